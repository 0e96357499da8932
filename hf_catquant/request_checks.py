"""Checks of what a user asks for; each message names the field, its rule and the value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from .formats import ACTIVATION_FORMATS, FORMATS, check_group_size
from .rotation import ROTATIONS

_MOST_BITS = 100  # of a weight on average: no format with a low-rank product beside it comes near


def check_choice(name: str, value: Any, choices: Iterable[str], extra: str = "") -> None:
    """Refuse what is none of ``choices``; ``extra`` says what else would do.

    Raises:
        ValueError: it is none.
    """
    if value not in tuple(choices):
        raise ValueError(f"{name} must be {extra}one of {', '.join(choices)}, got {value!r}")


def check_weights(name: str, value: Any) -> None:
    """Refuse what is no format.

    Raises:
        ValueError: it is none.
    """
    check_choice(name, value, FORMATS)


def check_activations(name: str, value: Any) -> None:
    """Refuse what is neither None nor a format of activations.

    Raises:
        ValueError: it is neither.
    """
    if value is not None:
        check_choice(name, value, ACTIVATION_FORMATS, "None or ")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_seed(name: str, value: Any) -> None:
    """Refuse what is no integer of 32 bits: scikit-learn takes no other seeds.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ValueError(f"{name} must be an integer from 0 to 2**32 - 1, got {value!r}")


def check_rotation(name: str, value: Any) -> None:
    """Refuse what is neither None, "auto" nor a rotation.

    Raises:
        ValueError: it is none of them.
    """
    if value is not None:
        check_choice(name, value, ("auto", *ROTATIONS), "None or ")


def check_budget(average_bits: Any, target_bytes: Any) -> None:
    """Refuse what is no budget of mixed formats: None, a number of bits a weight, or of bytes in all.

    Raises:
        ValueError: one is neither, or both are given.
    """
    bits_are_number = isinstance(average_bits, int | float) and not isinstance(average_bits, bool)
    if average_bits is not None and not (bits_are_number and 0 < average_bits < _MOST_BITS):
        raise ValueError(f"average_bits must be None or a number above 0 and below {_MOST_BITS}, got {average_bits!r}")
    bytes_are_count = isinstance(target_bytes, int) and not isinstance(target_bytes, bool)
    if target_bytes is not None and not (bytes_are_count and target_bytes > 0):
        raise ValueError(f"target_bytes must be None or a positive integer, got {target_bytes!r}")
    if None not in (average_bits, target_bytes):
        raise ValueError(f"average_bits {average_bits} and target_bytes {target_bytes} are both given: choose one")


def check_names(names: Any) -> None:
    """Refuse what is neither None nor names of modules to skip.

    Raises:
        TypeError: it is no list of names.
        ValueError: a name is no regular expression, which transformers searches it as.
    """
    if names is None:
        return
    if not isinstance(names, list | tuple | set) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"modules_to_not_convert must be None or a list of names, got {names!r}")
    for name in names:
        _check_pattern("modules_to_not_convert", name)


# The fields of a request that may differ from layer to layer, and the check of each.
OVERRIDABLE: dict[str, Callable[[str, Any], Any]] = {
    "weights": check_weights,
    "group_size": lambda name, value: check_group_size(value),
    "activations": check_activations,
    "low_rank": check_count,
    "rotation": check_rotation,
}


def check_overrides(overrides: Any) -> None:
    """Refuse what is not ``{regex: {field: value}}`` with fields of :data:`OVERRIDABLE`.

    Raises:
        TypeError: it has another shape.
        ValueError: a pattern is no regular expression, a field is unknown, or a value breaks its rule.
    """
    if not isinstance(overrides, dict):
        raise TypeError(f"overrides must be {{regex: {{field: value}}}}, got {overrides!r}")
    for pattern, fields in overrides.items():
        if not isinstance(pattern, str) or not isinstance(fields, dict):
            raise TypeError(f"overrides must be {{regex: {{field: value}}}}, got {pattern!r}: {fields!r}")
        _check_pattern("overrides", pattern)
        for field, value in fields.items():
            if field not in OVERRIDABLE:
                raise ValueError(f"overrides[{pattern!r}] must set {', '.join(OVERRIDABLE)}, got {field!r}")
            OVERRIDABLE[field](f"overrides[{pattern!r}]: {field}", value)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from error
