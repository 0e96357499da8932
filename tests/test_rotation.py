"""The rotation is orthogonal, its own inverse transposed, spreads an outlier, and changes nothing but the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.formats import get_format
from hf_catquant.layers import QuantizedModule, Scheme, layer_for
from hf_catquant.model import select
from hf_catquant.rotation import block_size, rotate
from hf_catquant.solvers import rtn

WIDTHS = (1, 2, 7, 8, 12, 48, 64, 96, 384)


@pytest.mark.parametrize("columns", WIDTHS)
def test_orthogonal(columns):
    matrix = rotate(torch.eye(columns), False)  # row i is R e_i
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(torch.eye(columns), True), matrix.T, atol=1e-6, rtol=0)


def test_blocks_are_as_large_as_they_can_be():
    assert [block_size(columns) for columns in WIDTHS] == [1, 2, 1, 8, 4, 16, 64, 32, 128]


def test_the_stored_format_never_changes():
    # A checkpoint is only right with the very same matrix: signs and entries of K = 12, twice the block of 4.
    wanted = rotate(torch.eye(12), False) * 2
    signs = "".join("+" if value > 0 else "-" for value in wanted[:, [0, 4, 8]].sum(1))
    assert signs == SIGNS
    assert torch.equal(wanted.abs().sum(1), torch.full((12,), 4.0))


SIGNS = "+--+---++-+-"


def test_an_outlier_and_a_constant_are_spread():
    for x in (torch.eye(256)[3], torch.full((256,), 1 / 16)):
        assert rotate(x, False).abs().max() < 0.3  # norm 1: all the same would be 1 / 16


def test_inference_mode_leaves_nothing_behind():
    with torch.inference_mode():
        rotate(torch.ones(2, 40), False)
    x = torch.ones(2, 40, requires_grad=True)
    rotate(x, False).sum().backward()
    torch.testing.assert_close(x.grad, rotate(torch.ones(2, 40), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_gradient(dtype):
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = torch.ops.catquant.rotate(x, False)
    assert y.dtype == dtype
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.ops.catquant.rotate(weight, True))


@pytest.mark.parametrize("activations", [None, "int8"])
@torch.no_grad()
def test_a_layer_is_right_in_its_own_basis(activations):
    torch.manual_seed(0)
    module = nn.Linear(48, 10)
    layer = layer_for(module)(module, Scheme("int8", 16, activations, rotation="hadamard"))
    layer.fill(rtn.solve(layer.target(module.weight), get_format("int8"), 16))
    x = torch.randn(5, 48)
    torch.testing.assert_close(layer.weight, module.weight, atol=0.02, rtol=0)
    torch.testing.assert_close(layer(x), module(x), atol=0.05, rtol=0)
    torch.testing.assert_close(layer.to_float()(x), module(x), atol=0.05, rtol=0)


def test_layers_that_cannot_rotate_refuse():
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match="rotation must be None for a Conv2d, got 'hadamard'"):
        layer_for(conv)(conv, Scheme("int8", 16, rotation="hadamard"))


@pytest.mark.parametrize("solver", ["rtn", "gptq", "reconstruct"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama_tied", "gpt2"])
@torch.no_grad()
def test_quantized_saved_and_reloaded(name, solver, tmp_path):
    samples = tiny_models.samples(name, 12, seed=0)
    config = CatQuantConfig(
        weights="int4",
        activations="int8" if name == "vit" and solver != "rtn" else None,
        group_size=16,
        rotation="hadamard",
        edge_weights=None,  # the tied head and its embedding are asked, too
        solver=solver,
        solver_options={"block_steps": 4, "model_steps": 2} if solver == "reconstruct" else {},
        correction=None,
        dataset=None if solver == "rtn" else samples,
        batch_size=3,
    )
    model, before = tiny_models.build(name), tiny_models.build(name)
    quantize(model, config)
    rotated = [m for m in model.modules() if isinstance(m, QuantizedModule) and m.scheme.rotation]
    assert rotated
    assert all(isinstance(m, layer_for(nn.Linear(2, 2))) for m in rotated)
    assert {layer.name for layer in report(model).layers if layer.rotation} == {
        layer for layer, module in model.named_modules() if module in rotated
    }
    assert " inputs rotated" in str(report(model))
    assert max(layer.error or 0 for layer in report(model).layers) < 0.05
    inputs = tiny_models.batch(name)
    out, wanted = tiny_models.main_output(model(**inputs)), tiny_models.main_output(before(**inputs))
    assert (out - wanted).norm() < 0.5 * wanted.norm()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny_models.main_output(again(**inputs)), out)


@pytest.mark.parametrize("value", ["Hadamard", 1, True])
def test_bad_values(value):
    with pytest.raises(ValueError, match="rotation must be None or one of auto, hadamard, got"):
        CatQuantConfig(rotation=value)


@pytest.mark.parametrize(
    ("weights", "activations", "rotation", "found"),
    [
        ("binary", None, "auto", "hadamard"),
        ("int3", None, "auto", "hadamard"),
        ("int4", None, "auto", None),
        ("int4", "int8", "auto", None),
        ("int8", "int4", "auto", "hadamard"),
        ("ternary", None, None, None),
        ("int8", None, "hadamard", "hadamard"),
    ],
)
def test_where_auto_rotates(weights, activations, rotation, found):
    overrides = {"b": {"weights": "int4"}}
    config = CatQuantConfig(weights=weights, activations=activations, rotation=rotation, overrides=overrides)
    assert config.scheme_for("a", edge=False).rotation == found
    assert config.scheme_for("a", edge=True).rotation is None
    if activations is None and rotation == "auto":
        assert config.scheme_for("b", edge=False).rotation is None


@pytest.mark.parametrize(("width", "found"), [(27, None), (54, "hadamard")])
def test_an_odd_width_has_no_rotation(width, found):
    """Its largest block is a single input: nothing would be mixed."""
    layers = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    sites = select(layers, CatQuantConfig(weights="ternary", overrides={".": {"rotation": "hadamard"}})).sites
    assert {site.scheme.rotation for site in sites} == {found}


class Pair(nn.Module):
    """Two linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x)) + torch.tanh(self.b(x))


