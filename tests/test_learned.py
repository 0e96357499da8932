"""Learned layers compute what the packed layer will, gradients reach everything, and what was learned is written back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_catquant.formats import get_format
from hf_catquant.layers import QuantizedModule, Scheme, layer_for
from hf_catquant.learned import LearnedLayer
from hf_catquant.solvers import rtn
from hf_catquant.weight import fit_static_range

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (5, 24)),
    "transposed": (lambda: Conv1D(10, 24), (5, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False), (2, 6, 7, 8)),
    "embedding": (lambda: nn.Embedding(10, 24), (5, 3)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (1, 4, 7, 8)),
}
FORMATS = ("binary", "ternary", "int2", "int3", "int4")


def packed(
    name: str, weights: str, activations: str | None = None, low_rank: int = 0
) -> tuple[QuantizedModule, Tensor, Tensor]:
    """(packed layer, its float weight (N, K), an input)."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
        x = torch.randint(10, shape) if name == "embedding" else torch.randn(shape)
    kind = layer_for(module)
    layer = kind(module, Scheme(weights, 8, activations, low_rank=low_rank))
    matrix = kind.to_matrix(module.weight.detach())
    layer.fill(rtn.solve(matrix, get_format(weights), 8))
    if low_rank:
        generator = torch.Generator().manual_seed(1)
        layer.fill_low_rank(
            *(0.1 * torch.randn(size, generator=generator) for size in ((len(matrix), 2), (2, len(matrix.T))))
        )
    if layer.input_scale is not None:
        layer.fill_input_range(*fit_static_range(x.flatten(), get_format(activations)))
    return layer, matrix, x


def learned(layer: QuantizedModule, matrix: Tensor) -> LearnedLayer:
    return LearnedLayer(layer, matrix, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("low_rank", [0, 2])
def test_starts_as_the_packed_layer(name, weights, low_rank):
    layer, matrix, x = packed(name, weights, low_rank=low_rank)
    stand_in = learned(layer, matrix)
    torch.testing.assert_close(stand_in(x), layer(x), rtol=1e-3, atol=1e-4)
    assert stand_in.changed() == 0
    before = [t.clone() for t in layer.packed_tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, stand_in.write_back().packed_tensors(), strict=True))


@pytest.mark.parametrize("activations", ["int2", "int4"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_inputs_are_quantized_alike(name, activations):
    layer, matrix, x = packed(name, "int4", activations, low_rank=2)
    torch.testing.assert_close(learned(layer, matrix)(x), layer(x), rtol=1e-3, atol=1e-3)


def test_codes_start_inside_the_cells_of_the_solver():
    layer, matrix, _ = packed("linear", "ternary")
    stand_in = learned(layer, matrix + 0.3)  # a weight that other codes would be nearer to
    assert stand_in.changed() == 0
    inner = (stand_in.codes > 0) & (stand_in.codes < 2)
    assert ((stand_in.codes - stand_in.rounded()).abs()[inner] <= 0.48 + 1e-6).all()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("name", "activations"), [("linear", None), ("linear", "int4"), ("conv2d", "int4")])
def test_learning_and_writing_back(name, activations, weights):
    """Towards another weight: the loss falls, codes and scales move, and the packed layer is what was learned."""
    layer, matrix, x = packed(name, weights, activations)
    stand_in = learned(layer, matrix)
    target = layer.apply_matrix(x, matrix.roll(1, 0), None).detach()
    optimizer = torch.optim.Adam(stand_in.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (stand_in(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in stand_in.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.8 * losses[0]
    assert stand_in.changed() > 0
    found = stand_in(x).detach()
    assert stand_in.write_back() is layer
    torch.testing.assert_close(layer(x).detach(), found, rtol=2e-2, atol=2e-2)
    layer.check_values()


def test_the_layer_is_not_touched_before_it_is_written():
    layer, matrix, x = packed("linear", "ternary")
    layer.weight_scale = layer.weight_scale.float()  # scales that float16 does not hold are stored like this
    layer.weight_offset = layer.weight_offset.float()
    expected = layer(x).detach()
    stand_in = learned(layer, matrix)
    with torch.no_grad():
        for parameter in stand_in.parameters():
            parameter.add_(1)
    assert torch.equal(layer(x), expected)


def test_zero_stays_a_level_of_a_learned_range():
    layer, matrix, x = packed("conv2d", "int4", "int3")
    stand_in = learned(layer, matrix)
    with torch.no_grad():
        stand_in.input_scale.mul_(1.37)
    zeros = torch.zeros_like(x)
    assert torch.equal(stand_in._quantized_input(zeros), zeros)


def test_dropping_leaves_some_inputs_in_float():
    layer, matrix, x = packed("linear", "int4", "int2")
    stand_in = learned(layer, matrix)
    stand_in.drop = 0.5
    kept = (stand_in._quantized_input(x) == x).float().mean()
    assert 0.3 < float(kept) < 0.7
    stand_in.drop = 0.0
    assert float((stand_in._quantized_input(x) == x).float().mean()) < 0.2


def test_what_is_not_learned_is_asked_of_the_layer():
    layer, matrix, _ = packed("linear", "int4")
    stand_in = learned(layer, matrix)
    assert (stand_in.in_features, stand_in.weight.dtype) == (24, torch.float32)
    with pytest.raises(AttributeError):
        _ = stand_in.no_such_name
