"""The passes of solvers over blocks of columns by the compiled library: the bits of the torch code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_catquant.formats import FORMATS, Format, get_format
from hf_catquant.kernels import columns, native
from hf_catquant.solvers import _descent
from hf_catquant.solvers._descent import ColumnGrid

SHAPES = [(1, 128, 32), (1, 300, 70), (1, 7, 1), (3, 9, 4), (2, 129, 33)]  # runs, columns, rows
needs_library = pytest.mark.skipif(native.PATH == "reference", reason="the compiled library is not here")


def problem(shape: tuple[int, int, int], fmt: Format, generator: torch.Generator) -> tuple[Tensor, ...]:
    runs, count, rows = shape
    x = torch.randn(runs, 2 * count, count, generator=generator)
    gram = x.mT @ x / len(x[0])
    gram = 0.5 * (gram + gram.mT) + 0.05 * torch.eye(count)
    target = torch.randn(runs, count, rows, generator=generator)
    scale = torch.rand(runs, count, rows, generator=generator) + 0.2
    scale[:, ::5] *= torch.rand(
        runs, len(range(0, count, 5)), rows, generator=generator
    ).round()  # some groups are constant
    offset = 0.1 * torch.randn(runs, count, rows, generator=generator)
    codes = torch.randint(0, fmt.radix, (runs, count, rows), generator=generator)
    return gram, target, scale, offset, torch.tensor(fmt.levels)[codes]


def passes(shape: tuple[int, int, int], fmt: Format, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gram, target, scale, offset, levels = problem(shape, fmt, generator)
    grid = ColumnGrid(scale, offset)
    lower = torch.linalg.cholesky(gram.mT.contiguous().mT)
    slope = gram @ (target - grid.values(levels))
    fed_back = _descent.feed_back(target, lower, grid, fmt)
    return fed_back, _descent.descend(slope, gram, levels, grid, fmt)


def as_torch_does(
    shape: tuple[int, int, int], fmt: Format, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(native, "PATH", "reference")
        return passes(shape, fmt, torch.Generator().manual_seed(seed))


@needs_library
@pytest.mark.parametrize("path", native.available_paths())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_both_passes_give_the_bits_of_torch(name, shape, path, monkeypatch):
    fmt = get_format(name)
    expected = as_torch_does(shape, fmt, 3, monkeypatch)
    monkeypatch.setattr(native, "path_number", native.PATHS[path])
    for found, wanted in zip(passes(shape, fmt, torch.Generator().manual_seed(3)), expected, strict=True):
        assert torch.equal(found, wanted)


@needs_library
def test_the_library_is_asked_for_every_block(monkeypatch):
    asked = []
    run = columns._run
    monkeypatch.setattr(columns, "_run", lambda name, *rest: asked.append((name, run(name, *rest))) or asked[-1][1])
    passes((1, 300, 70), get_format("ternary"), torch.Generator().manual_seed(0))
    assert asked == [("cq_feed_back", True)] * 3 + [("cq_descend", True)] * 3


@needs_library
def test_results_are_the_same_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            gram, target, scale, offset, levels = problem(
                (1, 96, 500), get_format("int2"), torch.Generator().manual_seed(1)
            )
            new, change = torch.zeros_like(levels), torch.zeros_like(levels)
            block = slice(0, 96)
            assert columns.descend(target, gram, levels, scale, offset, get_format("int2"), block, new, change)
            found.append((new, change))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("what", ["float64", "strided", "levels apart unevenly", "too many columns"])
def test_what_the_library_does_not_serve_is_torchs(what):
    fmt = get_format("ternary")
    count = 129 if what == "too many columns" else 12
    gram, target, scale, offset, levels = problem((1, count, 6), fmt, torch.Generator().manual_seed(2))
    new, change = torch.zeros_like(levels), torch.zeros_like(levels)
    if what == "float64":
        target = target.double()
    elif what == "strided":
        target = target.mT.contiguous().mT
    elif what == "levels apart unevenly":
        fmt = Format("uneven", (-1.0, 0.0, 0.5), 5, 1, True)
    assert not columns.descend(target, gram, levels, scale, offset, fmt, slice(0, count), new, change)
    assert not change.any()
