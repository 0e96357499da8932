"""Calibration samples that a language model writes itself: text of its own distribution, as much as one likes.

The idea of LLM-QAT (arXiv 2305.17888). Low-bit models learn from data, and a few hundred texts are few: what the float model
samples is the text that the quantized one shall continue in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .request_checks import check_count, check_seed

Sample = dict[str, Tensor]


@torch.no_grad()
def generate_samples(
    model: PreTrainedModel, num_samples: int, *, length: int = 256, batch_size: int = 32, seed: int = 0
) -> list[Sample]:
    """Texts that the float ``model`` samples at temperature 1 from its start token, ready for ``dataset=``.

    Args:
        model: a causal language model; it is not changed.
        num_samples: how many texts.
        length: tokens of each at most, the start token included; a text ends at its end token.
        batch_size: texts that are sampled at once.
        seed: of the sampling; no global generator moves.

    Returns:
        Dicts of ``input_ids`` and ``attention_mask`` (T,) int64 on the CPU, T at least 2 and at most ``length``.

    Raises:
        ValueError: the model continues no text from a start token (it has none, has an encoder, or generates nothing), or a
            number breaks its rule.
    """
    start = _start_token(model)
    for name, value, least in (("num_samples", num_samples, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        check_count(name, value, least)
    check_seed("seed", seed)
    was_training = model.training
    model.eval()
    rows: list[Sample] = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            while len(rows) < num_samples:
                prompt = torch.full((min(batch_size, num_samples - len(rows)), 1), start, device=model.device)
                rows += [_until_end(text, model) for text in _sampled(model, prompt, length)]
    finally:
        model.train(was_training)
    return rows


def _start_token(model: Any) -> int:
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} does not write text from nothing: only causal language models do")
    token = config.bos_token_id if config.bos_token_id is not None else model.config.get_text_config().bos_token_id
    if not isinstance(token, int):
        raise ValueError(f"{type(model).__name__} has no start token: set model.generation_config.bos_token_id")
    return token


def _sampled(model: Any, prompt: Tensor, length: int) -> Tensor:
    ends = _ends(model)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        pad_token_id=ends[0] if ends else 0,
    )


def _ends(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else list(found or ())


def _until_end(text: Tensor, model: Any) -> Sample:
    """One text up to and with its first end token; what generation filled up with is cut off."""
    ends = torch.isin(text[1:], torch.tensor(_ends(model), dtype=text.dtype, device=text.device)).nonzero()
    kept = text[: int(ends[0]) + 2] if len(ends) else text
    ids = kept.cpu()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
