"""Formats: scalar codebooks and the storage words that hold them.

The one equation of the package is

    w_hat[n, k] = scale[n, g] * level[code[n, k]] + offset[n, g]        g = k // group_size

A :class:`Format` is the ``level`` table together with the storage word: ``digits`` base-``radix`` codes, least
significant first, in ``nbytes`` little-endian bytes. Nothing outside this file and ``packing.py`` knows the levels or
the bytes of a format; a new codebook is a new row of :data:`FORMATS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A scalar codebook and its storage word.

    Attributes:
        name: the name that users write, lower case.
        levels: the values a code stands for, ascending; code ``c`` means ``levels[c]``.
        digits: codes in one storage word.
        nbytes: bytes in one storage word.
        affine: whether a group of this format carries an offset beside its scale. Few levels need it; 256 do not.
    """

    name: str
    levels: tuple[float, ...]
    digits: int
    nbytes: int
    affine: bool

    @property
    def radix(self) -> int:
        """Number of levels, the base of a storage word."""
        return len(self.levels)

    @property
    def level_step(self) -> float | None:
        """What neighbouring levels are apart, None where that differs."""
        step = self.levels[1] - self.levels[0]
        return step if all(b - a == step for a, b in zip(self.levels, self.levels[1:], strict=False)) else None

    @property
    def storage_bits(self) -> float:
        """Bits that one code takes in a full storage word (1.6 for ternary: 5 codes in a byte)."""
        return 8 * self.nbytes / self.digits

    @property
    def bits(self) -> int:
        """Storage bits rounded up to an integer, as the Hub's pages read it."""
        return math.ceil(self.storage_bits)

    def packed_len(self, count: int) -> int:
        """Bytes that hold ``count`` codes: whole words, the last one padded with code 0."""
        return -(-count // self.digits) * self.nbytes


def _integer(bits: int, digits: int, nbytes: int, affine: bool = True) -> Format:
    half = 1 << (bits - 1)
    return Format(f"int{bits}", tuple(float(v) for v in range(-half, half)), digits, nbytes, affine)


# binary {0, 1} is the same affine map as {-1, +1}: scale' = 2 * scale, offset' = offset - scale.
FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("binary", (-1.0, 1.0), digits=8, nbytes=1, affine=True),
        Format("ternary", (-1.0, 0.0, 1.0), digits=5, nbytes=1, affine=True),
        # Without offsets, for narrow layers, where they take a fifth of the bits, and for files of other runtimes.
        Format("ternary_symmetric", (-1.0, 0.0, 1.0), digits=5, nbytes=1, affine=False),
        _integer(2, digits=4, nbytes=1),
        _integer(3, digits=8, nbytes=3),
        _integer(4, digits=2, nbytes=1),
        _integer(8, digits=1, nbytes=1, affine=False),
    )
}

# One bit or three levels are too few for the values that flow between layers.
ACTIVATION_FORMATS: tuple[str, ...] = tuple(name for name in FORMATS if name.startswith("int"))


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        ValueError: there is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def check_group_size(group_size: int) -> int:
    """``group_size`` itself, if it is -1 (one group a row) or a positive multiple of 8.

    Raises:
        ValueError: it is neither.
    """
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or (group_size != -1 and (group_size < 8 or group_size % 8)):
        raise ValueError(f"group_size must be -1 or a positive multiple of 8, got {group_size!r}")
    return group_size


def group_width(columns: int, group_size: int) -> int:
    """Columns that share a scale in a row of ``columns``: ``group_size``, or the whole row if shorter or -1."""
    return columns if group_size == -1 else min(group_size, columns)


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of ``columns``; the last one may be narrower than the others."""
    return -(-columns // group_width(columns, group_size))
