"""Statistics of features that come in batches: what is counted, of which rows, and how several processes join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .inputs import check_classes, check_rows, checked_number, checked_pair
from .moments import Matrix, Moments, pairwise, pooled, square

CHUNK = 2**22  # values that are looked at together: 32 MiB in float64


@dataclass(frozen=True)
class Coder:
    """Binary or ternary codes of features: 1[z > threshold], or sign(z) 1[|z| > threshold], z = (x - mean) * inverse.

    Attributes:
        mean, inverse: (d,) or scalars; ``inverse`` is 1 over the deviation, 0 where that is 0.
        threshold: in deviations, a number or (d,).
        ternary: which of the two.
    """

    mean: Any
    inverse: Any
    threshold: Any
    ternary: bool

    def __call__(self, rows: Matrix) -> Matrix:
        """Codes (n, d) in float64 of rows (n, d)."""
        values = (rows - self.mean) * self.inverse
        if self.ternary:
            return np.sign(values) * (np.abs(values) > self.threshold)
        return (values > self.threshold).astype(np.float64)


class FeatureStatistics:
    """Discrimination of features that come in batches: memory is two numbers a class and feature, however many rows.

    One object for each process, thread or file, then ``merge``. It can be pickled. The quantized features need the mean
    and deviation of all rows first, so they take a second look at the data:

        plain = FeatureStatistics()
        for features, labels in batches:
            plain.add(features, labels)
        ternary = plain.quantized(threshold=0.6, ternary=True)
        for features, labels in batches:
            ternary.add(features, labels)
        plain.compute()["discrimination"], ternary.compute()["discrimination"]

    Args:
        coder: makes codes of the rows before they are counted; None: the features, standardised one by one when D is
            computed.
    """

    def __init__(self, coder: Coder | None = None) -> None:
        self.coder = coder
        self._classes: dict[Any, Moments] = {}
        self._rows = 0
        self._width: int | None = None

    def add(self, features: Any, labels: Any) -> None:
        """Add a batch.

        Args:
            features: (n, d) of any real dtype.
            labels: (n,) integers or strings.

        Raises:
            ValueError: they are not, differ in length, a value is not finite, or d is not that of the earlier batches.
        """
        x, y = checked_pair(features, labels)
        self._check_width(x.shape[1])
        for label, moments in self._counted(x, y).items():
            self._classes.setdefault(label, Moments()).merge(moments)
        self._width = x.shape[1]
        self._rows += len(x)

    def _counted(self, x: NDArray[Any], y: NDArray[Any]) -> dict[Any, Moments]:
        """Moments of the classes of a batch, all of which is read before any of it is added."""
        classes: dict[Any, Moments] = {}
        done = self._rows
        for rows, part in chunks(x, y):
            check_rows(rows, done)
            found, index, counts = np.unique(part, return_inverse=True, return_counts=True)
            rows = rows[np.argsort(index, kind="stable")]
            ends = np.cumsum(counts)
            for label, start, end in zip(found.tolist(), ends - counts, ends, strict=True):
                members = rows[start:end].astype(np.float64)
                classes.setdefault(label, Moments()).add(members if self.coder is None else self.coder(members))
            done += len(rows)
        return classes

    def merge(self, other: FeatureStatistics) -> None:
        """Add all that ``other`` has seen.

        Raises:
            TypeError: it is something else.
            ValueError: it has seen features of another width, or makes other codes of them.
        """
        if not isinstance(other, FeatureStatistics):
            raise TypeError(f"merge takes FeatureStatistics, got {type(other).__name__}: merge them one by one")
        if not _alike(self.coder, other.coder):
            raise ValueError(
                f"statistics of {_named(self.coder)} cannot take in those of {_named(other.coder)}: merge what was made "
                "with the same means, deviations and threshold"
            )
        if other._width is None:
            return
        self._check_width(other._width)
        self._width = other._width
        for label, moments in other._classes.items():
            self._classes.setdefault(label, Moments()).merge(moments)
        self._rows += other._rows

    @property
    def classes(self) -> list[Any]:
        """The labels seen so far, sorted.

        Raises:
            ValueError: some are integers and some strings.
        """
        try:
            return sorted(self._classes)
        except TypeError:
            raise ValueError("labels (references) must be all integers or all strings, got both") from None

    @property
    def count(self) -> int:
        """Rows seen so far."""
        return self._rows

    def standard(self) -> tuple[Matrix, Matrix]:
        """Mean and inverse deviation (d,) of all rows; the inverse is 0 for a constant feature, so that it becomes 0.

        Raises:
            ValueError: there are no rows yet.
        """
        if not self._rows:
            raise ValueError("there are no features yet: add some first")
        whole = Moments()
        for part in self._classes.values():
            whole.merge(part)
        spread = np.sqrt(whole.squares / whole.count)
        return whole.mean, np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)

    @property
    def threshold(self) -> float | None:
        """The threshold of the codes, None of float features."""
        return None if self.coder is None else self.coder.threshold

    def reader(self) -> Callable[[NDArray[Any]], Matrix]:
        """The function from rows (n, d) to what D is computed of: their codes, or themselves standardised."""
        if self.coder is not None:
            coder = self.coder
            return lambda rows: coder(rows.astype(np.float64))
        mean, inverse = self.standard()
        return lambda rows: (rows - mean) * inverse

    def quantized(self, threshold: float | Matrix, ternary: bool) -> FeatureStatistics:
        """Empty statistics of codes, for a second look at the data; ``threshold`` in deviations, a number or (d,).

        Raises:
            ValueError: there are no rows yet, or the threshold is not finite, of another width or, of ternary codes,
                negative.
        """
        mean, inverse = self.standard()
        return FeatureStatistics(Coder(mean, inverse, _checked_threshold(threshold, ternary, len(mean)), ternary))

    def compute(self, per_feature: bool = False, pairs: bool = False) -> dict[str, Any]:
        """Discrimination of what was added.

        Returns:
            discrimination, discrimination_min: mean and least D over pairs of classes.
            n, num_classes, num_features: sizes.
            per_feature, if asked for: D_j of every feature.
            classes, pairs, if asked for: the labels, and D of any two of them, symmetric; 1/2 on the diagonal.

        Raises:
            ValueError: there are fewer than two classes, or one has a single sample.
        """
        labels, moments = self.classes, self.moments()
        scale = 1.0 if self.coder is not None else self.standard()[1]
        found = pairwise(moments, scale)
        result: dict[str, Any] = {
            "discrimination": float(found.mean()),
            "discrimination_min": float(found.min()),
            "n": self._rows,
            "num_classes": len(labels),
            "num_features": self._width,
        }
        if per_feature:
            result["per_feature"] = pooled(moments, scale).tolist()
        if pairs:
            result |= {"classes": labels, "pairs": square(found, len(labels)).tolist()}
        return result

    def moments(self) -> list[Moments]:
        """Those of every class, in the order of ``classes``.

        Raises:
            ValueError: there are fewer than two classes, or one has a single sample.
        """
        labels = self.classes
        found = [self._classes[label] for label in labels]
        check_classes(labels, [m.count for m in found])
        return found

    def _check_width(self, width: int) -> None:
        if self._width not in (None, width):
            raise ValueError(f"features (predictions) must be of one width, got {self._width} columns and now {width}")


def _checked_threshold(threshold: Any, ternary: bool, width: int) -> Any:
    least = 0.0 if ternary else -np.inf
    if isinstance(threshold, str) or np.ndim(threshold) == 0:
        return checked_number(threshold, "threshold", least)
    values = np.asarray(threshold, np.float64)
    if values.shape != (width,):
        raise ValueError(f"threshold must be a number or ({width},), one a feature, got shape {values.shape}")
    bad = values[~(np.isfinite(values) & (values >= least))]
    if len(bad):
        rule = " and at least 0 for ternary codes" if ternary else ""
        raise ValueError(f"threshold must be finite{rule}, got {bad[0]}")
    return values


def _alike(one: Coder | None, other: Coder | None) -> bool:
    """Whether two coders are the same but for rounding."""
    if one is None or other is None:
        return one is other
    parts = [(coder.mean, coder.inverse, coder.threshold) for coder in (one, other)]
    return one.ternary == other.ternary and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*parts, strict=True)
    )


def _named(coder: Coder | None) -> str:
    return "float features" if coder is None else f"{'ternary' if coder.ternary else 'binary'} codes"


def chunks(x: NDArray[Any], y: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Rows of ``x`` (n, d), some at a time, with their labels."""
    step = max(1, CHUNK // x.shape[1])
    for start in range(0, len(x), step):
        yield x[start : start + step], y[start : start + step]
