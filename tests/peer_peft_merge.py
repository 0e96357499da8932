"""Merging adapters of PEFT into a quantized model: right in every layer, or refused before the first one is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.correction import ClusterAffine, attach, detach
from hf_catquant.layers.linear import QuantizedLinear

peft = pytest.importorskip("peft")
from hf_catquant.lora import LoraOnQuantized, get_peft_model, lora_config  # noqa: E402

RTN = {"weights": "int4", "group_size": 8, "solver": "rtn", "correction": None}
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
WAYS: dict[str, Callable[[Any], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}
in_every_way = pytest.mark.parametrize("way", WAYS)


def toy(**fields: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.ReLU(), nn.Linear(16, 8))
    return quantize(model, CatQuantConfig(**{**RTN, **fields})).eval()


def lora(*targets: str, **fields: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=list(targets) or ["0", "2"], **fields)


def adapted(model: nn.Module, *configs: peft.LoraConfig, size: float = 0.3) -> peft.PeftModel:
    """Adapters that do something: B starts as zeros."""
    made = get_peft_model(model, configs[0] if configs else lora())
    for number, config in enumerate(configs[1:]):
        made.add_adapter(f"more{number}", config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)
    made.base_model.set_adapter(list(made.peft_config))
    return made.eval()


def check_refused(model: peft.PeftModel, way: str, message: str) -> None:
    """The merge is refused, and afterwards every tensor and every adapter is where it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"^nothing was merged, because of {message}.*(keep the adapters apart|delete_adapter)"
    ):
        WAYS[way](model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) or tensor.isnan().any() for name, tensor in before.items())
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())


@in_every_way
@pytest.mark.parametrize("kept", [None, ["2"]], ids=["packed", "float"])
def test_a_layer_that_carries_a_correction_takes_no_adapter(kept: list[str] | None, way: str):
    """It would correct what the adapter adds, too: another model than the one that was trained."""
    model = toy(modules_to_not_convert=kept)
    attach(model, "2", ClusterAffine.of(None, torch.zeros(1, 16), torch.full((1, 16), 1.5), torch.ones(1, 16)))
    made = adapted(model)
    check_refused(made, way, "2: a correction sits on it")
    detach(made.get_base_model(), "2.base_layer")
    wanted = made(X)
    merged = WAYS[way](made) or made
    torch.testing.assert_close(merged(X), wanted, rtol=2e-3, atol=2e-3)


def set_last(model: peft.PeftModel, value: float) -> None:
    list(model.base_model.model[2].lora_B.values())[0].weight.data[0, 0] = value  # noqa: RUF015


@in_every_way
@pytest.mark.parametrize(
    ("value", "message"), [(torch.inf, "2: adapter 'default' has values that are not finite"), (1e12, "2: .*float16")]
)
@pytest.mark.parametrize("kept", [None, ["2"]], ids=["packed", "float"])
def test_one_bad_value_in_the_last_layer_costs_no_adapter(value: float, message: str, kept: Any, way: str):
    if kept and value < torch.inf:
        model = adapted(toy(modules_to_not_convert=kept).half())
        set_last(model, 6e4)
        model.base_model.model[2].lora_A["default"].weight.data[:] = 6e4
    else:
        model = adapted(toy(modules_to_not_convert=kept))
        set_last(model, value)
    check_refused(model, way, message)


@in_every_way
def test_a_bias_is_not_merged_by_halves(way: str):
    """Of packed layers, and of a float one that has none of its own: PEFT raises there, after others were merged."""
    check_refused(adapted(toy(), lora("0"), lora(lora_bias=True)), way, "0: adapter 'more0' has a bias")
    float_layer = adapted(toy(modules_to_not_convert=["2"]), lora("0"), lora("2", lora_bias=True))
    check_refused(float_layer, way, "2: adapter 'more0' has a bias .*this layer has none")


@in_every_way
def test_a_tied_weight_costs_no_adapter(way: str):
    model = adapted(toy())
    owner, layer = (model.base_model.model[i].get_base_layer() for i in (0, 2))
    layer.__dict__["owner"] = owner
    check_refused(model, way, "2: adapter 'default': its weight is tied")
    float_one = toy(modules_to_not_convert=["2", "4"])
    float_one[4] = nn.Linear(24, 16)
    float_one[4].weight = float_one[2].weight
    check_refused(adapted(float_one), way, r"2: its weight is one tensor with that of 2\.base_layer, 4,")


