"""Quantized matrices as blocks of GGML: the codes are moved, nothing is rounded twice.

    w = d * q + m        in blocks of 32 or 256 columns, d and m float16

| type | values of q | m | columns | bytes |
|---|---|---|---|---|
| TQ1_0 | -1, 0, 1 | 0 | 256 | 54 |
| TQ2_0 | -1, 0, 1 | 0 | 256 | 66 |
| Q4_0 | -8 ... 7 | 0 | 32 | 18 |
| Q4_1 | 0 ... 15 | yes | 32 | 20 |
| Q8_0 | -128 ... 127 | 0 | 32 | 34 |

Ours is w = scale * level + offset in groups: the same where a group is whole blocks and float16 holds d and m. The
layouts of the bytes are those of ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..formats import get_format, group_count, group_width
from ..layers import QuantizedModule
from ..packing import unpack

TOLERANCE = 1 / 64  # of a step: m rounded to float16 moves a weight by less


@dataclass(frozen=True)
class Block:
    """A type of GGML.

    Attributes:
        name: as GGML has it.
        columns: of a block.
        low, high: least and largest q.
        has_min: whether there is an m.
        pack: (blocks, columns) int16 of q to (blocks, bytes) uint8 without d and m.
        tail: whether d comes behind the codes.
    """

    name: str
    columns: int
    low: int
    high: int
    has_min: bool
    pack: Callable[[np.ndarray], np.ndarray]
    tail: bool = False


@dataclass(frozen=True)
class Encoded:
    """A matrix in blocks: ``data`` (N, bytes) uint8 of ``block``, and how far a weight moved at most, in steps."""

    block: Block
    data: np.ndarray
    moved: float


def encode(module: QuantizedModule, rows: torch.Tensor, ternary: str = "TQ2_0") -> Encoded | None:
    """The rows of a layer's weight in the smallest type that holds them; None where none does.

    Args:
        module: neither rotated nor with a low-rank product.
        rows: order of the rows, (N,) int64.
        ternary: type for three levels without an offset.
    """
    fmt, columns = get_format(module.scheme.weights), module.columns
    width, groups = group_width(columns, module.scheme.group_size), group_count(columns, module.scheme.group_size)
    step, least = int(fmt.levels[1] - fmt.levels[0]), int(fmt.levels[0])
    scale = module.weight_scale[rows].double()
    offset = torch.zeros_like(scale) if module.weight_offset is None else module.weight_offset[rows].double()
    centred = not bool(offset.any())
    for block in _candidates(ternary):
        # With an m any level may be called 0; without one q is the level itself.
        low, d = (0, scale * step) if block.has_min else (least, scale)
        high = len(fmt.levels) - 1 if block.has_min else int(fmt.levels[-1])
        m = offset + scale * least if block.has_min else torch.zeros_like(scale)
        if low < block.low or high > block.high or columns % block.columns or not (centred or block.has_min):
            continue
        if groups > 1 and width % block.columns:
            continue
        moved = _moved(d, m, max(-low, high))
        if moved > TOLERANCE:
            continue
        codes = unpack(module.weight_packed[rows], fmt, module.scheme.group_size, columns).cpu().numpy()
        q = codes.astype(np.int16) + low if block.has_min else codes.astype(np.int16) * step + least
        repeats = width // block.columns
        numbers = [_halves(d, repeats, columns // block.columns)]
        if block.has_min:
            numbers.append(_halves(m, repeats, columns // block.columns))
        return Encoded(block, _assembled(block, q, numbers), moved)
    return None


def _candidates(ternary: str) -> list[Block]:
    return [block for block in BLOCKS if not block.name.startswith("TQ") or block.name == ternary]


def _moved(d: torch.Tensor, m: torch.Tensor, most: int) -> float:
    """How far float16 moves a weight at most, in steps of its group; where there is no step, in its own size."""
    error = (d - d.half().double()).abs() * most + (m - m.half().double()).abs()
    unit = torch.where(d != 0, d.abs(), torch.where(m != 0, m.abs(), torch.ones_like(m)))
    return float((error / unit).nan_to_num(nan=float("inf")).max())


def _halves(values: torch.Tensor, repeats: int, blocks: int) -> np.ndarray:
    """(N, G) as float16 bytes of every block, (N * blocks, 2) uint8."""
    each = values.half().repeat_interleave(repeats, dim=1)[:, :blocks].contiguous().cpu().numpy()
    return each.astype("<f2").reshape(-1, 1).view(np.uint8)


def _assembled(block: Block, q: np.ndarray, numbers: list[np.ndarray]) -> np.ndarray:
    packed = block.pack(q.reshape(-1, block.columns))
    parts = [packed, *numbers] if block.tail else [*numbers, packed]
    return np.concatenate(parts, axis=1).reshape(len(q), -1)


def _pack_tq2(q: np.ndarray) -> np.ndarray:
    """Two bits; byte b of a half block holds columns b, 32 + b, 64 + b and 96 + b of it."""
    fields = (q + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    return np.bitwise_or.reduce(fields << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(-1, 64)


def _pack_tq1(q: np.ndarray) -> np.ndarray:
    """Five trits a byte, as the fixed-point fraction (first trit first) that decoding multiplies by 3 again and again."""
    trits = (q + 1).astype(np.uint16)
    long = trits[:, :160].reshape(-1, 5, 32)
    short = trits[:, 160:240].reshape(-1, 5, 16)
    rest = trits[:, 240:].reshape(-1, 4, 4)
    rest = np.concatenate([rest, np.zeros_like(rest[:, :1])], axis=1)
    weights = np.array([81, 27, 9, 3, 1], np.uint16)[:, None]
    return np.concatenate(
        [((part * weights).sum(1) * 256 + 242) // 243 for part in (long, short, rest)], axis=1
    ).astype(np.uint8)


def _pack_nibbles(low: int) -> Callable[[np.ndarray], np.ndarray]:
    """Four bits; byte b holds columns b and 16 + b."""

    def pack(q: np.ndarray) -> np.ndarray:
        fields = (q - low).astype(np.uint8)
        return fields[:, :16] | (fields[:, 16:] << 4)

    return pack


def _pack_bytes(q: np.ndarray) -> np.ndarray:
    return q.astype(np.int8).view(np.uint8)


BLOCKS = (  # smallest first
    Block("TQ1_0", 256, -1, 1, False, _pack_tq1, tail=True),
    Block("TQ2_0", 256, -1, 1, False, _pack_tq2, tail=True),
    Block("Q4_0", 32, -8, 7, False, _pack_nibbles(-8)),
    Block("Q4_1", 32, 0, 15, True, _pack_nibbles(0)),
    Block("Q8_0", 32, -128, 127, False, _pack_bytes),
)
