"""The weight as the products read it: built from the stored tensors, kept beside them, never saved.

Codes are widened to 1, 2, 4 or 8 bits (ternary takes 2, int3 takes 4) and laid out in tiles of 16 rows by 256 / bits
columns, which is what a warp multiplies; ``csrc/product.cuh`` says where each code lies. Groups are padded to 32, 64 or
whole chunks of columns, rows to 16. Scales and offsets keep their dtype and lie in pairs, two rows together.

A layout belongs to the memory of the packed codes, or of a part of them (an expert). It is built when a layer comes to the
device, else at the second use (what is moved in for one use is not worth it), again if one of the tensors was written to,
and dropped with that memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import Format, get_format, group_count, group_width
from ..packing import unpack
from .cuda_compile import Unserved

STEP = 32  # columns of one 8-bit tensor-core product
_BUILD_CODES = 1 << 25  # codes that are unpacked at a time: building takes some 6 bytes for each of them


@dataclass(frozen=True)
class Layout:
    """A weight (N, K) in tiles.

    Attributes:
        tiles: (row tiles, column tiles, 512) uint8.
        scales: (row tiles, groups, 8, 2, 2) float16 or float32: row r and row r + 8, scale and offset.
        rows, columns: N and K.
        bits: of a code in a tile.
        group_steps: columns of a padded group in steps of 32, 0 for whole rows.
        chunks: turns of 128 columns (256 for one bit).
        spread: (groups, width, padded width) if groups had to be padded apart, so that x has to be as well.
        level_step, level_zero: what a code means, less the 128 that 8-bit products take off it.
    """

    tiles: Tensor
    scales: Tensor
    rows: int
    columns: int
    bits: int
    group_steps: int
    chunks: int
    spread: tuple[int, int, int] | None
    level_step: float
    level_zero: float

    @property
    def padded(self) -> int:
        """Columns of all chunks."""
        return self.chunks * chunk_width(self.bits)

    def renewed(self, other: Layout) -> Layout:
        """This layout with the values of ``other``, where it is as large: captured graphs read it where it is."""
        alike = all(
            getattr(self, field.name) == getattr(other, field.name)
            for field in fields(self)
            if field.name not in ("tiles", "scales")
        )
        pairs = ((self.tiles, other.tiles), (self.scales, other.scales))
        if not alike or any(old.shape != new.shape or old.dtype != new.dtype for old, new in pairs):
            return other
        if any(old.is_inference() for old, _ in pairs) and not torch.is_inference_mode_enabled():
            return other
        for old, new in pairs:
            old.copy_(new)
        return self

    def align(self, x: Tensor) -> Tensor:
        """x (M, K) with its columns where the tiles have theirs: contiguous, a multiple of 8 wide, on 16 bytes."""
        if self.spread is not None:
            groups, width, wide = self.spread
            x = pad(x, (0, groups * width - self.columns)).view(-1, groups, width)
            return pad(x, (0, wide - width)).view(-1, groups * wide)
        return aligned(pad(x, (0, -self.columns % 8)) if self.columns % 8 else x)


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and on 16 bytes, as vector loads want it."""
    x = x.contiguous()
    return x if x.is_meta or x.data_ptr() % 16 == 0 else x.clone()


def held_scale(scale: Tensor) -> Tensor:
    """The scale as kernels read it: float16 or float32, to which others are converted exactly."""
    return scale if scale.dtype in (torch.float16, torch.float32) else scale.float()


def level_map(fmt: Format) -> tuple[float, float]:
    """(step, zero) such that level = step * code + zero.

    Raises:
        Unserved: the levels are not evenly spaced.
    """
    step = fmt.levels[1] - fmt.levels[0]
    if any(level != fmt.levels[0] + step * code for code, level in enumerate(fmt.levels)):
        raise Unserved(f"CUDA kernels need evenly spaced levels, {fmt.name} has {fmt.levels}")
    return step, fmt.levels[0]


def code_bits(fmt: Format) -> int:
    """Bits of a code in a tile.

    Raises:
        Unserved: more than 8 would be needed, or 8 with levels other than code - 128 and an offset.
    """
    for bits in (1, 2, 4, 8):
        if fmt.radix <= 1 << bits:
            if bits == 8 and (fmt.affine or level_map(fmt) != (1.0, -128.0)):
                break
            return bits
    raise Unserved(f"CUDA kernels have no layout for the {fmt.radix} levels of {fmt.name}")


