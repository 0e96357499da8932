"""Which kernel serves how many tokens, and in which launch. Every number that is a matter of speed alone is here.

The thresholds come from instruction counts and bandwidths of an H200 (docs/gpu.md), not from timings; ``benchmarks/gpu.py``
measures what they should be.
"""

from __future__ import annotations

from functools import cache

from .cuda_compile import Variant
from .cuda_layout import Layout

SPLIT_TOKENS = 4  # up to here 16-bit activations go through 8-bit products: fewer instructions a weight
EXACT_TOKENS = 64  # up to here they are multiplied as they are; above, weights are dequantized for cuBLAS
INTEGER_TOKENS = 1024  # the same for activations in few bits
DENSE_BYTES = 24 << 20  # dequantized at a time: stays in the second-level cache (50 MB on an H200)
PROJECT_ROWS, PROJECT_WIDTH, PROJECT_RANK = 64, 8192, 256  # of a correction that projects inside its one kernel
CLUSTER_THREADS = ROW_THREADS = WEIGHT_THREADS = 256


def blocks(row_tiles: int, bits: int, column_tiles: int, chunks: int, processors: int) -> tuple[int, int]:
    """(row tiles of a block, warps of a block) of a product.

    More row tiles use each activation more often, as long as nearly every multiprocessor still gets a block. More warps
    have more loads on the way where there are few blocks. Sums of more than 4 tiles (2 with 8 bits, or with several
    column tiles) do not fit the registers of a thread, nor 16 warps of as many those of a multiprocessor.
    """
    tiles = 4 if bits < 8 and column_tiles == 1 else 1 if bits == 1 and column_tiles == 4 else 2
    while tiles > 1 and -(-row_tiles // tiles) < 0.9 * processors:
        tiles //= 2
    warps = 16 if tiles * column_tiles <= 2 and -(-row_tiles // tiles) < 2 * processors else 8
    while warps > 1 and warps // 2 >= chunks:
        warps //= 2
    return tiles, warps


def product(layout: Layout, tokens: int, dtype: int, integer: bool, processors: int) -> tuple[Variant, int, int, int]:
    """The variant for ``tokens`` rows of x, the tokens and the row tiles of a block, and its warps.

    Args:
        layout: of the weight.
        tokens: M, at least 1.
        dtype: 0 bfloat16, 1 float16, 2 float32, of out.
        integer: whether x comes as int8 codes.
        processors: multiprocessors of the device.
    """
    split = 0 if integer or tokens > SPLIT_TOKENS else 1 << (tokens - 1).bit_length()
    column_tiles = 1 if split or tokens <= 8 else 2 if tokens <= 16 else 4
    scale32 = int(layout.scales.element_size() == 4)
    fixed = (layout.bits, layout.group_steps, scale32, dtype, layout.tiles.shape[0], layout.chunks)
    return _plan(*fixed, column_tiles, split, integer, processors)


@cache
def _plan(
    bits: int,
    group_steps: int,
    scale32: int,
    dtype: int,
    row_tiles: int,
    chunks: int,
    column_tiles: int,
    split: int,
    integer: bool,
    processors: int,
) -> tuple[Variant, int, int, int]:
    tiles, warps = blocks(row_tiles, bits, column_tiles, chunks, processors)
    values = (bits, group_steps, scale32, dtype, tiles, column_tiles, warps)
    names = ("BITS", "GROUP_STEPS", "SCALE32", "TYPE", "MT", "NT", "WARPS")
    constants = tuple(zip(names, values, strict=True))
    if not split and not integer:
        return Variant("product16", constants), 8 * column_tiles, tiles, warps
    held = split or 8 * column_tiles
    return Variant("product8", (*constants, ("SPLIT", int(split > 0)), ("TOKENS", held))), held, tiles, warps
