"""``conv`` on the CPU: few positions are a linear of their patches; many are convolved by torch with the float weight.

Patches cost K values a position to lay out, the float weight N * K to dequantize: where a layer has fewer positions
than about the rows of a cache, its weight is the larger part. Early layers of an image network have small weights and
many positions, and later ones the reverse.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import get_format
from ..op_checks import check_conv, check_input
from ..weight import quantize_activation
from . import activation, native
from .cpu_linear import linear
from .cpu_rows import dequantize, dequantize_into
from .layout import readable
from .patches import patches

# Positions of all inputs together up to which patches are faster; measured with the layers of ResNet-50.
MOST_POSITIONS = 256
MOST_HELD = (
    16 << 20
)  # bytes of float weight that a thread keeps the memory of: the largest layer of ResNet-50 is 9.4 MB

_held = threading.local()


def conv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    activations: str | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution of x_hat (B, C, *spatial) with w_hat (N, C / groups * prod(kernel_size)), zero padding."""
    check_conv(x, packed, scale, offset, weights, group_size, kernel_size, groups)
    check_input(x, bias, packed.shape[0], activations, input_scale)
    sides = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    spatial = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides]
    if groups == 1 and _few(x, math.prod(spatial), activations, input_scale, input_offset):
        rows = patches(x, kernel_size, stride, padding, dilation)
        out = linear(rows, packed, scale, offset, input_scale, input_offset, bias, weights, group_size, activations)
        maps = out.new_empty((x.shape[0], packed.shape[0], *spatial))  # no view: the caller may write into it
        maps.flatten(2).copy_(out.transpose(1, 2))
        return maps
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    shape = torch.Size((packed.shape[0], x.shape[1] // groups, *kernel_size))
    columns = shape[1:].numel()
    if shape.numel() and readable(packed, scale, offset):
        weight = _buffer(shape.numel(), x.dtype)
        dequantize_into(weight, None, packed, scale, offset, weights, group_size, columns)
    else:
        weight = dequantize(packed, scale, offset, weights, group_size, columns, x.dtype)
    function = torch.nn.functional.conv1d if len(kernel_size) == 1 else torch.nn.functional.conv2d
    bias = None if bias is None else bias.to(x.dtype)
    return function(x, weight.view(shape), bias, list(stride), list(padding), list(dilation), groups).contiguous()


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    """(size,) of ``dtype`` in memory that the thread keeps: new pages cost more time than the values in them."""
    nbytes = size * dtype.itemsize
    if nbytes > MOST_HELD:
        return torch.empty(size, dtype=dtype)
    held: Tensor | None = getattr(_held, "buffer", None)
    if held is None or held.numel() < nbytes:
        held = _held.buffer = torch.empty(nbytes, dtype=torch.uint8)
    return held[:nbytes].view(dtype)


def _few(x: Tensor, positions: int, activations: str | None, scale: Tensor | None, offset: Tensor | None) -> bool:
    """Whether patches are worth laying out, and mean the same: a range has to be one for all, with zero on a level."""
    count = x.shape[0] * positions
    if not 0 < count <= MOST_POSITIONS:
        return False
    if activations is None:
        return count * activation.DIGITS[x.dtype] < native.dense_from
    return (
        count < native.dense_from
        and scale is not None
        and activation.given_range(activations, scale, offset) is not None
    )
