"""How well classes stay apart in features, and in their binary and ternary quantization; numpy is all it needs.

What D is, and why sums are enough, is in ``moments.py``. Features are standardised one by one, then read again for their
codes: three looks at the data in all, of which none holds more than some rows in float64.

The one implementation: the script beside it, which ``evaluate`` copies together with these files, and ``hf_catquant``'s
functions both call it. It imports neither the package nor ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .accuracy import accuracies, check_folds, checked_classifiers
from .bootstrap import intervals
from .inputs import check_classes, checked_count, checked_flag, checked_number, checked_pair
from .moments import Matrix
from .streaming import FeatureStatistics, chunks
from .thresholds import search

# The threshold of least squared error for Gaussian features is 0.612 deviations, which is 0.767 mean magnitudes.
DEFAULT_ETA = 0.75

Batch = tuple[Any, Any]
Looks = tuple[
    FeatureStatistics, FeatureStatistics, FeatureStatistics
]  # of the float, the binary, the ternary features


@dataclass(frozen=True)
class Thresholds:
    """What is asked of the thresholds, in deviations: numbers, "mean" (eta times the mean magnitude), "best"."""

    eta: float
    binary: Any
    ternary: Any

    @classmethod
    def checked(cls, eta: Any, binary: Any, ternary: Any, words: tuple[str, ...] = ("best",)) -> Thresholds:
        """Refuse what is no threshold.

        Raises:
            ValueError: naming it.
        """
        return cls(
            checked_number(eta, "eta", 0),
            checked_number(binary, "binary_threshold", words=words),
            checked_number(ternary, "ternary_threshold", 0, words=("mean", *words)),
        )


def feature_discrimination(
    features: Any,
    labels: Any,
    eta: float = DEFAULT_ETA,
    *,
    binary_threshold: float | str = 0.0,
    ternary_threshold: float | str = "mean",
    per_feature: bool = False,
    pairs: bool = False,
    accuracy: Any = (),
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Discrimination of features standardised one by one, and of their binary and ternary quantization.

    Binary is 1[z > binary_threshold], ternary sign(z) 1[|z| > ternary_threshold] of the standardised values z. D says how
    far apart classes are on average; it and the accuracy of a classifier do not always move together. An array (a
    memory-mapped one too) is read some rows at a time and not copied, unless thresholds are searched or accuracies asked
    for.

    Args:
        features: (n, d) of any real dtype: array, tensor (bfloat16 too, on any device) or rows.
        labels: (n,) integers or strings, at least two classes of at least two samples each.
        eta: the ternary threshold "mean" is eta times the mean |z|, eta at least 0. The default is nearly the threshold of
            least squared error for Gaussian features.
        binary_threshold: in deviations; "best": the one, for all features, of highest mean D over pairs of classes on
            these very data, among 0 and 1024 quantiles of all values (fewer of them from 129 classes on).
        ternary_threshold: in deviations, "mean" or "best".
        per_feature: add D of every feature on its own.
        pairs: add D of every pair of classes.
        accuracy: "knn" (5 neighbours), "linear" (a support vector machine, C = 0.01) or both: add their accuracies in
            5-fold cross-validation; fewer folds where a class has fewer than 5 samples, at least 3. Needs scikit-learn.
        bootstrap: add 95 % intervals from so many resamples, e.g. 1000.
        seed: of the folds and the resamples.

    Returns:
        discrimination, discrimination_min: mean and least D over pairs of classes; inf if a pair has no spread inside.
        binary, ternary: mean D of the quantized features.
        binary_ratio, ternary_ratio: these over discrimination.
        binary_threshold, ternary_threshold: those that were used, in deviations.
        n, num_classes, num_features: sizes.
        per_feature, binary_per_feature, ternary_per_feature: (d,) each, if asked for.
        classes, pairs, binary_pairs, ternary_pairs: the sorted labels and (C, C) each, if asked for.
        {knn,linear}_accuracy, .._binary, .._ternary: if asked for.
        {discrimination,binary,ternary,binary_ratio,ternary_ratio}_{low,high}: if asked for.

    Raises:
        ValueError: features are not a finite matrix, labels do not match them, there are too few of a class, or an option
            is none.
    """
    x, y = checked_pair(features, labels)
    names, resamples = checked_classifiers(accuracy), checked_count(bootstrap, "bootstrap", 0)
    seed, per_feature, pairs = checked_count(seed, "seed", 0), *_flags(per_feature, pairs)
    thresholds = Thresholds.checked(eta, binary_threshold, ternary_threshold)
    classes, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    check_classes(classes.tolist(), counts.tolist())
    if names:
        check_folds(classes.tolist(), counts.tolist())
    looks = _looks(x, y, index, thresholds)
    result = _summary(looks, per_feature, pairs)
    if names:
        result |= accuracies(x, index, lambda rows, part: _readers(rows, part, thresholds), names, seed)
    if resamples:
        readers = dict(zip(("discrimination", "binary", "ternary"), (look.reader() for look in looks), strict=True))
        result |= intervals(x, readers, index, counts, resamples, seed)
    return result


