"""Packed rows back to numbers on the CPU: ``dequantize``, ``embedding`` and ``unpack``, the same bits as the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import group_width
from ..op_checks import check_indices, check_packed, check_weight
from . import native, reference
from .layout import check_state, readable
from .native import DTYPES, FORMAT_NUMBERS


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
    check_indices(indices, packed)
    check_weight(packed, scale, offset, weights, group_size, columns)
    rows = indices.to(torch.int64).contiguous()
    inside = rows.numel() and int(rows.min()) >= 0 and int(rows.max()) < packed.shape[0]
    if not inside or dtype not in DTYPES or not readable(packed, scale, offset):
        return reference.embedding(indices, packed, scale, offset, weights, group_size, columns, dtype)
    out = packed.new_empty((*indices.shape, columns), dtype=dtype)
    dequantize_into(out, rows, packed, scale, offset, weights, group_size, columns)
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
    dequantize_into(out, None, packed, scale, offset, weights, group_size, columns)
    return out


def dequantize_into(
    out: Tensor,
    rows: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
) -> None:
    """Write w_hat at ``rows`` (int64, None for all of them) into ``out``, contiguous; tensors must be readable."""
    state = native.loaded().cq_dequantize(
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
        native.path_number,
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
    native.loaded().cq_unpack(number, packed.data_ptr(), *sizes, codes.data_ptr(), torch.get_num_threads())
    return codes
