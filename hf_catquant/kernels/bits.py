"""Dot products of packed codes with many rows, and the best rows: by the compiled library, or by numpy.

Of binary codes, read as -1 and +1, and of ternary codes with bits u (not 0) and v (negative), d features in all,

    binary    x . y = d - 2 |x xor y|                 |.| counts bits
    ternary   x . y = |u & u'| - 2 |u & u' & (v xor v')|

Rows lie in tiles (tiles, planes, words, ``TILE``): a word of 64 features of all rows of a tile side by side, so that one
instruction counts in several rows, and a tile stays in the cache while every query meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import native, reference_bits
from .reference_bits import Rows, Scores, Words, best_of

TILE = 256  # CQ_BITS_TILE of csrc/bits.c
LINE = 64  # bytes of a line of the cache, on which vectors are read fastest
ROW_BITS = 48  # of a key, see csrc/bits.c


def in_words(planes: NDArray[np.uint8]) -> Words:
    """(n, planes, words) of the bytes (n, planes, bytes) of rows, filled up with zeros."""
    count, number, width = planes.shape
    padded = np.zeros((count, number, -(-width // 8) * 8), np.uint8)
    padded[..., :width] = planes
    return padded.view(np.uint64)


def in_tiles(planes: NDArray[np.uint8]) -> Words:
    """(tiles, planes, words, TILE) of the bytes (n, planes, bytes) of rows; rows that fill the last tile up are 0."""
    count, number, width = planes.shape
    found = _on_a_line((-(-count // TILE), number, -(-width // 8), TILE))
    found[-1] = 0
    for tile in range(len(found)):
        rows = in_words(planes[tile * TILE : (tile + 1) * TILE])
        found[tile, ..., : len(rows)] = rows.transpose(1, 2, 0)
    return found


def scores(tiles: Words, asked: Words, features: int, threads: int, found: Scores) -> Scores:
    """Put the dot products of queries (q, planes, words) with rows in tiles into ``found`` (q, rows), C-contiguous."""
    count = found.shape[1]
    if native.PATH != "reference":
        native.loaded().cq_bits_scores(*_rows(tiles, count, asked, features), found.ctypes.data, threads)
        return found

    def fill(start: int, stop: int) -> None:
        for query, first, values in reference_bits.products(tiles, asked, features, start, stop):
            found[query, first : first + len(values)] = values[: count - first]

    _share(fill, len(tiles), threads)
    return found


def best(tiles: Words, count: int, asked: Words, features: int, k: int, threads: int) -> tuple[Rows, Scores]:
    """Row numbers (q, k) and scores (q, k) of the best of ``count`` rows in tiles, best first; of equal ones the first."""
    if native.PATH == "reference":
        find = reference_bits.best
        parts = _share(lambda a, b: find(tiles, count, asked, features, k, a, b), len(tiles), threads)
        rows, values = (np.concatenate(column, 1) for column in zip(*parts, strict=True))
        lines = [best_of(*line, k) for line in zip(rows, values, strict=True)]
        return np.stack([line[0] for line in lines]), np.stack([line[1] for line in lines])
    shares = min(threads, len(tiles))
    keys = np.empty((shares, len(asked), k), np.uint64)
    native.loaded().cq_bits_best(*_rows(tiles, count, asked, features), keys.ctypes.data, k, shares, threads)
    keys = np.sort(keys.transpose(1, 0, 2).reshape(len(asked), -1), axis=1)[:, : -k - 1 : -1]
    values = (keys >> np.uint64(ROW_BITS)).astype(np.int64) - 2**15
    return (2**ROW_BITS - 1 - (keys & np.uint64(2**ROW_BITS - 1)).astype(np.int64)), values.astype(np.int16)


def _rows(tiles: Words, count: int, asked: Words, features: int) -> tuple[Any, ...]:
    """What both functions of the library begin with."""
    _, planes, words, _ = tiles.shape
    sizes = (count, words, features, int(planes == 2))
    return native.path_number, tiles.ctypes.data, *sizes, asked.ctypes.data, len(asked)


def _share(work: Callable[[int, int], Any], tiles: int, threads: int) -> list[Any]:
    """``work(start, stop)`` on a share of the tiles in every thread; numpy lets the others run."""
    count = max(1, min(threads, tiles // reference_bits.TOGETHER))
    ends = [tiles * i // count for i in range(count + 1)]
    if count == 1:
        return [work(0, tiles)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, ends[:-1], ends[1:]))


def _on_a_line(shape: tuple[int, ...]) -> Words:
    """Memory that begins on a line of the cache. Not of zeros, which numpy does not ask for in large pages."""
    size, more = int(np.prod(shape)), LINE // 8
    memory = np.empty(size + more, np.uint64)
    start = -memory.ctypes.data % LINE // 8
    return memory[start : start + size].reshape(shape)
