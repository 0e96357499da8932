"""An example of what a model's forward takes, from its config and processor, and which of its sizes are free."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model_inputs import ModelInputs, text_config
from ..tasks import load_processor

Example = tuple[dict[str, Tensor], dict[str, dict[int, str]]]
_ROWS, _TOKENS, _SECOND = 2, 12, 16_000  # not 1, which torch.export would take for a size that never changes


def example_inputs(model: Any, source: str | None) -> Example:
    """Two samples, and names of the sizes that another call may change, by input and dimension.

    Texts are free in number and length; images, spectrograms and waveforms (one second) in number.

    Args:
        model: a transformers model.
        source: the folder or Hub id it came from, for the size of images where the config has none.

    Raises:
        ValueError: it reads something else, or more than one input.
    """
    config, inputs = model.config, ModelInputs.of(model)
    key = model.main_input_name
    if getattr(config, "is_encoder_decoder", False) or {"input_ids", "pixel_values"} <= set(inputs.names):
        raise ValueError(_unknown(model, f"{type(model).__name__} takes several inputs"))
    if key == "input_ids":
        return _texts(inputs, text_config(config))
    draw = torch.Generator().manual_seed(0)
    if key == "pixel_values" and "pixel_values" in inputs.names:
        vision = getattr(config, "vision_config", config)
        shape: tuple[int, ...] = (getattr(vision, "num_channels", 3), *_image_size(model, source))
    elif key == "input_values" and inputs.mel_bins is None:
        shape = (_SECOND,)
    elif key == "input_values" and isinstance(getattr(config, "max_length", None), int):
        shape = (config.max_length, inputs.mel_bins or 0)
    else:
        raise ValueError(_unknown(model, f"its config does not say what {key} looks like"))
    return {key: torch.randn(_ROWS, *shape, generator=draw)}, {key: {0: "batch"}}


def _texts(inputs: ModelInputs, config: Any) -> Example:
    # No padding: some models count positions by it. One token more than the last special one that most vocabularies have.
    first = min(1000, inputs.vocab_size // 2) if inputs.vocab_size else 5
    ids = (torch.arange(_ROWS * _TOKENS) % max(1, (inputs.vocab_size or 100) - first) + first).view(_ROWS, _TOKENS)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    kept = {name: value for name, value in found.items() if name in inputs.names}
    return kept, {name: {0: "batch", 1: "tokens"} for name in kept}


def _image_size(model: Any, source: str | None) -> tuple[int, int]:
    size = getattr(model.config, "image_size", None)
    if size is None and source is not None:
        processor = load_processor(source)
        blank = np.zeros((320, 320, 3), np.uint8)
        size = (
            None
            if processor is None
            else tuple(processor(images=blank, return_tensors="pt")["pixel_values"].shape[-2:])
        )
    if size is None:
        raise ValueError(_unknown(model, "neither its config nor a processor says how large images are"))
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unknown(model: Any, why: str) -> str:
    return (
        f"there is no example input for {type(model).__name__}: {why}. Call "
        "hf_catquant.exports.export_onnx(model, path, kwargs={...}) with one"
    )
