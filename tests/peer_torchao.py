"""What tests/quantization/torchao_integration/test_torchao.py of transformers asks, asked of this quantizer."""

from __future__ import annotations

import json

import pytest
import torch

from hf_catquant import CatConfig, CatQuantConfig, quantize
from hf_catquant.packed_model import quantized_modules
from hf_catquant.report import stored_bytes
from peer_bnb import llama

FREE = {"solver": "rtn", "correction": None, "group_size": 16}


@pytest.mark.parametrize("correction", [None, "cat", CatConfig.paper()])
def test_the_config_is_json_serializable(correction):
    config = CatQuantConfig(
        correction=correction, dataset=[{"x": torch.ones(2)}], overrides={"a": {"weights": "int8"}}
    )
    assert CatQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    json.loads(config.to_json_string())


def test_the_repr_says_what_was_asked_for():
    text = repr(CatQuantConfig(weights="binary", dataset=[{"x": torch.ones(2)}]))
    assert text.startswith("CatQuantConfig {")
    assert '"weights": "binary"' in text
    assert "tensor" not in text


def test_the_last_pattern_that_matches_a_module_wins():
    model = llama()
    overrides = {
        r"layers\.\d+\.self_attn": {"weights": "int3"},
        r"layers\.1\.self_attn\.q_proj": {"weights": "int8", "group_size": -1},
        "k_proj": {"activations": "int8"},
    }
    quantize(model, CatQuantConfig(weights="ternary", overrides=overrides, **FREE))
    schemes = {name.removeprefix("model.layers."): m.scheme for name, m in quantized_modules(model).items()}
    assert schemes["0.self_attn.q_proj"].weights == "int3"
    assert (schemes["1.self_attn.q_proj"].weights, schemes["1.self_attn.q_proj"].group_size) == ("int8", -1)
    assert (schemes["0.self_attn.k_proj"].weights, schemes["0.self_attn.k_proj"].activations) == ("int3", "int8")
    assert schemes["0.mlp.up_proj"].weights == "ternary"


@pytest.mark.parametrize("edge", [None, "int8"])
def test_embeddings_and_head_are_quantized_too(edge):
    model = llama()
    quantize(model, CatQuantConfig(weights="ternary", edge_weights=edge, **FREE))
    found = quantized_modules(model)
    for name in ("model.embed_tokens", "lm_head"):
        assert found[name].scheme.weights == (edge or "ternary")


@pytest.mark.parametrize(("weights", "bits"), [("binary", 1), ("ternary", 1.6), ("int2", 2), ("int4", 4), ("int8", 8)])
def test_the_bytes_of_each_module_are_those_of_its_format(weights, bits):
    model = llama()
    quantize(model, CatQuantConfig(weights=weights, edge_weights=None, **{**FREE, "group_size": -1}))
    module = model.model.layers[0].mlp.up_proj
    whole = -(-module.columns * bits // 8)
    assert module.weight_packed.nbytes == pytest.approx(module.rows_ * whole, abs=module.rows_)
    assert stored_bytes(module) == sum(t.nbytes for t in module.packed_tensors())
