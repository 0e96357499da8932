"""The folder is the registry, and what all solvers share: the error measure, the checks of their input."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_catquant import solvers
from hf_catquant.formats import FORMATS
from hf_catquant.solvers import Moments, output_distance, output_error
from hf_catquant.weight import dequantize


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    """Moments of float rows x and quantized rows y, (B, M, K) each."""
    rows = x.shape[1]
    return Moments(y.mT @ y / rows, x.mT @ y / rows, y.mean(1), x.mean(1), rows)


def test_names_are_the_public_files_of_the_folder():
    assert solvers.names() == ["gptq", "reconstruct", "rtn"]


def test_names_imports_no_solver(monkeypatch):
    for name in solvers.names():
        monkeypatch.delitem(sys.modules, f"{solvers.__name__}.{name}", raising=False)
    for name in solvers.names():
        assert f"{solvers.__name__}.{name}" not in sys.modules


@pytest.mark.parametrize("name", solvers.names())
def test_every_solver_offers_the_contract(name, generator):
    solver = solvers.get(name)
    assert isinstance(solver.NEEDS_MOMENTS, bool)
    weight, x = torch.randn(4, 24, generator=generator), torch.randn(1, 99, 24, generator=generator)
    result = solver.solve(weight, FORMATS["ternary"], 16, moments_of(x, x))
    assert (result.codes.shape, result.scale.shape, result.offset.shape) == ((4, 24), (4, 2), (4, 2))


@pytest.mark.parametrize("name", ["nope", "_grid", "", "GPTQ"])
def test_unknown_solver_is_refused_with_the_names(name):
    with pytest.raises(ValueError, match=r"solver must be one of gptq, reconstruct, rtn, got"):
        solvers.get(name)


@pytest.mark.parametrize("name", solvers.names())
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), r"weight must be finite, got 1 of 2"),
        (torch.tensor([[float("inf"), float("-inf")]]), r"weight must be finite, got 2 of 2"),
        (torch.zeros(2, 3, 1), r"weight must be a \(N, K\) floating-point matrix .* got \(2, 3, 1\) torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int8), r"weight must be .* got \(2, 3\) torch.int8"),
        (torch.zeros(0, 3), r"with N, K > 0, got \(0, 3\)"),
    ],
)
def test_bad_weights_are_refused(name, weight, message):
    with pytest.raises(ValueError, match=message):
        solvers.get(name).solve(weight, FORMATS["ternary"], 8, None)


@pytest.mark.parametrize("name", solvers.names())
def test_bad_group_size_is_refused(name):
    moments = moments_of(torch.ones(1, 5, 8), torch.ones(1, 5, 8))
    with pytest.raises(ValueError, match="group_size must be -1 or a positive multiple of 8, got 20"):
        solvers.get(name).solve(torch.ones(2, 8), FORMATS["ternary"], 20, moments)


def test_output_error_is_the_error_of_the_outputs(generator):
    weight, x = torch.randn(6, 10, generator=generator), torch.randn(2, 500, 10, generator=generator)
    x[1] *= 3  # the second run of rows meets other inputs
    w_hat = dequantize(solvers.get("rtn").solve(weight, FORMATS["int2"], -1, None), FORMATS["int2"], -1)
    runs, hat_runs = weight.view(2, 3, 10), w_hat.view(2, 3, 10)
    expected = ((runs - hat_runs) @ x.mT).square().sum() / (runs @ x.mT).square().sum()
    assert output_error(weight, w_hat, moments_of(x, x)) == pytest.approx(float(expected), rel=1e-4)
    plain = (weight - w_hat).square().sum() / weight.square().sum()
    assert output_error(weight, w_hat, None) == pytest.approx(float(plain), rel=1e-5)


def test_output_distance_is_the_distance_from_the_float_outputs(generator):
    weight, w_hat = (torch.randn(6, 8, generator=generator) for _ in range(2))
    x, y = (torch.randn(2, 50, 8, generator=generator) for _ in range(2))
    rows = zip(weight.chunk(2), w_hat.chunk(2), x, y, strict=True)
    expected = sum(float((a @ w.T - b @ v.T).square().sum() - (a @ w.T).square().sum()) for w, v, a, b in rows)
    moments = Moments(y.mT @ y / 50, x.mT @ y / 50, y.mean(1), x.mean(1), 50)
    assert output_distance(weight, w_hat, moments) == pytest.approx(expected, rel=1e-4)


def test_output_error_without_signal():
    x = torch.zeros(1, 5, 8)
    assert output_error(torch.zeros(2, 8), torch.zeros(2, 8), None) == 0.0
    assert output_error(torch.zeros(2, 8), torch.zeros(2, 8), moments_of(x + 1, x + 1)) == 0.0
    # Inputs that were all zero in calibration say nothing, so the weights are compared themselves.
    assert output_error(torch.ones(2, 8), torch.full((2, 8), 0.5), moments_of(x, x)) == pytest.approx(0.25)
