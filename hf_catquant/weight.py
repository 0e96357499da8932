"""The equation: quantized weights back to numbers, and numbers through an activation format.

w_hat[n, k] = scale[n, g] * level[code[n, k]] + offset[n, g]        g = k // group_size
x_hat[m, k] = scale[m]    * level[code[m, k]] + offset[m]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formats import Format, group_count, group_width
from .packing import unpack_levels


class QuantizedWeight(NamedTuple):
    """What a solver finds for a matrix (N, K) with G groups a row.

    Attributes:
        codes: (N, K) uint8.
        scale: (N, G) float32.
        offset: (N, G) float32, or None where the format is not affine.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None


def expand_groups(values: Tensor, columns: int, group_size: int) -> Tensor:
    """Repeat per-group values (..., G) over their columns: (..., ``columns``)."""
    return values.repeat_interleave(group_width(columns, group_size), dim=-1)[..., :columns]


def dequantize(weight: QuantizedWeight, fmt: Format, group_size: int) -> Tensor:
    """w_hat (N, K) float32 of unpacked codes."""
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=weight.codes.device)[weight.codes.long()]
    return _affine(levels, weight.scale.float(), None if weight.offset is None else weight.offset.float(), group_size)


def dequantize_packed(
    packed: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format, group_size: int, columns: int
) -> Tensor:
    """w_hat (N, ``columns``) float32 of packed codes (N, packed_width) uint8."""
    levels = unpack_levels(packed, fmt, group_size, columns)
    return _affine(levels, scale.float(), None if offset is None else offset.float(), group_size)


def _affine(levels: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    rows, columns = levels.shape
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    if groups * width == columns:  # broadcast over whole groups: no (N, K) copies of scale and offset
        grouped = levels.view(rows, groups, width) * scale.unsqueeze(-1)
        return (grouped if offset is None else grouped + offset.unsqueeze(-1)).view(rows, columns)
    values = levels * expand_groups(scale, columns, group_size)
    return values if offset is None else values + expand_groups(offset, columns, group_size)


def storage_dtype(scale: Tensor, offset: Tensor | None = None) -> torch.dtype:
    """float16 if it holds scale (N, G) and offset (N, G) to its usual 11 bits, else float32.

    float16 goes up to 65504 and loses bits below 6.1e-5. A scale of an unusually small or large weight does not fit, and
    is then stored in float32 instead of being rounded away. Offsets need no more precision than a step of their group;
    scales below a millionth of the largest one move no output that matters.
    """
    if not scale.numel():
        return torch.float16
    size = scale.abs().float()
    matters = size > float(size.max()) * 2**-20
    lost = (size - size.half().float()).abs() > size * 2**-10
    bad = lost & matters
    if offset is not None:
        reach = torch.maximum(size, offset.abs().float())
        bad |= ((offset.float() - offset.half().float()).abs() > reach * 2**-10) & (
            reach > float(reach.max()) * 2**-20
        )
    return torch.float32 if bool(bad.any()) else torch.float16


def quantize_activation(x: Tensor, fmt: Format, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """x_hat, in the shape and dtype of ``x``.

    Args:
        x: (..., K) float.
        fmt: an integer format.
        scale: () float32 of a calibrated static range, or None: a range for each row of the last dimension.
        offset: () float32, with ``scale`` of an affine format only.
    """
    values = x.float()
    if scale is None:
        scale, offset = dynamic_range(values, fmt)
    # In place from here on: of a large input, new memory costs more than the arithmetic.
    codes = values / scale if offset is None else (values - offset).div_(scale)
    codes.round_().clamp_(fmt.levels[0], fmt.levels[-1]).mul_(scale)
    return (codes if offset is None else codes.add_(offset)).to(x.dtype)


def dynamic_range(values: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and offset (..., 1) that just hold each row of ``values`` (..., K) float32."""
    if not fmt.affine:
        return _positive(values.abs().amax(-1, keepdim=True) / fmt.levels[-1]), None
    return affine_range(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), fmt)


def affine_range(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset that spread the levels over [low, high] widened to hold 0, with 0 itself on a level.

    Zero stays exact because convolutions pad with it and ReLU makes half of all values equal to it.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / (fmt.levels[-1] - fmt.levels[0]))
    zero_level = (fmt.levels[0] - low / scale).round()
    return scale, -zero_level * scale


def fit_static_range(sample: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and offset () float32 of least squared error on a 1-D ``sample`` of activations.

    Clipping the tails is searched over 60 shrink factors of the observed range; values that never go below zero (after
    a ReLU) get all levels for the positive side.
    """
    sample = sample.float().flatten()
    low, high = sample.min(), sample.max()
    best: tuple[float, Tensor, Tensor | None] | None = None
    for shrink in torch.linspace(1.0, 0.05, 60).tolist():
        if fmt.affine:
            scale, offset = affine_range(low * shrink, high * shrink, fmt)
        else:
            scale, offset = _positive(torch.maximum(-low, high) * shrink / fmt.levels[-1]), None
        error = float((quantize_activation(sample, fmt, scale, offset) - sample).square().mean())
        if best is None or error < best[0]:
            best = (error, scale, offset)
    assert best is not None
    return best[1], best[2]


def _positive(scale: Tensor) -> Tensor:
    # An all-zero row has no scale; any positive one maps it to zero.
    return torch.where(scale > 0, scale, torch.ones_like(scale))
