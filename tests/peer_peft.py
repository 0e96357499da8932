"""What PEFT's users do with a quantized model: LoRA to train, to save and load, and to merge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from packaging.version import Version
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, export, quantize, report
from hf_catquant.describing import describe
from hf_catquant.exports import TARGETS
from hf_catquant.layers import QuantizedModule
from hf_catquant.layers.linear import QuantizedLinear
from hf_catquant.packed_model import quantized_modules
from hf_catquant.verify import verify
from test_ties import FIELDS, ROWS, Tied

peft = pytest.importorskip("peft")
from hf_catquant.lora import LoraOnQuantized, get_peft_model, load_peft_model, lora_config  # noqa: E402

IDS = torch.arange(3, 19).view(2, 8)
RTN = {"weights": "int4", "group_size": 16, "solver": "rtn", "correction": None}


def quantized(name: str = "llama", **fields: object) -> nn.Module:
    model = tiny_models.build(name)
    quantize(model, CatQuantConfig(**{**RTN, **fields}))
    return model


def lora(**fields: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def shake(model: nn.Module, size: float = 0.3, seed: int = 0) -> None:
    """Adapters that do something: B starts as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size


def test_a_base_model_with_adapters_on_float_layers_is_not_saved(tmp_path: Path):
    model = quantized("bert", modules_to_not_convert=["classifier"])
    adapted = get_peft_model(model, peft.LoraConfig(r=4, target_modules=["classifier"]))
    with pytest.raises(ValueError, match=r"adapters are on 1 of its layers \(classifier \.\.\.\)"):
        adapted.get_base_model().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    adapted.unload().save_pretrained(tmp_path)
    assert verify(tmp_path).is_whole


def test_adapters_learn_and_nothing_else_does(tmp_path: Path):
    base = quantized()
    packed = {name: buffer.clone() for name, buffer in base.named_buffers()}
    model = get_peft_model(base, lora())
    assert sum(isinstance(module, LoraOnQuantized) for module in model.modules()) == 4
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=8, report_to=[], use_cpu=True, learning_rate=0.02)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    for name, buffer in packed.items():
        layer, _, last = name.rpartition(".")
        wrapped = f"{layer}.base_layer" if isinstance(base.get_submodule(layer), LoraOnQuantized) else layer
        assert torch.equal(getattr(base.get_submodule(wrapped), last), buffer)


