"""Accuracy of simple classifiers on float, binary and ternary features, by stratified cross-validation.

Means, deviations and thresholds are those of the training folds: nothing is known of the rows that are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .moments import Matrix

CLASSIFIERS = ("knn", "linear")
FOLDS = 5  # at most: as many as the smallest class has samples
LEAST = 3  # samples of a class, so that two are left to learn from
NEIGHBORS = 5
SVM_C = 0.01  # regularised enough that the 0/1 and the -1/0/1 codes of hundreds of features do not overfit


def checked_classifiers(value: Any) -> tuple[str, ...]:
    """The names in ``value``, one or several, each once.

    Raises:
        ValueError: one is not a classifier, or they are no names at all.
    """
    names = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    unknown = [name for name in names if name not in CLASSIFIERS]
    if unknown:
        raise ValueError(f"accuracy must name classifiers of {', '.join(CLASSIFIERS)}, got {unknown[0]!r}")
    return tuple(dict.fromkeys(names))


def check_folds(labels: Sequence[Any], counts: Sequence[int]) -> None:
    """Refuse a class of which a training fold would keep a single sample.

    Raises:
        ValueError: naming the class.
    """
    least = int(np.argmin(counts))
    if counts[least] < LEAST:
        raise ValueError(
            f"accuracy needs at least {LEAST} samples of every class, class {labels[least]} has {counts[least]}: add "
            "some, drop it, or leave accuracy out"
        )


def accuracies(
    x: NDArray[Any],
    index: NDArray[np.intp],
    fit: Callable[[NDArray[Any], NDArray[np.intp]], Mapping[str, Callable[[NDArray[Any]], Matrix]]],
    names: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """Share of rows classified right.

    Args:
        x: (n, d) features.
        index: (n,) class numbers.
        fit: from training rows and their classes to {suffix: function from rows to what a classifier reads}.
        names: of ``CLASSIFIERS``.
        seed: of the folds.

    Returns:
        {name}_accuracy{suffix} for every classifier and suffix.
    """
    from sklearn.model_selection import StratifiedKFold  # a second of importing, which D itself does not need

    folds = StratifiedKFold(min(FOLDS, int(np.bincount(index).min())), shuffle=True, random_state=seed)
    right: dict[str, int] = {}
    for train, test in folds.split(x, index):
        for suffix, read in fit(x[train], index[train]).items():
            seen, asked = read(x[train]), read(x[test])
            for name in names:
                model = _classifier(name, len(train), seed).fit(seen, index[train])
                key = f"{name}_accuracy{suffix}"
                right[key] = right.get(key, 0) + int((model.predict(asked) == index[test]).sum())
    return {key: value / len(x) for key, value in right.items()}


def _classifier(name: str, rows: int, seed: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC

    if name == "knn":
        return KNeighborsClassifier(min(NEIGHBORS, rows))
    return LinearSVC(C=SVM_C, random_state=seed, max_iter=10_000)
