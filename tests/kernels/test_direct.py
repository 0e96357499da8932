"""Layers pass by torch's dispatcher on the CPU, and never where somebody watches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import random_case
from hf_catquant.kernels import direct, native
from hf_catquant.layers.base import Scheme
from hf_catquant.layers.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(native.PATH == "reference", reason="the library was not built")


@pytest.fixture
def layer():
    made = QuantizedLinear(nn.Linear(24, 6), Scheme("int4", 8, rotation="hadamard"))
    made.weight_packed, made.weight_scale, made.weight_offset = random_case("int4", 6, 24, 8).stored
    return made


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called past the dispatcher."""
    made: list[int] = []
    monkeypatch.setattr(direct.cpu, "linear", lambda *a, kernel=direct.cpu.linear: made.append(1) or kernel(*a))
    return made


class Watcher(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


def test_the_same_comes_out(layer, calls):
    x = torch.randn(3, 24)
    with torch.no_grad():
        found = layer(x)
        assert len(calls) == 1
        with Watcher() as watcher:
            expected = layer(x)
        assert {"catquant::linear", "catquant::rotate"} <= set(watcher.seen)
    assert len(calls) == 1
    assert torch.equal(found, expected)


def test_gradients_are_there(layer, calls):
    layer(torch.randn(3, 24)).sum().backward()
    assert float(layer.bias.grad[0]) == 3
    layer.bias.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert not calls
    assert not layer(x.detach()).requires_grad
    assert len(calls) == 1


def test_traces_transforms_and_subclasses_are_seen(layer, calls):
    layer.requires_grad_(False)
    x = torch.randn(3, 24)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "catquant::linear" in str(traced.graph)
    assert "catquant.linear" in str(torch.export.export(layer, (x,)).graph)
    assert layer(nn.Parameter(x)).requires_grad
    assert torch.func.vmap(layer)(x.unsqueeze(0)).shape == (1, 3, 6)
    assert not calls
