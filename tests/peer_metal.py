"""What tests/quantization/metal/test_metal.py of transformers asks of a quantizer, asked of this one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from hf_catquant import CatQuantConfig, quantize
from hf_catquant.formats import FORMATS, get_format
from hf_catquant.layers import Scheme
from hf_catquant.layers.linear import QuantizedLinear
from hf_catquant.model import select
from hf_catquant.packed_model import quantized_modules
from hf_catquant.packing import pack, packed_width, unpack
from hf_catquant.quantizer import CatQuantizer
from hf_catquant.registration import register

DATA_FREE = {"solver": "rtn", "correction": None}


def opt() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=40, word_embed_proj_dim=16, max_position_embeddings=16, **sizes)).eval()


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def test_the_config_has_defaults_takes_others_and_goes_through_a_dict():
    assert (CatQuantConfig().weights, CatQuantConfig().group_size, CatQuantConfig().bits) == ("ternary", 128, 2)
    config = CatQuantConfig(weights="int3", group_size=64, modules_to_not_convert=["lm_head"], **DATA_FREE)
    stored = config.to_dict()
    assert stored["quant_method"] == "catquant"
    assert stored["bits"] == 3
    assert CatQuantConfig.from_dict(stored) == config
    assert AutoQuantizationConfig.from_dict(stored) == config


def test_the_quantizer_is_registered_once_and_may_be_again():
    register()
    quantizer = AutoHfQuantizer.from_config(CatQuantConfig(**DATA_FREE), pre_quantized=False)
    assert type(quantizer) is CatQuantizer
    assert not quantizer.requires_calibration


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_the_environment_is_fine_on_one_device(device_map):
    quantizer = CatQuantizer(CatQuantConfig(**DATA_FREE), pre_quantized=False)
    quantizer.validate_environment(device_map=device_map)


def test_the_environment_refuses_to_quantize_over_devices():
    quantizer = CatQuantizer(CatQuantConfig(**DATA_FREE), pre_quantized=False)
    with pytest.raises(ValueError, match="whole model on one device"):
        quantizer.validate_environment(device_map={"a": "cpu", "b": "disk"})


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_packing_goes_both_ways(weights, group_size, generator):
    fmt = get_format(weights)
    codes = torch.randint(fmt.radix, (6, 72), dtype=torch.uint8, generator=generator)
    packed = pack(codes, fmt, group_size)
    assert packed.shape == (6, packed_width(fmt, 72, group_size))
    assert torch.equal(unpack(packed, fmt, group_size, 72), codes)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_has_the_shapes_it_promises(bias):
    layer = QuantizedLinear(nn.Linear(64, 24, bias=bias), Scheme("int4", 32))
    assert layer.weight_packed.shape == (24, 32)
    assert layer.weight_scale.shape == layer.weight_offset.shape == (24, 2)
    assert (layer.bias is not None) == bias
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 24)


def test_all_linears_are_replaced():
    model = opt()
    names = linears(model)
    quantize(model, CatQuantConfig(**DATA_FREE))
    assert linears(model) == []
    assert set(names) <= set(quantized_modules(model))


@pytest.mark.parametrize(
    ("listed", "left"), [(["lm_head"], 1), (["model.decoder.layers.0"], 6), (["q_proj", "fc1"], 4)]
)
def test_modules_to_not_convert_are_not_converted(listed, left):
    model = opt()
    # A tied head stays in float with its embedding only.
    quantize(model, CatQuantConfig(modules_to_not_convert=listed, **DATA_FREE))
    kept = linears(model)
    assert len(kept) == left
    assert all(any(name.startswith(part) or name.endswith(part) for part in listed) for name in kept)


def test_nothing_but_layers_with_weights_is_selected():
    model = opt()
    selection = select(model, CatQuantConfig(**DATA_FREE))
    assert not any("norm" in site.name for site in selection.sites)
    assert not any("norm" in name for name in selection.skipped)
