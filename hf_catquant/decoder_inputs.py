"""Decoder inputs of encoder-decoder models whose samples have none: what the float model itself says, greedily.

Calibrating the decoder on its own continuation is the distribution it meets when it generates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .model_inputs import Row, forward_names

NEW_TOKENS = 32

logger = logging.getLogger(__name__)


def fill_decoder_inputs(batches: list[Row], model: nn.Module) -> list[Row]:
    """``batches``, with ``decoder_input_ids`` added where the model needs them and nothing stands for them.

    They are up to 32 tokens the model generates greedily. A model that cannot generate gets its start token alone,
    unless it makes decoder inputs by itself (BART classifiers: from ``input_ids``).
    """
    config = getattr(model, "config", None)
    given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" not in forward_names(model):
        return batches
    if any(given & batch.keys() for batch in batches):
        return batches
    start = _start_token(model)
    with _evaluating(model), torch.no_grad():
        if not callable(getattr(model, "generate", None)):
            if _runs(model, batches[0]):
                return batches
            return [_with_ids(batch, _start_column(batch, start)) for batch in batches]
        try:
            return [_with_ids(batch, _generate(model, batch, start)) for batch in batches]
        except Exception as error:
            logger.warning(
                "%s.generate failed, its decoder is calibrated on the start token alone: %s: pass samples with labels "
                "or decoder_input_ids to calibrate it on text",
                type(model).__name__,
                error,
            )
            return [_with_ids(batch, _start_column(batch, start)) for batch in batches]


def _generate(model: Any, batch: Row, start: int) -> Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
    ids = model.generate(**_placed(batch, model), **options).cpu().long()
    starts = bool((ids[:, 0] == start).all())  # Whisper cuts its start token off
    return ids if starts else torch.cat((_start_column(batch, start), ids), dim=1)


def _runs(model: nn.Module, batch: Row) -> bool:
    try:
        model(**_placed({key: tensor[:1] for key, tensor in batch.items()}, model))
    except Exception:
        return False
    return True


def _placed(batch: Row, model: nn.Module) -> Row:
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtypes = {key: reference.dtype if tensor.is_floating_point() else tensor.dtype for key, tensor in batch.items()}
    return {key: tensor.to(reference.device, dtypes[key]) for key, tensor in batch.items()}


def _with_ids(batch: Row, ids: Tensor) -> Row:
    return {**batch, "decoder_input_ids": ids}


def _start_column(batch: Row, start: int) -> Tensor:
    return torch.full((len(next(iter(batch.values()))), 1), start, dtype=torch.long)


def _start_token(model: nn.Module) -> int:
    configs = (getattr(model, "generation_config", None), getattr(model, "config", None))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    tokens = (getattr(config, name, None) for name in names for config in configs)
    return next((token for token in tokens if isinstance(token, int)), 0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
