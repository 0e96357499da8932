"""Intervals of discrimination: the bootstrap, samples drawn again class by class.

A resample weights every sample by how often it was drawn, so its class means are one matrix product. A sample drawn twice
has distance 0 to itself, which makes the mean distance inside a class too small by (n - 1) / n on average; that is divided
out. Means, deviations and thresholds stay those of all samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .moments import Matrix, pairs_of

BLOCK = 2**23  # values of class means that are held at a time: 64 MiB
TAILS = (2.5, 97.5)  # percentiles of a 95 % interval


def intervals(
    features: Mapping[str, Matrix], index: NDArray[np.intp], counts: NDArray[np.intp], resamples: int, seed: int
) -> dict[str, float]:
    """95 % percentile intervals of the mean D over pairs of classes, and of its ratio to that of the first.

    Args:
        features: {name: (n, d)}, used as they are.
        index, counts: class numbers (n,), samples of each class (C,).
        resamples: how many; all of ``features`` see the same ones.
        seed: of the draws.

    Returns:
        {name}_low, {name}_high for all, {name}_ratio_low, {name}_ratio_high for all but the first.
    """
    generator = np.random.default_rng(seed)
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(counts)[:-1])
    width = next(iter(features.values())).shape[1]
    block = max(1, min(resamples, BLOCK // (len(counts) * width), BLOCK // int(counts.max())))
    drawn: dict[str, list[Matrix]] = {name: [] for name in features}
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        weights = [generator.multinomial(n, np.full(n, 1 / n), size).astype(np.float64) for n in counts]
        for name, x in features.items():
            drawn[name].append(_resampled(x, members, weights))
    found = {name: np.concatenate(parts) for name, parts in drawn.items()}
    first = next(iter(found))
    result: dict[str, float] = {}
    for name, values in found.items():
        result |= _ends(name, values)
        if name != first:
            with np.errstate(invalid="ignore"):  # inf / inf: both are infinitely apart
                ratio = np.where(values == found[first], 1.0, values / found[first])
            result |= _ends(f"{name}_ratio", ratio)
    return result


def _resampled(x: Matrix, members: list[NDArray[np.intp]], weights: list[Matrix]) -> Matrix:
    """Mean D (resamples,) of the rows of ``x`` under ``weights`` [(resamples, samples of the class)]."""
    counts = np.array([len(rows) for rows in members], np.float64)
    means, spread = [], []
    for rows, weight in zip(members, weights, strict=True):
        middle = x[rows].mean(0)
        part = x[rows] - middle
        shift = weight @ part / len(rows)
        means.append(middle + shift)
        traces = weight @ np.square(part).sum(1) / len(rows) - np.square(shift).sum(1)
        spread.append(np.maximum(traces, 0.0))
    all_means, population = np.stack(means, 1), np.stack(spread, 1)
    unbiased = population * np.square(counts / (counts - 1))
    return np.array([pairs_of(m, p, u).mean() for m, p, u in zip(all_means, population, unbiased, strict=True)])


def _ends(name: str, values: Matrix) -> dict[str, float]:
    # Not interpolated: between a number and infinity there is nothing.
    low, high = np.percentile(values, TAILS, method="nearest")
    return {f"{name}_low": float(low), f"{name}_high": float(high)}
