"""How the kernel of a product is launched for a weight and rows of x: what follows from its constants, nothing chosen."""

from __future__ import annotations

from typing import NamedTuple

from .cuda_compile import Variant
from .cuda_layout import STEP, chunk_width

STAGE_COLUMNS = 256  # that wgemm and wdense have copied at once


class Launch(NamedTuple):
    """How a product is run.

    Attributes:
        variant: the kernel; grid, threads: as the driver takes them.
        splits: parts along k whose sums ``partials.cu`` adds, 1 for none.
        runs: of columns, whose sums of x ``sums.cu`` makes for the kernel, 0 for none.
        shared: bytes of shared memory of a block, besides what the kernel declares.
    """

    variant: Variant
    grid: tuple[int, int]
    threads: tuple[int, int]
    splits: int = 1
    runs: int = 0
    shared: int = 0


class Block(NamedTuple):
    """What a block of a product makes: tiles of 16 rows, rows of x; ``turns``: whether its warps take turns along k."""

    tiles: int
    tokens: int
    turns: bool


def block_of(variant: Variant) -> Block:
    """The block of a product's kernel."""
    held, turns = dict(variant.constants), variant.source in ("split8", "product8", "product16")
    of_token = held.get("TOKEN_WARPS", 1)
    tiles = held["MT"] * (1 if turns else held["WARPS"] // of_token)
    return Block(tiles, held.get("TOKENS", 8 * held["NT"] * of_token), turns)


def launch(variant: Variant, row_tiles: int, chunks: int, tokens: int, splits: int = 1) -> Launch:
    """The launch of a product's kernel for a weight of so many tiles and turns along k, and so many rows of x."""
    held, block = dict(variant.constants), block_of(variant)
    threads = (32, held["WARPS"])
    down, along = -(-row_tiles // block.tiles), -(-tokens // block.tokens)
    if block.turns:
        return Launch(variant, (down, along), threads)
    shared = _staged(held, block) if "STAGES" in held else 0
    steps, group = chunk_width(held["BITS"]) // STEP, held["GROUP_STEPS"]
    runs = chunks * (steps // group if 0 < group < steps else 1) if held.get("SUMS") else 0
    return Launch(variant, (down * along * splits, 1), threads, splits, runs, shared)


def _staged(held: dict[str, int], block: Block) -> int:
    """Bytes of shared memory of a block of wgemm and wdense: stages of x and its sums, or results, and barriers."""
    stage = block.tokens * ((1 if held["INTEGER"] else 2) * STAGE_COLUMNS + 2 * 4)
    results = block.tokens * (16 * block.tiles + 8) * (4 if held["TYPE"] == 2 else 2)
    return max(held["STAGES"] * (stage + -stage % 1024), results) + 16 * held["STAGES"]
