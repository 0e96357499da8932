"""What tests/quantization/quanto_integration/test_quanto.py of transformers asks, asked of this quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_catquant import CatQuantConfig, quantize
from hf_catquant.packed_model import quantized_modules
from peer_bnb import llama

IDS = torch.arange(8).view(1, 8)


def assert_same_model(first: nn.Module, second: nn.Module) -> None:
    """The two have the same modules, tensors, config and logits."""
    modules = [[(name, type(module)) for name, module in model.named_modules()] for model in (first, second)]
    assert modules[0] == modules[1]
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert tensor.dtype == states[1][name].dtype, name
    assert first.config.quantization_config.modules == second.config.quantization_config.modules
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)


@pytest.mark.parametrize("weights", ["binary", "ternary", "int3", "int8"])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_loading_quantized_and_quantizing_what_is_loaded_agree(weights, solver, tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path)
    data = [{"input_ids": (torch.arange(8) * (i + 1)) % 40} for i in range(8)]
    config = CatQuantConfig(weights=weights, solver=solver, correction=None, dataset=data, group_size=16)
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    in_memory = quantize(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    assert_same_model(on_load, in_memory)
    on_load.save_pretrained(tmp_path / "saved")
    assert_same_model(on_load, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


def test_skipped_modules_are_the_float_ones():
    model = llama()
    head = model.lm_head.weight.clone()
    quantize(model, CatQuantConfig(solver="rtn", correction=None, modules_to_not_convert=["lm_head"]))
    assert "lm_head" not in quantized_modules(model)
    assert torch.equal(model.lm_head.weight, head)
