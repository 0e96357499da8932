"""What tests/quantization/bnb/test_4bit.py and test_replace_linear.py of transformers ask, asked of this quantizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.layers import QuantizedModule
from hf_catquant.packed_model import quantized_modules

REQUEST = {"weights": "int4", "solver": "rtn", "correction": None, "group_size": 16}


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    llama().save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=CatQuantConfig(**REQUEST))


NETS = {
    "one": (lambda: nn.Sequential(nn.Linear(8, 8)), 1),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.ModuleList([nn.Linear(8, 8)])), 2),
    "mixed": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Embedding(4, 8), nn.Linear(8, 8)), 3),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), 2),
    "gpt2": (lambda: nn.ModuleList([Conv1D(8, 8), nn.LayerNorm(8), nn.Bilinear(2, 2, 2), nn.Linear(8, 2)]), 2),
}


@pytest.mark.parametrize("name", NETS)
def test_the_number_of_replaced_layers(name):
    build, count = NETS[name]
    net = build()
    quantize(net, CatQuantConfig(**REQUEST))
    assert len(quantized_modules(net)) == count


def test_the_footprint_shrinks_and_the_report_counts_every_parameter(folder, model):
    float_model = LlamaForCausalLM.from_pretrained(folder)
    assert float_model.get_memory_footprint() / model.get_memory_footprint() > 3.5
    assert report(model).parameters == float_model.num_parameters()


def test_the_config_is_json(model):
    stored = json.loads(model.config.to_json_string())["quantization_config"]
    assert stored["quant_method"] == "catquant"
    assert stored["bits"] == 4
    assert "dataset" not in stored
    model.config.to_diff_dict()
    assert "catquant" in repr(model.config)


def test_generation_stays_close_to_float(folder):
    config = CatQuantConfig(**{**REQUEST, "weights": "int8"})
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    ids = torch.arange(6).view(1, 6)
    expected = LlamaForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=8, do_sample=False)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == expected.shape
    assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False), expected[:, :8])


@torch.no_grad()
def test_dequantize_gives_the_same_logits_and_leaves_no_trace(model):
    ids = torch.arange(6).view(1, 6)
    before = model(ids).logits
    model.dequantize()
    assert not quantized_modules(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_the_head_has_the_class_it_should(model):
    assert isinstance(model.lm_head, QuantizedModule)
    assert isinstance(model.model.norm.weight, nn.Parameter)
    assert type(model.model.norm.weight) is nn.Parameter


@torch.no_grad()
def test_devices_and_dtypes_can_be_assigned(model):
    packed = {n: b.clone() for n, b in model.named_buffers() if n.endswith(("weight_packed", "weight_scale"))}
    ids = torch.arange(6).view(1, 6)
    for target in ("cpu", torch.bfloat16, torch.float16, torch.float32):
        model = model.to(target)
        assert bool(torch.isfinite(model(ids).logits).all())
        for name, buffer in packed.items():
            assert torch.equal(model.get_buffer(name), buffer)
    with pytest.raises(ValueError, match="not supported for quantized model"):  # transformers' own guard
        model.half()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_left_in_float_have_the_dtype_asked_for(folder, dtype):
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=CatQuantConfig(**REQUEST), dtype=dtype)
    assert model.model.norm.weight.dtype == dtype
    assert model(torch.arange(6).view(1, 6)).logits.dtype == dtype


def test_t5_and_gpt2_have_all_their_layers_quantized():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    for model in (t5.eval(), gpt2.eval()):
        quantize(model, CatQuantConfig(**REQUEST))
        assert not any(type(m) in (nn.Linear, Conv1D) for m in model.modules())
    assert isinstance(t5.encoder.block[0].layer[1].DenseReluDense.wo, QuantizedModule)
    ids = torch.arange(4).view(1, 4)
    assert bool(torch.isfinite(t5(input_ids=ids, decoder_input_ids=ids).logits).all())


def test_trainer_takes_the_model_and_gradients_reach_what_can_learn(model, tmp_path):
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
    before = model.model.norm.weight.clone()
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, learning_rate=0.1)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert not torch.equal(model.model.norm.weight, before)


def test_an_adapter_learns_on_top_of_a_packed_layer(model):
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module, width: int) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj, 32)
    ids = torch.arange(6).view(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert float(layer.self_attn.q_proj.up.weight.grad.norm()) > 0