def test_kinds_that_peft_does_not_merge_are_found_first():
    """On float layers all kinds of LoRA work; DoRA merges, aLoRA raises at its layer."""
    kept = {"modules_to_not_convert": ["2"]}
    check_refused(
        adapted(toy(**kept), lora("0"), lora("2", alora_invocation_tokens=[1])),
        "merge_and_unload",
        "2: adapter 'more0': aLoRA does not support",
    )
    made = adapted(toy(**kept), lora("0"), lora("2", use_dora=True))
    wanted = made(X)
    torch.testing.assert_close(made.merge_and_unload()(X), wanted, rtol=2e-3, atol=2e-3)


def test_adapters_under_which_the_layers_were_dequantized_merge_as_on_a_float_model():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    quantize(model, CatQuantConfig(**RTN))
    ids = torch.arange(8).view(1, 8)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    made = adapted(model, lora("c_attn", "c_fc"))
    wanted = logits(made)
    made.get_base_model().dequantize()
    assert isinstance(made.base_model.model.transformer.h[0].mlp.c_fc, LoraOnQuantized)
    made.merge_adapter()
    torch.testing.assert_close(logits(made), wanted, rtol=1e-4, atol=1e-5)
    made.unmerge_adapter()
    torch.testing.assert_close(logits(made), wanted, rtol=1e-4, atol=1e-5)
    merged = made.merge_and_unload()
    assert not any(isinstance(module, (QuantizedLinear, LoraOnQuantized)) for module in merged.modules())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)

    made = adapted(quantize(model, CatQuantConfig(**RTN)), lora("c_fc"))
    made.merge_adapter()
    made.get_base_model().dequantize()
    with pytest.raises(ValueError, match="was merged into a packed layer, which has been dequantized since"):
        made.unmerge_adapter()


def test_what_peft_would_pass_over_or_refuse_without_a_way_out():
    sizes = {**tiny_models.LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    model = quantize(tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)), CatQuantConfig(**RTN))
    for fields, message in (
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            r"'mlp.experts.gate_up_proj' .*convert=\['model.+experts'\]",
        ),
        ({"target_parameters": ["q_proj.weight"]}, r"'q_proj.weight' is .*convert=\['model.+q_proj'\]"),
        (
            {"trainable_token_indices": [1]},
            r"^trainable_token_indices: model.embed_tokens .*convert=\['model.embed_tokens'\]",
        ),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "^trainable_token_indices: model.embed_tokens is packed"),
        (
            {"target_modules": ["embed_tokens"]},
            r"model.embed_tokens is a packed Embedding.*convert=\['model.embed_tokens'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    with pytest.raises(ValueError, match=r"mixed=True is for .*only LoRA"):
        get_peft_model(model, lora("q_proj"), mixed=True)
    with pytest.raises(TypeError, match="got a AdaLoraConfig"):
        get_peft_model(model, peft.AdaLoraConfig(target_modules=["q_proj"], total_step=2))
    assert not any("lora" in name for name, _ in model.named_modules())
    kept = quantize(
        tf.LlamaForCausalLM(tf.LlamaConfig(**tiny_models.LLAMA)),
        CatQuantConfig(**RTN, modules_to_not_convert=["embed_tokens", "lm_head"]),
    )
    free = {"target_parameters": ["lm_head.weight"], "trainable_token_indices": [1]}
    assert lora_config(lora("q_proj", **free), kept).target_parameters == ["lm_head.weight"]


@pytest.mark.parametrize("names", [["nope"], []])
def test_adapters_that_there_are_not_are_refused(names: list[str]):
    """PEFT would merge nothing and take all adapters off."""
    model = adapted(toy())
    before = model(torch.ones(2, 16))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"adapter_names must be some of default, got "):
            merge(adapter_names=names)
    assert torch.equal(model(torch.ones(2, 16)), before)


def test_adapters_of_offloaded_layers_have_no_values_and_are_refused():
    """PEFT would draw them anew at each call, and without a word."""
    accelerate = pytest.importorskip("accelerate")
    model = toy()
    wanted = model(X)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with pytest.raises(
        ValueError, match=r"0\.lora_A\.default\.weight has no values: the layer is offloaded\. Add adapters"
    ):
        get_peft_model(model, lora())
    assert not any(isinstance(module, LoraOnQuantized) for module in model.modules())
    assert torch.equal(model(X), wanted)

    late = adapted(toy())
    late.base_model.model[0].lora_A["default"].to("meta")
    with pytest.raises(ValueError, match="nothing was merged, because of 0: adapter 'default' has no values"):
        late.merge_and_unload()