def test_an_adapter_is_saved_and_loaded(tmp_path: Path):
    model = get_peft_model(quantized(), lora(target_modules="all-linear"))
    shake(model)
    model.save_pretrained(tmp_path)
    again = load_peft_model(quantized(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    plain = peft.PeftModel.from_pretrained(tiny_models.build("llama"), str(tmp_path))  # and it fits the float model
    assert len(plain.state_dict()) > len(again.base_model.model.lm_head.state_dict())


def saved_adapter(folder: Path, seed: int, **fields: object) -> Path:
    model = get_peft_model(quantized(), lora(**fields))
    shake(model, seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("root", [True, False], ids=["beside another one", "only there"])
def test_the_configuration_comes_from_where_the_adapter_is(root: bool, tmp_path: Path):
    """Another alpha, rank and target in the root, or none there at all."""
    saved_adapter(tmp_path / "v2", 2, lora_alpha=64)
    if root:
        saved_adapter(tmp_path, 1, lora_alpha=4, r=2, target_modules=["q_proj"])
    again = load_peft_model(quantized(), tmp_path, subfolder="v2", adapter_name="two", is_trainable=True)
    config = again.peft_config["two"]
    assert (config.lora_alpha, config.r, set(config.target_modules)) == (64, 4, {"q_proj", "down_proj"})
    assert any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(logits(again), logits(load_peft_model(quantized(), tmp_path / "v2")))


def test_the_configuration_comes_from_the_same_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for revision, alpha in (("main", 4), ("v2", 64)):
        saved_adapter(tmp_path / revision, 0, lora_alpha=alpha)
    asked = []

    def download(repo: str, name: str, *, revision: str | None = None, token: str | None = None, **_: object) -> str:
        asked.append((name, repo, revision, token))
        return str(tmp_path / (revision or "main") / name)

    for module in ("peft.config", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda **_: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    again = load_peft_model(quantized(), "me/adapter", revision="v2", token="hf_nothing")
    assert again.peft_config["default"].lora_alpha == 64
    assert {(repo, revision, token) for _, repo, revision, token in asked} == {("me/adapter", "v2", "hf_nothing")}


def test_a_second_adapter_computes_what_it_does_on_the_float_model(tmp_path: Path):
    """However it comes, and also on layers that the first one left alone."""
    first = saved_adapter(tmp_path / "first", 1)
    second = saved_adapter(tmp_path / "second", 2, target_modules=["k_proj", "q_proj"], r=2, lora_alpha=16)
    model = load_peft_model(quantized(), first)
    model.load_adapter(second, "two")
    plain = peft.PeftModel.from_pretrained(quantized().dequantize(), first)
    plain.load_adapter(second, "two")
    for place in (model, plain):
        place.add_weighted_adapter(["default", "two"], [0.5, 0.25], "both", combination_type="cat")
    found = {}
    for name in ("default", "two", "both", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        found[name] = logits(model)
        torch.testing.assert_close(found[name], logits(plain), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["default"], found["two"])
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    again = load_peft_model(quantized(), second)
    again.add_adapter("new", lora(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="changes the weight of the layer"):
        again.add_adapter("pissa", lora(init_lora_weights="pissa"))
    assert list(again.peft_config) == ["default", "new"]
    assert torch.equal(logits(again), found["two"])
    for add in (lambda: load_peft_model(model, first), lambda: get_peft_model(model, lora())):
        with pytest.raises(ValueError, match=r"has adapters \(default, two, both\) already: .* load_adapter\(folder"):
            add()


def test_all_linear_is_all_but_the_output_layer():
    model = quantized()
    wanted = lora(target_modules="all-linear")
    names = lora_config(wanted, model).target_modules
    linears = {n for n, m in quantized_modules(model).items() if isinstance(m, QuantizedLinear)}
    assert names == sorted(linears - {"lm_head"})
    # and those that have an adapter already
    adapted = get_peft_model(model, lora(target_modules=["q_proj", "lm_head"], task_type=None))
    assert lora_config(wanted, model).target_modules == lora_config(wanted, adapted).target_modules == names
    plain = peft.get_peft_model(tiny_models.build("llama"), lora(target_modules=["q_proj", "lm_head"], task_type=None))
    for place in (adapted, plain):
        place.add_adapter("all", lora(target_modules="ALL-linear", task_type=None))
    shapes = [{n: p.shape for n, p in m.named_parameters() if ".all." in n} for m in (adapted, plain)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 2 * len(names)
    with pytest.raises(ValueError, match="Embedding has no linear layer"):
        lora_config(wanted, nn.Embedding(2, 2))


@pytest.mark.parametrize("fields", [{}, {"weights": "ternary"}, {"low_rank": 2}], ids=["plain", "rotated", "product"])
def test_a_merged_adapter_is_part_of_the_checkpoint(fields: dict, tmp_path: Path):
    model = get_peft_model(quantized(**fields), lora())
    shake(model)
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj, QuantizedModule)
    torch.testing.assert_close(logits(merged), wanted, rtol=2e-3, atol=2e-3)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    again.dequantize()
    torch.testing.assert_close(logits(again), wanted, rtol=2e-3, atol=2e-3)


def test_a_card_tells_a_merged_adapter(tmp_path: Path):
    """And nothing on it is of before the merge without saying so."""
    model = quantized(dataset=tiny_models.samples("llama"), correction=CatConfig(num_clusters=2, alpha=0.5))
    known = report(model)
    assert known.corrections
    for rank in (4, 2):  # the second time into what was saved and loaded
        adapted = get_peft_model(model, lora(r=rank, target_modules=["q_proj"]))
        shake(adapted)
        merged = adapted.merge_and_unload()
        said = report(merged)
        merged.save_pretrained(tmp_path / str(rank))
        model = LlamaForCausalLM.from_pretrained(tmp_path / str(rank))
        assert report(merged) == report(model) == said
    folder = tmp_path / "2"
    changed = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [layer.name for layer in said.layers if layer.error is None] == changed
    assert model.config.quantization_config.provenance["merged_adapters"] == dict.fromkeys(changed, 6)
    summary = "adapters of rank 6 were merged into 2 layers"
    assert f"note: {summary} after quantizing" in str(said)
    assert "not known" in str(said)
    card = ModelCard.load(describe(folder, "me/tuned", "you/float"))
    assert (card.data.base_model, card.data.base_model_relation) == ("you/float", "finetune")
    assert "post-training-quantization" not in card.data.tags
    parts = dict(zip(*[iter(re.split(r"^## (.*)$", f"## Head{card.content}", flags=re.M)[1:])] * 2, strict=True))
    assert f"Then fine-tuned: {summary}" in card.content
    assert (
        f"request of the quantization. The fine-tuning came after it, so it alone does not make these files: {summary}"
        in card.content
    )
    assert f"- {summary} after quantizing" in parts["Limits"]
    assert "The licence is that of the float model; a fine-tuning can change" in parts["Limits"]
    assert "Output correction (CAT), measured before the fine-tuning:" in parts["What is stored"]
    assert "without the layers that it changed" in parts["What is stored"]
    assert "q_proj" not in parts["What is stored"]
    stored = json.loads((folder / "config.json").read_text())
    assert verify(folder).provenance["fine-tuning"] == f"{summary} after quantizing"
    for table, problem in (({}, "provenance is not what was saved"), ({"a": "b"}, "must be {module: rank}, got")):
        stored["quantization_config"]["provenance"]["merged_adapters"] = table
        (folder / "config.json").write_text(json.dumps(stored))
        assert problem in verify(folder).problems[-1]


def test_a_tied_weight_takes_no_adapter_after_calibration():
    """Its layers would be two models in memory, and one in the file."""
    model = quantize(Tied().eval(), CatQuantConfig(**FIELDS, dataset=ROWS))
    for name in ("stem", "head"):
        adapted = get_peft_model(model, peft.LoraConfig(r=2, target_modules=[name]))
        with pytest.raises(ValueError, match="tied to that of another one"):
            adapted.merge_and_unload()
        model = adapted.unload()


def test_a_tied_head_stays_tied_through_a_merge(tmp_path: Path):
    """PEFT takes packed embeddings for untied, and has the config say so: a float copy would lack the head."""
    merged = get_peft_model(quantized("llama_tied"), lora()).merge_and_unload()
    merged.save_pretrained(tmp_path / "packed")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    assert merged.config.tie_word_embeddings
    assert again.config.tie_word_embeddings
    merged.config.tie_word_embeddings = False  # not saved in between
    for name, model in (("merged", merged), ("again", again)):
        wanted = logits(model.dequantize())
        model.save_pretrained(tmp_path / name)
        assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / name)), wanted)


def test_merging_can_be_undone():
    model = get_peft_model(quantized(low_rank=2), lora())
    shake(model)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=2e-3, atol=2e-3)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_small_and_large_factors_survive_float16():
    layer = quantized().model.layers[0].mlp.up_proj
    before = layer.matrix(torch.float32)
    out, into = torch.full((48, 1), 3e-8), torch.full((1, 32), 2e6)
    layer.add_product(out, into)
    torch.testing.assert_close(layer.matrix(torch.float32) - before, out @ into, rtol=2e-3, atol=1e-6)


def test_what_would_go_wrong_silently_is_refused():
    base = quantized("llama_tied")
    for fields, message in (
        ({"init_lora_weights": "pissa"}, "changes the weight of the layer"),
        ({"use_dora": True}, "reads the float weight"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(quantized(), lora(**fields))
    with pytest.raises(TypeError, match="pass a LoraConfig"):
        get_peft_model(base, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(quantized(), lora())  # PEFT alone
    tied = get_peft_model(base, lora(target_modules=["lm_head"]))
    shake(tied)
    with pytest.raises(ValueError, match="tied to that of another one"):
        tied.merge_and_unload()
    biased = get_peft_model(quantized(), lora(lora_bias=True))
    with pytest.raises(ValueError, match="has a bias"):
        biased.merge_and_unload()


@pytest.mark.parametrize("way", ["model", "inside"])
def test_adapters_of_a_float_model_are_not_quantized(way: str):
    """Nothing of them could learn any more, and no file could hold them."""
    base = tiny_models.build("llama")
    adapted = peft.get_peft_model(base, lora())
    names = [name for name, _ in adapted.named_modules()]
    with pytest.raises(ValueError, match=r"of PEFT, and adapters are not quantized: .*merge_and_unload\(\)"):
        quantize(adapted if way == "model" else base, CatQuantConfig(**RTN))
    assert names == [name for name, _ in adapted.named_modules()]
    assert all(parameter.requires_grad for name, parameter in adapted.named_parameters() if "lora_" in name)
    merged = quantize(adapted.merge_and_unload(), CatQuantConfig(**RTN))
    assert len(report(merged).layers) == 16


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_are_not_exported_before_they_are_merged(target: str, tmp_path: Path):
    base = quantized(group_size=32, rotation=None)
    adapted = get_peft_model(base, lora())
    for model in (base, adapted):
        with pytest.raises(ValueError, match=r"of PEFT, and adapters are not exported: .*merge_and_unload\(\)"):
            export(model, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())
    if target == "safetensors":
        shake(adapted)
        merged = adapted.merge_and_unload()
        export(merged, tmp_path / "out", target)
        again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(again), logits(merged), rtol=1e-5, atol=1e-5)


def test_gpt2_and_its_transposed_linears():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    quantize(model, CatQuantConfig(**RTN))
    adapted = get_peft_model(model, lora(target_modules=["c_attn"]))
    shake(adapted)
    wanted = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), wanted, rtol=2e-3, atol=2e-3)


def test_the_hook_of_transformers_takes_the_same_config():
    least = tf.integrations.peft.MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(least):
        pytest.skip(f"this transformers wants peft {least} for add_adapter")
    model = quantized()
    before = logits(model)
    model.add_adapter(lora_config(lora(), model))
    shake(model)
    assert not torch.equal(logits(model), before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_kbit_preparation_and_gradient_checkpointing(reentrant: bool):
    grads = {}
    for checkpointing in (False, True):
        model = quantized().to(torch.bfloat16)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert model.model.norm.weight.dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora()).train()
        shake(adapted)
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        grads[checkpointing] = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(float(grad.norm()) > 0 for grad in grads[True])
    torch.testing.assert_close(grads[True], grads[False])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task_type": "SEQ_CLS"}, "classifier"),
        ({"modules_to_save": ["word_embeddings"], "task_type": None}, "word_embeddings"),
    ],
)
def test_a_packed_layer_that_would_be_trained_whole_is_refused(fields: dict, named: str):
    """Its copy would be packed: only the bias learns, and the adapter does not load on the float model."""
    config = lora(target_modules="all-linear", **fields)
    with pytest.raises(ValueError, match=rf"^{named}: .*quantize with modules_to_not_convert=\['{named}'\]"):
        get_peft_model(quantized("bert"), config)


def test_the_head_of_a_classifier_learns_beside_adapters(tmp_path: Path):
    def base() -> nn.Module:
        return quantized("bert", modules_to_not_convert=["classifier"])

    model = get_peft_model(base(), lora(target_modules="all-linear", task_type="SEQ_CLS"))
    shake(model)
    head = next(p for n, p in model.named_parameters() if n.endswith("classifier.modules_to_save.default.weight"))
    assert head.requires_grad
    head.data += 0.5
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_peft_model(base(), tmp_path)), wanted)
    on_float = peft.PeftModel.from_pretrained(tiny_models.build("bert"), tmp_path)
    found = dict(on_float.named_parameters())
    assert torch.equal(
        next(p for n, p in found.items() if n.endswith("classifier.modules_to_save.default.weight")), head
    )
    with pytest.raises(ValueError, match="classifier"):
        load_peft_model(quantized("bert"), tmp_path)
