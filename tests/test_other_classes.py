"""Checkpoints loaded into another class of the same family than the one that was saved, or built with less than it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.packed_model import quantized_modules
from hf_catquant.verify import verify

INT8 = CatQuantConfig("int8", 16, solver="rtn", correction=None)
IDS = torch.arange(3, 19).view(2, 8)
# A class without the head, the class that generates, and the layers there that hold the weight of its embedding.
BASES = {
    "llama_tied": (tf.LlamaModel, tf.LlamaForCausalLM, {"lm_head": "model.embed_tokens"}),
    "gpt2": (tf.GPT2Model, tf.GPT2LMHeadModel, {"lm_head": "transformer.wte"}),
    "opt": (tf.OPTModel, tf.OPTForCausalLM, {"lm_head": "model.decoder.embed_tokens"}),
    "t5": (tf.T5EncoderModel, tf.T5ForConditionalGeneration, {"decoder.embed_tokens": "shared", "lm_head": "shared"}),
    "whisper": (tf.WhisperModel, tf.WhisperForConditionalGeneration, {"proj_out": "model.decoder.embed_tokens"}),
}


@torch.no_grad()
def logits(model: nn.Module, name: str = "llama") -> Tensor:
    return model.eval()(**tiny_models.batch(name)).logits


def edited(folder: Path, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", BASES)
def test_a_head_holds_the_packed_weight_of_the_embedding(name: str, tmp_path: Path):
    base, generating, ties = BASES[name]
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path / "float")
    base.from_pretrained(tmp_path / "float", quantization_config=INT8).save_pretrained(tmp_path / "base")
    loaded = generating.from_pretrained(tmp_path / "base")
    layers = quantized_modules(loaded)
    for target, source in ties.items():
        assert layers[target].owner is layers[source]
    if name != "t5":  # its decoder is not in the encoder
        error = (logits(loaded, name) - logits(model, name)).norm() / logits(model, name).norm()
        assert error < 0.05
        # It is a whole model of its class now, which saves and loads as one.
        loaded.save_pretrained(tmp_path / "whole")
        assert verify(tmp_path / "whole").is_whole
        assert torch.equal(logits(generating.from_pretrained(tmp_path / "whole"), name), logits(loaded, name))


def test_a_head_with_a_weight_of_its_own_keeps_it(tmp_path: Path):
    class Mine(tf.LlamaForCausalLM):
        pass

    model = tiny_models.build("llama_tied")
    quantize(model, INT8)
    model.lm_head = nn.Linear(32, 96, bias=False)
    model.save_pretrained(tmp_path)
    loaded = Mine.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(logits(loaded), logits(model))


def test_an_untied_head_stays_fresh(tmp_path: Path):
    model = tiny_models.build("llama")
    quantize(model, INT8)
    model.model.save_pretrained(tmp_path)
    assert type(tf.LlamaForCausalLM.from_pretrained(tmp_path).lm_head) is nn.Linear


@pytest.mark.parametrize("name", ["roberta", "vit"])
def test_a_part_without_a_pooler_loads_without_one(name: str, tmp_path: Path):
    """Its class builds one from the same config: random weights would be in it, or the load would be refused."""
    model = tiny_models.build(name).eval()
    quantize(model, INT8)
    part = model.base_model
    assert part.pooler is None
    part.save_pretrained(tmp_path / "part")
    assert verify(tmp_path / "part").is_whole
    loaded = type(part).from_pretrained(tmp_path / "part")
    assert loaded.pooler is None
    inputs = tiny_models.batch(name)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).last_hidden_state, part(**inputs).last_hidden_state)
    assert set(quantized_modules(loaded)) == set(quantized_modules(part))
    # What a checkpoint lost is no such module.
    edited(tmp_path / "part", lambda stored: stored["provenance"].pop("absent"))
    with pytest.raises(ValueError, match=r"has no tensor pooler\.dense\.bias"):
        type(part).from_pretrained(tmp_path / "part")
    for wrong in (["encoder"], "pooler", [3]):
        edited(tmp_path / "part", lambda stored, wrong=wrong: stored["provenance"].update(absent=wrong))
        with pytest.raises(ValueError, match=r"provenance\.absent must be a list of (modules without tensors|str)"):
            type(part).from_pretrained(tmp_path / "part")
        assert "provenance.absent must be a list" in verify(tmp_path / "part").problems[0]


def test_what_holds_no_parameters_is_never_absent(tmp_path: Path):
    model = tiny_models.build("llama")
    quantize(model, INT8)
    model.save_pretrained(tmp_path)
    edited(tmp_path, lambda stored: stored["provenance"].update(absent=["model.rotary_emb"]))
    with pytest.raises(
        ValueError, match=r"provenance\.absent must be modules with parameters, got 'model\.rotary_emb'"
    ):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_model_around_a_part_without_a_pooler(tmp_path: Path):
    encoder = tiny_models.build("roberta")
    config = copy.deepcopy(encoder.config)
    config.is_decoder = config.add_cross_attention = True
    quantize(encoder, INT8)
    model = tf.EncoderDecoderModel(encoder=encoder.roberta, decoder=tf.RobertaForCausalLM(config)).eval()
    model.save_pretrained(tmp_path)
    loaded = tf.EncoderDecoderModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        first, second = (each(IDS, decoder_input_ids=IDS).logits for each in (model, loaded))
    assert torch.equal(first, second)


def test_layers_that_were_cut_off_are_not_absent(tmp_path: Path):
    """The config says that they are there, and nothing that was saved so would load."""
    model = tiny_models.build("llama")
    model.model.layers = model.model.layers[:1]
    quantize(model, INT8)
    for part in (model, model.model):
        with pytest.raises(
            ValueError, match=r"has no (model\.)?layers\.1, which its class builds .*num_hidden_layers"
        ):
            part.save_pretrained(tmp_path)
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("skipped", [None, ["^shared$", "lm_head"]])
def test_an_embedding_that_sits_at_several_names(skipped, tmp_path: Path):
    """resize_token_embeddings puts one module into encoder and decoder of T5, where the class builds three."""
    model = tiny_models.build("t5").eval()
    model.resize_token_embeddings(112)
    assert model.shared is model.encoder.embed_tokens
    quantize(model, CatQuantConfig("int8", 16, solver="rtn", correction=None, modules_to_not_convert=skipped))
    if skipped is not None:
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared  # as set_input_embeddings does
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).is_whole
    loaded = tf.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, "t5"), logits(model, "t5"))
    if skipped is None:
        assert loaded.encoder.embed_tokens.owner is loaded.lm_head.owner is loaded.shared
    else:
        assert loaded.encoder.embed_tokens.weight is loaded.shared.weight


@pytest.mark.parametrize("name", ["roberta", "wav2vec2"])
def test_saving_costs_no_random_numbers(name: str, tmp_path: Path):
    """Some classes draw numbers while they are built, also on the meta device."""
    model = tiny_models.build(name)
    quantize(model, INT8)
    before = torch.get_rng_state()
    model.base_model.save_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_asks_its_layers_to_reset(tmp_path: Path):
    """Wav2Vec2ForPreTraining does so while it loads, after the weights are in."""
    config = copy.deepcopy(tiny_models.build("wav2vec2").config)
    model = tf.Wav2Vec2ForPreTraining(config).eval()
    quantize(model, INT8)
    model.save_pretrained(tmp_path)
    loaded = tf.Wav2Vec2ForPreTraining.from_pretrained(tmp_path)
    inputs = tiny_models.batch("wav2vec2")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).projected_states, model(**inputs).projected_states)


def test_what_a_class_changes_in_its_config_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    whisper, gpt2 = tiny_models.build("whisper"), tiny_models.build("gpt2")
    for model, folder in ((whisper, tmp_path / "whisper"), (gpt2, tmp_path / "gpt2")):
        quantize(model, INT8)
        model.save_pretrained(folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_catquant"):
        tf.WhisperForCausalLM.from_pretrained(tmp_path / "whisper")  # sets is_encoder_decoder
        tf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "gpt2", num_labels=5, pad_token_id=0)
    assert "not what was saved" not in caplog.text.replace("pad_token_id of config.json are not what was saved", "")
    file = tmp_path / "whisper" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_embedding": True}))
    with caplog.at_level(logging.WARNING, "hf_catquant"):
        tf.WhisperForCausalLM.from_pretrained(tmp_path / "whisper")
    assert "scale_embedding of config.json are not what was saved" in caplog.text


def test_layers_of_another_quantized_model_bring_what_is_known_of_them(tmp_path: Path):
    model, other = tiny_models.build("llama"), tiny_models.build("llama")
    quantize(model, INT8)
    quantize(other, CatQuantConfig("int2", 16, solver="rtn", correction=None, edge_weights=None))
    errors = {layer.name: layer.error for layer in report(other).layers}
    names = [f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj")]
    # Each in the other's place, so that names alone would tell them wrongly.
    at = model.model.layers[0].self_attn
    at.q_proj, at.k_proj = other.model.layers[1].self_attn.q_proj, other.model.layers[0].self_attn.k_proj
    wanted = {names[0]: errors["model.layers.1.self_attn.q_proj"], names[1]: errors[names[1]]}
    model.save_pretrained(tmp_path)
    for each in (model, tf.LlamaForCausalLM.from_pretrained(tmp_path)):
        found = report(each)
        assert {layer.name: layer.error for layer in found.layers if layer.name in names} == wanted
        notes = [note for note in found.notes if "were quantized in another model" in note]
        assert len(notes) == 1
        copy.deepcopy(each).save_pretrained(tmp_path / "again")  # the note is there once, too
        assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
        assert notes[0].startswith(f"2 of its layers ({names[0]} ...)")
