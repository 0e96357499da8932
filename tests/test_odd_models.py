"""Architectures that do something unusual: scaled embeddings, weight norms, caches, models within models, experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

import hf_catquant
import tiny_models
from helpers import global_rng_untouched, slow
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.integrity import sha256
from tiny_models import LLAMA, SPEECH, TEXT, VIT, main_output

SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 96, "max_position_embeddings": 32}
SEQ2SEQ |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SEQ2SEQ |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def vision_encoder_decoder() -> tf.PreTrainedModel:
    decoder = tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VIT), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel(config=config)


def blip() -> tf.PreTrainedModel:
    text = {**TEXT, "encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return tf.BlipForConditionalGeneration(
        tf.BlipConfig(vision_config=VIT, text_config={**text, "sep_token_id": 2}, projection_dim=32)
    )


def levit() -> tf.PreTrainedModel:
    sizes = {"hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 2, 2], "depths": [2, 2, 2]}
    return tf.LevitForImageClassification(tf.LevitConfig(image_size=64, key_dim=[8, 8, 8], **sizes))


# What builds it, the kind of its input, percent of its parameters that are quantized at least.
MODELS: dict[str, tuple[Callable[[], tf.PreTrainedModel], str, float]] = {
    "bart: a scaled embedding, shared": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ, scale_embedding=True)),
        "seq2seq",
        85,
    ),
    "gemma3: a scaled embedding, tied": (
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**LLAMA, head_dim=16)),
        "text",
        98,
    ),
    "falcon: a linear of its own": (
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=96)
        ),
        "text",
        98,
    ),
    "albert: one block run twice": (
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16)),
        "text",
        90,
    ),
    "mamba: weights read without their layers": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=8)),
        "text",
        90,
    ),
    "mixtral: fused experts": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, **EXPERTS)), "text", 99),
    "wavlm: a weight norm": (
        lambda: tf.WavLMForSequenceClassification(tf.WavLMConfig(**SPEECH)),
        "wave",
        90,
    ),
    "levit: biases kept from one run to the next": (levit, "image64", 90),
    "blip: a text decoder with a cache": (blip, "caption", 90),
    "a vision encoder with a text decoder": (vision_encoder_decoder, "image to text", 90),
    "segformer": (
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(hidden_sizes=[16, 32, 32, 32], depths=[2, 2, 2, 2], decoder_hidden_size=32)
        ),
        "image64",
        95,
    ),
}


def build(name: str) -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


def sample(kind: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(3, 96, (10,), generator=generator)

    def image(size: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(3, size, size, generator=generator)}

    if kind == "wave":
        return {"input_values": torch.randn(800, generator=generator)}
    text = {"input_ids": ids(), "attention_mask": torch.ones(10, dtype=torch.int64)}
    parts = {
        "text": text,
        "seq2seq": {**text, "decoder_input_ids": ids()},
        "image64": image(64),
        "caption": {**text, **image(16)},
        "image to text": {"decoder_input_ids": ids(), **image(16)},
    }
    return parts[kind]


def batch(kind: str) -> dict[str, Tensor]:
    rows = [sample(kind, seed) for seed in (100, 101)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


LONG = ("segformer", "levit: biases kept from one run to the next")


@pytest.mark.parametrize("name", [*(name for name in MODELS if name not in LONG), *slow(*LONG)])
@torch.no_grad()
def test_round_trip(name: str, tmp_path: Path):
    """Calibrated and corrected on load, saved, reloaded: bit-exact, and the same file when saved again."""
    _, kind, least = MODELS[name]
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    config = CatQuantConfig(group_size=16, dataset=[sample(kind, i) for i in range(12)], batch_size=4)
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    quantized.save_pretrained(tmp_path / "first")
    reloaded = type(model).from_pretrained(tmp_path / "first")
    expected, actual = (main_output(m(**batch(kind))) for m in (quantized, reloaded))
    assert torch.isfinite(expected).all()
    assert torch.equal(expected, actual)
    reloaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / part / "model.safetensors").read_bytes() for part in ("first", "second"))
    assert first == second
    report = hf_catquant.report(reloaded)
    assert report.coverage >= least
    ternary = sum(layer.weights == "ternary" for layer in report.layers)
    assert 2 * ternary >= len(report.layers), "blocks were not found: what is outside them is int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("bart", "gemma3", "falcon", "wavlm"))])
@torch.no_grad()
def test_derived_layers_do_what_they_did(name: str, dtype: torch.dtype, tmp_path: Path):
    """In int8 the model is nearly the float one, and dequantized, saved and loaded it is exactly the quantized one."""
    kind = MODELS[name][1]
    build(name).save_pretrained(tmp_path / "float")
    model = type(build(name)).from_pretrained(tmp_path / "float", dtype=dtype)  # .to(dtype) casts rotary tables, too
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(kind).items()}
    expected = main_output(model(**inputs)).float()
    quantize(model, CatQuantConfig(weights="int8", group_size=16, solver="rtn", correction=None))
    found = main_output(model(**inputs)).float()
    assert (found - expected).norm() < 0.05 * expected.norm()
    plain = model.dequantize()
    torch.testing.assert_close(main_output(plain(**inputs)).float(), found, rtol=2e-2, atol=2e-2)
    plain.save_pretrained(tmp_path / "plain")
    again, info = type(model).from_pretrained(tmp_path / "plain", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    states = plain.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # Equal weights, but what is read from a file is aligned in memory as it happens to be, and torch's float convolutions
    # of some processors add up in another order then.
    torch.testing.assert_close(main_output(again(**inputs)), main_output(plain(**inputs)), rtol=1e-5, atol=1e-6)


def test_blocks_that_run_past_their_hooks(tmp_path: Path):
    """SqueezeBERT calls ``layer.forward``: its layers are units of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**TEXT, "embedding_size": 32, **{f"{part}_groups": 2 for part in ("q", "k", "v", "post_attention")}}
        model = tf.SqueezeBertForSequenceClassification(tf.SqueezeBertConfig(**sizes)).eval()
    rows = [sample("text", i) for i in range(12)]
    quantize(model, CatQuantConfig(group_size=16, dataset=rows, batch_size=4))
    assert not any("not reached" in note for note in hf_catquant.report(model).notes)
    assert torch.isfinite(model(**batch("text")).logits).all()


