"""What tests/quantization/gptq/test_gptq.py of transformers asks of a calibrated method, asked of this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_catquant import CatQuantConfig
from hf_catquant.packed_model import quantized_modules
from peer_bnb import llama

TEXTS = [{"input_ids": (torch.arange(8) * (i + 1)) % 40} for i in range(24)]
IDS = torch.arange(8).view(1, 8)


def request(**fields: object) -> CatQuantConfig:
    return CatQuantConfig(**{"weights": "int4", "group_size": 16, "dataset": TEXTS, "batch_size": 8, **fields})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=request())


@pytest.mark.parametrize(
    ("dataset", "error"), [(None, ValueError), ("wikitext2", TypeError), (7, TypeError), ([], ValueError)]
)
def test_the_dataset_is_validated(dataset, error, folder):
    with pytest.raises(error, match="dataset"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=request(dataset=dataset))


def test_a_generator_can_be_a_dataset_and_is_read_once(folder, quantized):
    stream = request(dataset=(text for text in TEXTS), num_samples=24)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=stream)
    assert torch.equal(model(IDS).logits, quantized(IDS).logits)


@pytest.mark.parametrize("shard", [None, "8KB"])
@torch.no_grad()
def test_a_saved_model_is_the_same_model(shard, quantized, tmp_path):
    quantized.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, quantized(IDS).logits)
    assert quantized_modules(again).keys() == quantized_modules(quantized).keys()


def test_the_data_never_reaches_the_disk(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {"dataset", "processor"}.isdisjoint(stored)
    assert stored["provenance"]["calibration"]["num_samples"] == 24


@torch.no_grad()
def test_a_model_dispatched_to_disk_is_the_same_model(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert torch.equal(model(IDS).logits, quantized(IDS).logits)


def test_the_request_itself_is_not_changed(folder):
    config = request()
    before = config.to_dict()
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert config.to_dict() == before
    assert config.dataset is TEXTS
