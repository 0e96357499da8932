"""What several tests need: random quantized weights, an independent dequantizer, measures of closeness."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_catquant.formats import FORMATS, Format, get_format, group_count
from hf_catquant.packing import pack

ALL_FORMATS = list(FORMATS)

# 33 columns in groups of 8 leave a last group of one; 20 in groups of 16 leave half a group; 40 come out even.
SHAPES = [(3, 33, 8), (5, 20, 16), (4, 40, 8), (7, 13, -1), (2, 1, 8)]


def slow(*values):
    """Cases that only ``make test-all`` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@dataclass(frozen=True)
class Case:
    """A random weight in one format, as a solver gives it and as a layer stores it."""

    fmt: Format
    group_size: int
    codes: Tensor
    packed: Tensor
    scale: Tensor
    offset: Tensor | None

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The three tensors as the ops take them."""
        return self.packed, self.scale, self.offset

    @property
    def dense(self) -> Tensor:
        """w_hat (N, K) float64, by loops over the equation."""
        return naive_dequantize(self.codes, self.scale, self.offset, self.fmt, self.group_size)


def random_case(name: str, rows: int, columns: int, group_size: int, device: torch.device | str = "cpu") -> Case:
    """A weight (``rows``, ``columns``) of random codes, positive scales and offsets of either sign."""
    fmt, generator = get_format(name), torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(fmt.radix, (rows, columns), dtype=torch.uint8, generator=generator)
    shape = (rows, group_count(columns, group_size))
    scale = (0.5 + torch.rand(shape, generator=generator)) / max(abs(level) for level in fmt.levels)
    offset = torch.randn(shape, generator=generator) * 0.3 if fmt.affine else None
    packed = pack(codes, fmt, group_size)
    moved = (None if t is None else t.to(device) for t in (codes, packed, scale, offset))
    return Case(fmt, group_size, *moved)  # type: ignore[arg-type]


def naive_dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format, group_size: int) -> Tensor:
    """w_hat[n, k] = scale[n, g] * level[code[n, k]] + offset[n, g], one number at a time, float64."""
    rows, columns = codes.shape
    width = columns if group_size == -1 else group_size
    out = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            g = k // width
            out[n, k] = float(scale[n, g]) * fmt.levels[int(codes[n, k])]
            out[n, k] += 0.0 if offset is None else float(offset[n, g])
    return out.to(codes.device)


def assert_product(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """``actual`` is a sum of products as exact as its dtype allows.

    Args:
        actual: in the dtype that was computed in.
        expected: the same sum in float64.
        magnitude: the sum of the products' absolute values, which is what rounding errors are relative to.
    """
    # Each factor and the result round by half an eps; sums are kept in float32. That is 2 eps with a little room.
    bound = 2 * torch.finfo(actual.dtype).eps * magnitude.double() + 1e-7
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape
    assert bool((error <= bound).all()), f"off by up to {float((error / bound).max()):.3g} times the bound"


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise in dB: 6 dB are one bit. Unlike a cosine it sees a wrong scale."""
    expected, actual = expected.double(), actual.double()
    noise = (expected - actual).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(expected.square().sum() / noise))


@contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Fail if the block draws from, or seeds, a global random generator."""

    def states() -> tuple[bytes, object, object]:
        _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  it is the global one we watch
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), (keys.tobytes(), position)

    before = states()
    yield
    for name, old, new in zip(("torch", "random", "numpy"), before, states(), strict=True):
        assert old == new, f"the global generator of {name} was used"
