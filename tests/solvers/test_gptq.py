"""GPTQ: its parts against textbook versions of them, and the whole against rounding to nearest."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import ALL_FORMATS, SHAPES, global_rng_untouched
from hf_catquant.formats import FORMATS, Format, group_count, group_width
from hf_catquant.solvers import Moments, _descent, _grid, _refit, gptq, output_error, rtn
from hf_catquant.weight import QuantizedWeight, dequantize, expand_groups

EACH_FORMAT = pytest.mark.parametrize("name", ALL_FORMATS)


def correlated(rows: int, columns: int, runs: int = 1, seed: int = 1) -> Tensor:
    """Rows (B, M, K) with a mean, correlated columns and few strong directions, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(runs, columns, columns, generator=generator)
    strength = torch.linspace(1, 0.05, columns).unsqueeze(-1) ** 2
    return torch.randn(runs, rows, columns, generator=generator) @ (strength * mix) + 0.3


def moments_of(x: Tensor, y: Tensor | None = None) -> Moments:
    """Moments of float rows x and quantized rows y, (B, M, K) each."""
    y, rows = x if y is None else y, x.shape[1]
    return Moments(y.mT @ y / rows, x.mT @ y / rows, y.mean(1), x.mean(1), rows)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_grid(target: Tensor, fmt: Format) -> _descent.ColumnGrid:
    """A grid fitted to each row of a target (B, K, n)."""
    runs, columns, rows = target.shape
    scale, offset = _grid.fit_grid(target.mT.reshape(-1, columns), fmt, -1)
    offset = torch.zeros_like(scale) if offset is None else offset
    return _descent.ColumnGrid(*(t.view(runs, 1, rows).expand(target.shape).contiguous() for t in (scale, offset)))


def objective(target: Tensor, w_hat: Tensor, gram: Tensor) -> Tensor:
    """(w* - w_hat) H (w* - w_hat)^T of every row: (B, n) float64 of tensors (B, K, n)."""
    error = (target - w_hat).double()
    return (error * (gram.double() @ error)).sum(1)


@EACH_FORMAT
def test_beats_rounding_to_nearest(name):
    fmt, weight, x = FORMATS[name], random_weight(48, 96), correlated(3000, 96)
    error = {}
    for solver in (rtn, gptq):
        w_hat = dequantize(solver.solve(weight, fmt, 32, moments_of(x)), fmt, 32)
        error[solver] = output_error(weight, w_hat, moments_of(correlated(3000, 96)))
    assert error[gptq] < 0.6 * error[rtn]


@EACH_FORMAT
def test_beats_rounding_to_nearest_on_inputs_it_has_not_seen(name):
    fmt, weight, x = FORMATS[name], random_weight(48, 64), correlated(4000, 64)
    fit, held_out = x[:, :2000], x[:, 2000:]
    w_hat = {s: dequantize(s.solve(weight, fmt, 32, moments_of(fit)), fmt, 32) for s in (rtn, gptq)}
    error = {s: output_error(weight, value, moments_of(held_out)) for s, value in w_hat.items()}
    assert error[gptq] < 0.7 * error[rtn]


@EACH_FORMAT
@pytest.mark.parametrize(("rows", "columns", "group_size"), [*SHAPES, (3, 100, 64)])
def test_shapes_dtypes_and_purity(name, rows, columns, group_size, device):
    fmt, weight = FORMATS[name], random_weight(rows, columns).to(device)
    moments = moments_of(correlated(50, columns).to(device))
    before = [weight.clone(), *(t.clone() for t in moments[:4])]
    with global_rng_untouched():
        codes, scale, offset = gptq.solve(weight, fmt, group_size, moments)
    for old, new in zip(before, (weight, *moments[:4]), strict=True):
        assert torch.equal(old, new)
    shape = (rows, group_count(columns, group_size))
    assert (codes.shape, codes.dtype, codes.device) == ((rows, columns), torch.uint8, weight.device)
    assert (scale.shape, scale.dtype) == (shape, torch.float32)
    assert int(codes.max()) < fmt.radix
    assert bool((scale >= 0).all())
    assert (offset is not None) == fmt.affine
    assert offset is None or (offset.shape, offset.dtype) == (shape, torch.float32)


