"""What accelerate does to a quantized model: dispatch, offload to memory and to disk, a device map made for a budget."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_catquant
import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, quantize
from hf_catquant.packed_model import quantized_modules
from tiny_models import LLAMA

IDS = torch.arange(3, 19).view(2, 8)


def build(name: str) -> tf.PreTrainedModel:
    if name != "mixtral":
        return tiny_models.build(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)).eval()


def quantized(name: str) -> tf.PreTrainedModel:
    model = build(name)
    quantize(model, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


NAMES = ["llama", "llama_tied", "mixtral"]  # tied: the packed weight of the head is that of the embedding


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers too"])
@pytest.mark.parametrize("name", NAMES)
def test_offload_to_disk_from_a_checkpoint(name: str, buffers: bool, tmp_path: Path):
    model = quantized(name)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    away = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "away", offload_buffers=buffers
    )
    packed = quantized_modules(away)["model.layers.1.self_attn.q_proj"].weight_packed
    assert packed.is_meta == buffers, "with offload_buffers=True the codes wait on the disk"
    assert torch.equal(logits(away), logits(model))
    assert hf_catquant.report(away).bytes_after == hf_catquant.report(model).bytes_after
    away.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_an_offloaded_model_is_dequantized_and_exported(name: str, tmp_path: Path):
    """What waits on the disk is read; before, the weights were meta tensors, and answers NaN."""
    model = quantized(name)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    away = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "away", offload_buffers=True
    )
    wanted = logits(model.dequantize())
    hf_catquant.export(away, tmp_path / "export")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "export")), wanted)
    assert quantized_modules(away), "an export works on a copy"
    assert torch.equal(logits(away.dequantize()), wanted)
    assert torch.equal(logits(away), wanted), "after the hooks have run once"
    away.save_pretrained(tmp_path / "float")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "float")), wanted)


def test_a_model_without_values_is_not_dequantized():
    model = quantized("llama").to("meta")
    layers = quantized_modules(model)
    with pytest.raises(ValueError, match=r"weight_packed is on the meta device, and no hook of accelerate says where"):
        model.dequantize()
    assert quantized_modules(model).keys() == layers.keys()
    with pytest.raises(ValueError, match="is on the meta device, and no hook"):
        hf_catquant.export(model, "nowhere")


@pytest.mark.parametrize(
    "name", ["llama", "mixtral"]
)  # of a tied one accelerate misses the buffers that are not saved
def test_offload_of_a_model_in_memory(name: str, tmp_path: Path):
    wanted = logits(quantized(name))
    for offload in (
        lambda model: accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True),
        lambda model: accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True),
    ):
        away = offload(quantized(name))
        assert torch.equal(logits(away), wanted)
        assert torch.allclose(logits(away.dequantize()), wanted, atol=1e-5)


def test_a_budget_decides_what_goes_to_the_disk(tmp_path: Path):
    model = quantized("llama")
    model.save_pretrained(tmp_path / "model")
    budget = {"cpu": model.get_memory_footprint() // 2}
    away = type(model).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory=budget,
        offload_folder=tmp_path / "away",
        offload_buffers=True,
    )
    assert {"cpu", "disk"} == set(away.hf_device_map.values())
    assert torch.equal(logits(away), logits(model))


def test_corrections_are_dispatched_with_their_module(tmp_path: Path):
    model = build("llama")
    data = [{"input_ids": torch.arange(12) * (i + 1) % 96} for i in range(16)]
    correction = CatConfig(num_clusters=2, alpha=0.5, at="blocks")
    quantize(model, CatQuantConfig(weights="int2", group_size=16, dataset=data, correction=correction))
    assert model.config.quantization_config.corrections
    model.save_pretrained(tmp_path / "model")
    places = {"model": "disk", "lm_head": "cpu"}
    away = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "away", offload_buffers=True
    )
    assert torch.equal(logits(away), logits(model))
