"""Thresholds of highest discrimination, by one sort a feature.

Of one feature, D_j (see ``moments.py``) of its codes is a function of sums over classes of code means m and second
moments e. Raising the threshold past one sample of class y changes only those of y:

    binary, 1[z > t]:             m_y -= 1 / n_y                  e_y = m_y
    ternary, sign(z) 1[|z| > t]:  m_y -= sign(z) / n_y            e_y -= 1[z != 0] / n_y

so that after sorting by z, or by |z|, cumulative sums give D_j at every threshold: O(N log N) a feature, for any number of
classes. A threshold for all features is another matter: D is the mean over pairs of classes, each pair with numerator and
denominator summed over the features. How many values of a class exceed each of some candidates says what is needed, and
products of class means give all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .moments import Matrix

CANDIDATES = 1024  # quantiles of all values among which a shared threshold is chosen
FEWEST = 64  # of them, where there are many classes
PRODUCTS = 2**24  # of class means that are held at a time: 128 MiB
SAMPLE = 2**20  # values that these quantiles are taken of
# Sums of up to millions of terms of size 1/n leave rounding errors of this size where the exact sum is 0.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Curve:
    """Numerator and denominator of D_j of one feature's codes at every threshold.

    Attributes:
        values: (n,) z or |z|, ascending.
        between, inside: (n + 1,); entry i is for a threshold that the first i values do not exceed.
        ternary: which codes.
    """

    values: Matrix
    between: Matrix
    inside: Matrix
    ternary: bool

    def best(self) -> float:
        """The threshold of highest D, 0 or halfway between two values; of equal ones the lowest. 0 for a constant.

        0 only of ternary codes that it leaves without a 0: a threshold below all values makes binary codes all alike.
        """
        lower, upper = self.values[:-1], self.values[1:]
        candidates = np.flatnonzero(lower < upper) + 1
        if self.ternary and self.values[0] > 0:
            candidates = np.append(0, candidates)
        if not len(candidates):
            return 0.0
        score = quotient(self.between[candidates], self.inside[candidates])
        chosen = candidates[int(np.argmax(score))]
        return float(0.5 * (self.values[chosen - 1] + self.values[chosen])) if chosen else 0.0


def curve(z: Matrix, index: NDArray[np.intp], counts: NDArray[np.intp], ternary: bool) -> Curve:
    """The curve of one feature.

    Args:
        z: (n,) standardised values.
        index: (n,) class numbers, 0 ... C - 1.
        counts: (C,) samples of each class, at least 2.
        ternary: which codes.
    """
    values = np.abs(z) if ternary else z
    order = np.argsort(values, kind="stable")
    step = np.sign(z[order]) if ternary else np.ones(len(z))
    index = index[order]
    weight = 1.0 / counts[index]
    start = np.bincount(index, step, len(counts))  # sums of the codes before any sample is passed
    # Mean of the sample's class before the sample is passed: what is left of its steps, class by class.
    by_class = np.argsort(index, kind="stable")
    run = np.cumsum(step[by_class])
    offset = np.repeat(np.concatenate([[0.0], np.cumsum(start)[:-1]]), np.bincount(index, minlength=len(counts)))
    passed = np.empty(len(z))
    passed[by_class] = run - step[by_class] - offset
    mean = (start[index] - passed) * weight
    of_means = _from(start @ (1 / counts), -step * weight)
    of_squares = _from(np.square(start / counts).sum(), weight * step * (weight * step - 2 * mean))
    moments = np.bincount(index, np.abs(step), len(counts)) / counts
    growth = weight * (-np.abs(step) - step * (weight * step - 2 * mean))  # of the class's population variance
    larger = counts / (counts - 1)
    population = _from((moments - np.square(start / counts)).sum(), growth)
    unbiased = _from((larger * (moments - np.square(start / counts))).sum(), larger[index] * growth)
    classes = len(counts)
    between = (classes - 1) * population + classes * of_squares - np.square(of_means)
    return Curve(values[order], between, 2 * (classes - 1) * unbiased, ternary)


def search(
    x: NDArray[Any],
    index: NDArray[np.intp],
    counts: NDArray[np.intp],
    standard: tuple[Any, Any],
    ternary: bool,
    per_feature: bool,
) -> Any:
    """Threshold of highest D in deviations: one (a float), or one for every feature (d,).

    One of a feature is the best there is for the D_j of that feature. A shared one is the best, for the mean D over pairs of
    classes, of 0 and ``CANDIDATES`` quantiles of all values, of fewer from 129 classes on; of equal ones the lowest.

    Args:
        x: (n, d) features.
        index, counts: as for :func:`curve`.
        standard: mean and inverse deviation, each (d,) or a number.
        ternary: which codes.
        per_feature: one for every feature.
    """
    mean, inverse = (np.broadcast_to(np.asarray(part, np.float64), x.shape[1]) for part in standard)
    if per_feature:
        columns = ((x[:, j].astype(np.float64) - mean[j]) * inverse[j] for j in range(x.shape[1]))
        return np.array([curve(z, index, counts, ternary).best() for z in columns])
    number = int(np.clip(PRODUCTS // len(counts) ** 2, FEWEST, CANDIDATES))
    grid = _grid(x, mean, inverse, ternary, number)
    return float(grid[int(np.argmax(mean_over_pairs(x, index, counts, (mean, inverse), grid, ternary)))])


def mean_over_pairs(
    x: NDArray[Any],
    index: NDArray[np.intp],
    counts: NDArray[np.intp],
    standard: tuple[Matrix, Matrix],
    grid: Matrix,
    ternary: bool,
) -> Matrix:
    """Mean D over pairs of classes of the codes at every threshold of ``grid`` (t,), ascending; the rest as for search."""
    classes, (mean, inverse) = len(counts), standard
    products = np.zeros((len(grid), classes, classes))
    population = np.zeros((len(grid), classes))
    step = max(1, PRODUCTS // (8 * len(grid) * classes))
    for start in range(0, x.shape[1], step):
        columns = slice(start, start + step)
        z = (x[:, columns].astype(np.float64) - mean[columns]) * inverse[columns]
        means, squares = _codes_at(z, index, counts, grid, ternary)
        products += means @ means.transpose(0, 2, 1)
        population += (squares - np.square(means)).sum(2)  # exactly 0 where the codes of a class are all alike
    unbiased = population * (counts / (counts - 1))
    norms = np.einsum("tcc->tc", products)
    a, b = np.triu_indices(classes, 1)
    found = np.empty(len(grid))
    for i in range(
        len(grid)
    ):  # candidate by candidate: all pairs of all candidates at once would be as large as products
        apart = norms[i, a] + norms[i, b] - 2 * products[i, a, b]
        found[i] = quotient(population[i, a] + population[i, b] + apart, 2 * (unbiased[i, a] + unbiased[i, b])).mean()
    return found


def _codes_at(
    z: Matrix, index: NDArray[np.intp], counts: NDArray[np.intp], grid: Matrix, ternary: bool
) -> tuple[Matrix, Matrix]:
    """Means and mean squares (t, C, d) of the codes of each class at every threshold; ``z`` (n, d) standardised."""
    size, classes = len(grid) + 1, len(counts)
    means = np.empty((len(grid), classes, z.shape[1]))
    squares = np.empty_like(means)
    for j, values in enumerate(z.T):
        cell = index * size + np.searchsorted(
            grid, np.abs(values) if ternary else values
        )  # thresholds that it exceeds
        for kept, weight in ((squares, None), (means, np.sign(values) if ternary else None)):
            sums = np.bincount(cell, weight, classes * size).reshape(classes, size)
            above = np.cumsum(sums[:, :0:-1], 1)[:, ::-1]  # entry i is of the values that exceed grid[i]
            kept[:, :, j] = (above / counts[:, None]).T
    return means, squares


def quotient(between: Matrix, inside: Matrix) -> Matrix:
    """D of numerators and denominators that carry rounding errors: 1/2 where both are 0, inf where the latter is."""
    empty = np.where(between > ROUNDING, np.inf, 0.5)
    return np.divide(between, inside, out=empty, where=inside > ROUNDING)


def _from(start: Any, steps: Matrix) -> Matrix:
    return np.concatenate([[start], start + np.cumsum(steps)])


def _grid(x: NDArray[Any], mean: Matrix, inverse: Matrix, ternary: bool, number: int) -> Matrix:
    """Candidates: 0 and so many quantiles of the values of every so-manieth row."""
    rows = x[:: max(1, x.size // SAMPLE)].astype(np.float64)
    values = (rows - mean) * inverse
    quantiles = np.quantile(np.abs(values) if ternary else values, np.linspace(0, 1, number, endpoint=False))
    return np.unique(np.append(quantiles, 0.0))