def test_same_input_same_result():
    weight, moments = random_weight(16, 200), moments_of(correlated(500, 200))
    first, second = (gptq.solve(weight, FORMATS["ternary"], 64, moments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["binary", "ternary", "int4", "int8"])
@pytest.mark.parametrize(("rows", "columns", "runs"), [(12, 9, 12), (8, 150, 2)])
def test_runs_are_solved_as_if_alone(name, rows, columns, runs):
    fmt, weight = FORMATS[name], random_weight(rows, columns)
    x = correlated(400, columns, runs)
    y = x + 0.1 * correlated(400, columns, runs, seed=5)
    together = dequantize(gptq.solve(weight, fmt, 64, moments_of(x, y)), fmt, 64)
    apart = [
        dequantize(gptq.solve(part, fmt, 64, moments_of(x[b : b + 1], y[b : b + 1])), fmt, 64)
        for b, part in enumerate(weight.chunk(runs))
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-4)


def textbook_gptq(weight: Tensor, gram: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> Tensor:
    """Levels by the published loop: one column at a time, the Cholesky factor of the inverse, float64."""
    weight, gram = weight.double().clone(), gram.double()
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    table, levels = torch.tensor(fmt.levels, dtype=torch.float64), torch.empty_like(weight)
    for k in range(weight.shape[1]):
        distance = ((weight[:, k] - offset[:, k]) / scale[:, k]).unsqueeze(-1) - table
        levels[:, k] = table[distance.abs().argmin(-1)]
        error = (weight[:, k] - scale[:, k] * levels[:, k] - offset[:, k]) / factor[k, k]
        weight[:, k:] -= error.unsqueeze(-1) * factor[k, k:]
    return levels


@EACH_FORMAT
def test_feedback_is_textbook_gptq(name, monkeypatch):
    monkeypatch.setattr(_descent, "_BLOCK", 16)
    fmt, target = FORMATS[name], random_weight(50, 6).view(1, 50, 6)
    gram = moments_of(correlated(800, 50)).gram
    gram = gram + 0.01 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(50)
    grid = random_grid(target, fmt)
    ours = _descent.feed_back(target, torch.linalg.cholesky(gram), grid, fmt)
    backwards = [t[0].T.flip(1) for t in (target, *grid)]  # the textbook begins where feed_back does if all is flipped
    expected = textbook_gptq(backwards[0], gram[0].flip(0, 1), backwards[1], backwards[2], fmt).flip(1).T
    assert float((ours[0] == expected).double().mean()) > 0.99, "all but ties and their consequences"


def test_feedback_goes_by_importance_not_by_position(monkeypatch):
    monkeypatch.setattr(gptq, "_SWEEPS", 0)  # descent does go by position
    fmt, weight, x = FORMATS["ternary"], random_weight(6, 40), correlated(400, 40)
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    codes = gptq.solve(weight, fmt, -1, moments_of(x)).codes
    shuffled = gptq.solve(weight[:, shuffle], fmt, -1, moments_of(x[..., shuffle])).codes
    assert float((codes[:, shuffle] == shuffled).float().mean()) > 0.98, "all but ties"


@pytest.mark.parametrize("name", ["binary", "ternary", "int2"])
def test_descent_adds_to_error_feedback(name, monkeypatch):
    fmt, weight, moments, error = FORMATS[name], random_weight(24, 64), moments_of(correlated(1000, 64)), {}
    for sweeps in (0, 3):
        monkeypatch.setattr(gptq, "_SWEEPS", sweeps)
        error[sweeps] = output_error(weight, dequantize(gptq.solve(weight, fmt, 32, moments), fmt, 32), moments)
    assert error[3] < 0.9 * error[0]


@EACH_FORMAT
def test_descent_never_raises_the_objective_and_ends_where_no_single_change_helps(name, monkeypatch):
    monkeypatch.setattr(_descent, "_BLOCK", 8)
    fmt, target = FORMATS[name], random_weight(2 * 20, 5).view(2, 20, 5)
    gram = moments_of(correlated(300, 20, 2)).gram + 0.1 * torch.eye(20)
    grid = random_grid(target, fmt)
    levels = _grid.nearest_level((target - grid.offset) / grid.scale, fmt)
    error = objective(target, grid.values(levels), gram)
    for _ in range(60):
        new = _descent.descend(gram @ (target - grid.values(levels)), gram, levels, grid, fmt)
        new_error = objective(target, grid.values(new), gram)
        assert bool((new_error <= error * (1 + 1e-5)).all())
        stopped, levels, error = torch.equal(new, levels), new, new_error
        if stopped:
            break
    assert stopped
    for column, value in product(range(20), fmt.levels[:: max(1, fmt.radix // 4)]):
        other = levels.clone()
        other[:, column] = value
        assert bool((objective(target, grid.values(other), gram) >= error * (1 - 1e-4)).all())


@pytest.mark.parametrize("name", ["binary", "ternary", "int4", "int8"])
@pytest.mark.parametrize(("columns", "width"), [(24, 8), (20, 8), (16, 16)])
def test_refit_is_the_joint_least_squares(name, columns, width, monkeypatch):
    fmt, runs, rows = FORMATS[name], 2, 3
    gram = moments_of(correlated(300, columns, runs)).gram + 0.1 * torch.eye(columns)
    target = random_weight(runs * columns, rows).view(runs, columns, rows)
    grid = _grid.fit_grid(target.mT.reshape(-1, columns), fmt, width)
    codes = _grid.nearest_codes(target.mT.reshape(-1, columns), *grid, fmt, width)
    levels = torch.tensor(fmt.levels)[codes.long()].view(runs, rows, columns).mT
    scale, offset = (None if t is None else t.view(runs, rows, -1) for t in grid)
    monkeypatch.setattr(_refit, "_RIDGE", 1e-6)
    monkeypatch.setattr(_refit, "_ELEMENTS", 1)  # one row at a time
    new = _refit.refit(gram @ target, gram, levels, scale, offset, width)
    parts = [t for t in new if t is not None]
    expanded = [expand_groups(t, columns, width).mT for t in parts]
    error = objective(target, expanded[0] * levels + (expanded[1] if fmt.affine else 0), gram)
    membership = (torch.arange(columns) // width).unsqueeze(-1) == torch.arange(scale.shape[-1])
    for b, n in product(range(runs), range(rows)):
        basis = membership * levels[b, :, n, None]
        basis = (torch.cat((basis, membership), 1) if fmt.affine else basis).double()
        root = torch.linalg.cholesky(gram[b].double(), upper=True)
        best = torch.linalg.lstsq(root @ basis, root @ target[b, :, n, None].double(), driver="gelsd").solution
        least = objective(target[b : b + 1, :, n : n + 1], (basis @ best).unsqueeze(0), gram[b : b + 1])
        assert float(error[b, n]) == pytest.approx(float(least), rel=1e-3)


def test_refit_keeps_scales_positive_and_a_grid_that_is_better():
    gram, levels = torch.eye(8).expand(1, 8, 8), torch.tensor([1.0, -1.0] * 4).view(1, 8, 1)
    pull = -levels  # the least squares scale is -1
    scale, _ = _refit.refit(pull, gram, levels, torch.ones(1, 1, 1), None, 8)
    assert float(scale) == 0.0
    broken = torch.full((1, 8, 8), float("nan"))
    scale, offset = _refit.refit(pull, broken, levels, torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 8)
    assert (float(scale), float(offset)) == (1.0, 0.0)


def least_by_force(row: Tensor, gram: Tensor, fmt: Format) -> float:
    """Least (w - w_hat) H (w - w_hat)^T over every assignment of levels and its own scale and offset, float64."""
    root = torch.linalg.cholesky(gram.double(), upper=True)
    levels = torch.tensor(list(product(fmt.levels, repeat=len(row))), dtype=torch.float64)
    ones = torch.ones_like(levels)
    basis = root @ torch.stack((levels, ones), -1)
    gap = (root @ row.double()).expand(len(levels), -1).unsqueeze(-1)
    coefficients = torch.linalg.pinv(basis) @ gap
    return float((gap - basis @ coefficients).square().sum((1, 2)).min())


@pytest.mark.parametrize(("name", "columns"), [("binary", 8), ("ternary", 6)])
def test_is_close_to_the_global_optimum(name, columns):
    fmt, weight, moments = FORMATS[name], random_weight(20, columns), moments_of(correlated(2000, columns))
    gram = gptq.factorise(moments.gram.clone(), torch.arange(columns).unsqueeze(0))[0]
    w_hat = dequantize(gptq.solve(weight, fmt, -1, moments), fmt, -1)
    error = objective(weight.T.unsqueeze(0), w_hat.T.unsqueeze(0), gram)[0]
    best = torch.tensor([least_by_force(row, gram[0], fmt) for row in weight], dtype=torch.float64)
    plain = dequantize(rtn.solve(weight, fmt, -1), fmt, -1)
    rounded = objective(weight.T.unsqueeze(0), plain.T.unsqueeze(0), gram)[0]
    assert bool((error >= best * (1 - 1e-4)).all())
    # It closes most of the way from rounding to the best there is.
    assert float((error - best).sum()) < 0.35 * float((rounded - best).sum())


def streams(rows: int, columns: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A float stream and a quantized one that lost part of it and has noise of its own."""
    x = correlated(rows, columns, seed=1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    mix = torch.eye(columns) + 0.1 * random_weight(columns, columns, seed=9)
    return x, x @ mix + 0.2 * x.std() * noise


def true_error(weight: Tensor, w_hat: Tensor, x: Tensor, y: Tensor) -> float:
    wanted = x[0] @ weight.T
    return float((wanted - y[0] @ w_hat.T).square().sum() / wanted.square().sum())


@EACH_FORMAT
def test_aiming_at_the_float_stream_helps_on_rows_it_has_not_seen(name):
    fmt, weight = FORMATS[name], random_weight(32, 48)
    x, y = streams(8000, 48)
    moments = moments_of(x[:, :4000], y[:, :4000])
    unaware = moments._replace(cross=moments.gram)
    errors = []
    for given_moments in (moments, unaware):
        w_hat = dequantize(gptq.solve(weight, fmt, 16, given_moments), fmt, 16)
        errors.append(true_error(weight, w_hat, x[:, 4000:], y[:, 4000:]))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_full_aim_is_the_ridge_regression_on_the_float_output(ridge):
    weight = random_weight(5, 12)
    x, y = streams(3000, 12)
    moments = moments_of(x, y)
    target = gptq.aim(weight.unsqueeze(0), weight @ (moments.cross - moments.gram), moments.gram, 1.0, ridge)[0]
    x64, y64 = x[0].double(), y[0].double()
    mean = float(y64.square().mean())
    # Rows sqrt(ridge) e_k with the outputs W e_k pull the regression toward W.
    pull = (3000 * ridge * mean) ** 0.5 * torch.eye(12, dtype=torch.float64)
    inputs, outputs = torch.cat((y64, pull)), torch.cat((x64, pull)) @ weight.double().T
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)
    half = gptq.aim(weight.unsqueeze(0), weight @ (moments.cross - moments.gram), moments.gram, 0.5, ridge)[0]
    torch.testing.assert_close(half, (weight + target) / 2, rtol=1e-4, atol=1e-4)


def test_equal_streams_leave_the_weight_as_the_target():
    moments = moments_of(correlated(500, 16))
    runs = random_weight(4, 16).unsqueeze(0)
    assert torch.equal(gptq.aim(runs, runs @ (moments.cross - moments.gram), moments.gram, 1.0, 0.01), runs)


def test_an_ill_conditioned_aim_is_bounded():
    weight = random_weight(6, 20)
    y = torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -6, 20)
    x = 1e3 * torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(1))
    moments = moments_of(x, y)
    gram, _ = gptq.factorise(moments.gram.clone(), torch.arange(20).unsqueeze(0))
    move = gptq.aim(weight.unsqueeze(0), weight @ (moments.cross - moments.gram), gram, 1.0, 0.0)[0] - weight
    length, moved = (((t @ gram[0]) * t).sum(-1).sqrt() for t in (weight, move))
    assert bool((moved <= length * 1.001).all())
    w_hat = dequantize(gptq.solve(weight, FORMATS["ternary"], 8, moments), FORMATS["ternary"], 8)
    assert bool(torch.isfinite(w_hat).all())


def test_trust_grows_with_the_data_for_each_column():
    shares, ridges = zip(*(gptq.trust(count, 64) for count in (1, 64, 64 * 24, 64 * 1000, 64 * 10**6)), strict=True)
    assert list(shares) == sorted(shares)
    assert list(ridges) == sorted(ridges, reverse=True)
    assert shares[0] == pytest.approx(0.7, abs=0.01)
    assert shares[-1] == pytest.approx(1, abs=0.01)
    assert ridges[0] > 5
    assert ridges[-1] < 0.01
    assert gptq.trust(1000, 10) == gptq.trust(100000, 1000), "what counts is data a column"


@EACH_FORMAT
def test_dead_columns_are_rounded_and_disturb_nothing(name):
    fmt, weight, x = FORMATS[name], random_weight(8, 32), correlated(500, 32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[5, 30]] = True
    x[..., dead] = 0
    result = gptq.solve(weight, fmt, -1, moments_of(x))
    w_hat, live = dequantize(result, fmt, -1), moments_of(x[..., ~dead])
    alone = dequantize(gptq.solve(weight[:, ~dead], fmt, -1, live), fmt, -1)
    error = output_error(weight[:, ~dead], w_hat[:, ~dead], live)
    assert error < 1.3 * output_error(weight[:, ~dead], alone, live)
    nearest = _grid.nearest_codes(weight[:, dead], result.scale, result.offset, fmt, -1)
    assert torch.equal(result.codes[:, dead], nearest)


@EACH_FORMAT
def test_zero_weights_and_inputs_that_are_all_zero(name):
    fmt, weight, x = FORMATS[name], random_weight(4, 16), torch.zeros(1, 10, 16)
    nothing = dequantize(gptq.solve(torch.zeros(4, 16), fmt, 8, moments_of(correlated(50, 16))), fmt, 8)
    assert torch.equal(nothing, torch.zeros(4, 16))
    w_hat = dequantize(gptq.solve(weight, fmt, 8, moments_of(x)), fmt, 8)
    plain = dequantize(rtn.solve(weight, fmt, 8), fmt, 8)
    assert float((weight - w_hat).square().sum()) <= 1.001 * float((weight - plain).square().sum())


def test_one_row_of_calibration_is_enough_to_run():
    weight = random_weight(8, 300)
    result = gptq.solve(weight, FORMATS["ternary"], 128, moments_of(correlated(1, 300)))
    assert bool(torch.isfinite(dequantize(result, FORMATS["ternary"], 128)).all())


@pytest.mark.parametrize("runs", [1, 2])
def test_what_is_made_twice_to_save_memory_changes_no_bit(runs, monkeypatch):
    x, y = streams(400, 300)
    moments = moments_of(x.expand(runs, -1, -1), y.expand(runs, -1, -1) * 2)
    weight = random_weight(20, 300)
    whole = gptq.solve(weight, FORMATS["int3"], 128, moments)
    monkeypatch.setattr(gptq, "_LARGE", 8)
    monkeypatch.setattr(gptq, "_BAND", 70)
    for found, wanted in zip(gptq.solve(weight, FORMATS["int3"], 128, moments), whole, strict=True):
        assert torch.equal(found, wanted)


def test_few_matrices_of_all_columns_are_held_at_once():
    # A process of its own: what malloc kept from earlier tests would be counted.
    code = """
import torch
from hf_catquant import memory
from hf_catquant.formats import FORMATS
from hf_catquant.solvers import Moments, gptq
if not memory.reset_peak():
    raise SystemExit("none")
memory.map_large_blocks()
x = torch.randn(1, 16, 2048, generator=torch.Generator().manual_seed(0))
gram, mean = x.mT @ x / 16, x.mean(1)
moments, weight = Moments(gram, gram.clone(), mean, mean, 16), torch.randn(4, 2048)
small = Moments(gram[..., :64, :64], gram[..., :64, :64], mean[:, :64], mean[:, :64], 16)
gptq.solve(weight[:, :64].contiguous(), FORMATS["int8"], -1, small)  # loads what is loaded once
for large in (1 << 20, 8):
    gptq._LARGE = large
    memory.reset_peak()
    before = memory.resident()
    gptq.solve(weight, FORMATS["int8"], -1, moments)
    print((memory.peak() - before) / gram.nbytes)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if "none" in done.stderr:
        pytest.skip("this system does not say how much memory was taken")
    plain, scarce = map(float, done.stdout.split())
    assert plain < 5.8
    assert scarce < 4.8


def test_damping_repairs_a_gram_that_is_not_quite_positive():
    gram = moments_of(correlated(500, 16, runs=2)).gram
    sound, _ = gptq.factorise(gram.clone(), torch.arange(16).expand(2, 16))
    broken = gram.clone()
    values, vectors = torch.linalg.eigh(gram[1])
    values[0] = -0.5 * gram[1].diagonal().mean()
    broken[1] = vectors @ torch.diag(values) @ vectors.T
    repaired, lower = gptq.factorise(broken.clone(), torch.arange(16).expand(2, 16))
    torch.testing.assert_close(repaired[0], sound[0], msg="the sound run keeps its one percent")
    assert float(torch.linalg.eigvalsh(repaired[1])[0]) > 0
    torch.testing.assert_close(lower @ lower.mT, repaired, rtol=1e-4, atol=1e-4)


def test_a_gram_beyond_repair_is_refused():
    moments = moments_of(correlated(50, 8))
    with pytest.raises(ValueError, match=r"moments.gram must be a mean of x\^T x, got .* not positive definite"):
        gptq.solve(random_weight(2, 8), FORMATS["int4"], 8, moments._replace(gram=-1e6 * torch.ones(1, 8, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.full((1, 8, 8), float("nan"))}, r"moments.gram must be finite, got 64 of 64"),
        ({"cross": torch.full((1, 8, 8), float("inf"))}, r"moments.cross must be finite"),
        ({"mean": torch.zeros(1, 7)}, r"moments.mean must be \(1, 8\) for weight \(4, 8\), got \(1, 7\)"),
        ({"gram": torch.eye(9).unsqueeze(0)}, r"moments.gram must be \(1, 8, 8\) .* got \(1, 9, 9\)"),
        ({"gram": torch.eye(8)}, r"moments.gram must be \(1, 8, 8\) .* got \(8, 8\)"),
        ({"gram": torch.eye(8).expand(3, 8, 8)}, r"a number of runs that divides the 4 rows, got 3"),
        ({"count": 0}, r"moments.count must be at least 1, got 0"),
    ],
)
def test_bad_moments_are_refused(change, message):
    moments = moments_of(correlated(50, 8))._replace(**change)
    with pytest.raises(ValueError, match=message):
        gptq.solve(random_weight(4, 8), FORMATS["ternary"], 8, moments)


def test_missing_moments_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"solver gptq needs calibration moments, got None: .* use solver rtn"):
        gptq.solve(random_weight(4, 8), FORMATS["ternary"], 8, None)


@settings(max_examples=25)
@given(
    name=st.sampled_from(ALL_FORMATS),
    runs=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    group_size=st.sampled_from([-1, 8, 16]),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_a_finite_weight_no_worse_than_it_should_be(name, runs, rows, columns, group_size, seed):
    fmt, weight = FORMATS[name], random_weight(runs * rows, columns, seed)
    moments = moments_of(correlated(60, columns, runs, seed))
    result = gptq.solve(weight, fmt, group_size, moments)
    assert isinstance(result, QuantizedWeight)
    w_hat = dequantize(result, fmt, group_size)
    assert bool(torch.isfinite(w_hat).all())
    assert result.scale.shape[1] * group_width(columns, group_size) >= columns
    # Zero is within reach of every grid, so the output error cannot exceed that of putting out nothing.
    assert output_error(weight, w_hat, moments) <= 1.01


@pytest.mark.parametrize("size", [1e-20, 1e-36])
def test_inputs_however_small_are_no_obstacle(size, generator):
    """Activations of a deep model without training vanish; their moments are no less moments for it."""
    weight = torch.randn(24, 32, generator=generator)
    x = torch.randn(200, 32, generator=generator)
    gram = (x.T @ x / 200).unsqueeze(0)
    large, small = (
        gptq.solve(weight, FORMATS["ternary"], 16, Moments(gram * s, gram * s, 0 * x[:1], 0 * x[:1], count=200))
        for s in (1.0, size)
    )
    if size > 1e-30:
        assert torch.equal(large.codes, small.codes)
    assert torch.isfinite(small.scale).all()


def test_the_bits_do_not_depend_on_the_number_of_threads():
    """LAPACK splits a factorization by it; a last bit in the factor turns most codes."""
    moments, weight = moments_of(correlated(1500, 704)), random_weight(64, 704)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            factor = gptq.ridge_factor(moments.gram, 0.01)
            found.append((factor, gptq.solve(weight, FORMATS["ternary"], 64, moments)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (factor, one), (other, two) = found
    assert torch.equal(factor, other)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
