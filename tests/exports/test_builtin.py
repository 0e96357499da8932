"""Exports that transformers' own quantizers load: the same outputs, without a layer of this package."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.integrations.gemma_quant import QuantizedLinear

import hf_catquant
import tiny_models
from hf_catquant import CatQuantConfig, export
from hf_catquant.packed_model import quantized_modules


def quantized(name: str, **options: Any) -> Any:
    usual = {"weights": "ternary", "group_size": -1, "solver": "rtn", "correction": None, "rotation": None}
    model = hf_catquant.quantize(tiny_models.build(name), CatQuantConfig(**{**usual, **options}))
    return model


def centred(model: Any) -> Any:
    """The model with all offsets zero."""
    for module in quantized_modules(model).values():
        if module.weight_offset is not None:
            module.weight_offset.zero_()
    return model


@torch.no_grad()
def outputs(model: Any, name: str) -> torch.Tensor:
    return tiny_models.main_output(model(**tiny_models.batch(name)))


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=1e-5 * float(first.abs().max()))


@pytest.mark.parametrize(("name", "bits"), [("bert", 2), ("llama", 2), ("vit", 4), ("t5", 4)])
def test_gemma(name, bits, tmp_path):
    model = centred(quantized(name, weights={2: "ternary", 4: "int4"}[bits]))
    done = export(model, tmp_path / "out", "gemma")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert close(outputs(model, name), outputs(loaded, name))
    kinds = {module.num_bits for module in loaded.modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {bits, 8} if name != "t5" else {bits}  # the head is int8
    kept = [name for name, module in loaded.named_modules() if name.endswith(".wo") and type(module) is nn.Linear]
    assert len(kept) == (name == "t5") * 4  # a class may keep some in float32, as transformers' quantizers do
    assert not done.lost
    assert "quantized layers are packed" in done.notes[0]


def test_gemma_keeps_layers_with_offsets_or_groups_in_float(tmp_path):
    model = quantized("bert")  # ternary with offsets in the blocks, int8 outside them
    export(model, tmp_path / "out", "gemma")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert close(outputs(model, "bert"), outputs(loaded, "bert"))
    kinds = [name for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)]
    assert kinds == ["bert.pooler.dense", "classifier"]
    with pytest.raises(ValueError, match=r"no layer fits .*group_size=-1, rotation=None"):
        export(quantized("bert", group_size=8, edge_weights=None), tmp_path / "other", "gemma")


@pytest.mark.parametrize(("weights", "bits"), [("ternary", 2), ("int2", 2), ("binary", 2), ("int3", 4), ("int8", 8)])
def test_metal(weights, bits, tmp_path):
    model = quantized("bert", weights=weights, group_size=32)
    done = export(model, tmp_path / "out", "metal")
    loaded = type(model).from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert close(outputs(model, "bert"), outputs(loaded, "bert"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (bits, 32)
    assert done.size < (2 if weights == "int8" else 1) * export(model, tmp_path / "float").size
    assert any("device_map" in note for note in done.notes)


def test_metal_passes_by_what_its_quantizer_does(tmp_path):
    """On Apple silicon; elsewhere transformers dequantizes whatever is packed."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
    model = T5ForConditionalGeneration(
        T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    ).eval()
    hf_catquant.quantize(model, CatQuantConfig("int8", group_size=32, solver="rtn", correction=None, rotation=None))
    export(model, tmp_path / "out", "metal")
    loaded = type(model).from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert close(outputs(model, "t5"), outputs(loaded, "t5"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        packed = [name for name in file.keys() if name.endswith(".qbiases")]  # noqa: SIM118
    assert packed
    assert not [name for name in packed if ".wo." in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.NAMES)
@pytest.mark.parametrize(("target", "weights", "group_size"), [("gemma", "int8", -1), ("metal", "int4", 32)])
def test_every_kind_of_model(target, weights, group_size, name, tmp_path):
    model = quantized(name, weights=weights, group_size=group_size)
    export(model, tmp_path / "out", target)
    loaded = type(model).from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert close(outputs(model, name), outputs(loaded, name))


def test_metal_refuses_what_no_group_fits(tmp_path):
    with pytest.raises(ValueError, match=r"no layer fits .*group_size=32, 64, 128 or -1"):
        export(
            quantized(
                "bert", rotation="hadamard", edge_weights=None, modules_to_not_convert=["classifier", "bert.pooler"]
            ),
            tmp_path / "out",
            "metal",
        )


def test_a_wrong_export_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_catquant.exports.builtin._BITS", (2, 4, 8))
    monkeypatch.setattr(
        "hf_catquant.exports.builtin._bytes",
        lambda q, bits: torch.zeros(len(q), q.shape[1] * bits // 8, dtype=torch.uint8),
    )
    with pytest.raises(ValueError, match="does not load these weights back"):
        export(centred(quantized("llama")), tmp_path / "out", "gemma")
    assert not list(tmp_path.iterdir())
