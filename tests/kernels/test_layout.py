"""Layouts live and die with the packed tensor, follow its changes, and are never part of what is saved."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers import random_case
from hf_catquant.formats import get_format
from hf_catquant.kernels import layout, native
from hf_catquant.layers.base import Scheme
from hf_catquant.layers.linear import QuantizedLinear
from hf_catquant.solvers import rtn

pytestmark = pytest.mark.skipif(
    not native.available_paths() or native.PATH == "reference",
    reason="the library was not built, or is not to be used",
)


@pytest.fixture
def layer():
    original = nn.Linear(40, 24)
    made = QuantizedLinear(original, Scheme("ternary", 16))
    made.fill(rtn.solve(original.weight.detach(), get_format("ternary"), 16, None))
    return made


@pytest.fixture(autouse=True)
def small_products_take_the_layout(monkeypatch):
    monkeypatch.setattr(native, "dense_from", 1 << 62)


X = torch.linspace(-1, 1, 80).view(2, 40)


def expected(layer):
    return nn.functional.linear(X, layer.weight, layer.bias)


def close(layer):
    return torch.allclose(layer(X), expected(layer), atol=1e-5)


def test_it_is_built_once(layer, monkeypatch):
    first = layer(X)
    monkeypatch.setattr(layout, "_build", None)
    assert torch.equal(layer(X), first)


def test_it_goes_with_the_packed_tensor(layer):
    layer(X)
    storage = layer.weight_packed.untyped_storage()
    (held,) = storage.catquant_layouts.values()
    reference = layout.weakref.ref(held.memory)
    del storage, held
    assert reference() is not None
    layer.weight_packed = torch.zeros_like(layer.weight_packed)
    gc.collect()
    assert reference() is None


def test_it_is_not_saved_or_copied(layer):
    layer(X)
    assert layout.held_bytes(layer.weight_packed) > 0
    keys = {"weight_packed", "weight_scale", "weight_offset", "bias"}
    assert set(layer.state_dict()) == keys
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer).weight_packed,
        pickle.loads(pickle.dumps(layer)).weight_packed,
        torch.load(file)["weight_packed"],
        layer.weight_packed.clone(),
    ):
        assert layout.held_bytes(other) == 0
    assert layout.held_bytes(layer.weight_packed.detach()) > 0


def test_copies_multiply_on_their_own(layer):
    layer(X)
    other = copy.deepcopy(layer)
    other.weight_scale.mul_(2)
    assert close(other)
    assert close(layer)


@pytest.mark.parametrize("buffer", ["weight_packed", "weight_scale", "weight_offset"])
def test_it_follows_what_is_written_in_place(layer, buffer):
    before = layer(X)
    getattr(layer, buffer)[:3] = 1
    assert close(layer)
    assert not torch.equal(layer(X), before)


@pytest.mark.parametrize("buffer", ["weight_packed", "weight_scale", "weight_offset"])
def test_it_follows_tensors_that_are_replaced(layer, buffer):
    for step in range(5):  # freed tensors come back at the same address
        layer(X)
        setattr(layer, buffer, torch.full_like(getattr(layer, buffer), step))
        assert close(layer)


def test_it_follows_a_loaded_state(layer):
    layer(X)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight_scale"] *= 3
    layer.load_state_dict(state)
    assert close(layer)


def test_inference_tensors_are_multiplied(layer):
    with torch.inference_mode():
        other = copy.deepcopy(layer)
        assert torch.equal(other(X), layer(X))


def test_a_shared_weight_has_one(layer):
    tied = QuantizedLinear(nn.Linear(40, 24), layer.scheme)
    tied.share(layer)
    layer(X)
    tied(X)
    assert len(layer.weight_packed.untyped_storage().catquant_layouts) == 1


def test_half_scales_and_wide_ones(layer):
    assert layer.weight_scale.dtype == torch.float16
    layer.weight_scale, layer.weight_offset = layer.weight_scale.float(), layer.weight_offset.float()
    assert close(layer)


def test_tensors_that_lie_apart_are_left_to_float_products():
    case = random_case("int4", 8, 40, 8)
    apart = case.scale.repeat(1, 2)[:, ::2]
    assert layout.layout_of(case.packed, apart, case.offset, "int4", 8, 40) is None


def test_the_variable_picks_the_path(monkeypatch):
    for name in (*native.available_paths(), "reference"):
        monkeypatch.setenv(native.VARIABLE, name)
        assert native.chosen_path() == name
    monkeypatch.setenv(native.VARIABLE, "mmx")
    with pytest.raises(
        ValueError, match=r"CATQUANT_CPU must be one of .*scalar, reference on this machine, got 'mmx'"
    ):
        native.chosen_path()
    monkeypatch.delenv(native.VARIABLE)
    assert native.chosen_path() == native.available_paths()[0]


def test_without_the_library_the_reference_runs_and_says_so_once():
    code = (
        "import pathlib, ctypes\n"
        "glob = pathlib.Path.glob\n"
        "pathlib.Path.glob = lambda self, pattern: iter(()) if 'libcatquant' in pattern else glob(self, pattern)\n"
        "import torch\n"
        "from hf_catquant.kernels import native\n"
        "packed, scale = torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2, 1)\n"
        "for _ in range(2):\n"
        "    print(torch.ops.catquant.dequantize(packed, scale, scale, 'int2', -1, 4, torch.float32).sum().item())\n"
        "print(native.PATH)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["-8.0", "-8.0", "reference"]
    assert found.stderr.count("without its CPU kernels") == 1