@torch.no_grad()
def test_a_model_that_draws_random_numbers_draws_alike_in_both_streams():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.ViTMAEModel(tf.ViTMAEConfig(**VIT, mask_ratio=0.5)).eval()
    rows = [{"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(32)]
    config = CatQuantConfig(weights="int4", group_size=16, dataset=rows, batch_size=4, correction=None)
    with global_rng_untouched():
        quantize(model, config)
    errors = [layer.error for layer in hf_catquant.report(model).layers if layer.error is not None]
    assert sum(errors) / len(errors) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_layers_that_stay_float32_do_so_after_a_reload(dtype: torch.dtype, tmp_path: Path):
    """T5 keeps ``wo`` in float32 beside float16."""
    tiny_models.build("t5").save_pretrained(tmp_path / "float")
    kind = tf.T5ForConditionalGeneration
    config = CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None)
    model = kind.from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", dtype=dtype)
    inputs = tiny_models.batch("t5")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    again.save_pretrained(tmp_path / "twice")
    assert sha256(tmp_path / "twice" / "model.safetensors") == sha256(tmp_path / "saved" / "model.safetensors")
    plain = model.dequantize()  # after a save the config holds its dtype as a word
    assert plain.lm_head.weight.dtype == dtype


def test_the_report_speaks_of_the_model_at_hand(tmp_path: Path):
    base = tiny_models.build("bert").bert
    quantize(base, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))
    base.save_pretrained(tmp_path)
    task = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    reason = hf_catquant.report(task).skipped["classifier"]
    assert reason == "not quantized in the checkpoint that was loaded"


def test_another_kind_of_head_under_the_same_name_is_fresh(tmp_path: Path):
    """RoBERTa's classifier is a linear for tokens and a module of two linears for sequences."""
    config = tf.RobertaConfig(**TEXT, type_vocab_size=1, pad_token_id=1)
    model = tf.RobertaForTokenClassification(config).eval()
    quantize(model, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))
    model.save_pretrained(tmp_path)
    task = tf.RobertaForSequenceClassification.from_pretrained(tmp_path)
    assert type(task.classifier.dense) is torch.nn.Linear
    assert torch.isfinite(task(**batch("text")).logits).all()
    assert torch.equal(
        task.roberta.encoder.layer[0].output.dense.weight, model.roberta.encoder.layer[0].output.dense.weight
    )


@torch.no_grad()
def test_a_tied_bias_stays_one_parameter(tmp_path: Path):
    """BERT's head has its bias under two names; the bias is shifted by the solver."""
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(tf.BertConfig(**TEXT)).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = [sample("text", seed) for seed in range(24)]
    quantize(model, CatQuantConfig(weights="int2", edge_weights="int2", group_size=16, dataset=rows, batch_size=4))
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert hf_catquant.report(model).parameters == count
    model.save_pretrained(tmp_path)
    again = tf.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch("text")).logits, model(**batch("text")).logits)


def test_the_report_of_an_offloaded_model(tmp_path: Path):
    model = tf.BertForMaskedLM(tf.BertConfig(**TEXT)).eval()
    quantize(model, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))
    model.save_pretrained(tmp_path)
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "disk"}
    away = tf.BertForMaskedLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "away")
    found, expected = hf_catquant.report(away), hf_catquant.report(model)
    assert (found.bytes_after, found.bits_per_parameter) == (expected.bytes_after, expected.bits_per_parameter)
    assert (found.parameters, found.coverage) == (expected.parameters, expected.coverage)


@torch.no_grad()
def test_ties_that_an_instance_makes_for_itself_come_back(tmp_path: Path):
    """Marian ties its embeddings in its constructor; dequantized it has to save and load as it did before."""
    config = tf.MarianConfig(**SEQ2SEQ)
    model = tf.MarianMTModel(config).eval()
    quantize(model, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))
    expected = model(**batch("seq2seq")).logits
    model.dequantize().save_pretrained(tmp_path)
    again = tf.MarianMTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch("seq2seq")).logits, expected, rtol=1e-4, atol=1e-5)
