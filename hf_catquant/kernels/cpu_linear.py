"""``linear`` on the CPU: sums of integers, exact, of the codes of a weight with digits of x (``csrc/catquant.h``).

Where integers have no instruction of their own, many rows of floats are faster: the library multiplies them by weights that
it dequantizes a few columns at a time. What it does not serve (values that are not finite, ranges that put zero between
levels, and on paths without such products many rows) is multiplied in float32 with float weights, a run of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..op_checks import check_input, check_weight
from ..weight import quantize_activation
from . import activation, native
from .cpu_rows import dequantize
from .layout import check_state, layout_of
from .native import DTYPES

DENSE_VALUES = 1 << 18  # values of the weight that are dequantized at once: 1 MiB, which stays in a second-level cache


def linear(*arguments: Any) -> Tensor:
    """x_hat (..., K) times w_hat (N, K) transposed, plus bias (N,): (..., N) in the dtype of x."""
    out = _library_linear(*arguments)
    return _float_linear(*arguments) if out is None else out


def _library_linear(
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
    """The product by the library, None if it does not serve it."""
    columns, rows, dtype = x.shape[-1], packed.shape[0], DTYPES.get(x.dtype)
    if dtype is None or not x.numel() or not (bias is None or readable_bias(bias, rows)):
        return None
    if input_scale is None:
        how = activation.row_range(activations, x.dtype)
    else:
        how = None if activations is None else activation.given_range(activations, input_scale, input_offset)
    count = x.numel() // columns
    if how is None or count * how.digits >= native.dense_from:
        return None
    address = layout_of(packed, scale, offset, weights, group_size, columns)
    if address is None:
        return None
    x, library = x.contiguous(), native.loaded()
    out = x.new_empty((*x.shape[:-1], rows))
    shift = (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    state = library.cq_linear(
        address,
        how.address,
        x.data_ptr(),
        count,
        columns,
        dtype,
        *shift,
        out.data_ptr(),
        native.path_number,
        torch.get_num_threads(),
    )
    check_state(state)
    return out if state == native.OK else None


def readable_bias(bias: Tensor, rows: int) -> bool:
    """Whether the library can add it where it lies."""
    return bias.is_cpu and bias.dtype in DTYPES and bias.shape == (rows,) and bias.is_contiguous()


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
    check_input(x, packed, bias, activations, input_scale)
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
