"""ONNX: a quantized model does not become one, and says so; a dequantized one does, with the same answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_catquant import CatQuantConfig, quantize
from hf_catquant.model import dequantize_modules


@pytest.fixture
def pair(generator) -> tuple[nn.Module, nn.Module, Tensor]:
    """A quantized model, the float one with its weights, and an input."""
    quantized = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    quantize(quantized, CatQuantConfig(group_size=8, solver="rtn", correction=None))
    plain = copy.deepcopy(quantized)
    dequantize_modules(plain)
    return quantized.eval(), plain.eval(), torch.randn(3, 16, generator=generator)


def test_only_the_dequantized_model_is_made_of_operators_of_torch(pair):
    """The exporter of ONNX translates one operator at a time, and knows those of torch."""
    *models, x = pair
    graphs = [torch.export.export(model, (x,)).graph for model in models]
    spaces = [{node.target.namespace for node in g.nodes if node.op == "call_function"} for g in graphs]
    assert spaces == [{"catquant", "aten"}, {"aten"}]


def test_onnx_refuses_the_quantized_model_and_takes_the_dequantized_one(pair):
    for package in ("onnxscript", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnxscript onnx")
    from onnx.reference import ReferenceEvaluator

    quantized, plain, x = pair
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"(?s)catquant\.linear"):
        torch.onnx.export(quantized, (x,), dynamo=True, verbose=False)
    program = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
    found = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found[0]), quantized(x), rtol=1e-4, atol=1e-5)
