"""What the metric takes: features, labels and options, checked before anything is computed; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 1e150  # squares of larger values overflow
EXACT = 2**53  # the largest integer up to which every one is a float64
SMALL = 1 / LIMIT  # squares of smaller values are 0


def as_array(values: Any) -> Any:
    """A tensor as an array; bfloat16 and float8, which numpy does not have, as float32. Anything else as it is.

    Raises:
        ValueError: it is sparse, or some of it is masked: numpy would take neither for what it is, without a word.
    """
    tensor = hasattr(values, "detach")
    if hasattr(values, "toarray") or (tensor and str(values.layout) != "torch.strided"):
        way = "to_dense()" if tensor else "toarray()"
        raise ValueError(f"data must be dense, got a sparse {type(values).__name__}: call its {way}")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError("data must have no masked values, which numpy reads as if they were not: drop their rows")
    if tensor:  # a torch tensor, without importing torch
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()
    if isinstance(values, list | tuple) and any(hasattr(row, "detach") for row in values):
        return [as_array(row) for row in values]
    return values


def checked_features(features: Any) -> NDArray[Any]:
    """Features as a matrix (n, d) of real numbers; whether they are finite is seen when they are read.

    Raises:
        ValueError: they are no such matrix.
    """
    values = as_array(features)
    try:
        x = np.asarray(values)
        if x.dtype == object and x.ndim == 1:  # a column of vectors
            x = np.asarray(as_array(list(x)))
    except ValueError as error:
        raise ValueError(f"features (predictions) must be rows of one length{_uneven(features)}") from error
    if x.ndim != 2 or x.size == 0:
        found = f"shape {x.shape}" if x.ndim else type(features).__name__
        raise ValueError(f"features (predictions) must be (n, d) with at least one row and column, got {found}")
    if x.dtype == object:
        x = _of_numbers(x)
    if x.dtype.kind not in "fiub":
        raise ValueError(f"features (predictions) must be real numbers, got {x.dtype}")
    return x


def _of_numbers(x: NDArray[Any]) -> NDArray[np.float64]:
    """A matrix that numpy takes for objects, as pandas gives columns that may have gaps."""
    bad = [value for value in x.flat if not isinstance(value, int | float | np.integer | np.floating | np.bool_)]
    if bad:
        raise ValueError(f"features (predictions) must be real numbers, got {bad[0]!r}")
    return x.astype(np.float64)


def checked_labels(labels: Any) -> NDArray[Any]:
    """Labels (n,): integers or strings; whole numbers in floats count as integers.

    Raises:
        ValueError: they are something else, or some are integers and some strings.
    """
    labels = as_array(labels)
    try:
        y = np.asarray(labels)
    except ValueError as error:
        raise ValueError(
            "labels (references) must be (n,) integers or strings, got rows of several lengths"
        ) from error
    if y.dtype.kind in "OUT" and y.ndim == 1:  # T: strings of any length, from numpy 2 on
        y = _of_objects(labels, y)
    elif y.dtype.kind == "f":
        y = _of_floats(y)
    if y.size and (y.ndim != 1 or y.dtype.kind not in "iubU"):
        found = f"{y.dtype} of shape {y.shape}" if y.ndim else type(labels).__name__
        raise ValueError(f"labels (references) must be (n,) integers or strings, got {found}")
    return y


def _of_objects(labels: Any, y: NDArray[Any]) -> NDArray[Any]:
    """Labels that numpy takes for strings or for objects, as it should have taken them."""
    kinds = [isinstance(label, str) for label in labels]
    if all(kinds):
        return y if y.dtype.kind == "U" else np.array(y.tolist(), str)
    if any(kinds) and all(isinstance(label, str | int | np.integer) for label in labels):
        raise ValueError("labels (references) must be all integers or all strings, got both")
    bad = [label for label in labels if not isinstance(label, str | int | np.integer)]
    if bad:
        raise ValueError(f"labels (references) must be (n,) integers or strings, got {bad[0]!r}")
    large = [label for label in labels if not -(2**63) <= label < 2**63]
    if large:
        raise ValueError(f"labels (references) must be integers of 64 bits, got {large[0]}: pass them as strings")
    return np.array([int(label) for label in labels], np.int64)


def _of_floats(y: NDArray[Any]) -> NDArray[Any]:
    """Floats that are whole, and small enough to be told apart, as integers."""
    whole = np.isfinite(y) & (np.abs(y) <= EXACT)
    bad = y[~whole | (np.where(whole, y, 0) % 1 != 0)]
    if bad.size:
        raise ValueError(f"labels (references) must be (n,) integers or strings, got {bad[0]} in {y.dtype}")
    return y.astype(np.int64)


def checked_pair(features: Any, labels: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features (n, d) and their labels (n,).

    Raises:
        ValueError: either is not what it must be, or they differ in length.
    """
    x, y = checked_features(features), checked_labels(labels)
    if len(x) != len(y):
        raise ValueError(
            f"features (predictions) and labels (references) must be of one length, got {len(x)} and {len(y)}"
        )
    return x, y


def check_rows(rows: NDArray[Any], start: int) -> None:
    """Refuse rows (n, d), the first of which is row ``start`` of all, with a value that is not finite or too large.

    So are rows that are all too small, but not all 0.

    Raises:
        ValueError: naming the value and its row.
    """
    low, high = float(rows.min()), float(rows.max())
    if 0 < max(-low, high) < SMALL:
        raise ValueError(
            f"features (predictions) must not all be less than {SMALL:g} in size, got {max(-low, high):g} at most from "
            f"row {start} on: multiply them by one large number, which leaves D what it is"
        )
    if low > -LIMIT and high < LIMIT:  # false for nan
        return
    good = np.abs(rows.astype(np.float64)) < LIMIT
    row = int(np.flatnonzero(~good.all(1))[0])
    raise ValueError(
        f"features (predictions) must be finite and less than {LIMIT:g} in size, got {rows[row][~good[row]][0]} in row "
        f"{start + row}"
    )


def check_classes(labels: Sequence[Any], counts: Sequence[int]) -> None:
    """Refuse fewer than two classes, and a class of one sample.

    Raises:
        ValueError: naming the class.
    """
    if len(labels) < 2:
        raise ValueError(
            f"labels (references) must have at least two classes, got {f'only {labels[0]}' if labels else 'none'}"
        )
    least = int(np.argmin(counts))
    if counts[least] < 2:
        raise ValueError(
            f"every class must have at least two samples, class {labels[least]} has one: add some or drop it"
        )


def checked_number(value: Any, name: str, least: float = -np.inf, words: Sequence[str] = ()) -> Any:
    """A finite number of at least ``least`` as a float, or one of ``words`` as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) and value in words:
        return value
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not least <= value < np.inf or value == -np.inf:
        rule = "a finite number" + (f" of at least {least:g}" if least > -np.inf else "")
        raise ValueError(f"{name} must be {' or '.join([rule, *map(repr, words)])}, got {value!r}")
    return float(value)


def checked_count(value: Any, name: str, least: int) -> int:
    """An integer of at least ``least``.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def checked_flag(value: Any, name: str) -> bool:
    """True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _uneven(features: Any) -> str:
    lengths = [len(row) if hasattr(row, "__len__") else 0 for row in features]
    other = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
    return "" if other is None else f", got {lengths[0]} values in row 0 and {lengths[other]} in row {other}"
