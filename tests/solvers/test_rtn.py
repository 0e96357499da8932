"""Round to nearest: the grid is the optimum where one can be computed, and never worse than plain rounding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ALL_FORMATS, SHAPES, global_rng_untouched
from hf_catquant.formats import FORMATS, Format, group_count
from hf_catquant.solvers import _grid, rtn
from hf_catquant.weight import dequantize

EACH_FORMAT = pytest.mark.parametrize("name", ALL_FORMATS)
AFFINE = [name for name in ALL_FORMATS if FORMATS[name].affine]
VALUES = st.one_of(st.just(0.0), st.just(1.0), st.floats(-100, 100, width=32))


def solve(weight: torch.Tensor, name: str, group_size: int = -1) -> torch.Tensor:
    return dequantize(rtn.solve(weight, FORMATS[name], group_size), FORMATS[name], group_size)


def squared_error(weight: torch.Tensor, w_hat: torch.Tensor) -> torch.Tensor:
    return (weight.double() - w_hat.double()).square().sum(-1)


def plain_rounding(rows: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Min-max rounding of every row, absmax rounding for a format without offset; float64."""
    rows, low, high = rows.double(), rows.double().amin(-1, True), rows.double().amax(-1, True)
    scale = (
        (high - low) / (fmt.levels[-1] - fmt.levels[0]) if fmt.affine else rows.abs().amax(-1, True) / fmt.levels[-1]
    )
    offset = low - scale * fmt.levels[0] if fmt.affine else torch.zeros_like(low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    nearest = ((rows - offset) / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return scale * levels[nearest] + offset


def best_by_force(row: torch.Tensor, share: torch.Tensor, fmt: Format, affine: bool = True) -> float:
    """Least weighted squared error over every assignment of levels and its own least squares, float64."""
    levels = torch.tensor(list(product(fmt.levels, repeat=len(row))), dtype=torch.float64)
    row, share = row.double(), share.double() / share.double().sum()
    center = float((share * row).sum()) if affine else 0.0
    centers = (levels * share).sum(-1, keepdim=True) if affine else 0.0
    spread = (share * (levels - centers).square()).sum(-1)
    gain = (share * (levels - centers) * (row - center)).sum(-1).square() / spread.clamp_min(1e-30)
    total = float((share * (row - center).square()).sum())
    return total - float(torch.where(spread > 1e-12, gain, 0 * gain).max())


def test_ternary_without_offsets_is_the_global_optimum(generator):
    fmt = FORMATS["ternary_symmetric"]
    rows = torch.randn(20, 7, generator=generator)
    rows[:5] += 0.7  # offsets would help here
    error = squared_error(rows, solve(rows, fmt.name))
    wanted = [7 * best_by_force(row, torch.ones(7), fmt, affine=False) for row in rows]
    torch.testing.assert_close(error, torch.tensor(wanted, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@EACH_FORMAT
@pytest.mark.parametrize(("rows", "columns", "group_size"), [*SHAPES, (3, 100, 64)])
def test_shapes_and_dtypes(name, rows, columns, group_size, generator, device):
    fmt, groups = FORMATS[name], group_count(columns, group_size)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    before = weight.clone()
    with global_rng_untouched():
        codes, scale, offset = rtn.solve(weight, fmt, group_size)
    assert (codes.shape, codes.dtype, codes.device) == ((rows, columns), torch.uint8, weight.device)
    assert (scale.shape, scale.dtype) == ((rows, groups), torch.float32)
    assert int(codes.max()) < fmt.radix
    assert bool((scale >= 0).all())
    assert (offset is not None) == fmt.affine
    if offset is not None:
        assert (offset.shape, offset.dtype) == ((rows, groups), torch.float32)
    assert torch.equal(weight, before)


@EACH_FORMAT
@settings(max_examples=30)
@given(row=st.lists(VALUES, min_size=1, max_size=20))
def test_no_group_is_worse_than_plain_rounding(name, row):
    weight = torch.tensor([row])
    error = squared_error(weight, solve(weight, name))
    plain = squared_error(weight, plain_rounding(weight, FORMATS[name]))
    rounding = 1e-10 * weight.double().square().sum(-1)  # of float32 arithmetic, (1e-5)^2
    assert bool((error <= plain * (1 + 1e-4) + rounding).all())


@EACH_FORMAT
def test_no_group_of_a_heavy_tailed_matrix_is_worse_than_plain_rounding(name, generator):
    weight = torch.randn(200, 64, generator=generator) ** 3
    groups = weight.view(-1, 16)
    error = squared_error(groups, solve(weight, name, 16).view(-1, 16))
    plain = squared_error(groups, plain_rounding(groups, FORMATS[name]))
    assert bool((error <= plain * (1 + 1e-5)).all())
    assert float(error.sum()) < 0.97 * float(plain.sum()), "and much better on the whole"


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_is_the_global_optimum(weighted, generator):
    fmt, weight = FORMATS["binary"], torch.randn(40, 9, generator=generator)
    share = torch.rand(40, 9, generator=generator) ** 2 if weighted else torch.ones(40, 9)
    scale, offset = _grid.fit_grid(weight, fmt, -1, share)
    levels = torch.where(weight > offset, 1.0, -1.0)
    error = (share / share.sum(-1, True) * (weight - scale * levels - offset).square()).sum(-1)
    best = torch.tensor([best_by_force(w, s, fmt) for w, s in zip(weight, share, strict=True)])
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_symmetric_ternary_scale_is_the_global_optimum(weighted, generator):
    weight = torch.randn(40, 7, generator=generator)
    share = torch.rand(40, 7, generator=generator) ** 2 if weighted else torch.ones(40, 7)
    share = share / share.sum(-1, True)
    scale = _grid.symmetric_scale(weight, share)
    error = (share * (weight - scale * (weight / scale).round().clamp(-1, 1)).square()).sum(-1)
    fmt = FORMATS["ternary"]
    best = torch.tensor([best_by_force(w, s, fmt, affine=False) for w, s in zip(weight, share, strict=True)])
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-7)


def test_affine_ternary_is_close_to_the_global_optimum(generator):
    fmt, weight = FORMATS["ternary"], torch.randn(30, 8, generator=generator)
    error = squared_error(weight, solve(weight, "ternary")) / 8
    best = torch.tensor([best_by_force(w, torch.ones(8), fmt) for w in weight], dtype=torch.float64)
    assert bool((error >= best - 1e-6).all())
    assert float(error.sum() / best.sum()) < 1.02


def test_ternary_beats_the_usual_thresholds(generator):
    weight = torch.randn(64, 128, generator=generator)
    error = float(squared_error(weight, solve(weight, "ternary")).sum())
    mean = weight.abs().mean(-1, True)
    absmean = mean * (weight / mean).round().clamp(-1, 1)  # BitNet
    kept = weight.abs() > 0.75 * mean  # ternary weight networks
    twn = kept * weight.sign() * (kept * weight.abs()).sum(-1, True) / kept.sum(-1, True)
    assert error < 0.98 * float(squared_error(weight, twn).sum()) < 0.98 * float(squared_error(weight, absmean).sum())


@EACH_FORMAT
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e-20, 7.7e20])
def test_constant_groups(name, value):
    weight = torch.full((2, 24), value)
    w_hat = solve(weight, name, 16)
    if FORMATS[name].affine or value == 0:
        assert torch.equal(w_hat, weight)
    torch.testing.assert_close(w_hat, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("values", [[5.0], [-1.0, 3.0], [0.25] * 7 + [-8.0]])
def test_groups_with_no_more_values_than_levels(name, values):
    weight = torch.tensor([values])
    torch.testing.assert_close(solve(weight, name), weight, rtol=1e-6, atol=1e-6)


@EACH_FORMAT
def test_the_last_group_is_fitted_alone(name, generator):
    weight = torch.randn(5, 100, generator=generator)
    apart = torch.cat((solve(weight[:, :64], name, 64), solve(weight[:, 64:], name, 64)), -1)
    torch.testing.assert_close(solve(weight, name, 64), apart, rtol=1e-5, atol=1e-6)


@EACH_FORMAT
def test_rows_are_fitted_alone_whatever_the_chunk(name, generator, monkeypatch):
    weight = torch.randn(9, 40, generator=generator)
    whole = rtn.solve(weight, FORMATS[name], 16)
    monkeypatch.setattr(_grid, "_CHUNK", {"cpu": 100})
    for a, b in zip(whole, rtn.solve(weight, FORMATS[name], 16), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@EACH_FORMAT
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_the_unit_of_the_weight_does_not_matter(name, factor, generator):
    weight = torch.randn(6, 48, generator=generator)
    torch.testing.assert_close(solve(weight * factor, name, 16) / factor, solve(weight, name, 16))


def test_low_precision_and_trainable_weights(generator):
    weight = torch.randn(4, 16, generator=generator).bfloat16().requires_grad_()
    result = rtn.solve(weight, FORMATS["int4"], -1)
    assert result.scale.dtype == torch.float32
    assert not result.scale.requires_grad
    assert torch.equal(result.codes, rtn.solve(weight.detach().float(), FORMATS["int4"], -1).codes)


@EACH_FORMAT
def test_column_weights_move_the_grid(name, generator):
    fmt, weight = FORMATS[name], torch.randn(50, 32, generator=generator)
    share = torch.ones(1, 32)
    share[:, :8] = 100
    error = []
    for column_weight in (None, share):
        scale, offset = _grid.fit_grid(weight, fmt, -1, column_weight)
        codes = _grid.nearest_codes(weight, scale, offset, fmt, -1)
        w_hat = dequantize(rtn.QuantizedWeight(codes, scale, offset), fmt, -1)
        error.append(float(squared_error(weight[:, :8], w_hat[:, :8]).sum()))
    assert error[1] < 0.95 * error[0]


@EACH_FORMAT
def test_columns_of_no_weight_count_nothing_and_all_of_them_count_the_same(name, generator):
    fmt, weight = FORMATS[name], torch.randn(4, 16, generator=generator)
    even = _grid.fit_grid(weight, fmt, 8)
    for column_weight in (torch.zeros(1, 16), torch.full((4, 16), 1e38), torch.full((2, 16), 1e-38)):
        for a, b in zip(even, _grid.fit_grid(weight, fmt, 8, column_weight), strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)
    half = torch.tensor([[1.0] * 4 + [0.0] * 4])
    pair = torch.tensor([[1.0, 1.0, 2.0, 2.0, 1.2, 1.3, 1.7, 1.9]])  # two values and some that do not count
    scale, offset = _grid.fit_grid(pair, FORMATS["binary"], -1, half)
    torch.testing.assert_close(torch.cat((offset - scale, offset + scale), 1), torch.tensor([[1.0, 2.0]]))


def test_levels_need_not_be_evenly_spaced():
    fmt = Format("uneven", (-4.0, -1.0, 0.0, 1.0, 4.0), digits=1, nbytes=1, affine=True)
    weight = torch.tensor([[-7.0, -1.0, 1.0, 3.0, 9.0, 1.2, 0.9]])
    w_hat = dequantize(rtn.solve(weight, fmt, -1), fmt, -1)
    assert float((weight - w_hat).abs().max()) < 0.2
