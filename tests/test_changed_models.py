"""Models whose layers were replaced or taken out after they were quantized: what is saved is what is there, and it loads."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, quantize, report, written
from hf_catquant.correction import corrections
from hf_catquant.packed_model import quantized_modules
from hf_catquant.plain import load_quantized, save_quantized
from hf_catquant.verify import verify

FIELDS = {"weights": "int4", "group_size": 16, "solver": "rtn", "correction": None}
IDS = torch.arange(3, 19).view(2, 8)


def quantized(name: str) -> tf.PreTrainedModel:
    model = tiny_models.build(name)
    quantize(model, CatQuantConfig(**FIELDS))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def saved_and_loaded(model: tf.PreTrainedModel, folder: Path) -> tf.PreTrainedModel:
    """The model from its files, which are whole, and which a second save writes again."""
    model.save_pretrained(folder / "one")
    found = verify(folder / "one")
    assert found.is_whole, found
    again = type(model).from_pretrained(folder / "one")
    assert torch.equal(logits(again), logits(model))
    assert report(again) == report(model)
    again.save_pretrained(folder / "two")
    for file in ("config.json", "model.safetensors"):
        assert (folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes()
    return again


def test_a_replaced_head(tmp_path: Path):
    model = quantized("bert")
    model.classifier = nn.Linear(32, 3)
    model.num_labels = model.config.num_labels = 3
    before = report(model)
    again = saved_and_loaded(model, tmp_path)
    reason = "replaced by a float Linear after it was quantized"
    assert before.skipped["classifier"] == report(again).skipped["classifier"] == reason
    assert "1 quantized layer is float now (classifier): errors" in report(again).notes[-1]
    config = again.config.quantization_config
    assert "classifier" not in {*config.modules, *config.provenance["errors"]}
    assert type(again.classifier) is nn.Linear


class Twice(nn.Linear):
    """A layer with a parameter more."""

    def __init__(self) -> None:
        super().__init__(32, 5)
        self.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("place", "put", "found", "wanted"),
    [
        ("model.norm", nn.Identity, "Identity with no parameters", r"LlamaRMSNorm with weight \[32\]"),
        ("lm_head", lambda: nn.Linear(32, 96), r"Linear with weight \[96, 32\], bias \[96\]", r"weight \[96, 32\]"),
        ("lm_head", lambda: nn.Sequential(nn.Linear(32, 96)), "Sequential with no parameters", "Linear with weight"),
        (
            "model.layers.1.self_attn.q_proj",
            lambda: nn.Linear(32, 32),
            r"Linear .*bias \[32\]",
            r"weight \[32, 32\]",
        ),
        ("lm_head", lambda: nn.Linear(32, 7, bias=False), r"Linear with weight \[7, 32\]", r"Linear with weight \[96"),
        ("lm_head", Twice, r"Twice with weight \[5, 32\], bias \[5\], gain \[1\]", r"Linear with weight \[96"),
    ],
)
def test_what_the_class_would_not_build_is_refused_before_anything_is_written(
    place, put, found, wanted, tmp_path: Path
):
    model = quantized("llama")
    parent, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(parent), leaf, put())
    match = f"^{place} is a {found}, and LlamaForCausalLM builds a .*{wanted}.* there from model.config"
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path / "one")
    assert not list(tmp_path.rglob("*.safetensors"))
    save_quantized(model, tmp_path / "two")
    other = tiny_models.build("llama")
    setattr(other.get_submodule(parent), leaf, put())
    assert torch.equal(logits(load_quantized(other, tmp_path / "two")), logits(model))


def with_biases(model: tf.PreTrainedModel) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32)


def without_bias(model: tf.PreTrainedModel) -> None:
    model.classifier = nn.Linear(32, 5, bias=False)


def with_another_layer(model: tf.PreTrainedModel) -> None:
    model.extra = nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("name", "before", "after", "match"),
    [
        (
            "llama",
            with_biases,
            {},
            r"q_proj is a .*packed weight \[32, 32\], bias \[32\].* builds a Linear with weight",
        ),
        ("bert", without_bias, {}, r"classifier is a .*packed weight \[5, 32\], and .* builds a Linear .*bias \[5\]"),
        (
            "bert",
            None,
            {"num_labels": 3},
            r"classifier is a .*packed weight \[5, 32\].* builds a Linear with weight \[3, 32\]",
        ),
        ("llama", None, {"vocab_size": 90}, r"embed_tokens is a .*packed weight \[96, 32\].* with weight \[90, 32\]"),
        ("llama", None, {"num_hidden_layers": 1}, r"layers\.1\..* is a .*builds nothing there"),
        ("llama", with_another_layer, {}, r"extra is a .*builds nothing there"),
    ],
)
def test_packed_layers_that_the_class_would_not_build(name, before, after, match, tmp_path: Path):
    """A bias that it does not build would be dropped at the load, and the rest would not load."""
    model = tiny_models.build(name)
    if before is not None:
        before(model)
    quantize(model, CatQuantConfig(**FIELDS))
    for field, value in after.items():
        setattr(model.config, field, value)
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_bias_that_the_class_does_not_build_is_not_dropped_at_the_load(tmp_path: Path, monkeypatch):
    """Of a checkpoint that a save without the look at what the class builds has written."""
    model = tiny_models.build("llama")
    with_biases(model)
    quantize(model, CatQuantConfig(**FIELDS))
    monkeypatch.setattr(written, "check_as_built", lambda *_: None)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"checkpoint has model\.layers\.0\.self_attn\.q_proj\.bias, and Llama.* without a bias"
    ):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
def test_what_only_training_reads_may_be_there_without_its_field(name, tmp_path: Path):
    model = quantized(name)
    model.config.mask_time_prob = 0.0
    model.save_pretrained(tmp_path)
    batch = tiny_models.batch(name)
    with torch.no_grad():
        first, second = (each(**batch).logits for each in (model, type(model).from_pretrained(tmp_path)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
def test_a_part_with_a_mask_token(name, tmp_path: Path):
    """The whole builds it with more than a config, and a load of the part without; it reads it of masked images only."""
    kind = getattr(
        tf, type(tiny_models.build(name)).__name__.replace("ForImageClassification", "ForMaskedImageModeling")
    )
    model = kind(tiny_models.build(name).config).eval()
    quantize(model, CatQuantConfig(**FIELDS))
    part = getattr(model, name)
    part.save_pretrained(tmp_path)
    batch = tiny_models.batch(name)
    with torch.no_grad():
        first, second = (each(**batch).last_hidden_state for each in (part, type(part).from_pretrained(tmp_path)))
    assert torch.equal(first, second)


class Sized(tf.LlamaForCausalLM):
    """A model that is built with more than a config."""

    def __init__(self, config: tf.LlamaConfig, extra: int = 3) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, extra)


def test_a_class_that_takes_more_than_a_config_is_not_judged(tmp_path: Path):
    model = Sized(tiny_models.build("llama").config, extra=7).eval()
    quantize(model, CatQuantConfig(**FIELDS))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Sized.from_pretrained(tmp_path, extra=7)), logits(model))


@pytest.mark.parametrize("is_read", [False, True])
def test_a_float_model_with_the_config_of_a_quantized_one_is_saved_as_float(is_read: bool, tmp_path: Path):
    """What from_config makes of it is float; with the entries of the other it would be refused at every load."""
    model = quantized("llama")
    model.save_pretrained(tmp_path / "quantized")
    config = tf.AutoConfig.from_pretrained(tmp_path / "quantized") if is_read else model.config
    other = tf.AutoModelForCausalLM.from_config(config)
    held = other.config.quantization_config
    assert getattr(other, "hf_quantizer", None) is None
    other.save_pretrained(tmp_path / "other")
    assert other.config.quantization_config is held
    assert "quantization_config" not in (tmp_path / "other" / "config.json").read_text()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert torch.equal(logits(again), logits(other))
    other.save_pretrained(tmp_path / "given", state_dict={n: v + 1 for n, v in other.state_dict().items()})
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    assert torch.equal(again.lm_head.weight, other.lm_head.weight + 1)
    saved_and_loaded(model, tmp_path)


def test_a_float_part_of_a_quantized_model_is_saved_as_float(tmp_path: Path):
    model = tiny_models.build("llama")
    quantize(model, CatQuantConfig(**FIELDS, modules_to_not_convert=["model"]))
    model.model.save_pretrained(tmp_path / "part")
    again = tf.LlamaModel.from_pretrained(tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model.model(IDS)[0])
    saved_and_loaded(model, tmp_path)


def test_the_first_block_is_taken_out(tmp_path: Path):
    """Names move: what was known of a layer goes with the layer."""
    model = quantized("llama")
    q_proj = "model.layers.{}.self_attn.q_proj"
    errors = {layer.name: layer.error for layer in report(model).layers}
    assert errors[q_proj.format(0)] != errors[q_proj.format(1)]
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.model.layers[0].self_attn.layer_idx = 0
    again = saved_and_loaded(model, tmp_path)
    now = {layer.name: layer.error for layer in report(again).layers}
    assert now[q_proj.format(0)] == errors[q_proj.format(1)]
    assert len(now) == len(errors) - 7
    assert "7 quantized layers are no longer there (model.layers.0." in report(again).notes[-1]


def test_a_float_embedding_under_a_tied_head(tmp_path: Path):
    """The head's weight was the embedding's, which alone was saved."""
    model = quantized("llama_tied")
    model.set_input_embeddings(nn.Embedding(96, 32))
    again = saved_and_loaded(model, tmp_path)
    assert again.config.quantization_config.modules["lm_head"]["tied_to"] is None
    assert again.lm_head.owner is None


class Branches(nn.Module):
    """Three layers of one weight, and a block whose output is corrected."""

    def __init__(self, is_float: bool) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))
        if not is_float:
            self.left.weight = self.right.weight = self.stem.weight
        self.block = Block()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.block(torch.relu(self.left(x)) + self.right(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


ROWS = [{"x": row} for row in torch.randn(24, 16, generator=torch.Generator().manual_seed(0))]
X = torch.stack([row["x"] for row in ROWS[:4]])


def branches(correction: CatConfig | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branches(is_float=False).eval()
    return quantize(model, CatQuantConfig(weights="int4", group_size=8, dataset=ROWS, correction=correction))


def test_the_first_heir_owns_the_weight(tmp_path: Path):
    model = branches()
    model.stem = nn.Linear(16, 16)
    wanted = model(X)
    save_quantized(model, tmp_path)
    assert model.right.owner is model.left
    assert model.left.sharers == (model.right,)
    again = load_quantized(Branches(is_float=True), tmp_path)
    assert torch.equal(again(X), wanted)
    assert again.right.owner is again.left
    assert verify(tmp_path).is_whole


def test_corrections_of_replaced_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One goes with its head; one around a replaced layer goes on, which is said, and its gain is not claimed any more."""
    model = branches(CatConfig(num_clusters=2, alpha=0.5, at=("block", "head")))
    assert set(corrections(model)) == set(report(model).corrections) == {"block", "head"}
    model.head = nn.Linear(16, 4)
    model.block.inner = nn.Linear(16, 16)
    wanted = model(X)
    with caplog.at_level(logging.WARNING, "hf_catquant"):
        save_quantized(model, tmp_path)
    assert "correction at block was fitted with block.inner" in caplog.text
    again = load_quantized(Branches(is_float=True), tmp_path)
    assert torch.equal(again(X), wanted)
    assert set(corrections(again)) == {"block"}
    assert report(again).corrections == report(model).corrections == {}
    assert report(again) == report(model)


def test_nothing_is_left(tmp_path: Path):
    model = branches()
    for name in quantized_modules(model):
        model.set_submodule(name, nn.Linear(16, 4 if name == "head" else 16))
    with pytest.raises(ValueError, match="not quantized by hf_catquant"):
        save_quantized(model, tmp_path)
    whole = quantized("llama")
    for name, layer in quantized_modules(whole).items():
        whole.set_submodule(name, layer.to_float())
    with pytest.raises(ValueError, match=r"no quantized layer any more: call model\.dequantize\(\)"):
        whole.save_pretrained(tmp_path)


class Adapted(nn.Module):
    """What PEFT makes of a layer, as far as names go."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer


def test_layers_with_adapters_are_not_saved_with_the_model(tmp_path: Path):
    model = quantized("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    errors = [layer.error for layer in report(model).layers]
    assert None not in errors
    with pytest.raises(ValueError, match=r"on 1 of its layers \(model\.layers\.0\.self_attn\.q_proj \.\.\.\).*merge"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    attention.q_proj = attention.q_proj.base_layer
    model.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]) == len(errors)


def test_a_part_tells_nothing_of_the_rest():
    said = report(quantized("llama").model)
    assert not said.notes
    assert None not in [layer.error for layer in said.layers]
