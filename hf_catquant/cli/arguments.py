"""Numbers on the command line, refused where they are read."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def seed(text: str) -> int:
    """An integer of at least 0 that fits in 32 bits, as scikit-learn wants its seeds."""
    return _integer(text, 0, (1 << 32) - 1)


def _integer(text: str, least: int, most: int | None = None) -> int:
    value = int(text) if text.lstrip("-").isdigit() else least - 1
    if value < least or (most is not None and value > most):
        end = "" if most is None else f" and at most {most}"
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}{end}, got {text!r}")
    return value
