"""Weight-normalised convolutions of speech models: the norm is folded into the packed weight, and comes back in float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import hf_catquant
from helpers import sqnr
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.layers import QuantizedModule
from hf_catquant.packed_model import quantized_modules
from tiny_models import SPEECH, TEXT

RTN = {"weights": "int8", "group_size": 16, "solver": "rtn", "correction": None}
MODELS = {
    "wav2vec2": lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**SPEECH)),
    "hubert": lambda: tf.HubertModel(tf.HubertConfig(**SPEECH)),
    "wavlm": lambda: tf.WavLMModel(tf.WavLMConfig(**SPEECH)),
    "unispeech-sat": lambda: tf.UniSpeechSatModel(tf.UniSpeechSatConfig(**SPEECH, num_codevectors_per_group=4)),
}


def build(make) -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def normed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "parametrizations")]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_positional_convolutions(name: str, tmp_path: Path):
    """One layer a model; calibrated, it is closer to float than it is far, and a reload is bit-exact."""
    model = build(MODELS[name])
    (norm,) = normed(model)
    weight = model.get_submodule(norm).weight.clone()
    waves = torch.randn(12, 800, generator=torch.Generator().manual_seed(0))
    before = model(waves).last_hidden_state
    data = [{"input_values": wave} for wave in waves]
    quantize(model, CatQuantConfig(**{**RTN, "solver": "gptq"}, edge_weights="int8", dataset=data, batch_size=4))
    layer = model.get_submodule(norm)
    assert isinstance(layer, QuantizedModule)
    assert sqnr(weight, layer.weight) > 35
    assert sqnr(before, model(waves).last_hidden_state) > 20
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(waves).last_hidden_state, model(waves).last_hidden_state)
    again.dequantize()
    assert normed(again) == [norm]
    assert sqnr(model(waves).last_hidden_state, again(waves).last_hidden_state) > 60


def vits() -> tf.VitsModel:
    sizes = {
        name: value for name, value in TEXT.items() if name not in ("intermediate_size", "max_position_embeddings")
    }
    return tf.VitsModel(
        tf.VitsConfig(
            **sizes,
            ffn_dim=48,
            flow_size=16,
            spectrogram_bins=9,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            duration_predictor_filter_channels=8,
            prior_encoder_num_flows=2,
            prior_encoder_num_wavenet_layers=2,
            posterior_encoder_num_wavenet_layers=2,
        )
    )


@torch.no_grad()
def test_vits(tmp_path: Path):
    """Flows of weight-normed convolutions; transposed ones stay in float, with the reason."""
    model = build(vits)
    norms = normed(model)
    assert len(norms) > 8

    def speak(speaker: tf.VitsModel) -> torch.Tensor:
        torch.manual_seed(0)
        return speaker(input_ids=torch.arange(3, 11).view(1, 8)).waveform

    before = speak(model)
    quantize(model, CatQuantConfig(**RTN))
    assert all(isinstance(model.get_submodule(name), QuantizedModule) for name in norms)
    skipped = hf_catquant.report(model).skipped
    assert any("ConvTranspose1d is not a layer type" in reason for reason in skipped.values())
    assert speak(model).shape == before.shape
    assert sqnr(before, speak(model)) > 15
    model.save_pretrained(tmp_path)
    again = tf.VitsModel.from_pretrained(tmp_path)
    assert torch.equal(speak(again), speak(model))
    assert quantized_modules(again).keys() == quantized_modules(model).keys()


def test_the_other_spelling_of_a_weight_norm_stays_in_float():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 6, 3)), nn.Flatten(), nn.Linear(6 * 6, 3))
    quantize(model, CatQuantConfig(**RTN))
    assert isinstance(model[0], nn.Conv1d)
    skipped = hf_catquant.report(model).skipped
    assert set(skipped) == {"0"} or {"0.weight_v"} <= set(skipped)
    assert isinstance(model[2], QuantizedModule)
