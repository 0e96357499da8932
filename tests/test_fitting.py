"""Corrections on whole models: where they sit, plain torch, our own models, and models that bitsandbytes quantized."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, fit_correction, load_correction, quantize, save_correction
from hf_catquant.correction import corrections, detach

FIXED = CatConfig(num_clusters=1, alpha=1.0, shrinkage=1.0)


def plain_pair() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[2].weight.mul_(0.4)
        model[2].bias.add_(torch.linspace(-1, 1, 5))
    return model, teacher, [torch.randn(6) for _ in range(200)]


def distance(model: nn.Module, teacher: nn.Module, rows: list[torch.Tensor]) -> float:
    with torch.no_grad():
        x = torch.stack(rows)
        return float((model(x) - teacher(x)).square().mean())


def test_plain_torch_modules():
    model, teacher, rows = plain_pair()
    before = distance(model, teacher, rows[100:])
    report = fit_correction(model, teacher, rows[:100])
    assert list(report) == ["2"]
    assert report["2"]["gain_low"] > 0
    assert distance(model, teacher, rows[100:]) < 0.3 * before
    assert model.training
    assert teacher.training


def test_named_sites_and_unknown_ones():
    model, teacher, rows = plain_pair()
    report = fit_correction(model, teacher, rows, CatConfig(num_clusters=1, alpha=1.0, at=["0", "logits"]))
    assert list(report) == ["0", "2"]
    with pytest.raises(ValueError, match="CatConfig\\(at='nowhere'\\): no module has this name"):
        fit_correction(model, teacher, rows, CatConfig(at="nowhere"))
    with pytest.raises(ValueError, match="Sequential has no repeated blocks"):
        fit_correction(model, teacher, rows, CatConfig(at="blocks"))


@pytest.mark.parametrize(("name", "count", "dim"), [("bert", 2, -1), ("resnet", 4, 1), ("vit", 2, -1)])
def test_every_block(name, count, dim):
    model = tiny_models.build(name)
    config = CatConfig(num_clusters=1, alpha=1.0, at="blocks")
    request = CatQuantConfig(weights="ternary", group_size=16, correction=config, dataset=tiny_models.samples(name))
    quantize(model, request)
    found = corrections(model)
    assert len(found) == count
    assert {correction.dim for correction in found.values()} == {dim}


def test_padding_does_not_change_a_fit():
    teacher = tiny_models.build("bert")
    rows = tiny_models.samples("bert", 24)
    found = []
    for token in (5, 90):  # what stands in the padded places must not matter
        padded = []
        for row in rows:
            ids, mask = row["input_ids"].clone(), row["attention_mask"].clone()
            ids[7:], mask[7:] = token, 0
            padded.append({"input_ids": ids, "attention_mask": mask})
        model = tiny_models.build("bert")
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.mul_(0.5)
        place = CatConfig(num_clusters=1, alpha=1.0, shrinkage=1.0, at="bert.encoder.layer.1")
        fit_correction(model, teacher, padded, place)
        found.append(corrections(model)["bert.encoder.layer.1"].beta)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def bnb_config(kind: str):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "lm_head"],  # its CPU kernel wants whole blocks of outputs, too
    )


def wide(name: str) -> tf.PreTrainedModel:
    """bitsandbytes' CPU kernel wants whole blocks of 64 columns."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny_models.LLAMA, **sizes})).eval()
        return tf.BertForSequenceClassification(tf.BertConfig(**{**tiny_models.TEXT, **sizes})).eval()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bitsandbytes_models(name, kind, tmp_path):
    teacher = wide(name)
    teacher.save_pretrained(tmp_path / "float")

    def quantized() -> nn.Module:
        options = {"quantization_config": bnb_config(kind), "device_map": "cpu", "dtype": torch.float32}
        return type(teacher).from_pretrained(tmp_path / "float", **options)

    model = quantized()
    report = fit_correction(model, teacher, tiny_models.samples(name, 40), FIXED)
    (site,) = report
    batch = tiny_models.batch(name)
    with torch.no_grad():
        corrected = model(**batch).logits
        save_correction(model, tmp_path)
        again = quantized()
        load_correction(again, tmp_path)
        assert torch.equal(again(**batch).logits, corrected)
        detach(model, site)
        assert not torch.equal(model(**batch).logits, corrected)
