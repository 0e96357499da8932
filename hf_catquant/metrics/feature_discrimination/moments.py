"""Discrimination from counts, means and squared deviations of the classes, which add up over batches and processes.

    D(a, b) = (p_a + p_b + |m_a - m_b|^2) / (2 (u_a + u_b))

with the mean m (d,) of a class and the traces p, u of its population and unbiased covariance: the mean squared distance
between samples of two classes over that between samples of one (arXiv 2504.13792). It *equals* the mean over all pairs
of samples, because the numerator has population and the denominator unbiased variances. Where classes are not apart D is
1/2, give or take the chance of a small sample; what has no spread at all counts 1/2.

A single feature of many classes is judged by the same ratio, numerator and denominator each summed over all pairs:

    D_j = sum_{a<b} (p_aj + p_bj + (m_aj - m_bj)^2) / sum_{a<b} 2 (u_aj + u_bj)
        = ((C - 1) sum_a p_aj + C sum_a (m_aj - m_j)^2) / (2 (C - 1) sum_a u_aj)        m_j = mean of m_aj over classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Moments:
    """Running count, mean (d,) and sum of squared deviations from it (d,) of rows that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Matrix) -> None:
        """Add rows (n, d), n at least 1."""
        # Deviations from a row, not sums of raw values: a constant has exactly no spread, however far from zero.
        shifted = rows - rows[0]
        shift = shifted.sum(0) / len(rows)
        shifted -= shift
        part = Moments()
        part.count, part.mean, part.squares = len(rows), rows[0] + shift, np.einsum("nd,nd->d", shifted, shifted)
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Add the rows that ``other`` has seen."""
        if self.count == 0:
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
            return
        total, delta = self.count + other.count, other.mean - self.mean
        self.squares = self.squares + other.squares + np.square(delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total


def pairwise(moments: Sequence[Moments], scale: float | Matrix = 1.0) -> Matrix:
    """D (pairs,) of every pair of classes, each feature times ``scale`` (d,): (0, 1), (0, 2), ..., (1, 2), ..."""
    means = np.stack([m.mean * scale for m in moments])
    spread = np.array([float(_scaled(m.squares, scale).sum()) for m in moments])
    counts = np.array([m.count for m in moments])
    return pairs_of(means, spread / counts, spread / (counts - 1))


def pairs_of(means: Matrix, population: Matrix, unbiased: Matrix) -> Matrix:
    """D (pairs,) of classes with ``means`` (C, d) and traces (C,) of their population and unbiased covariance."""
    found = []
    for a in range(len(means) - 1):  # class by class: all differences at once would be (pairs, d)
        rest = slice(a + 1, None)
        between = population[a] + population[rest] + np.square(means[rest] - means[a]).sum(1)
        found.append(ratio(between, 2 * (unbiased[a] + unbiased[rest])))
    return np.concatenate(found)


def pooled(moments: Sequence[Moments], scale: float | Matrix = 1.0) -> Matrix:
    """D_j (d,) of every feature on its own; ``scale`` only tells a feature that counts as constant, where it is 0."""
    means = np.stack([m.mean * scale for m in moments])
    squares = np.stack([_scaled(m.squares, scale) for m in moments])
    counts = np.array([[m.count] for m in moments])
    classes = len(moments)
    between = (classes - 1) * (squares / counts).sum(0) + classes * np.square(means - means.mean(0)).sum(0)
    return ratio(between, 2 * (classes - 1) * (squares / (counts - 1)).sum(0))


def _scaled(squares: Matrix, scale: float | Matrix) -> Matrix:
    """Squares of deviations times ``scale``, whose own square overflows where they are small."""
    return np.square(np.sqrt(squares) * scale)


def ratio(between: Matrix, inside: Matrix) -> Matrix:
    """between / inside; 1/2 where both are 0, inf where only the latter is."""
    empty = np.where(between > 0, np.inf, 0.5)
    return np.divide(between, inside, out=empty, where=inside > 0)


def square(pairs: Matrix, classes: int) -> Matrix:
    """The symmetric matrix (C, C) of values of pairs (0, 1), (0, 2), ..., with 1/2 on the diagonal."""
    full = np.full((classes, classes), 0.5)
    upper = np.triu_indices(classes, 1)
    full[upper] = full.T[upper] = pairs
    return full
