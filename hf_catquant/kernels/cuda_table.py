"""Which kernel serves how many tokens, and in which launch. Every number that is a matter of speed alone is here.

The numbers come from timings on an H200 where there were some, else from instruction counts (docs/gpu.md says which);
``benchmarks/gpu.py`` measures what they should be.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from .cuda_compile import Variant
from .cuda_launch import STAGE_COLUMNS, Launch, launch
from .cuda_layout import Layout, chunk_width

# Up to here 16-bit activations go through 8-bit products: fewer instructions a weight. Of four tokens product16 was faster.
SPLIT_TOKENS = 2
FEW_TOKENS = 8  # up to here every warp reads the activations itself; above, a block shares them
EXACT_TOKENS = (
    256  # up to here 16-bit activations are multiplied from tiles; above, weights are dequantized for cuBLAS
)
# On Hopper, for codes of 1 and 2 bits: above so many tokens codes are looked up as rounded weights; above so many more,
# weights are dequantized for cuBLAS there too, which is what has been timed.
LOOKED_UP_TOKENS, MOST_TOKENS = 64, 1024
TALL_TOKENS = (
    16  # up to here a warp of the product of many rows makes 64 weight rows, not 32: fewer instructions a weight
)
# Dequantized at a time. 24 MB would stay in the second-level cache (50 MB on an H200), but 1536 rows of 8192 columns fill
# the multiprocessors one and a half times, and 4096 rows nearly four times: less of them idle.
DENSE_BYTES = 64 << 20
# Of a correction that projects inside its one kernel. Each row's block reads the whole basis from the second-level cache,
# which serves one multiprocessor with 100 GB/s and all of them with 5 TB/s: more rows than these are cuBLAS's.
PROJECT_ROWS, PROJECT_WIDTH, PROJECT_RANK = 64, 8192, 256
PROJECT_THREADS = 1024  # of a block: many reads have to be under way; and a thread has eight columns
CLUSTER_THREADS = 512  # the most, where nothing is projected: eight columns a thread of the usual widths
ROW_THREADS = WEIGHT_THREADS = SUM_THREADS = 256
MOST_HELD = 4  # runs of eight activations that a thread keeps while it looks for their range
ROTATE_THREADS = 128  # of a block, where the rotation's own blocks are not larger
FEW_AHEAD = 1  # chunks under way to a warp of product8 and product16 while it multiplies another
OVERLAP = True  # from sm_90 on a launch begins while the one before it runs: about a microsecond less between them
LAUNCHES = 4096  # that are remembered
RESIDENT_THREADS = 2048  # of a multiprocessor
UNTILE_WARPS = 8


WARP_GROUPS = ("wdense", "wgemm")  # kernels that only Hopper has, before others of the same rows


class Shape(NamedTuple):
    """Of a block of split8: row tiles, warps, chunks under way to each warp, and blocks that a multiprocessor holds."""

    tiles: int
    warps: int
    ahead: int = 1
    at_once: int = 1


SPLIT_SHAPES = tuple(Shape(*s) for s in ((1, 16), (2, 16), (2, 8), (4, 16), (4, 8), (7, 8), (10, 8), (14, 8)))


def split_shape(
    row_tiles: int, bits: int, group_steps: int, tokens: int, chunks: int, processors: int, scale32: int = 0
) -> Shape:
    """The shape with which the busiest multiprocessor has least to do: all of them get whole blocks.

    Args:
        row_tiles: of the weight; chunks: turns along k.
        bits: of a code in a tile.
        group_steps: columns that share a scale, in steps of 32, 0 for whole rows.
        tokens: of a block: 1, 2 or 4.
        processors: multiprocessors of the device.
        scale32: whether scales are float32.
    """

    def work(shape: Shape) -> int:
        blocks = -(-row_tiles // shape.tiles)
        turns = -(-chunks // shape.warps) * shape.warps
        # x of a chunk takes a warp as long as some row tiles, and a tile of several tokens longer: counted in machine code.
        return -(-blocks // processors) * turns * (shape.tiles + 3 - tokens // 2)

    # What fits the registers of a multiprocessor, as NVRTC finds: sums first, then codes under way.
    small = group_steps in (1, 2)
    most = 128 if bits <= 2 and group_steps and not scale32 else 100
    if bits == 8 or small or (bits == 1 and (tokens > 1 or scale32)):
        most = 32 if bits == 1 and group_steps == 1 else 64
    shape = min((shape for shape in SPLIT_SHAPES if shape.tiles * tokens * shape.warps <= most), key=work)
    tiles, warps, ahead, at_once = shape
    if bits == 1 and tiles == 14:
        tiles, warps, ahead, at_once = 7, 4, 2, 2  # the same in two blocks, with more codes under way
    if bits == 1 and tokens == 4:
        warps = min(warps, 8)  # or x of two chunks of 256 columns would take more than 48 KB
    while warps > 1 and warps // 2 >= chunks:
        warps //= 2
    return Shape(tiles, warps, ahead, at_once)


def blocks(
    row_tiles: int, bits: int, column_tiles: int, chunks: int, processors: int, integer: bool = False
) -> tuple[int, int]:
    """(row tiles of a block, warps of a block) of product8 (``integer``) and product16.

    More row tiles use each activation more often, as long as nearly every multiprocessor still gets a block; more than two
    were slower with 16-bit activations. More warps have more loads on the way where there are few blocks. Sums of more than
    4 tiles (2 with 8 bits, or with several column tiles) do not fit the registers of a thread, nor 16 warps of as many
    those of a multiprocessor.
    """
    tiles = 4 if integer and bits < 8 and column_tiles == 1 else 1 if bits == 1 and column_tiles == 4 else 2
    while tiles > 1 and -(-row_tiles // tiles) < 0.9 * processors:
        tiles //= 2
    warps = 16 if tiles * column_tiles <= 2 and -(-row_tiles // tiles) < 1.5 * processors else 8
    while warps > 1 and warps // 2 >= chunks:
        warps //= 2
    return tiles, warps


def blocks_of_rows(rows: int, segments: int, threads: int, processors: int) -> int:
    """Blocks for each of ``segments`` parts of ``rows`` rows: as many as run at a time, where all get as many rows."""
    at_once = processors * max(1, RESIDENT_THREADS // threads)
    turns = -(-rows * segments // at_once)
    return -(-rows // turns)


def row_threads(runs: int, rows: int) -> tuple[int, int]:
    """(threads of a block that quantizes a row of ``runs`` times eight values, runs that a thread keeps, 0 for none).

    Few rows leave multiprocessors idle: more threads read a row at once. Many rows want no thread without work.
    """
    few = rows <= 128
    threads = 1024
    while threads > 64 and threads // 2 * (1 if few else MOST_HELD) >= runs:
        threads //= 2
    held = -(-runs // threads)
    return threads, held if held <= MOST_HELD else 0


def serves(layout: Layout, tokens: int, warp_groups: bool) -> bool:
    """Whether 16-bit activations of so many rows are multiplied from tiles, and weights not dequantized for cuBLAS."""
    return tokens <= (MOST_TOKENS if warp_groups and _can_look_up(layout) else EXACT_TOKENS)


def _can_look_up(layout: Layout) -> bool:
    """Whether warp groups can look codes up as rounded weights."""
    return layout.bits <= 2 and layout.group_steps % 4 == 0


def product(
    layout: Layout, tokens: int, dtype: int, integer: bool, processors: int, refused: Collection[str] = WARP_GROUPS
) -> Launch:
    """The launch for ``tokens`` rows of x.

    Args:
        layout: of the weight.
        tokens: M, at least 1.
        dtype: 0 bfloat16, 1 float16, 2 float32, of out.
        integer: whether x comes as int8 codes.
        processors: multiprocessors of the device.
        refused: those of ``WARP_GROUPS`` that cannot be used.
    """
    scale32 = int(layout.scales.element_size() == 4)
    fixed = (layout.bits, layout.group_steps, scale32, dtype, layout.tiles.shape[0], layout.chunks)
    if tokens > FEW_TOKENS and layout.group_steps % 4 == 0:
        looked_up = not integer and _can_look_up(layout) and tokens > LOOKED_UP_TOKENS and "wdense" not in refused
        if looked_up or "wgemm" not in refused:
            return _grouped(*fixed, tokens, integer, looked_up, processors)
    if tokens > FEW_TOKENS:
        return _shared(*fixed, tokens, integer, processors)
    split = 0 if integer or tokens > SPLIT_TOKENS else 1 << (tokens - 1).bit_length()
    return _few(*fixed, tokens, 1 if tokens <= 8 else 2 if tokens <= 16 else 4, split, integer, processors)


NAMES = ("BITS", "GROUP_STEPS", "SCALE32", "TYPE", "MT", "NT", "WARPS")


@lru_cache(LAUNCHES)
def _few(
    bits: int,
    group_steps: int,
    scale32: int,
    dtype: int,
    row_tiles: int,
    chunks: int,
    tokens: int,
    column_tiles: int,
    split: int,
    integer: bool,
    processors: int,
) -> Launch:
    """split8, product8 and product16."""
    if split:
        tiles, warps, ahead, at_once = split_shape(row_tiles, bits, group_steps, split, chunks, processors, scale32)
        values = (bits, group_steps, scale32, dtype, tiles, 1, warps)
        more = (("TOKENS", split), ("AHEAD", ahead), ("BLOCKS", at_once))
        return launch(Variant("split8", (*zip(NAMES, values, strict=True), *more)), row_tiles, chunks, tokens)
    tiles, warps = blocks(row_tiles, bits, column_tiles, chunks, processors, integer)
    values = (bits, group_steps, scale32, dtype, tiles, column_tiles, warps)
    constants = (*zip(NAMES, values, strict=True), ("AHEAD", FEW_AHEAD))
    return launch(Variant("product8" if integer else "product16", constants), row_tiles, chunks, tokens)


class Group(NamedTuple):
    """Of a block of wgemm: tiles of 8 tokens, times 64 rows of a warp group, warps, stages of x, blocks at once."""

    column_tiles: int
    row_groups: int
    warps: int
    stages: int
    at_once: int


def group_shape(tokens: int, bits: int, integer: bool, looked_up: bool) -> Group:
    """Few tokens want many loads under way, many tokens want each number that is made of a code used often.

    What fits the registers, as NVRTC finds: codes of 4 and 8 bits take more of them.
    """
    large = bits >= 4
    if looked_up:  # 256 rows by 128 tokens: fewer would have the second-level cache read x too often
        return Group(16, 2 if bits == 2 else 1, 8, 3, 1)
    if tokens <= 16:
        return Group(2, 1, 4, 4, 4) if large else Group(2, 2, 4, 4, 3)
    if tokens <= 32:
        return Group(4, 1, 4, 3, 3) if large else Group(4, 2, 4, 3, 2)
    if tokens <= 64 or not integer or bits == 8:
        return Group(8, 1, 8, 3, 1)
    return Group(16, 1, 8, 4, 1)


@lru_cache(LAUNCHES)
def _grouped(
    bits: int,
    group_steps: int,
    scale32: int,
    dtype: int,
    row_tiles: int,
    chunks: int,
    tokens: int,
    integer: bool,
    looked_up: bool,
    processors: int,
) -> Launch:
    """wgemm or wdense: warp groups of 64 or 128 weight rows by 16 to 128 rows of x."""
    column_tiles, row_groups, warps, stages, at_once = group_shape(tokens, bits, integer, looked_up)
    tiles, held = row_groups * warps, 8 * column_tiles
    made = -(-row_tiles // tiles) * -(-tokens // held)
    splits = group_cuts(made, -(-chunks * chunk_width(bits) // STAGE_COLUMNS), processors * at_once)
    values = (bits, group_steps, scale32, dtype, row_groups, column_tiles, warps)
    more = (("INTEGER", int(integer)), ("STAGES", stages), ("BLOCKS", at_once))
    variant = Variant("wdense" if looked_up else "wgemm", (*zip(NAMES, values, strict=True), *more))
    return launch(variant, row_tiles, chunks, tokens, splits)


@lru_cache(LAUNCHES)
def _shared(
    bits: int,
    group_steps: int,
    scale32: int,
    dtype: int,
    row_tiles: int,
    chunks: int,
    tokens: int,
    integer: bool,
    processors: int,
) -> Launch:
    """gemm: 256 weight rows by 32 or 64 rows of x a block, 512 by 16, or 128 by 128.

    Sums of 64 by 32, 32 by 64 or 16 by 128 fit the registers of a warp: the more rows of x, the more often each number
    that is made of a code is used. 8-bit codes beside 16-bit activations take so much room that they get one row tile.
    """
    column_tiles = 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    token_warps = 1 if tokens <= 64 else 2
    tiles = 4 if tokens <= TALL_TOKENS and 16 * -(-row_tiles // 32) >= 0.9 * processors else 2
    if bits == 8 and tokens > 32 and not integer:
        tiles, column_tiles, token_warps = 1, 8 * token_warps, 1
    row_warps = 8 // token_warps
    while row_warps * token_warps > 4 and row_warps // 2 * tiles >= row_tiles:
        row_warps //= 2  # not below four warps: a thread would copy more of x than it has registers for
    made = -(-row_tiles // (tiles * row_warps)) * -(-tokens // (8 * column_tiles * token_warps))
    small = group_steps in (1, 2)
    at_once = 2 if tiles * column_tiles == 4 and not small else 1  # blocks of a multiprocessor that its registers hold
    splits = cuts(made, chunks, processors * at_once)
    sums = int(bits < 8 and tokens > 32)
    values = (bits, group_steps, scale32, dtype, tiles, column_tiles, row_warps * token_warps)
    constants = (
        *zip(NAMES, values, strict=True),
        ("INTEGER", int(integer)),
        ("TOKEN_WARPS", token_warps),
        ("SUMS", sums),
        # Wider codes come in several loads, each asked for as soon as the last is used; one-bit ones of small groups spill.
        ("AHEAD", int(bits == 2 or (bits == 1 and not small))),
        ("BLOCKS", at_once),
    )
    return launch(Variant("gemm", constants), row_tiles, chunks, tokens, splits)


def group_cuts(made: int, stages: int, at_once: int) -> int:
    """Parts along k of wgemm for ``made`` blocks of ``stages`` turns each, as :func:`cuts`.

    Blocks begin when others end, so that turns are not whole; a part costs a stage to begin, and all of them four and
    a quarter for each to be added.
    """

    def cost(parts: int) -> float:
        begun = max(1.0, made * parts / at_once) * (-(-stages // parts) + 1)
        return begun + (4 + parts / 4 if parts > 1 else 0)

    return min((parts for parts in _possible_parts(made, stages, at_once) if parts in (1, 2, 4, 8, 16)), key=cost)


def cuts(made: int, chunks: int, at_once: int) -> int:
    """Parts along k of gemm for ``made`` blocks of ``chunks`` turns each where ``at_once`` run at a time.

    A block that is cut has to fill its pipeline once more, and what it wrote is read again: about 3 and 1 turns.
    """

    def turns(parts: int) -> float:
        return -(-made * parts // at_once) * (-(-chunks // parts) + 3) + (4 + parts if parts > 1 else 0)

    return min(_possible_parts(made, chunks, at_once), key=turns)


def _possible_parts(made: int, chunks: int, at_once: int) -> list[int]:
    """Up to 16, none of them empty; parts of many blocks would fill much memory and gain little."""
    most = min(16, chunks) if made < 2 * at_once else 1
    return [parts for parts in range(1, most + 1) if -(-chunks // -(-chunks // parts)) == parts]
