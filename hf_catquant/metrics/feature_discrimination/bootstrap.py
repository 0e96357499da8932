"""Intervals of discrimination: the bootstrap, samples drawn again class by class.

A resample weights every sample by how often it was drawn, so its class means are a matrix product. A sample drawn twice
has distance 0 to itself, which makes the mean distance inside a class too small by (n - 1) / n on average; that is divided
out. Means, deviations and thresholds stay those of all samples.

Some resamples are drawn at a time, and for them the rows are read some at a time: what is held are class means and draws,
not another copy of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .moments import Matrix, pairs_of

BLOCK = 2**23  # class means, and draws of a class, that are held at a time: 64 MiB each
CHUNK = 2**19  # values that are looked at together: 4 MiB in float64
TAILS = (2.5, 97.5)  # percentiles of a 95 % interval

Reader = Callable[[NDArray[Any]], Matrix]


def intervals(
    x: NDArray[Any],
    readers: Mapping[str, Reader],
    index: NDArray[np.intp],
    counts: NDArray[np.intp],
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """95 % percentile intervals of the mean D over pairs of classes, and of its ratio to that of the first reader.

    Args:
        x: (n, d) features.
        readers: {name: function from rows (k, d) to what D is computed of}.
        index, counts: class numbers (n,), samples of each class (C,).
        resamples: how many; all readers see the same ones.
        seed: of the draws.

    Returns:
        {name}_low, {name}_high for all, {name}_ratio_low, {name}_ratio_high for all but the first.
    """
    generator = np.random.default_rng(seed)
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(counts)[:-1])
    block = max(1, min(resamples, BLOCK // (len(counts) * x.shape[1]), BLOCK // int(counts.max())))
    drawn: dict[str, list[Matrix]] = {name: [] for name in readers}
    for start in range(0, resamples, block):
        sums = {name: _Sums(min(block, resamples - start), counts, x.shape[1]) for name in readers}
        for number, rows in enumerate(members):
            n = len(rows)
            draws = generator.multinomial(n, np.full(n, 1 / n), min(block, resamples - start))
            step = max(1, CHUNK // x.shape[1])
            for first in range(0, n, step):
                part, weight = x[rows[first : first + step]], draws[:, first : first + step].astype(np.float64)
                for name, read in readers.items():
                    sums[name].add(number, read(part), weight)
        for name, found in sums.items():
            drawn[name].append(found.discrimination())
    return _all_ends({name: np.concatenate(parts) for name, parts in drawn.items()})


class _Sums:
    """Sums over the drawn samples of every class, for ``size`` resamples."""

    def __init__(self, size: int, counts: NDArray[np.intp], width: int) -> None:
        self.counts = counts
        self.origins = np.zeros((len(counts), width))  # the first row of the class: a constant has exactly no spread
        self.seen = np.zeros(len(counts), bool)
        self.shifts = np.zeros((size, len(counts), width))
        self.squares = np.zeros((size, len(counts)))

    def add(self, number: int, rows: Matrix, weight: Matrix) -> None:
        """Rows (k, d) of class ``number``, and how often each was drawn (size, k)."""
        if not self.seen[number]:
            self.origins[number], self.seen[number] = rows[0], True
        part = rows - self.origins[number]
        self.shifts[:, number] += weight @ part
        self.squares[:, number] += weight @ np.einsum("kd,kd->k", part, part)

    def discrimination(self) -> Matrix:
        """Mean D (size,) over pairs of classes."""
        found = []
        for shift, squares in zip(self.shifts, self.squares, strict=True):
            shift = shift / self.counts[:, None]
            population = np.maximum(squares / self.counts - np.einsum("cd,cd->c", shift, shift), 0.0)
            unbiased = population * np.square(self.counts / (self.counts - 1))
            found.append(pairs_of(self.origins + shift, population, unbiased).mean())
        return np.array(found)


def _all_ends(found: Mapping[str, Matrix]) -> dict[str, float]:
    first = next(iter(found))
    result: dict[str, float] = {}
    for name, values in found.items():
        result |= _ends(name, values)
        if name != first:
            with np.errstate(invalid="ignore"):  # inf / inf: both are infinitely apart
                ratio = np.where(values == found[first], 1.0, values / found[first])
            result |= _ends(f"{name}_ratio", ratio)
    return result


def _ends(name: str, values: Matrix) -> dict[str, float]:
    # Not interpolated: between a number and infinity there is nothing.
    low, high = np.percentile(values, TAILS, method="nearest")
    return {f"{name}_low": float(low), f"{name}_high": float(high)}
