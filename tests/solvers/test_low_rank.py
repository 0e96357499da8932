"""The low-rank product: it takes the error that weighs most, layers add it as their weight says, and it is stored."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from helpers import slow
from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.formats import get_format
from hf_catquant.layers import Scheme, layer_for
from hf_catquant.model import select
from hf_catquant.moments import MomentSums
from hf_catquant.solvers import Moments, gptq, output_error, rtn, solve_with_product
from hf_catquant.solvers._low_rank import _target
from hf_catquant.weight import QuantizedWeight, dequantize

TERNARY = get_format("ternary")


def case(rows: int, columns: int, drift: float = 0.0) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) * torch.logspace(0, -2, columns)
    x = x @ torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    found = x + drift * x @ torch.randn(columns, columns, generator=generator) / columns**0.5
    sums = MomentSums()
    sums.add(x.unsqueeze(0), found.unsqueeze(0))
    moments = sums.result()
    assert moments is not None
    return weight, moments


def values(quantized: QuantizedWeight) -> Tensor:
    return dequantize(quantized, TERNARY, 16)


def by(solver: ModuleType) -> Callable[[Tensor, Moments | None], QuantizedWeight]:
    return lambda weight, moments: solver.solve(weight, TERNARY, 16, moments)


@pytest.mark.parametrize(("rows", "columns"), [(24, 48), (48, 24)])
@pytest.mark.parametrize("calibrated", [True, False])
def test_it_takes_the_error_that_weighs_most(rows, columns, calibrated):
    weight, moments = case(rows, columns)
    if not calibrated:
        moments = None
    solver = gptq if calibrated else rtn
    errors = [output_error(weight, values(by(solver)(weight, moments)), moments)]
    for rank in (2, 6):
        quantized, out, into = solve_with_product(weight, rank, moments, by(solver), values)
        assert out.shape == (rows, rank)
        assert into.shape == (rank, columns)
        assert out.dtype == into.dtype == torch.float16
        errors.append(output_error(weight, values(quantized) + out.float() @ into.float(), moments))
    assert errors[1] < 0.85 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_the_product_alone_is_best_under_the_inputs():
    """Of all products of rank 2 that are added to given codes none does better: random moves from it do worse."""
    weight, moments = case(24, 48)
    exact = moments._replace(cross=moments.gram)
    quantized, out, into = solve_with_product(weight, 2, exact, by(gptq), values)
    best = output_error(weight, values(quantized) + out.float() @ into.float(), exact)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = out.float() + 0.05 * out.float().std() * torch.randn(out.shape, generator=generator)
        assert output_error(weight, values(quantized) + moved @ into.float(), exact) > best


@pytest.mark.parametrize("solver", [gptq, rtn])
def test_codes_and_product_share_one_aim(solver):
    """The product acts on the quantized stream: what it leaves to the codes has moved to the float stream already."""
    weight, moments = case(24, 48, drift=0.3)
    target, _ = _target(weight, moments)
    still = moments._replace(cross=moments.gram)
    quantized, *product = solve_with_product(weight, 4, moments, by(solver), values)
    expected, *expected_product = solve_with_product(target, 4, still, by(solver), values)
    assert torch.equal(quantized.codes, expected.codes)
    torch.testing.assert_close(quantized.scale, expected.scale)
    torch.testing.assert_close(product, expected_product)
    assert not torch.equal(by(solver)(weight, still).codes, by(solver)(target, still).codes)


def test_more_rank_than_there_is_room_for_is_zeros():
    weight, moments = case(4, 24)
    _, out, into = solve_with_product(weight, 9, moments, by(gptq), values)
    assert out.shape == (4, 9)
    assert into.shape == (9, 24)
    assert not out[:, 4:].any()
    assert not into[4:].any()


LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (5, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False), (2, 6, 7, 8)),
    "position": (lambda: nn.Conv2d(6, 9, 1, stride=(2, 3)), (2, 6, 7, 8)),
    "padded": (lambda: nn.Conv1d(6, 8, 1, stride=2, padding=2), (2, 6, 11)),
    "dilated": (lambda: nn.Conv2d(6, 9, 3, padding="same", dilation=2), (2, 6, 7, 8)),
    "embedding": (lambda: nn.Embedding(10, 24), (5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_computes_with_the_weight_it_shows(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module = make()
    kind = layer_for(module)
    matrix = kind.to_matrix(module.weight)
    layer = kind(module, Scheme("ternary", 8, low_rank=3))
    layer.fill(rtn.solve(matrix, TERNARY, 8))
    plain = layer.matrix(torch.float32)
    layer.fill_low_rank(torch.randn(len(matrix), 3), torch.randn(3, len(matrix.T)))
    assert not torch.allclose(layer.matrix(torch.float32), plain)
    x = torch.randint(10, shape) if name == "embedding" else torch.randn(shape)
    torch.testing.assert_close(layer(x), layer.to_float()(x), rtol=1e-3, atol=1e-3)
    assert layer(x).dtype == torch.float32
    if name != "embedding":
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("solver", ["rtn", "gptq", *slow("reconstruct")])
@pytest.mark.parametrize("name", ["bert", "resnet"])
@torch.no_grad()
def test_stored_and_reported(name, solver, tmp_path):
    errors = []
    for rank in (0, 2):
        model = tiny_models.build(name)
        samples = tiny_models.samples(name, 12, seed=0)
        options = {"block_steps": 2, "model_steps": 2} if solver == "reconstruct" else {}
        config = CatQuantConfig(
            weights="ternary",
            group_size=16,
            low_rank=rank,
            solver=solver,
            solver_options=options,
            correction=None,
            dataset=None if solver == "rtn" else samples,
            batch_size=3,
        )
        quantize(model, config)
        errors.append(sum(layer.error for layer in report(model).layers))
    assert errors[1] < errors[0]
    held = [m for m in model.modules() if getattr(m, "low_rank_out", None) is not None]
    assert held
    assert all(m.scheme.weights == "ternary" for m in held)
    layer = next(layer for layer in report(model).layers if layer.weights == "ternary")
    rows, columns = layer.shape
    assert layer.bits > 16 * 2 * (rows + columns) / (rows * columns)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inputs = tiny_models.batch(name)
    expected = tiny_models.main_output(model(**inputs))
    assert torch.equal(tiny_models.main_output(again(**inputs)), expected)
    plain = again.dequantize()
    torch.testing.assert_close(tiny_models.main_output(plain(**inputs)), expected, rtol=1e-3, atol=1e-3)


def test_a_layer_takes_no_more_ranks_than_it_has_rows_or_columns():
    model = tiny_models.build("llama")  # the keys have 16 rows, the queries 32
    ranks = {site.name: site.scheme.low_rank for site in select(model, CatQuantConfig(low_rank=20)).sites}
    assert (ranks["model.layers.0.self_attn.q_proj"], ranks["model.layers.0.self_attn.k_proj"]) == (20, 16)
    with pytest.raises(ValueError, match=r"low_rank must be at most 32, the smaller side of the .*, got 33"):
        select(model, CatQuantConfig(low_rank=33))
    with pytest.raises(ValueError, match=r"low_rank must be at most 16, the smaller side of .*k_proj\), got 17"):
        select(model, CatQuantConfig(overrides={"k_proj": {"low_rank": 17}}))


def test_one_and_two_threads_find_the_same():
    """Factors of matrices from about 200 columns on differ by threads; codes, scales and products must not."""
    weight, moments = case(8, 384)
    ridged = moments.gram + moments.gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(384)
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            factor, _ = gptq._cholesky(ridged.clone())
            coded, *product = solve_with_product(weight, 4, moments, by(rtn), values)
            found.append([factor, coded.codes, *product])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
