"""What each CUDA kernel is called with: tensors and numbers for the structs of ``csrc/``."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format, group_count, group_width
from ..rotation import block_size
from . import cuda_driver, cuda_table
from .cuda_compile import Unserved, Variant
from .cuda_layout import Layout, aligned, held_scale, level_map

MOST_THREADS = 1024  # of a block
MOST_BLOCKS = (2**31 - 1, 65535)  # along x and y
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # the constant TYPE of every kernel

# The struct that each kernel takes: pointers, then ints, then floats, rounded up to whole pointers as C does.
FORMS = {
    "product16": struct.Struct("7P7i2f0P"),
    "product8": struct.Struct("7P7i2f0P"),
    "split8": struct.Struct("7P7i2f0P"),
    "gemm": struct.Struct("7P7i2f0P"),
    "wgemm": struct.Struct("7P7i2f0P"),
    "wdense": struct.Struct("7P7i2f0P"),
    "arrange": struct.Struct("3P2i2f0P"),
    "sums": struct.Struct("2P3i0P"),
    "partials": struct.Struct("4P3i0P"),
    "rows": struct.Struct("3P2i2f0P"),
    "weight": struct.Struct("5P7i2f0P"),
    "untile": struct.Struct("7P7i2f0P"),
    "rotate": struct.Struct("2P3i1f0P"),
    "cluster": struct.Struct("7P3i0P"),
}


def dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    bias: Tensor | None,
    layout: Layout | None = None,
) -> Tensor:
    """x (..., K) times w_hat (N, K), dequantized a piece at a time, from its tiles where there are some: (..., N)."""
    rows, columns = packed.shape[0], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], rows)
    x = x.reshape(-1, columns)
    if layout is not None and layout.spread is None:
        x = layout.align(x)
    else:
        layout = None

    def piece(first: int, last: int) -> Tensor:
        if layout is not None:
            return untile(layout, first // 16, -(-last // 16), x.dtype)
        some = None if offset is None else offset[first:last]
        return expand(packed[first:last], scale[first:last], some, weights, group_size, columns, x.dtype)

    at_once = max(64, cuda_table.DENSE_BYTES // (columns * x.element_size()) // 64 * 64)
    for first in range(0, rows, at_once):
        last = min(first + at_once, rows)
        weight = piece(first, last)
        if bias is None:
            torch.mm(x, weight.T, out=out.view(-1, rows)[:, first:last])
        else:
            torch.addmm(bias[first:last], x, weight.T, out=out.view(-1, rows)[:, first:last])
    return out


def untile(layout: Layout, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """w_hat of the row tiles from ``first`` up to ``last``, in ``dtype``, as wide as ``layout.align`` makes x."""
    count = last - first
    rows = min(layout.rows - 16 * first, 16 * count)
    columns = layout.columns + -layout.columns % 8
    out = torch.empty(rows, columns, dtype=dtype, device=layout.tiles.device)
    constants = (layout.bits, layout.group_steps, int(layout.scales.element_size() == 4), TYPES[dtype], 1, 1)
    variant = Variant("untile", tuple(zip(cuda_table.NAMES, (*constants, cuda_table.UNTILE_WARPS), strict=True)))
    sizes = (1, rows, columns, count, layout.chunks, layout.scales.shape[1], 1)
    zero = layout.level_zero - (128 * layout.level_step if layout.bits == 8 else 0)
    tensors = (layout.tiles[first:last], layout.scales[first:last], None, None, None, None, out)
    grid = (count, -(-layout.chunks // cuda_table.UNTILE_WARPS))
    _launch(variant, out.device, grid, (32, cuda_table.UNTILE_WARPS), (*tensors, *sizes, layout.level_step, zero))
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
    fmt, scale = get_format(weights), held_scale(scale)
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
    if rows * -(-columns // 8) >= 2**32 - threads:
        raise Unserved(f"dequantize counts its work in 32 bits, ({rows}, {columns}) is too much: use fewer rows")
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
    rows = aligned(y.reshape(-1, width))
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not out.numel():
        return out
    inside = (
        rows.shape[0] <= cuda_table.PROJECT_ROWS
        and width <= cuda_table.PROJECT_WIDTH
        and rank <= cuda_table.PROJECT_RANK
    )
    held = [aligned(t.float()) for t in (centroids, gamma, beta)]
    basis = None if basis is None else aligned(basis.float())
    projected = None if basis is None or inside else rows.float() @ basis
    project = math.gcd(rank, 4) if basis is not None and inside else 0
    threads = cuda_table.PROJECT_THREADS if project else min(_threads_of_eight(width), cuda_table.CLUSTER_THREADS)
    variant = Variant("cluster", (("TYPE", TYPES[y.dtype]), ("THREADS", threads), ("PROJECT", project)))
    arguments = (rows, basis if project else None, projected, *held, out, width, rank, len(centroids))
    _launch(variant, y.device, (rows.shape[0], 1), (threads, 1), arguments)
    return out


def rotate(x: Tensor, inverse: bool) -> Tensor:
    """R x of the rows of x (..., K), or R^T x: see ``rotation.py``.

    Raises:
        Unserved: of the dtype, or of so wide a block, there is no kernel.
    """
    columns = x.shape[-1]
    size = block_size(columns)
    if x.dtype not in TYPES:
        raise Unserved(f"rotate takes {', '.join(map(str, TYPES))}, not {x.dtype}")
    if size > 8 * MOST_THREADS:
        raise Unserved(f"rotate takes blocks of up to {8 * MOST_THREADS} columns, {columns} have one of {size}")
    x = aligned(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    threads = max(size // 8, min(_threads_of_eight(columns), cuda_table.ROTATE_THREADS))
    segments, rows = -(-columns // (8 * threads)), x.numel() // columns
    names = ("LOG", "TYPE", "INVERSE", "THREADS")
    values = (size.bit_length() - 1, TYPES[x.dtype], int(inverse), threads)
    arguments = (x, out, rows, columns, segments, size**-0.5)
    blocks = segments * cuda_table.blocks_of_rows(rows, segments, threads, cuda_driver.processors(x.device))
    variant = Variant("rotate", tuple(zip(names, values, strict=True)))
    _launch(variant, x.device, (blocks, 1), (threads, 1), arguments)
    return out


def _threads_of_eight(columns: int) -> int:
    """Threads of a block that takes a row at once, eight columns each: a power of two, whole warps."""
    return max(32, 1 << max(0, -(-columns // 8) - 1).bit_length())


def _launch(
    variant: Variant,
    device: torch.device,
    grid: tuple[int, int],
    block: tuple[int, int],
    arguments: tuple[Any, ...],
    shared: int = 0,
) -> None:
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise RuntimeError(
                f"all tensors of {variant.source} must be on {device}, one is on {tensor.device}: move the layer there"
            )
    if grid[0] > MOST_BLOCKS[0] or grid[1] > MOST_BLOCKS[1]:
        raise Unserved(f"{variant.source} would take {grid} blocks, the most are {MOST_BLOCKS}: use smaller batches")
    cuda_driver.launch(variant, device, grid, block, FORMS[variant.source], arguments, shared)