def chunk_width(bits: int) -> int:
    """Columns that a warp multiplies in a turn."""
    return max(128, 256 // bits)


def padded_group(width: int, bits: int) -> int:
    """Columns that a group of ``width`` takes: 32, 64, ... up to a chunk, then whole chunks."""
    chunk = chunk_width(bits)
    size = STEP
    while size < chunk:
        if width <= size:
            return size
        size *= 2
    return -(-width // chunk) * chunk


@torch.no_grad()
def build(packed: Tensor, scale: Tensor, offset: Tensor | None, weights: str, group_size: int, columns: int) -> Layout:
    """The layout of stored tensors, on their device.

    Raises:
        Unserved: the format has none.
    """
    fmt = get_format(weights)
    bits, (step, zero) = code_bits(fmt), level_map(fmt)
    rows, chunk = packed.shape[0], chunk_width(bits)
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    wide = padded_group(width, bits) if groups > 1 else -(-columns // chunk) * chunk
    chunks = -(-groups * wide // chunk)
    row_tiles, column_tiles = -(-rows // 16), chunks * chunk * bits // 256
    tiles = torch.empty(row_tiles, column_tiles, 512, dtype=torch.uint8, device=packed.device)
    at_once = max(1, _BUILD_CODES // (16 * chunks * chunk))
    for first in range(0, row_tiles, at_once):
        codes = unpack(packed[16 * first : 16 * (first + at_once)], fmt, group_size, columns)
        codes = pad(codes, (0, groups * width - columns)).view(-1, groups, width)
        codes = pad(codes, (0, wide - width)).view(-1, groups * wide)
        codes = pad(codes, (0, chunks * chunk - groups * wide, 0, -codes.shape[0] % 16))
        tiles[first : first + at_once] = _tiles(codes, bits)
    held_groups = groups if groups == 1 else -(-chunks * chunk // wide)
    scale = held_scale(scale)
    pairs = torch.stack((scale, torch.zeros_like(scale) if offset is None else offset.to(scale.dtype)), -1)
    pairs = pad(pairs, (0, 0, 0, held_groups - groups, 0, 16 * row_tiles - rows))
    pairs = pairs.view(row_tiles, 2, 8, held_groups, 2).permute(0, 3, 2, 1, 4).contiguous()
    return Layout(
        tiles=tiles,
        scales=pairs,
        rows=rows,
        columns=columns,
        bits=bits,
        group_steps=0 if groups == 1 else wide // STEP,
        chunks=chunks,
        spread=(groups, width, wide) if groups > 1 and wide != width else None,
        level_step=step,
        level_zero=zero + 128 * step if bits == 8 else zero,
    )


def _tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes (16 a, b * 256 / bits) to bytes (a, b, 512), as csrc/product.cuh lays them out."""
    fields = 8 // bits  # codes in a byte: the steps of a tile
    # rows: tile, rh, r        columns: tile, step, q, i0, kp, h
    split = codes.view(codes.shape[0] // 16, 2, 8, codes.shape[1] * bits // 256, fields, 4, 2, 2, 2)
    split = split.permute(0, 3, 2, 5, 7, 1, 8, 6, 4)  # tile, tile, r, q, kp, rh, h, i0, step
    out = split[..., 0].clone(memory_format=torch.contiguous_format)
    for step in range(1, fields):
        out |= split[..., step] << step * bits
    return out.view(*out.shape[:2], 512)


class Layouts:
    """Layouts by the storage, and the place in it, of the packed tensors that they belong to."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, ...], tuple[weakref.ref[Any], tuple[Any, ...], Layout | None]] = {}

    def of(
        self,
        packed: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        weights: str,
        group_size: int,
        columns: int,
        build_now: bool = False,
    ) -> Layout | None:
        """The layout, built if it has been asked for before or ``build_now``; None the first time.

        Raises:
            Unserved: the format has none.
        """
        storage = packed.untyped_storage()
        key = (id(storage), packed.data_ptr(), packed.shape[0])
        state = (*map(_state, (packed, scale, offset)), weights, group_size, columns)
        entry = self._held.get(key)
        known = entry is not None and entry[0]() is storage
        if known and entry is not None and entry[1] == state and entry[2] is not None:
            return entry[2]
        if packed.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # what a capture allocates and computes belongs to the graph
        made = build(packed, scale, offset, weights, group_size, columns) if known or build_now else None
        if made is not None and known and entry is not None and entry[2] is not None:
            made = entry[2].renewed(made)
        if made is not None and packed.is_cuda:
            _finish(packed.device)
        self._held[key] = (weakref.ref(storage, lambda gone: self._drop(key, gone)), state, made)
        return made

    def doubt(self, packed: Tensor) -> None:
        """Have the layouts of the storage of ``packed`` built again, in their places, at the next product."""
        for key, (storage, _, made) in list(self._held.items()):
            if key[0] == id(packed.untyped_storage()):
                self._held[key] = (storage, (), made)

    def __len__(self) -> int:
        return sum(entry[2] is not None for entry in self._held.values())

    def _drop(self, key: tuple[int, ...], gone: weakref.ref[Any]) -> None:
        if key in self._held and self._held[key][0] is gone:
            del self._held[key]


def _finish(device: torch.device) -> None:
    """Wait for what was queued: the next use of the layout may be on another stream."""
    torch.cuda.current_stream(device).synchronize()


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """What changes when a tensor is written to or replaced. Inference tensors count no versions."""
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