def stream_discrimination(
    batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
    eta: float = DEFAULT_ETA,
    *,
    binary_threshold: float = 0.0,
    ternary_threshold: float | str = "mean",
    per_feature: bool = False,
    pairs: bool = False,
) -> dict[str, Any]:
    """:func:`feature_discrimination` of features that come in batches: memory is two numbers a class and feature.

    Args:
        batches: of (features (n, d), labels (n,)); anything that can be read three times, such as a list or a
            DataLoader, or a function that returns an iterator each time it is called.
        eta, binary_threshold, ternary_threshold, per_feature, pairs: as there, except that "best" needs all features at
            once.

    Returns:
        The same.

    Raises:
        ValueError: as there, or the batches are no pairs, or not the same at every look.
    """
    thresholds = Thresholds.checked(eta, binary_threshold, ternary_threshold, ())
    per_feature, pairs = _flags(per_feature, pairs)
    read = batches if callable(batches) else lambda: batches
    return _summary(_three_looks(lambda: _checked_batches(read()), thresholds), per_feature, pairs)


def _flags(per_feature: Any, pairs: Any) -> tuple[bool, bool]:
    return checked_flag(per_feature, "per_feature"), checked_flag(pairs, "pairs")


def _checked_batches(batches: Any) -> Iterator[Batch]:
    try:
        each = iter(batches)
    except TypeError:
        raise ValueError(
            f"batches must be (features, labels), one after the other, got {type(batches).__name__}"
        ) from None
    for batch in each:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise ValueError(f"every batch must be a pair (features, labels), got a {type(batch).__name__}{size}")
        yield batch[0], batch[1]


def _looks(x: NDArray[Any], y: NDArray[Any], index: NDArray[np.intp], thresholds: Thresholds) -> Looks:
    """Statistics of the float, binary and ternary features of arrays; searches thresholds that are "best"."""
    if "best" in (thresholds.binary, thresholds.ternary):
        plain = FeatureStatistics()
        plain.add(x, y)
        standard, counts = plain.standard(), np.bincount(index)
        binary, ternary = (
            search(x, index, counts, standard, ternary, per_feature=False) if value == "best" else value
            for value, ternary in ((thresholds.binary, False), (thresholds.ternary, True))
        )
        thresholds = Thresholds(thresholds.eta, binary, ternary)
    return _three_looks(lambda: [(x, y)], thresholds)


def _three_looks(read: Callable[[], Iterable[Batch]], thresholds: Thresholds) -> Looks:
    plain = FeatureStatistics()
    for features, labels in read():
        plain.add(features, labels)
    plain.moments()  # too few classes or samples: no need to look again
    binary, threshold, total = plain.quantized(thresholds.binary, ternary=False), thresholds.ternary, 0.0
    for features, labels in read():
        binary.add(features, labels)
        if threshold == "mean":
            total += _magnitude(features, labels, *plain.standard())
    _check_same(plain, binary)
    if threshold == "mean":
        threshold = thresholds.eta * total / (plain.count * len(plain.standard()[0]))
    ternary = plain.quantized(threshold, ternary=True)
    for features, labels in read():
        ternary.add(features, labels)
    _check_same(plain, ternary)
    return plain, binary, ternary


def _magnitude(features: Any, labels: Any, mean: Matrix, inverse: Matrix) -> float:
    return sum(float(np.abs((rows - mean) * inverse).sum()) for rows, _ in chunks(*checked_pair(features, labels)))


def _check_same(plain: FeatureStatistics, again: FeatureStatistics) -> None:
    if again.count != plain.count or again.classes != plain.classes:
        raise ValueError(
            f"batches must give the same rows at every look, got {plain.count} and then {again.count}: a generator can be "
            "read once, pass a function that makes it"
        )


def _summary(looks: Looks, per_feature: bool, pairs: bool) -> dict[str, Any]:
    plain, binary, ternary = (look.compute(per_feature, pairs) for look in looks)
    value = plain["discrimination"]
    result = {
        "discrimination": value,
        "discrimination_min": plain["discrimination_min"],
        "binary": binary["discrimination"],
        "ternary": ternary["discrimination"],
        "binary_ratio": _ratio(binary["discrimination"], value),
        "ternary_ratio": _ratio(ternary["discrimination"], value),
        "binary_threshold": looks[1].threshold,
        "ternary_threshold": looks[2].threshold,
        "n": plain["n"],
        "num_classes": plain["num_classes"],
        "num_features": plain["num_features"],
    }
    for key in ("classes", "per_feature", "pairs"):
        if key in plain:
            result[key] = plain[key]
            if key != "classes":
                result |= {f"binary_{key}": binary[key], f"ternary_{key}": ternary[key]}
    return result


def _readers(
    x: NDArray[Any], index: NDArray[np.intp], thresholds: Thresholds
) -> dict[str, Callable[[NDArray[Any]], Matrix]]:
    """What a classifier is given, fitted on training rows."""
    looks = _looks(x, index, index, thresholds)
    return dict(zip(("", "_binary", "_ternary"), (look.reader() for look in looks), strict=True))


def _ratio(value: float, base: float) -> float:
    return 1.0 if value == base else value / base  # also where both are infinite
