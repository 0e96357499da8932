"""Ops on the CPU by the compiled library: products of packed weights, and packed rows back to numbers.

Products are sums of integers, exact, of the codes of a weight with digits of x (``csrc/catquant.h``). What the library
does not serve (values that are not finite, ranges that put zero between levels, and on processors where that is
faster, many rows) is computed from float weights, a run of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format, group_width
from ..log import logger
from ..op_checks import check_conv, check_indices, check_input, check_packed, check_weight
from ..weight import quantize_activation
from . import activation, native, reference
from .layout import check_state, layout_of, readable
from .native import DTYPES, FORMAT_NUMBERS, PATHS

PATH = native.chosen_path()
# Rows of x, times digits, from which float products of dequantized weights are faster; measured by
# benchmarks/cpu_kernels.py.
DENSE_FROM = {"amx": 1 << 62, "avx512": 1 << 62, "avx2": 64, "neon": 64, "scalar": 12, "reference": 0}
DENSE_VALUES = 1 << 18  # values of the weight that are dequantized at once: 1 MiB, which stays in a second-level cache

_library: Any = native.library()
_path = PATHS.get(PATH, -1)
_dense_from = DENSE_FROM[PATH]


def linear(*arguments: Any) -> Tensor:
    """x_hat (..., K) times w_hat (N, K) transposed, plus bias (N,): (..., N) in the dtype of x."""
    out = _integer_linear(*arguments)
    return _float_linear(*arguments) if out is None else out


def _integer_linear(
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
) -> Tensor | None:
    """The product in integers, None if the library does not serve it."""
    columns, rows, dtype = x.shape[-1], packed.shape[0], DTYPES.get(x.dtype)
    if dtype is None or not x.numel() or not (bias is None or _readable_bias(bias, rows)):
        return None
    if input_scale is None:
        how = activation.row_range(activations, x.dtype)
    else:
        how = None if activations is None else activation.given_range(activations, input_scale, input_offset)
    count = x.numel() // columns
    if how is None or count * how.digits >= _dense_from:
        return None
    address = layout_of(packed, scale, offset, weights, group_size, columns)
    if address is None:
        return None
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], rows))
    shift = (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    state = _library.cq_linear(
        address,
        how.address,
        x.data_ptr(),
        count,
        columns,
        dtype,
        *shift,
        out.data_ptr(),
        _path,
        torch.get_num_threads(),
    )
    check_state(state)
    return out if state == native.OK else None


def _readable_bias(bias: Tensor, rows: int) -> bool:
    return bias.dtype in DTYPES and bias.shape == (rows,) and bias.is_contiguous()


def _float_linear(
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
) -> Tensor:
    """The reference's product in float32, from ``DENSE_VALUES`` float weights at a time."""
    columns, rows = x.shape[-1], packed.shape[0]
    check_weight(packed, scale, offset, weights, group_size, columns)
    check_input(x, bias, rows, activations, input_scale)
    wide, shift = x.float(), None if bias is None else bias.float()
    if activations is not None:
        wide = quantize_activation(wide, get_format(activations), input_scale, input_offset)
    out = x.new_empty((*x.shape[:-1], rows))
    step = max(16, DENSE_VALUES // max(columns, 1))
    for start in range(0, rows, step):
        run = slice(start, start + step)
        part = (packed[run], scale[run], None if offset is None else offset[run])
        weight = dequantize(*part, weights, group_size, columns, torch.float32)
        out[..., run] = torch.nn.functional.linear(wide, weight, None if shift is None else shift[run])
    return out


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
    """Convolution of x_hat (B, C, *spatial) with w_hat (N, C / groups * prod(kernel_size)), zero padding.

    A kernel of one position is a linear of every position; others dequantize the weight and convolve as torch does.
    """
    check_conv(x, packed, scale, offset, weights, group_size, kernel_size, groups)
    check_input(x, bias, packed.shape[0], activations, input_scale)
    pointwise = groups == 1 and {*kernel_size, *stride} == {1} and set(padding) == {0}
    if pointwise and (activations is None or input_scale is not None):
        rows = x.movedim(1, -1)
        out = linear(rows, packed, scale, offset, input_scale, input_offset, bias, weights, group_size, activations)
        return out.movedim(-1, 1).contiguous()
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    shape = torch.Size((packed.shape[0], x.shape[1] // groups, *kernel_size))
    weight = dequantize(packed, scale, offset, weights, group_size, shape[1:].numel(), x.dtype).view(shape)
    function = torch.nn.functional.conv1d if len(kernel_size) == 1 else torch.nn.functional.conv2d
    bias = None if bias is None else bias.to(x.dtype)
    return function(x, weight, bias, list(stride), list(padding), list(dilation), groups).contiguous()


def embedding(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of w_hat (N, ``columns``) at ``indices`` (...): (..., ``columns``); only those rows are unpacked."""
    check_indices(indices)
    check_weight(packed, scale, offset, weights, group_size, columns)
    rows = indices.to(torch.int64).contiguous()
    inside = rows.numel() and int(rows.min()) >= 0 and int(rows.max()) < packed.shape[0]
    if not inside or dtype not in DTYPES or not readable(packed, scale, offset):
        return reference.embedding(indices, packed, scale, offset, weights, group_size, columns, dtype)
    out = packed.new_empty((*indices.shape, columns), dtype=dtype)
    _dequantize_into(out, rows, packed, scale, offset, weights, group_size, columns)
    return out


def dequantize(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """w_hat (N, ``columns``) in ``dtype``."""
    check_weight(packed, scale, offset, weights, group_size, columns)
    if dtype not in DTYPES or not readable(packed, scale, offset):
        return reference.dequantize(packed, scale, offset, weights, group_size, columns, dtype)
    out = packed.new_empty((packed.shape[0], columns), dtype=dtype)
    _dequantize_into(out, None, packed, scale, offset, weights, group_size, columns)
    return out


def _dequantize_into(
    out: Tensor,
    rows: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
) -> None:
    state = _library.cq_dequantize(
        FORMAT_NUMBERS[weights],
        packed.data_ptr(),
        packed.shape[1],
        scale.data_ptr(),
        None if offset is None else offset.data_ptr(),
        int(scale.dtype == torch.float32),
        None if rows is None else rows.data_ptr(),
        out.numel() // columns,
        columns,
        group_width(columns, group_size),
        out.data_ptr(),
        DTYPES[out.dtype],
        _path,
        torch.get_num_threads(),
    )
    check_state(state)


def unpack(packed: Tensor, weights: str, group_size: int, columns: int) -> Tensor:
    """Codes (N, ``columns``) uint8."""
    check_packed(packed, weights, group_size, columns)
    if not packed.numel() or not packed.is_contiguous():
        return reference.unpack(packed, weights, group_size, columns)
    codes = packed.new_empty((packed.shape[0], columns))
    number, width = FORMAT_NUMBERS[weights], group_width(columns, group_size)
    sizes = (packed.shape[1], packed.shape[0], columns, width)
    _library.cq_unpack(number, packed.data_ptr(), *sizes, codes.data_ptr(), torch.get_num_threads())
    return codes


@cache
def _say_that_there_is_no_library() -> None:
    logger.warning(
        "hf_catquant was installed without its CPU kernels and computes with plain torch, slower: "
        "install it again with a C compiler"
    )


def _without_library(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(kernel)
    def call(*arguments: Any) -> Tensor:
        _say_that_there_is_no_library()
        return kernel(*arguments)

    return call


KERNELS = (linear, conv, embedding, dequantize, unpack)
for _kernel in KERNELS:
    if PATH != "reference":
        torch.library.register_kernel(f"catquant::{_kernel.__name__}", "cpu", _kernel)
    elif _library is None:
        _plain = getattr(reference, _kernel.__name__)
        torch.library.register_kernel(f"catquant::{_kernel.__name__}", "cpu", _without_library(_plain))
