"""ONNX: quantized encoders as standard operators, run in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, quantize
from hf_catquant.onnx_export import export_onnx
from tiny_models import main_output

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CASES = {
    "bert": {"weights": "ternary"},  # rotated
    "vit": {"weights": "int3", "activations": "int8"},
    "resnet": {"weights": "int4"},
    "wav2vec2": {"weights": "binary"},
}


@pytest.mark.parametrize("name", CASES)
def test_an_encoder_in_onnxruntime(name: str, tmp_path: Path):
    model = tiny_models.build(name)
    request = {"group_size": 16, "dataset": tiny_models.samples(name, 16), "solver": "gptq", **CASES[name]}
    quantize(model, CatQuantConfig(**request, correction=CatConfig(num_clusters=2, alpha=0.5)))
    path = tmp_path / "model.onnx"
    names = export_onnx(model, tiny_models.batch(name, 2), path)
    assert names[0] == "logits"
    graph = onnx.load(path).graph
    assert not any("catquant" in node.op_type + node.domain for node in graph.node)
    held = sum(np.prod(i.dims, dtype=int) for i in graph.initializer if i.data_type == onnx.TensorProto.UINT8)
    codes = sum(b.numel() for n, b in model.named_buffers() if n.endswith("weight_packed"))
    assert held >= codes, "the codes are in the file as they are"
    batch = tiny_models.batch(name, 3)  # another batch size than that of the export
    with torch.no_grad():
        wanted = main_output(model(**batch)).numpy()
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {each.name: batch[each.name].numpy() for each in session.get_inputs()})[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_experts_are_refused():
    from test_experts import RTN, build

    model = build()
    quantize(model, CatQuantConfig(**RTN))
    with pytest.raises(ValueError, match="fused experts cannot be exported"):
        export_onnx(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, "nowhere.onnx")
