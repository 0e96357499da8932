"""Similarity of packed codes by bit counts, and search with it: embeddings in 1 or 2 bits a feature.

Of binary codes, read as -1 and +1, and of ternary codes with bits u (not 0) and v (negative), d features in all,

    binary    x . y = d - 2 |x xor y|                 |.| counts bits
    ternary   x . y = |u & u'| - 2 |u & u' & (v xor v')|

exactly. Codes are kept word by word, 64 features of all rows together, so that a block of them stays in the processor's
cache while every query meets it. Searching for the nearest rows first by codes and then, among a few of them, by the float
embeddings (re-scoring) is how binary sentence embeddings are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics.feature_discrimination.inputs import as_array, checked_count

BLOCK = 2**15  # rows whose scores are held at a time: a word of each is 256 KiB

Words = NDArray[np.uint64]
Scores = NDArray[np.int16]


class PackedIndex:
    """Packed codes to search in.

    Args:
        packed: (n, bytes) uint8, as ``BinaryQuantizer(packing="bits")`` and ``TernaryQuantizer(packing="bits")`` give them.
        num_features: d, at most 16,383.
        ternary: which of the two.
        num_threads: None: as many as there are processors to use.

    Raises:
        ValueError: the array is not of that width.
    """

    def __init__(
        self, packed: Any, num_features: int, *, ternary: bool = False, num_threads: int | None = None
    ) -> None:
        self.num_features = checked_count(num_features, "num_features", 1)
        if self.num_features >= 2**14:
            raise ValueError(f"num_features must be from 1 to {2**14 - 1}, got {num_features}")
        self.ternary = ternary
        self.num_threads = _processors() if num_threads is None else checked_count(num_threads, "num_threads", 1)
        self._planes = self._words(packed, "packed")

    def __len__(self) -> int:
        """Rows to search in."""
        return self._planes.shape[-1]

    def scores(self, queries: Any) -> Scores:
        """Dot products (q, n) of packed queries (q, bytes) with all rows, of codes -1/+1 or -1/0/+1.

        Raises:
            ValueError: the queries are not packed like the rows.
        """
        asked = self._words(queries, "queries")
        found = np.empty((asked.shape[-1], len(self)), np.int16)

        def fill(start: int, stop: int) -> None:
            for query, rows, values in self._products(asked, start, stop):
                found[query, rows] = values

        self._share(fill)
        return found

    def search(
        self, queries: Any, k: int, *, embeddings: Any = None, float_queries: Any = None, oversample: int = 4
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The ``k`` rows most similar to each query, best first; of equal ones the first.

        Args:
            queries: (q, bytes) packed.
            k: at most n.
            embeddings: (n, e) of any real dtype, memory-mapped or not: the ``oversample * k`` best rows by codes are scored
                again by their dot product with ``float_queries``.
            float_queries: (q, e).
            oversample: at least 1.

        Returns:
            Row numbers (q, k) and scores (q, k), int16 of codes or float32 of embeddings.

        Raises:
            ValueError: an argument does not fit the index.
        """
        if checked_count(k, "k", 1) > len(self):
            raise ValueError(f"k must be from 1 to the {len(self)} rows, got {k}")
        oversample = checked_count(oversample, "oversample", 1)
        if (embeddings is None) != (float_queries is None):
            raise ValueError("embeddings and float_queries go together, got one of them")
        asked = self._words(queries, "queries")
        wanted = k if embeddings is None else min(k * oversample, len(self))
        parts = self._share(lambda start, stop: self._best(asked, start, stop, wanted))
        rows, scores = (np.concatenate(column, 1) for column in zip(*parts, strict=True))
        rows, scores = _top(rows, scores, wanted)
        if embeddings is None:
            return rows, scores
        embeddings, float_queries = _matrix(embeddings), _matrix(float_queries).astype(np.float32)
        if len(embeddings) != len(self) or float_queries.shape != (len(rows), embeddings.shape[1]):
            raise ValueError(
                f"embeddings and float_queries must be ({len(self)}, e) and ({len(rows)}, e), got {embeddings.shape} and "
                f"{float_queries.shape}"
            )
        near = np.stack(
            [np.asarray(embeddings[chosen], np.float32) @ q for chosen, q in zip(rows, float_queries, strict=True)]
        )
        if not np.isfinite(near).all():
            query, place = np.argwhere(~np.isfinite(near))[0]
            raise ValueError(
                f"embeddings and float_queries must be finite, got a product of {near[query, place]} of query {query} "
                f"with row {rows[query, place]}"
            )
        return _top(rows, near, k)

    def _words(self, packed: Any, name: str) -> Words:
        """(planes, words, n): the bytes of each plane as 64-bit words, word by word."""
        packed = np.ascontiguousarray(packed)
        planes, width = 1 + self.ternary, -(-self.num_features // 8)
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != planes * width or not len(packed):
            raise ValueError(
                f"{name} must be (n, {planes * width}) uint8, {'two planes' if self.ternary else 'a plane'} of "
                f'{self.num_features} bits as packing="bits" gives, got {packed.dtype} of shape {packed.shape}'
            )
        used = np.packbits(np.arange(8 * width) < self.num_features, bitorder="little")
        packed = np.ascontiguousarray(packed & np.tile(used, planes))  # bits behind the last feature are no codes
        padded = np.zeros((len(packed), planes, -(-width // 8) * 8), np.uint8)
        padded[:, :, :width] = packed.reshape(len(packed), planes, width)
        return np.ascontiguousarray(padded.view(np.uint64).transpose(1, 2, 0))

    def _share(self, work: Any) -> list[Any]:
        """``work(start, stop)`` on a share of the rows in every thread; numpy lets the others run."""
        count = max(1, min(self.num_threads, len(self) // BLOCK))
        ends = [len(self) * i // count for i in range(count + 1)]
        if count == 1:
            return [work(0, len(self))]
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(work, ends[:-1], ends[1:]))

    def _products(self, asked: Words, start: int, stop: int) -> Iterator[tuple[int, slice, Scores]]:
        """(query, rows, dot products) for rows ``start`` to ``stop``, a block at a time; the products are overwritten."""
        words, bits = np.empty((2, BLOCK), np.uint64), np.empty(BLOCK, np.uint8)
        total = np.empty(BLOCK, np.int16)
        multiply = _ternary_products if self.ternary else _binary_products
        for low in range(start, stop, BLOCK):
            rows = slice(low, min(low + BLOCK, stop))
            size = rows.stop - low
            for query in range(asked.shape[-1]):
                values = total[:size]
                multiply(self._planes[..., rows], asked[..., query], words[:, :size], bits[:size], values)
                if not self.ternary:
                    np.multiply(values, -2, out=values)
                    values += self.num_features
                yield query, rows, values

    def _best(self, asked: Words, start: int, stop: int, k: int) -> tuple[NDArray[np.int64], Scores]:
        """Row numbers and scores (q, at most k) of the best of rows ``start`` to ``stop``."""
        k = min(k, stop - start)
        rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * asked.shape[-1]
        scores: list[Scores] = [np.empty(0, np.int16)] * asked.shape[-1]
        for query, block, values in self._products(asked, start, stop):
            if len(rows[query]) == k:
                least = scores[query][-1] + 1  # an equal score comes after the rows that are there
            else:
                least = np.partition(values, -min(k, len(values)))[-min(k, len(values))]
            better = np.flatnonzero(values >= least)
            if len(better):
                both = np.append(rows[query], better + block.start), np.append(scores[query], values[better])
                rows[query], scores[query] = _best_of(*both, k)
        return np.stack(rows), np.stack(scores)


def _binary_products(planes: Words, asked: Words, words: Words, bits: NDArray[np.uint8], total: Scores) -> None:
    """Put the number of bits that differ into ``total``."""
    total[:] = 0
    for word in range(planes.shape[1]):
        np.bitwise_xor(planes[0, word], asked[0, word], out=words[0])
        total += _count(words[0], bits)


def _ternary_products(planes: Words, asked: Words, words: Words, bits: NDArray[np.uint8], total: Scores) -> None:
    total[:] = 0
    for word in range(planes.shape[1]):
        np.bitwise_and(planes[0, word], asked[0, word], out=words[0])
        total += _count(words[0], bits)
        np.bitwise_xor(planes[1, word], asked[1, word], out=words[1])
        words[1] &= words[0]
        counted = _count(words[1], bits)
        total -= counted
        total -= counted


def _count_by_table(words: Words, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    np.sum(_BITS[words.view(np.uint16).reshape(len(words), 4)], axis=1, dtype=np.uint8, out=out)
    return out


def _count_natively(words: Words, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.bitwise_count(words, out=out)


_BITS = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
_count = _count_natively if hasattr(np, "bitwise_count") else _count_by_table  # numpy 2 and later have the instruction


def _best_of(rows: NDArray[np.int64], scores: Any, k: int) -> tuple[NDArray[np.int64], Any]:
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


def _top(rows: NDArray[np.int64], scores: Any, k: int) -> tuple[NDArray[np.int64], Any]:
    """The ``k`` best of each line."""
    best = [_best_of(*line, k) for line in zip(rows, scores, strict=True)]
    return np.stack([line[0] for line in best]), np.stack([line[1] for line in best])


def _matrix(values: Any) -> NDArray[Any]:
    """Embeddings (n, e): an array, memory-mapped or not, a tensor or rows."""
    found = np.asanyarray(as_array(values))
    if found.ndim != 2 or found.dtype.kind not in "fiub":
        raise ValueError(
            f"embeddings and float_queries must be (n, e) of real numbers, got {found.dtype} of shape {found.shape}"
        )
    return found


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
