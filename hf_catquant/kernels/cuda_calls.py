"""What each CUDA kernel is called with: tensors and numbers for the structs of ``csrc/``."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Format, get_format, group_count, group_width
from . import cuda_driver, cuda_table
from .cuda_compile import Unserved, Variant
from .cuda_layout import Layout, level_map

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # the constant TYPE of every kernel

# The struct that each kernel takes: pointers, then ints, then floats, rounded up to whole pointers as C does.
FORMS = {
    "product16": struct.Struct("7P7i2f0P"),
    "product8": struct.Struct("7P7i2f0P"),
    "gemm": struct.Struct("7P7i2f0P"),
    "sums": struct.Struct("2P3i0P"),
    "partials": struct.Struct("4P3i0P"),
    "rows": struct.Struct("3P2i2f0P"),
    "weight": struct.Struct("5P7i2f0P"),
    "cluster": struct.Struct("7P3i0P"),
}


def multiply(x: Tensor, layout: Layout, bias: Tensor | None, activations: str | None) -> Tensor:
    """x (M, K) times the weight in tiles, plus bias (N,) in the dtype of x: (M, N).

    Args:
        x: float16 or bfloat16, or any dtype together with ``activations``.
        layout: of the weight (N, K).
        bias: added before the one rounding.
        activations: an integer format that x is quantized to, with a range for every row; None: x as it is.

    Raises:
        Unserved: the kernel cannot be compiled or loaded.
    """
    dtype, tokens, device = x.dtype, x.shape[0], x.device
    out = x.new_empty(tokens, layout.rows)
    x, scale = layout.align(x), None
    columns = x.shape[1]
    if activations is not None:
        x, scale = quantize_rows(x, get_format(activations), layout.padded)
    plan = cuda_table.product(layout, tokens, TYPES[dtype], scale is not None, cuda_driver.processors(device))
    row_tiles = layout.tiles.shape[0]
    x_sums = _sum_runs(x, plan, scale is not None) if plan.runs else None
    made = out if plan.splits == 1 else out.new_empty(plan.splits, tokens, layout.rows, dtype=torch.float32)
    sizes = (tokens, layout.rows, columns, row_tiles, layout.chunks, layout.scales.shape[1], plan.splits)
    arguments = (layout.tiles, layout.scales, x, scale, x_sums, bias, made, *sizes, layout.level_step, layout.level_zero)
    _launch(plan.variant, device, plan.grid, plan.threads, arguments)
    if plan.splits > 1:
        adding = Variant("partials", (("TYPE", TYPES[dtype]),))
        grid = (-(-layout.rows // cuda_table.SUM_THREADS), tokens)
        sizes = (tokens, layout.rows, plan.splits)
        _launch(adding, device, grid, (cuda_table.SUM_THREADS, 1), (made, scale, bias, out, *sizes))
    return out


def _sum_runs(x: Tensor, plan: cuda_table.Launch, integer: bool) -> Tensor:
    """Sums of x (M, K) over runs of columns, as gemm reads them: (runs, M rounded up to 2) float32."""
    tokens, columns = x.shape
    made = torch.empty(plan.runs, tokens + tokens % 2, dtype=torch.float32, device=x.device)
    shared = dict(plan.variant.constants)
    constants = tuple((name, shared[name]) for name in (*cuda_table.NAMES, "INTEGER"))
    grid = (tokens, -(-plan.runs * 32 // cuda_table.SUM_THREADS))
    arguments = (x, made, tokens, columns, plan.runs)
    _launch(Variant("sums", constants), x.device, grid, (cuda_table.SUM_THREADS, 1), arguments)
    return made


def quantize_rows(x: Tensor, fmt: Format, padded: int) -> tuple[Tensor, Tensor]:
    """int8 codes (M, ``padded``) of x (M, K) in the order of an 8-bit product, and their scales (M,) float32."""
    tokens, columns = x.shape
    codes = torch.empty(tokens, padded, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    variant = Variant("rows", (("TYPE", TYPES[x.dtype]), ("AFFINE", int(fmt.affine))))
    arguments = (x, codes, scale, columns, padded, fmt.levels[0], fmt.levels[-1])
    _launch(variant, x.device, (tokens, 1), (cuda_table.ROW_THREADS, 1), arguments)
    return codes, scale


def dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """x (M, K) times w_hat (N, K), dequantized a piece at a time: (M, N)."""
    rows, columns = packed.shape[0], x.shape[1]
    at_once = max(64, cuda_table.DENSE_BYTES // (columns * x.element_size()) // 64 * 64)
    if rows <= at_once:
        return F.linear(x, expand(packed, scale, offset, weights, group_size, columns, x.dtype), bias)
    out = x.new_empty(x.shape[0], rows)
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        some = None if offset is None else offset[part]
        weight = expand(packed[part], scale[part], some, weights, group_size, columns, x.dtype)
        if bias is None:
            torch.mm(x, weight.T, out=out[:, part])
        else:
            torch.addmm(bias[part], x, weight.T, out=out[:, part])
    return out


def expand(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:
    """w_hat (N, ``columns``), or its rows at ``index`` (R,) int32 or int64, in ``dtype``.

    Raises:
        Unserved: of the dtype or the format there is no kernel.
    """
    fmt = get_format(weights)
    if dtype not in TYPES:
        raise Unserved(f"dequantize writes {', '.join(map(str, TYPES))}, not {dtype}")
    width = group_width(columns, group_size)
    rows = packed.shape[0] if index is None else index.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    constants = (
        ("RADIX", fmt.radix),
        ("DIGITS", fmt.digits),
        ("NBYTES", fmt.nbytes),
        ("SCALE32", int(scale.dtype == torch.float32)),
        ("TYPE", TYPES[dtype]),
        ("INDEX", 0 if index is None else 8 * index.element_size()),
    )
    packed, scale = packed.contiguous(), scale.contiguous()
    offset = None if offset is None else offset.to(scale.dtype).contiguous()
    index = None if index is None else index.contiguous()
    numbers = (rows, columns, *packed.shape, width, fmt.packed_len(width), group_count(columns, group_size))
    threads = cuda_table.WEIGHT_THREADS
    grid = (-(-rows * -(-columns // 8) // threads), 1)
    arguments = (packed, scale, offset, index, out, *numbers, *level_map(fmt))
    _launch(Variant("weight", constants), packed.device, grid, (threads, 1), arguments)
    return out


def correct(y: Tensor, basis: Tensor | None, centroids: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """gamma[c] * y + beta[c] for y (..., D), c the nearest of the centroids (C, P) to y @ basis (D, P), or to y.

    Raises:
        Unserved: of the dtype there is no kernel.
    """
    if y.dtype not in TYPES:
        raise Unserved(f"cluster_affine takes {', '.join(map(str, TYPES))}, not {y.dtype}")
    width, rank = y.shape[-1], centroids.shape[1]
    rows = y.reshape(-1, width).contiguous()
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not out.numel():
        return out
    inside = (
        rows.shape[0] <= cuda_table.PROJECT_ROWS
        and width <= cuda_table.PROJECT_WIDTH
        and rank <= cuda_table.PROJECT_RANK
    )
    held = [t.float().contiguous() for t in (centroids, gamma, beta)]
    basis = None if basis is None else basis.float().contiguous()
    projected = None if basis is None or inside else rows.float() @ basis
    project = basis is not None and inside
    variant = Variant("cluster", (("TYPE", TYPES[y.dtype]), ("PROJECT", int(project))))
    arguments = (rows, basis if project else None, projected, *held, out, width, rank, len(centroids))
    _launch(variant, y.device, (rows.shape[0], 1), (cuda_table.CLUSTER_THREADS, 1), arguments)
    return out


def _launch(
    variant: Variant, device: torch.device, grid: tuple[int, int], block: tuple[int, int], arguments: tuple[Any, ...]
) -> None:
    cuda_driver.launch(variant, device, grid, block, FORMS[variant.source], arguments)
