"""``conv`` on the CPU: sums of integers where that takes less time, else torch's own with the float weight.

Laying out the K values of a position costs about as much as multiplying them by some tens of channels, and the float
weight N * K values to dequantize. So layers with few channels are convolved by torch, and those with many in integers, by
the library, which reads the input where it lies: what each would take says which (``native.ConvCosts``). Where that was
not measured, few positions become a linear of patches.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import get_format
from ..op_checks import check_conv, check_input
from ..weight import quantize_activation
from . import activation, native
from .cpu_linear import linear, readable_bias
from .cpu_rows import dequantize, dequantize_into
from .layout import check_state, layout_of, readable
from .native import DTYPES
from .patches import patches

# Positions of all inputs together up to which patches are faster; measured with the layers of ResNet-50.
MOST_POSITIONS = 256
# Bytes of float weight that a thread keeps the memory of: the largest layer of ResNet-50 is 9.4 MB.
MOST_HELD = 16 << 20
LEAST_PRODUCTS = 1 << 21  # of a value and a weight: with fewer, starting oneDNN takes longer than it spares
MOST_PLANS = 4096

_held = threading.local()


class _Plan(NamedTuple):
    """What the shapes of a call decide, once they were checked: a small layer would feel that at every call."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    weight: torch.Size
    out: torch.Size
    columns: int
    window: native.Window


_plans: dict[Any, _Plan] = {}


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
    geometry = (kernel_size, stride, padding, dilation, groups)
    plan = _plan_of(x, packed, scale, offset, input_scale, bias, weights, group_size, activations, *geometry)
    if x.dtype == torch.float64:
        shift = None if bias is None else bias.float()
        stored = (packed, scale, offset, input_scale, input_offset, shift, weights, group_size, activations)
        return conv(x.float(), *stored, *geometry).double()
    arguments = (packed, scale, offset, input_scale, input_offset, bias, weights, group_size, activations)
    if groups == 1:
        found = _integer_conv(x, *arguments, plan)
        if found is not None:
            return found
    if groups == 1 and _few(x, math.prod(plan.out[2:]), activations, input_scale, input_offset):
        rows = patches(x, kernel_size, stride, padding, dilation)
        out = linear(rows, *arguments)
        maps = out.new_empty(plan.out)  # no view: the caller may write into it
        maps.flatten(2).copy_(out.transpose(1, 2))
        return maps
    dtype = x.dtype
    if x.element_size() == 2 and not native.has_half_convolutions:
        x = x.float()
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    if plan.weight.numel() and readable(packed, scale, offset):
        weight = _buffer(plan.weight.numel(), x.dtype)
        dequantize_into(weight, None, packed, scale, offset, weights, group_size, plan.columns)
    else:
        weight = dequantize(packed, scale, offset, weights, group_size, plan.columns, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    steps = (plan.stride, plan.padding, plan.dilation)
    return _float_conv(x, weight.view(plan.weight), bias, *steps, groups).contiguous().to(dtype)


def _plan_of(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    activations: str | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> _Plan:
    """The plan of such tensors, made and kept if there is none.

    Raises:
        RuntimeError: they do not agree with each other, as :mod:`..op_checks` says, or x is smaller than the kernel.
    """
    tensors = (x, packed, scale, offset, bias)
    kinds = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)
    geometry = tuple(tuple(values) for values in (kernel_size, stride, padding, dilation))
    key = (kinds, input_scale is None, weights, group_size, activations, geometry, groups)
    plan = _plans.get(key)
    if plan is not None:
        return plan
    check_conv(x, packed, scale, offset, weights, group_size, kernel_size, groups)
    check_input(x, packed, bias, activations, input_scale)
    sides = zip(x.shape[2:], *geometry, strict=True)
    spatial = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides]
    torch._check(
        min(spatial) > 0,
        lambda: (
            f"x of {tuple(x.shape[2:])} with padding {tuple(padding)} is smaller than a kernel of {tuple(kernel_size)} "
            f"with dilation {tuple(dilation)}: pass a larger input"
        ),
    )
    shape = torch.Size((packed.shape[0], x.shape[1] // groups, *kernel_size))
    sizes = (_sides(x.shape[2:], 1), _sides(spatial, 1), _sides(kernel_size, 1))
    steps = (_sides(stride, 1), _sides(padding, 0), _sides(dilation, 1))
    window = native.Window(*x.shape[:2], *(side for pair in (*sizes, *steps) for side in pair))
    out = torch.Size((x.shape[0], packed.shape[0], *spatial))
    plan = _Plan(list(stride), list(padding), list(dilation), shape, out, shape[1:].numel(), window)
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _float_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Torch's convolution. By itself torch calls oneDNN for no kernel of one place on one thread, nor for one small input,
    and its own way takes up to twice as long (ResNet-50).
    """
    products = x.numel() // max(1, x.shape[1]) * weight.numel() // math.prod(stride)
    if x.dtype == torch.float32 and products >= LEAST_PRODUCTS and _has_onednn():
        x = x.contiguous()
        if len(stride) == 2:
            return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        sizes = ([0, *padding], [1, *stride], [1, *dilation])
        return torch.mkldnn_convolution(x.unsqueeze(2), weight.unsqueeze(2), bias, *sizes, groups).squeeze(2)
    function = torch.nn.functional.conv1d if len(stride) == 1 else torch.nn.functional.conv2d
    return function(x, weight, bias, stride, padding, dilation, groups)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _integer_conv(
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
    plan: _Plan,
) -> Tensor | None:
    """The convolution in integers, None if the library does not serve it or float weights are faster."""
    dtype = DTYPES.get(x.dtype)
    if dtype is None or not plan.out.numel() or not (bias is None or readable_bias(bias, packed.shape[0])):
        return None
    how = activation.row_range(None, x.dtype)
    if activations is not None:  # a range has to be one for all, with zero, which is around x, on a level
        how = None if input_scale is None else activation.given_range(activations, input_scale, input_offset)
    if how is None or not _integers_pay(x, how.digits, plan):
        return None
    address = layout_of(packed, scale, offset, weights, group_size, plan.columns)
    if address is None:
        return None
    x, out = x.contiguous(), x.new_empty(plan.out)
    state = native.loaded().cq_conv(
        address,
        how.address,
        ctypes.addressof(plan.window),
        x.data_ptr(),
        dtype,
        *((None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])),
        out.data_ptr(),
        native.path_number,
        torch.get_num_threads(),
    )
    check_state(state)
    return out if state == native.OK else None


def _integers_pay(x: Tensor, digits: int, plan: _Plan) -> bool:
    """Whether integers take less time for x than the float weight."""
    costs = native.conv_costs
    if costs is None:
        return False
    rows, columns = plan.out[1], plan.columns
    positions, places = plan.out.numel() // rows, plan.weight[2:].numel()
    integers = costs.pack[digits - 1] * columns + costs.place * places + costs.store * rows
    integers += costs.product * digits * rows * columns
    floats = positions * costs.floats[x.dtype == torch.bfloat16] + costs.dequantize
    quantize = costs.quantize * x.numel() if digits == 1 else 0
    return positions * integers < rows * columns * floats + quantize


def _sides(values: Sequence[int], first: int) -> tuple[int, ...]:
    """Of two dimensions; a convolution over time has one line."""
    return (first, *values) if len(values) == 1 else tuple(values)


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
    if native.conv_costs is not None or not 0 < count <= MOST_POSITIONS:
        return False
    if activations is None:
        return count * activation.DIGITS[x.dtype] < native.dense_from
    return (
        count < native.dense_from
        and scale is not None
        and activation.given_range(activations, scale, offset) is not None
    )
