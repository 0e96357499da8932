"""Quantized layers under ``torch.autocast`` take and return what torch's own layers do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_catquant.layers import QuantizedModule, Scheme, layer_for
from hf_catquant.weight import QuantizedWeight

INPUTS = {nn.Linear: (3, 12), nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 4, 7, 7)}


def quantized(module: nn.Module) -> QuantizedModule:
    kind = layer_for(module)
    assert kind is not None
    rows, columns = kind.matrix_shape(module)
    layer = kind(module, Scheme("int4", -1))
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layer.fill(QuantizedWeight(codes, torch.full((rows, 1), 0.1), torch.zeros(rows, 1)))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 5), lambda: nn.Conv1d(4, 6, 3), lambda: nn.Conv2d(4, 6, 3)])
def test_as_torch_does(make, dtype, generator):
    module = make()
    layer, x = quantized(module), torch.randn(INPUTS[type(module)], generator=generator).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == module(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), layer(x.bfloat16()))
    if dtype == torch.float32:
        assert layer(x).dtype == torch.float32


def test_compiled(generator):
    torch._dynamo.reset()
    layer, x = quantized(nn.Linear(12, 5)), torch.randn(3, 12, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


def test_without_a_device(generator):
    assert quantized(nn.Linear(12, 5)).to("meta")(torch.empty(3, 12, device="meta")).shape == (3, 5)
