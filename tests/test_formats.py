"""Formats: the table is what the documents say, and bad names and sizes are refused in one clear line."""

from __future__ import annotations

import pytest

from helpers import ALL_FORMATS
from hf_catquant.formats import (
    ACTIVATION_FORMATS,
    FORMATS,
    check_group_size,
    get_format,
    group_count,
    group_width,
)

# name: (levels, stored bits a code, carries an offset)
EXPECTED = {
    "binary": ((-1, 1), 1.0, True),
    "ternary": ((-1, 0, 1), 1.6, True),
    "int2": (range(-2, 2), 2.0, True),
    "int3": (range(-4, 4), 3.0, True),
    "int4": (range(-8, 8), 4.0, True),
    "int8": (range(-128, 128), 8.0, False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_levels_bits_and_offset(name):
    fmt = FORMATS[name]
    levels, bits, affine = EXPECTED[name]
    assert fmt.levels == tuple(levels)
    assert fmt.storage_bits == bits
    assert fmt.affine is affine


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_row_of_the_table_is_sound(name):
    fmt = FORMATS[name]
    assert fmt.name == name
    assert list(fmt.levels) == sorted(set(fmt.levels)), "levels ascend without repeats"
    assert fmt.radix <= 256, "a code is a byte before it is packed"
    assert fmt.radix**fmt.digits <= 256**fmt.nbytes, "a full word fits its bytes"
    assert fmt.nbytes < 4, "a word fits int32"
    assert fmt.nbytes == 1 or fmt.digits % 2 == 0, "words of several bytes are decoded in two halves"


def test_bits_are_rounded_up_to_an_integer():
    assert [FORMATS[name].bits for name in ("binary", "ternary", "int3")] == [1, 2, 3]


def test_five_ternary_codes_take_one_byte():
    ternary = FORMATS["ternary"]
    assert [ternary.packed_len(count) for count in (1, 5, 6, 128)] == [1, 1, 2, 26]


def test_int3_takes_three_bytes_for_eight_codes():
    assert [FORMATS["int3"].packed_len(count) for count in (1, 8, 9)] == [3, 3, 6]


def test_activations_are_the_integer_formats():
    assert ACTIVATION_FORMATS == ("int2", "int3", "int4", "int8")


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"format must be one of binary, ternary, .*, got 'int5'"):
        get_format("int5")


@pytest.mark.parametrize("group_size", [-1, 8, 64, 128, 4096])
def test_group_size_is_accepted(group_size):
    assert check_group_size(group_size) == group_size


@pytest.mark.parametrize("group_size", [0, -8, 4, 20, 12.0, True, "128", None])
def test_group_size_is_refused(group_size):
    with pytest.raises(ValueError, match=r"group_size must be -1 or a positive multiple of 8, got "):
        check_group_size(group_size)


@pytest.mark.parametrize(
    ("columns", "group_size", "width", "count"),
    [(128, -1, 128, 1), (128, 64, 64, 2), (130, 64, 64, 3), (27, 128, 27, 1), (1, 8, 1, 1)],
)
def test_groups_of_a_row(columns, group_size, width, count):
    assert group_width(columns, group_size) == width
    assert group_count(columns, group_size) == count
