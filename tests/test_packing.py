"""Packing: bit for bit the layout that the module describes, for every format, width and group size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import ALL_FORMATS
from hf_catquant.formats import FORMATS, group_count, group_width
from hf_catquant.packing import check_bytes, pack, packed_width, unpack, unpack_levels


@st.composite
def packings(draw):
    """A format, a group size and random codes (N, K)."""
    fmt = FORMATS[draw(st.sampled_from(ALL_FORMATS))]
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 70))
    group_size = draw(st.one_of(st.just(-1), st.integers(1, 80)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(fmt.radix, (rows, columns), dtype=torch.uint8, generator=generator)
    return fmt, group_size, codes


def naive_pack(codes, fmt, group_size):
    """Rows of bytes, group by group and word by word, in Python's own integers."""
    width = group_width(codes.shape[1], group_size)
    rows = []
    for row in codes.tolist():
        packed = b""
        for start in range(0, len(row), width):
            group = row[start : start + width]
            for first in range(0, len(group), fmt.digits):
                word = sum(code * fmt.radix**d for d, code in enumerate(group[first : first + fmt.digits]))
                packed += word.to_bytes(fmt.nbytes, "little")
        rows.append(list(packed))
    return rows


@given(packings())
def test_bytes_are_the_described_layout(device, case):
    fmt, group_size, codes = case
    packed = pack(codes.to(device), fmt, group_size)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (codes.shape[0], packed_width(fmt, codes.shape[1], group_size))
    assert packed.tolist() == naive_pack(codes, fmt, group_size)


@given(packings())
def test_round_trip_is_exact(device, case):
    fmt, group_size, codes = case
    packed = pack(codes.to(device), fmt, group_size)
    check_bytes(packed, fmt)
    assert torch.equal(unpack(packed, fmt, group_size, codes.shape[1]).cpu(), codes)
    levels = torch.tensor(fmt.levels)[codes.long()]
    assert torch.equal(unpack_levels(packed, fmt, group_size, codes.shape[1]).cpu(), levels)


@given(packings())
def test_every_group_starts_on_a_byte(case):
    fmt, group_size, codes = case
    columns = codes.shape[1]
    width, packed = group_width(columns, group_size), pack(codes, fmt, group_size)
    for g in range(group_count(columns, group_size)):
        group = codes[:, g * width : (g + 1) * width]
        start = g * fmt.packed_len(width)
        alone = packed[:, start : start + fmt.packed_len(group.shape[1])]
        assert torch.equal(unpack(alone.contiguous(), fmt, -1, group.shape[1]), group)


@pytest.mark.parametrize(
    ("name", "codes", "expected"),
    [
        ("binary", [1, 0, 0, 0, 0, 0, 1, 1, 1], [0b11000001, 0b1]),
        ("ternary", [2, 1, 0, 0, 1, 2], [2 + 1 * 3 + 1 * 81, 2]),
        ("ternary", [2, 2, 2, 2, 2], [242]),
        ("int2", [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        ("int3", [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        ("int4", [15, 1, 8], [0x1F, 0x08]),
        ("int8", [0, 255, 128], [0, 255, 128]),
    ],
)
def test_bytes_by_hand(name, codes, expected):
    packed = pack(torch.tensor([codes], dtype=torch.uint8), FORMATS[name], -1)
    assert packed[0].tolist() == expected


@pytest.mark.parametrize("name", [name for name in ALL_FORMATS if FORMATS[name].radix < 256])
def test_code_out_of_range_is_refused(name):
    radix = FORMATS[name].radix
    codes = torch.tensor([[0, radix - 1, radix]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{name} codes must be below {radix}, got {radix}"):
        pack(codes, FORMATS[name], -1)


@pytest.mark.parametrize(
    "codes", [torch.zeros(2, 3), torch.zeros(6, dtype=torch.uint8), torch.zeros(1, 2, 3, dtype=torch.uint8)]
)
def test_codes_must_be_a_byte_matrix(codes):
    with pytest.raises(ValueError, match=r"codes must be a \(N, K\) uint8 matrix, got "):
        pack(codes, FORMATS["int4"], -1)


@pytest.mark.parametrize("byte", range(243, 256))
def test_byte_that_no_ternary_codes_give_is_refused(byte):
    with pytest.raises(ValueError, match=f"a packed ternary byte must be at most 242, got {byte}"):
        check_bytes(torch.tensor([[0, byte]], dtype=torch.uint8), FORMATS["ternary"])


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_bytes_in_range_pass(name):
    top = 242 if FORMATS[name].radix == 3 else 255
    check_bytes(torch.arange(top + 1, dtype=torch.uint8)[None], FORMATS[name])
    check_bytes(torch.empty(0, 3, dtype=torch.uint8), FORMATS[name])


def test_packing_does_not_change_its_input():
    codes = torch.tensor([[0, 1, 2, 1, 0, 2, 2]], dtype=torch.uint8)
    before = codes.clone()
    pack(codes, FORMATS["ternary"], 8)
    assert torch.equal(codes, before)


def test_codes_may_be_a_strided_view(generator):
    codes = torch.randint(3, (9, 12), dtype=torch.uint8, generator=generator)
    packed = pack(codes.T[:, ::2], FORMATS["ternary"], 8)
    assert torch.equal(packed, pack(codes.T[:, ::2].contiguous(), FORMATS["ternary"], 8))