class Pairs(nn.Module):
    """What ``a`` holds is ternary as it is, what ``b`` holds after a rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        for block in self.blocks:
            ternary = torch.randint(-1, 2, (16, 16), generator=generator) * 0.5
            block.a.weight.data, block.b.weight.data = ternary, rotate(ternary, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def pairs_quantized(**how) -> dict[str, tuple[str | None, bool]]:
    """Of every layer its rotation, and whether its output is exact."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    dataset = [{"x": row} for row in x] if how.get("solver") == "gptq" else None
    config = CatQuantConfig("ternary_symmetric", -1, dataset=dataset, num_samples=64, correction=None, **how)
    layers = report(quantize(Pairs(), config)).layers
    return {layer.name.removeprefix("blocks."): (layer.rotation, layer.error < 1e-3) for layer in layers}


@torch.no_grad()
def test_data_decides_for_every_layer():
    found = pairs_quantized(solver="gptq")
    assert found == {
        f"{i}.{name}": (rotation, True) for i in (0, 1) for name, rotation in (("a", None), ("b", "hadamard"))
    }


@torch.no_grad()
def test_what_is_set_is_not_tried():
    # Only the first block is fed the float model's own inputs, and exact.
    for rotation, exact in (("hadamard", "b"), (None, "a")):
        found = pairs_quantized(solver="gptq", rotation=rotation)
        assert {used for used, _ in found.values()} == {rotation}
        assert [name for name, (_, is_exact) in found.items() if is_exact and name.startswith("0.")] == [f"0.{exact}"]


@torch.no_grad()
def test_layers_that_read_one_tensor_may_be_told_apart():
    found = pairs_quantized(solver="gptq", rotation=None, overrides={r"\.b$": {"rotation": "hadamard"}})
    assert found == {
        f"{i}.{name}": (rotation, True) for i in (0, 1) for name, rotation in (("a", None), ("b", "hadamard"))
    }


@torch.no_grad()
def test_rounded_inputs_rotate_always():
    found = pairs_quantized(solver="gptq", activations="int4")
    assert {rotation for rotation, _ in found.values()} == {"hadamard"}


@torch.no_grad()
def test_without_data_few_levels_rotate():
    found = pairs_quantized(solver="rtn")
    assert {rotation for rotation, _ in found.values()} == {"hadamard"}


def test_options_that_layers_go_without_are_told(caplog):
    caplog.set_level("WARNING", logger="hf_catquant")
    asked = {"solver": "rtn", "correction": None, "group_size": 16, "edge_weights": None}
    asked |= {"low_rank": 4, "rotation": "hadamard"}
    two = quantize(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), CatQuantConfig(**asked))
    notes = report(two).notes
    assert [note.split(" layers")[0] for note in notes] == ["low_rank: 2 of 2", "rotation: 2 of 2"]
    assert all(note in caplog.text for note in notes)
    reached = {**asked, "overrides": {"0|2": {"low_rank": 4, "rotation": "hadamard"}}}
    two = quantize(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), CatQuantConfig(**reached))
    assert report(two).notes == ()
    caplog.clear()
    edges = report(quantize(tiny_models.build("bert"), CatQuantConfig(**{**asked, "rotation": "auto"}))).notes
    assert [note.split(" layers")[0] for note in edges] == ["low_rank: 5 of 17"]
    assert not caplog.text
