"""Padding: which rows of a hidden tensor are real, and which only fill a batch up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CROSS_ATTENTION = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}
_KEYS_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value"}  # in cross-attention these read the encoder's output


def padding_mask(batch: dict[str, Tensor], model: nn.Module, site_name: str, hidden: Tensor) -> Tensor | None:
    """Mask of the real rows of ``hidden``, the input or output of the module ``site_name``.

    Args:
        batch: what the model was called with.
        model: makes ``hidden`` of ``batch``.
        site_name: name of the module in ``model``.
        hidden: (B, T, ...) or flattened (B * T, D), channels last.

    Returns:
        (B, T) bool, (B * T,) for flattened rows, on the device of ``hidden``; None where nothing is padding or no mask
        of the batch speaks about these rows (images, pooled vectors, experts that see some of the tokens).
    """
    mask = _find(batch, model, site_name.split("."), hidden)
    if mask is None or bool(mask.all()):
        return None
    return mask.to(hidden.device)


def _find(batch: dict[str, Tensor], model: nn.Module, site: list[str], hidden: Tensor) -> Tensor | None:
    if hidden.dim() < 2 or ("pixel_values" in batch and _is_vision(site)):
        return None
    encoder, decoder = _encoder_mask(batch), _decoder_mask(batch, model)
    reads_encoder = _reads_encoder(site)
    masks = [m for m in ((encoder, decoder) if reads_encoder else (decoder, encoder)) if m is not None]
    for mask in masks:
        if hidden.dim() > 2 and hidden.shape[:2] == mask.shape:
            return mask
        if hidden.dim() == 2 and hidden.shape[0] == mask.numel():
            return mask.flatten()
    audio = "input_values" in batch or "input_features" in batch
    if audio and encoder is not None and (reads_encoder or "decoder" not in site):
        return _subsampled(encoder, model, hidden)
    return None


def _encoder_mask(batch: dict[str, Tensor]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _decoder_mask(batch: dict[str, Tensor], model: nn.Module) -> Tensor | None:
    """Mask of the decoder positions of an encoder-decoder; only its batches have them."""
    mask = batch.get("decoder_attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    if "decoder_input_ids" in batch:
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        real = batch["decoder_input_ids"] != (0 if pad is None else pad)
    elif "labels" in batch and batch["labels"].dim() == 2:
        real = batch["labels"] != -100
    else:
        return None
    # Only the trailing run is padding: T5 also starts with its pad token.
    real = real.flip(-1).cummax(-1).values.flip(-1)
    real[:, 0] = True
    return real


def _reads_encoder(site: list[str]) -> bool:
    if "decoder" in site:
        return bool(_CROSS_ATTENTION & set(site)) and site[-1] in _KEYS_VALUES
    return "encoder" in site


def _is_vision(site: list[str]) -> bool:
    return any(part.startswith(("vision", "visual", "image")) for part in site)


def _subsampled(mask: Tensor, model: nn.Module, hidden: Tensor) -> Tensor | None:
    """The mask over the samples or frames of audio, brought to the time steps of ``hidden``."""
    rows = mask.shape[0]
    if hidden.dim() == 2:
        steps = hidden.shape[0] // rows if hidden.shape[0] % rows == 0 else 0
    else:
        steps = hidden.shape[1] if hidden.shape[0] == rows else 0
    if steps < 1 or steps > mask.shape[1]:
        return None
    resampled = _by_model(mask, model, steps)
    if resampled is None:
        resampled = _by_kernels(mask, model, steps)
    if resampled is None:
        nearest = torch.arange(steps, device=mask.device) * mask.shape[1] // steps
        resampled = mask[:, nearest]
    return resampled.flatten() if hidden.dim() == 2 else resampled


def _by_model(mask: Tensor, model: nn.Module, steps: int) -> Tensor | None:
    """The model's own rule, where it is about this many steps: it knows the last feature extractor layer only."""
    owners = [module for module in model.modules() if hasattr(module, "_get_feature_vector_attention_mask")]
    for owner in owners:
        rule: Any = owner._get_feature_vector_attention_mask
        try:
            full, own = (rule(steps, m.long()).bool() for m in (torch.ones_like(mask), mask))
        except (IndexError, RuntimeError):  # fewer steps than it counts on
            continue
        if bool(full.all()):
            return own
    return None


def _by_kernels(mask: Tensor, model: nn.Module, steps: int) -> Tensor | None:
    """What layers before the last of a feature extractor make of a recording alone, where one has this many steps."""
    config, lengths = getattr(model, "config", None), mask.sum(1, keepdim=True)
    kernels, strides = (getattr(config, name, None) for name in ("conv_kernel", "conv_stride"))
    places = torch.arange(mask.shape[1], device=mask.device)
    if not (isinstance(kernels, tuple | list) and isinstance(strides, tuple | list)):
        return None
    if not torch.equal(mask, places < lengths):  # only what is padded on the right begins as it does alone
        return None
    length = mask.shape[1]
    for kernel, stride in zip(kernels, strides, strict=False):
        length, lengths = (length - kernel) // stride + 1, (lengths - kernel) // stride + 1
        if length == steps:
            return places[:steps] < lengths
    return None
