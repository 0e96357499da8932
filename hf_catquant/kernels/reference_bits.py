"""Bit counts in numpy: what the compiled ones compute, and what runs where there are none.

Rows lie in tiles (see ``bits.py``), of which as many are looked at together as stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

TOGETHER = 128  # tiles; a word of all of their rows is 256 KiB

Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
Scores = NDArray[np.int16]
Rows = NDArray[np.int64]


def products(tiles: Words, asked: Words, features: int, start: int, stop: int) -> Iterator[tuple[int, int, Scores]]:
    """(query, first row, dot products) of tiles ``start`` to ``stop``, some at a time; the products are overwritten."""
    width = tiles.shape[-1]
    words, bits = np.empty((2, TOGETHER, width), np.uint64), np.empty((TOGETHER, width), np.uint8)
    total = np.empty((TOGETHER, width), np.int16)
    multiply = _ternary if asked.shape[1] == 2 else _binary
    for low in range(start, stop, TOGETHER):
        part = tiles[low : min(low + TOGETHER, stop)]
        size = len(part)
        for query in range(len(asked)):
            multiply(part, asked[query], features, words[:, :size], bits[:size], total[:size])
            yield query, low * width, total[:size].reshape(-1)


def best(tiles: Words, count: int, asked: Words, features: int, k: int, start: int, stop: int) -> tuple[Rows, Scores]:
    """Row numbers and scores (q, at most k), best first, of tiles ``start`` to ``stop``; rows from ``count`` on are none."""
    k = min(k, min(count, stop * tiles.shape[-1]) - start * tiles.shape[-1])
    rows = [np.empty(0, np.int64)] * len(asked)
    scores = [np.empty(0, np.int16)] * len(asked)
    for query, first, values in products(tiles, asked, features, start, stop):
        values = values[: count - first]
        if len(rows[query]) == k:
            least = scores[query][-1] + 1  # an equal score comes after the rows that are there
        else:
            least = np.partition(values, -min(k, len(values)))[-min(k, len(values))]
        better = np.flatnonzero(values >= least)
        if len(better):
            both = np.append(rows[query], better + first), np.append(scores[query], values[better])
            rows[query], scores[query] = best_of(*both, k)
    return np.stack(rows), np.stack(scores)


def best_of(rows: Rows, scores: NDArray, k: int) -> tuple[Rows, NDArray]:
    """The ``k`` best of ``rows`` by their ``scores``; of equal ones the first."""
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


def _binary(tiles: Words, asked: Words, features: int, words: Words, bits: Bytes, total: Scores) -> None:
    total[:] = features
    for word in range(tiles.shape[2]):
        np.bitwise_xor(tiles[:, 0, word], asked[0, word], out=words[0])
        counted = count_bits(words[0], bits)
        total -= counted
        total -= counted


def _ternary(tiles: Words, asked: Words, features: int, words: Words, bits: Bytes, total: Scores) -> None:
    total[:] = 0
    for word in range(tiles.shape[2]):
        np.bitwise_and(tiles[:, 0, word], asked[0, word], out=words[0])
        total += count_bits(words[0], bits)
        np.bitwise_xor(tiles[:, 1, word], asked[1, word], out=words[1])
        words[1] &= words[0]
        counted = count_bits(words[1], bits)
        total -= counted
        total -= counted


def count_by_table(words: Words, out: Bytes) -> Bytes:
    """Bits of every word (t, w) into ``out``; numpy before 2.0."""
    np.sum(_BITS[words.view(np.uint16).reshape(*words.shape, 4)], axis=-1, dtype=np.uint8, out=out)
    return out


def count_natively(words: Words, out: Bytes) -> Bytes:
    """The same by the processor's instruction."""
    return np.bitwise_count(words, out=out)


_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
count_bits = count_natively if hasattr(np, "bitwise_count") else count_by_table
