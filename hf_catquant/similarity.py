"""Similarity of packed codes by bit counts, and search with it: embeddings in 1 or 2 bits a feature.

Of binary codes, read as -1 and +1, and of ternary codes with bits u (not 0) and v (negative), d features in all,

    binary    x . y = d - 2 |x xor y|                 |.| counts bits
    ternary   x . y = |u & u'| - 2 |u & u' & (v xor v')|

exactly (``kernels/bits.py``). Searching for the nearest rows first by codes and then, among a few of them, by the float
embeddings (re-scoring) is how binary sentence embeddings are used.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels import bits
from .metrics.feature_discrimination.inputs import as_array, checked_count

MOST_FEATURES = 2**14 - 1  # dot products are int16


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
        if self.num_features > MOST_FEATURES:
            raise ValueError(f"num_features must be from 1 to {MOST_FEATURES}, got {num_features}")
        self.ternary = ternary
        self.num_threads = _processors() if num_threads is None else checked_count(num_threads, "num_threads", 1)
        self._tiles, self._count = bits.in_tiles(self._planes(packed, "packed")), len(packed)

    def __len__(self) -> int:
        """Rows to search in."""
        return self._count

    def scores(self, queries: Any, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
        """Dot products (q, n) of packed queries (q, bytes) with all rows, of codes -1/+1 or -1/0/+1.

        Args:
            queries: packed like the rows.
            out: (q, n) int16 to write into, C-contiguous; new memory costs about as much as the products.

        Raises:
            ValueError: the queries are not packed like the rows, or ``out`` does not fit.
        """
        asked = self._asked(queries)
        shape = (len(asked), len(self))
        if out is None:
            out = np.empty(shape, np.int16)
        elif not (
            isinstance(out, np.ndarray)
            and out.dtype == np.int16
            and out.shape == shape
            and out.flags.c_contiguous
            and out.flags.writeable
        ):
            found = f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise ValueError(f"out must be a C-contiguous, writable int16 array of shape {shape}, got {found}")
        return bits.scores(self._tiles, asked, self.num_features, self.num_threads, out)

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
        asked = self._asked(queries)
        wanted = k if embeddings is None else min(k * oversample, len(self))
        rows, scores = bits.best(self._tiles, len(self), asked, self.num_features, wanted, self.num_threads)
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

    def _planes(self, packed: Any, name: str) -> NDArray[np.uint8]:
        """The bytes (n, planes, bytes) of the planes of packed rows; bits behind the last feature are no codes, and 0."""
        packed = np.ascontiguousarray(packed)
        planes, width = 1 + self.ternary, -(-self.num_features // 8)
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != planes * width or not len(packed):
            raise ValueError(
                f"{name} must be (n, {planes * width}) uint8, {'two planes' if self.ternary else 'a plane'} of "
                f'{self.num_features} bits as packing="bits" gives, got {packed.dtype} of shape {packed.shape}'
            )
        used = np.packbits(np.arange(8 * width) < self.num_features, bitorder="little")
        return (packed & np.tile(used, planes)).reshape(len(packed), planes, width)

    def _asked(self, queries: Any) -> NDArray[np.uint64]:
        """The words (q, planes, words) of packed queries."""
        return np.ascontiguousarray(bits.in_words(self._planes(queries, "queries")))


def _top(rows: NDArray[np.int64], scores: Any, k: int) -> tuple[NDArray[np.int64], Any]:
    """The ``k`` best of each line."""
    best = [bits.best_of(*line, k) for line in zip(rows, scores, strict=True)]
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
