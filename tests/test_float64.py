"""The dtypes that a quantized model computes in: float64 beside the usual three, others are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.formats import get_format
from hf_catquant.layers import Scheme, layer_for
from hf_catquant.solvers import rtn

FIELDS = {"weights": "int4", "group_size": 16, "solver": "rtn", "correction": None}


@torch.no_grad()
def answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return tiny_models.main_output(model(**batch))


@pytest.mark.parametrize("name", ["llama_tied", "resnet"])  # embeddings, linears, rotations; convolutions
def test_a_float64_model_answers_as_in_float32(name: str, tmp_path: Path):
    model = quantize(tiny_models.build(name), CatQuantConfig(**FIELDS))
    model.save_pretrained(tmp_path / "single")
    batch = tiny_models.batch(name)
    wanted = answers(model, batch)
    double = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    loaded = type(model).from_pretrained(tmp_path / "single", dtype=torch.float64)
    loaded.save_pretrained(tmp_path / "double")
    again = type(model).from_pretrained(tmp_path / "double")
    from_float64 = quantize(tiny_models.build(name).double(), CatQuantConfig(**FIELDS))
    for other in (loaded, again, from_float64, model.double()):
        found = answers(other, double)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_in_float64(kind: str, activations: str | None):
    original: nn.Module = nn.Linear(16, 8) if kind == "linear" else nn.Conv1d(16, 8, 3)
    kind_of_layer = layer_for(original)
    assert kind_of_layer is not None
    layer = kind_of_layer(original, Scheme("int4", 16, activations))
    layer.fill(rtn.solve(layer.target(original.weight), get_format("int4"), 16, None))
    if kind == "conv" and activations is not None:
        layer.fill_input_range(torch.tensor(0.02), torch.tensor(0.0))
    x = torch.arange(16 * 16).sin().view(16, 16)
    found = []
    for dtype in (torch.float32, torch.float64):
        given = x.detach().to(dtype, copy=True).requires_grad_()
        out = layer.to(dtype)(given)
        assert out.dtype == dtype
        out.sum().backward()
        assert given.grad is not None
        found.append((out.detach().float(), given.grad.float()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "complex64"])
def test_other_dtypes_are_refused(dtype: str, tmp_path: Path):
    model = quantize(tiny_models.build("llama"), CatQuantConfig(**FIELDS))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"dtype must be one of float32, .* got torch\.{dtype}: .*pass dtype="):
        type(model).from_pretrained(tmp_path, dtype=dtype)


def test_float8_weights_stay_as_they_are():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].to(torch.float8_e4m3fn)
    quantize(model, CatQuantConfig(**FIELDS))
    assert "its weight is torch.float8_e4m3fn, not a dtype that layers compute in" in report(model).skipped["0"]


def test_weights_without_elements_stay_as_they_are():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 0))
    quantize(model, CatQuantConfig(**FIELDS))
    assert report(model).skipped["1"] == "its weight has no elements: (0, 16)"
