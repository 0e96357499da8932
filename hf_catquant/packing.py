"""Packing: codes to bytes and back, bit for bit. The only Python that knows bytes.

A row of K codes is packed group by group, so that every group starts on a byte: group ``g`` of width ``w`` lies at
byte ``g * packed_len(w)`` of its row. The last group of a row may be narrower and then takes only the bytes it needs.
Inside a group each storage word holds ``digits`` codes, the first code least significant, in little-endian bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .formats import Format, group_count, group_width

_AT_ONCE = 1 << 22  # codes that are packed at once: as numbers they take many times their size


def packed_width(fmt: Format, columns: int, group_size: int) -> int:
    """Bytes of one packed row of ``columns`` codes."""
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    return (groups - 1) * fmt.packed_len(width) + fmt.packed_len(columns - (groups - 1) * width)


def pack(codes: Tensor, fmt: Format, group_size: int) -> Tensor:
    """Pack codes (N, K) uint8, each below ``fmt.radix``, into (N, packed_width) uint8.

    Raises:
        ValueError: codes are not a uint8 matrix, or one is out of range.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be a (N, K) uint8 matrix, got {tuple(codes.shape)} {codes.dtype}")
    if codes.numel() and int(codes.max()) >= fmt.radix:
        raise ValueError(f"{fmt.name} codes must be below {fmt.radix}, got {int(codes.max())}")
    rows, columns = codes.shape
    if codes.numel() > _AT_ONCE and rows > 1:
        out = codes.new_empty(rows, packed_width(fmt, columns, group_size))
        for start in range(0, rows, step := max(1, _AT_ONCE // columns)):
            out[start : start + step] = pack(codes[start : start + step], fmt, group_size)
        return out
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    words_per_group = -(-width // fmt.digits)
    grouped = _pad(codes, groups * width).view(rows, groups, width)
    digits = _pad(grouped, words_per_group * fmt.digits).view(rows, groups, words_per_group, fmt.digits)
    place = torch.tensor([fmt.radix**d for d in range(fmt.digits)], dtype=torch.int32, device=codes.device)
    words = (digits.to(torch.int32) * place).sum(-1, dtype=torch.int32)
    shifts = torch.arange(fmt.nbytes, dtype=torch.int32, device=codes.device) * 8
    packed = ((words.unsqueeze(-1) >> shifts) & 255).to(torch.uint8)
    packed = packed.view(rows, groups * words_per_group * fmt.nbytes)
    return packed[:, : packed_width(fmt, columns, group_size)].contiguous()


def unpack(packed: Tensor, fmt: Format, group_size: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`: (N, packed_width) uint8 to codes (N, ``columns``) uint8."""
    return _decode(packed, fmt, group_size, columns, code_table(fmt, packed.device))


def unpack_levels(packed: Tensor, fmt: Format, group_size: int, columns: int) -> Tensor:
    """The levels that the packed codes stand for, (N, ``columns``) float32."""
    return _decode(packed, fmt, group_size, columns, level_table(fmt, packed.device))


def check_bytes(packed: Tensor, fmt: Format) -> None:
    """Refuse bytes that no code sequence packs to (243 to 255 in ternary).

    Raises:
        ValueError: such a byte is there.
    """
    limit = fmt.radix**fmt.digits - 1
    if fmt.nbytes == 1 and limit < 255 and packed.numel() and int(packed.max()) > limit:
        raise ValueError(f"a packed {fmt.name} byte must be at most {limit}, got {int(packed.max())}")


@cache
def code_table(fmt: Format, device: torch.device) -> Tensor:
    """Digits of every value that one table index can take, (entries, digits) uint8.

    One-byte words are their own index. Wider words (int3: 24 bits) are cut to index-sized halves in ``_decode``.
    """
    digits = _table_digits(fmt)
    index = torch.arange(fmt.radix**digits if fmt.nbytes > 1 else 256, dtype=torch.int32)
    place = torch.tensor([fmt.radix**d for d in range(digits)], dtype=torch.int32)
    return ((index[:, None] // place) % fmt.radix).to(torch.uint8).to(device)


@cache
def level_table(fmt: Format, device: torch.device) -> Tensor:
    """:func:`code_table` with every code replaced by its level, float32."""
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=device)
    return levels[code_table(fmt, device).long()]


def _table_digits(fmt: Format) -> int:
    # Four octal digits are 12 bits: a 4,096-entry table, two look-ups for each 24-bit word.
    return fmt.digits if fmt.nbytes == 1 else fmt.digits // 2


def _decode(packed: Tensor, fmt: Format, group_size: int, columns: int, table: Tensor) -> Tensor:
    rows = packed.shape[0]
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    group_bytes = fmt.packed_len(width)
    index = _indices(_pad(packed, groups * group_bytes), fmt)
    values = table.index_select(0, index.reshape(-1))
    values = values.view(rows, groups, group_bytes // fmt.nbytes * fmt.digits)[:, :, :width]
    return values.reshape(rows, groups * width)[:, :columns].contiguous()


def _indices(packed: Tensor, fmt: Format) -> Tensor:
    if fmt.nbytes == 1:
        return packed.to(torch.int32)
    shifts = torch.arange(fmt.nbytes, dtype=torch.int32, device=packed.device) * 8
    words = packed.view(packed.shape[0], packed.shape[1] // fmt.nbytes, fmt.nbytes).to(torch.int32)
    words = (words << shifts).sum(-1, dtype=torch.int32)
    size = fmt.radix ** _table_digits(fmt)
    return torch.stack((words % size, words // size), dim=-1)


def _pad(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[-1]
    return x if missing == 0 else torch.nn.functional.pad(x, (0, missing))
