"""How well classes stay apart in features, from running moments; numpy and the standard library only.

    D(a, b) = (p_a + p_b + |m_a - m_b|^2) / (2 (u_a + u_b))

with the mean m (d,) of a class and the traces p, u of its population and unbiased covariance: the mean squared distance
between samples of two classes over that between samples of one (arXiv 2504.13792). It *equals* the mean over all pairs
of samples, because the numerator has population and the denominator unbiased variances. Where classes are not apart D is
1/2, give or take the chance of a small sample; what has no spread at all counts 1/2.

The one implementation: the script beside it, which ``evaluate`` copies together with this file, and
``hf_catquant.feature_discrimination`` both call it. It imports neither the package nor ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# The threshold of least squared error for Gaussian features is 0.612 deviations, which is 0.767 mean magnitudes.
DEFAULT_ETA = 0.75

LIMIT = 1e150  # squares of larger values overflow
CHUNK = 2**21  # values that are float64 at a time: 16 MiB


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
        shift = shifted.mean(0)
        part = Moments()
        part.count, part.mean, part.squares = len(rows), rows[0] + shift, np.square(shifted - shift).sum(0)
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


def feature_discrimination(features: Any, labels: Any, eta: float = DEFAULT_ETA) -> dict[str, Any]:
    """Discrimination of features standardised one by one, and of their binary and ternary quantization.

    Args:
        features: (n, d) numbers.
        labels: (n,) integers, at least two classes of at least two samples each.
        eta: ternary keeps the sign of values larger than eta times the mean magnitude; binary is 1[value > 0].

    Returns:
        discrimination, discrimination_min: mean and least D over pairs of classes; inf if a pair has no spread inside.
        binary, ternary: mean D of the quantized features.
        binary_ratio, ternary_ratio: these over discrimination.
        n, num_classes, num_features: sizes.

    Raises:
        ValueError: features are not a finite matrix, labels do not match them, or there are too few of a class.
    """
    x, y = _features(features), _labels(labels)
    classes = _classes(x, y)
    eta = _checked_eta(eta)
    moments = class_moments(x, classes)
    mean, inverse = _standard(moments)
    size = sum(float(np.abs((rows - mean) * inverse).sum()) for rows in _chunks(x)) / x.size
    plain = pairwise(moments, inverse)
    binary = pairwise(class_moments(x, classes, lambda rows: (rows > mean).astype(np.float64)))
    ternary = pairwise(class_moments(x, classes, lambda rows: _ternary((rows - mean) * inverse, eta * size)))
    value, of_binary, of_ternary = float(plain.mean()), float(binary.mean()), float(ternary.mean())
    return {
        "discrimination": value,
        "discrimination_min": float(plain.min()),
        "binary": of_binary,
        "ternary": of_ternary,
        "binary_ratio": _ratio(of_binary, value),
        "ternary_ratio": _ratio(of_ternary, value),
        "n": len(x),
        "num_classes": len(classes),
        "num_features": x.shape[1],
    }


def class_moments(
    x: NDArray[Any], classes: list[NDArray[np.intp]], transform: Callable[[Matrix], Matrix] = lambda rows: rows
) -> list[Moments]:
    """Moments of each class of the rows of ``x`` (n, d) after ``transform``; ``classes`` holds its row numbers."""
    found = []
    for members in classes:
        moments = Moments()
        for rows in _chunks(x, members):
            moments.add(transform(rows))
        found.append(moments)
    return found


def pairwise(moments: list[Moments], scale: float | Matrix = 1.0) -> Matrix:
    """D (pairs,) of every pair of classes, each feature times ``scale`` (d,): (0, 1), (0, 2), ..., (1, 2), ..."""
    means = np.stack([m.mean * scale for m in moments])
    spread = np.array([float((m.squares * np.square(scale)).sum()) for m in moments])
    counts = np.array([m.count for m in moments])
    population, unbiased = spread / counts, spread / (counts - 1)
    found = []
    for a in range(len(moments) - 1):  # class by class: all differences at once would be (pairs, d)
        rest = slice(a + 1, None)
        between = population[a] + population[rest] + np.square(means[rest] - means[a]).sum(1)
        inside = 2 * (unbiased[a] + unbiased[rest])
        apart = np.where(between > 0, np.inf, 0.5)
        found.append(np.divide(between, inside, out=apart, where=inside > 0))
    return np.concatenate(found)


def _standard(moments: list[Moments]) -> tuple[Matrix, Matrix]:
    """Mean and inverse deviation (d,) of all rows; a constant feature has 0 for it, so that it becomes 0."""
    whole = Moments()
    for part in moments:
        whole.merge(part)
    spread = np.sqrt(whole.squares / whole.count)
    return whole.mean, np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)


def _ternary(values: Matrix, threshold: float) -> Matrix:
    return np.sign(values) * (np.abs(values) > threshold)


def _ratio(value: float, base: float) -> float:
    return 1.0 if value == base else value / base  # also where both are infinite


def _chunks(x: NDArray[Any], members: NDArray[np.intp] | None = None) -> Iterator[Matrix]:
    """The rows of ``x``, or those ``members`` of it, some at a time as float64."""
    step = max(1, CHUNK // x.shape[1])
    for start in range(0, len(x if members is None else members), step):
        part = slice(start, start + step)
        yield x[part if members is None else members[part]].astype(np.float64)


def _features(features: Any) -> NDArray[Any]:
    try:
        x = np.asarray(features)
    except ValueError as error:
        raise ValueError(f"features (predictions) must be rows of one length{_uneven(features)}") from error
    if x.ndim != 2 or x.size == 0:
        raise ValueError(
            f"features (predictions) must be (n, d) with at least one row and column, got shape {x.shape}"
        )
    if x.dtype.kind not in "fiub":
        raise ValueError(f"features (predictions) must be real numbers, got {x.dtype}")
    start = 0
    for rows in _chunks(x):
        bad = np.flatnonzero(~(np.abs(rows) < LIMIT).all(1))
        if len(bad):
            row = rows[bad[0]]
            value = row[~(np.abs(row) < LIMIT)][0]
            raise ValueError(
                f"features (predictions) must be finite and less than {LIMIT:g} in size, got {value} in row {start + bad[0]}"
            )
        start += len(rows)
    return x


def _checked_eta(eta: Any) -> float:
    if not isinstance(eta, int | float | np.integer | np.floating) or not 0 <= eta < np.inf:
        raise ValueError(f"eta must be a finite number of at least 0, got {eta!r}")
    return float(eta)


def _uneven(features: Any) -> str:
    lengths = [len(row) if hasattr(row, "__len__") else 0 for row in features]
    other = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
    return "" if other is None else f", got {lengths[0]} values in row 0 and {lengths[other]} in row {other}"


def _labels(labels: Any) -> NDArray[Any]:
    try:
        y = np.asarray(labels)
    except ValueError as error:
        raise ValueError("labels (references) must be (n,) integers, got rows of several lengths") from error
    if y.size and (y.ndim != 1 or y.dtype.kind not in "iub"):
        raise ValueError(f"labels (references) must be (n,) integers, got {y.dtype} of shape {y.shape}")
    return y


def _classes(x: NDArray[Any], y: NDArray[Any]) -> list[NDArray[np.intp]]:
    """Row numbers of each class, in the order of the labels."""
    if len(x) != len(y):
        raise ValueError(
            f"features (predictions) and labels (references) must be of one length, got {len(x)} and {len(y)}"
        )
    labels, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(labels) < 2:
        raise ValueError(f"labels (references) must have at least two classes, got only {labels[0]}")
    if counts.min() < 2:
        raise ValueError(
            f"every class must have at least two samples, class {labels[counts.argmin()]} has one: add some or drop it"
        )
    return np.split(np.argsort(index, kind="stable"), np.cumsum(counts)[:-1])
