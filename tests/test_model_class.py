"""The class that loads a model is the one that its config names: no head is lost, nothing is made up."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import tiny_models
from hf_catquant import CatQuantConfig, export, quantize_folder, report
from hf_catquant.checkpoint import weight_files
from hf_catquant.cli import main
from hf_catquant.describing import describe
from hf_catquant.shelf import shelf_of
from hf_catquant.streaming import open_on_shelf
from hf_catquant.tasks import auto_class, load_quantized, model_class
from hf_catquant.whole import left_over, load_whole

TEXT, VIT, SPEECH = (
    {**sizes, "num_hidden_layers": 1} for sizes in (tiny_models.TEXT, tiny_models.VIT, tiny_models.SPEECH)
)
REQUEST = partial(CatQuantConfig, weights="int8", solver="rtn", correction=None, rotation=None, group_size=16)
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
SEQ2SEQ = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
SEGFORMER = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [2], "hidden_sizes": [16], "patch_sizes": [3]}
SEGFORMER |= {"strides": [2], "num_attention_heads": [1], "mlp_ratios": [2], "decoder_hidden_size": 16}
TDNN = {"tdnn_dim": (32, 32), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 16}
CLIP_TEXT = {**TEXT, "projection_dim": 24, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
CONFIGS = {
    "BertForPreTraining": lambda: tf.BertConfig(**TEXT),
    "GPT2DoubleHeadsModel": lambda: tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64),
    "SegformerForSemanticSegmentation": lambda: tf.SegformerConfig(**SEGFORMER),
    "YolosForObjectDetection": lambda: tf.YolosConfig(
        **{**tiny_models.VIT, "image_size": [16, 16]}, num_detection_tokens=4
    ),
    "Wav2Vec2ForXVector": lambda: tf.Wav2Vec2Config(**SPEECH, **TDNN),
    "CLIPTextModelWithProjection": lambda: tf.CLIPTextConfig(**CLIP_TEXT),
    "T5EncoderModel": lambda: tf.T5Config(**T5),
    "MarianMTModel": lambda: tf.MarianConfig(**SEQ2SEQ, decoder_start_token_id=0, max_position_embeddings=64),
    "EncoderDecoderModel": lambda: tf.EncoderDecoderConfig.from_encoder_decoder_configs(
        tf.BertConfig(**TEXT), tf.BertConfig(**TEXT)
    ),
}


def saved(name: str, folder: Path, config: tf.PreTrainedConfig | None = None) -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(tf, name)(config or CONFIGS[name]()).eval()
        if name == "MarianMTModel":
            model.final_logits_bias.normal_()  # zeros would hide that it is lost
    model.save_pretrained(folder)
    return model


def changed(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    text = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in text.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_no_part_of_a_model_is_lost_on_any_way(name, tmp_path, monkeypatch):
    """Quantized from the disk, opened again, reported on for the Hub, exported."""
    model = saved(name, tmp_path / "float")
    out = tmp_path / "out"
    quantized = quantize_folder(tmp_path / "float", out, REQUEST())
    assert type(quantized) is type(load_quantized(str(out))) is type(model)
    counted = report(quantized).parameters
    (out / "report.json").unlink()
    monkeypatch.setattr("hf_catquant.describing._draw", lambda *args: None)
    describe(out)
    assert json.loads((out / "report.json").read_text())["parameters"] == counted
    assert export(out, tmp_path / "plain").lost == []
    again, found = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(found.values())
    for (key, value), (other, wanted) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        torch.testing.assert_close(value, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()) + 1e-9)


@pytest.mark.parametrize("name", ["GPT2DoubleHeadsModel", "EncoderDecoderModel"])
def test_the_shelf_builds_the_same_class(name, tmp_path):
    saved(name, tmp_path)
    assert_shelved(name, tmp_path)


def test_a_tower_in_a_folder_with_the_config_of_both(tmp_path):
    both = tf.CLIPConfig(text_config=CLIP_TEXT, vision_config={**VIT, "projection_dim": 24}, projection_dim=24)
    saved("CLIPTextModelWithProjection", tmp_path, both.text_config)
    both.architectures = ["CLIPTextModelWithProjection"]
    both.save_pretrained(tmp_path)
    assert_shelved("CLIPTextModelWithProjection", tmp_path)


def assert_shelved(name: str, folder: Path) -> None:
    kind = model_class(tf.AutoConfig.from_pretrained(folder))
    assert kind is getattr(tf, name)
    shelved = open_on_shelf(kind, str(folder), weight_files(folder), dtype=torch.float32, least=1)
    whole = load_whole(kind, str(folder), dtype=torch.float32)
    shelf_of(shelved).finish()
    assert type(shelved) is type(whole) is kind
    assert shelved.config.to_dict() == whole.config.to_dict()
    for (key, value), (other, wanted) in zip(shelved.state_dict().items(), whole.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, wanted), key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": None},
            r"has tensors that BertModel, which config.json does not name, does not read.*: cls\.",
        ),
        ({"architectures": ["RobertaModel"]}, "BertModel, which config.json does not name"),
        ({"architectures": ["ElectraForPreTraining"]}, "names the class ElectraForPreTraining .* model_type is bert"),
        (
            {"architectures": ["BertForMagic"]},
            "names the class BertForMagic in architectures, which transformers .* lacks",
        ),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "vit"}, "names the class GPT2LMHeadModel"),
    ],
)
def test_a_head_is_not_dropped_for_a_class_that_nobody_named(tmp_path, fields, message):
    saved("BertForPreTraining", tmp_path / "float")
    changed(tmp_path / "float", **fields)
    for stream in (True, False):
        with pytest.raises(ValueError, match=message):
            quantize_folder(tmp_path / "float", tmp_path / "out", REQUEST(), stream=stream)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_named_class_does_not_read_is_a_note(tmp_path, stream, caplog):
    """A body that somebody named, in the files of a larger model; tables that are computed today are no news."""
    saved("BertForPreTraining", tmp_path / "float")
    changed(tmp_path / "float", architectures=["BertModel"])
    tensors = load_file(tmp_path / "float" / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    model = quantize_folder(tmp_path / "float", tmp_path / "out", REQUEST(), stream=stream)
    assert type(model) is tf.BertModel
    note = next(note for note in report(model).notes if "does not read" in note)
    assert "BertModel, the class that config.json names" in note
    assert "cls.predictions.bias" in note
    assert "position_ids" not in note
    assert note in caplog.text
    assert report(load_quantized(str(tmp_path / "out"))).notes == report(model).notes


def test_old_tables_alone_are_no_head(tmp_path):
    saved("GPT2DoubleHeadsModel", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if k.startswith("transformer.")}
    tensors["transformer.position_ids"] = torch.arange(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    changed(tmp_path, architectures=None)
    assert left_over(load_whole(tf.AutoModel, str(tmp_path))) == []


def test_a_quantized_model_is_not_opened_in_another_class(tmp_path, capsys):
    saved("T5EncoderModel", tmp_path / "float")
    out = tmp_path / "out"
    quantize_folder(tmp_path / "float", out, REQUEST())
    assert main(["inspect", str(out), "--json"]) == 0
    capsys.readouterr()
    shutil.copytree(out, tmp_path / "other")
    changed(tmp_path / "other", architectures=["T5Model"])
    assert main(["inspect", str(tmp_path / "other")]) == 1
    assert "has no tensor decoder." in capsys.readouterr().err


def test_which_class_loads_and_what_it_is_for():
    """The class answers "what loads it", the Auto class "what is it for"; code that comes along is only named."""
    config = tiny_models.build("bert").config
    config.architectures = ["BertForSequenceClassification"]
    assert model_class(config) is tf.BertForSequenceClassification
    assert auto_class(config) is tf.AutoModelForSequenceClassification
    config.auto_map = {"AutoModelForSequenceClassification": "other/repo--modeling.BertForSequenceClassification"}
    assert model_class(config) is tf.BertForSequenceClassification
    assert model_class(config, trust_remote_code=True) is tf.AutoModelForSequenceClassification
    config.architectures, config.auto_map = ["MyNet"], {"AutoModelForMaskedLM": "modeling.MyNet"}
    assert model_class(config) is tf.AutoModelForMaskedLM  # which asks for --trust-remote-code
    config = tiny_models.build("deit").config
    config.architectures = ["DeiTForImageClassificationWithTeacher"]
    assert model_class(config) is tf.DeiTForImageClassificationWithTeacher
    assert auto_class(config) is tf.AutoModelForImageClassification
    config.architectures = ["ViTForImageClassification"]  # of another model type: by its task, as transformers does
    assert model_class(config) is tf.AutoModelForImageClassification
    config.architectures = None
    assert model_class(config) is tf.AutoModel


@pytest.mark.parametrize("stream", [True, False])
def test_a_float_model_that_is_a_variant(tmp_path, stream):
    model = saved("BertForPreTraining", tmp_path / "plain")
    model.save_pretrained(tmp_path / "float", variant="fp16")
    found = quantize_folder(tmp_path / "float", tmp_path / "out", REQUEST(), stream=stream)
    assert torch.equal(found.bert.pooler.dense.bias, model.bert.pooler.dense.bias)
    assert torch.equal(found.cls.predictions.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_the_config_names(tmp_path, stream, sharded):
    """transformers reads them in the place of model.safetensors."""
    folder = tmp_path / "float"
    saved("BertForPreTraining", folder)
    best = tf.BertForPreTraining(tf.BertConfig(**TEXT))
    best.save_pretrained(tmp_path / "best", max_shard_size="20KB" if sharded else "1GB")
    files = {path.name: path.name.replace("model", "best") for path in (tmp_path / "best").glob("model*")}
    for name, other in files.items():
        shutil.copyfile(tmp_path / "best" / name, folder / other)
    value = "best.safetensors"
    if sharded:
        value = "best.safetensors.index.json"
        text = (folder / value).read_text().replace("model-0", "best-0")
        (folder / value).write_text(text)
    changed(folder, transformers_weights=value)
    assert {path.name for path in weight_files(folder)} == {n for n in files.values() if n.endswith(".safetensors")}
    assert torch.equal(tf.BertForPreTraining.from_pretrained(folder).cls.predictions.bias, best.cls.predictions.bias)
    found = quantize_folder(folder, tmp_path / "out", REQUEST(), stream=stream)
    wanted = best.bert.encoder.layer[0].attention.self.query.weight
    got = found.bert.encoder.layer[0].attention.self.query.to_float().weight
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02 * float(wanted.detach().abs().max()))
    assert torch.equal(found.bert.pooler.dense.bias, best.bert.pooler.dense.bias)


@pytest.mark.parametrize("value", ["../x.safetensors", "none.safetensors", "adapter_model.bin", 3])
def test_weights_that_the_config_names_and_that_are_not_there(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": value}))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"transformers_weights must name a \.safetensors file of this folder"):
        weight_files(tmp_path)
