"""Config-built models of every architecture that the round trip is proved on: tiny, seeded, random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor

TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT |= {"max_position_embeddings": 64}
LLAMA = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}
VIT |= {"patch_size": 8}
SPEECH = {**VIT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
SPEECH |= {
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
    "classifier_proj_size": 24,
}


def _llama(tied: bool) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def _clip() -> tf.PreTrainedModel:
    text = {**TEXT, "projection_dim": 24, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return tf.CLIPModel(
        tf.CLIPConfig(text_config=text, vision_config={**VIT, "projection_dim": 24}, projection_dim=24)
    )


def _whisper() -> tf.PreTrainedModel:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(vocab_size=96, **layers, **sizes, **tokens, max_target_positions=32, suppress_tokens=None)
    )


def _t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 96}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    )


def _labels(count: int = 5) -> dict[str, Any]:
    return {"id2label": {i: f"class {i}" for i in range(count)}, "label2id": {f"class {i}": i for i in range(count)}}


BUILDERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama_tied": lambda: _llama(True),
    "llama": lambda: _llama(False),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=48,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    ),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **_labels())),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=96, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64, **_labels()
        )
    ),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**TEXT, type_vocab_size=1, pad_token_id=1, **_labels())
    ),
    "t5": _t5,
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT, **_labels())),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**VIT, **_labels())),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, **_labels()
        )
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=16, patch_size=2, **_labels())
    ),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_channels=3, **_labels()
        )
    ),
    "mobilenet_v2": lambda: tf.MobileNetV2ForImageClassification(
        tf.MobileNetV2Config(
            image_size=32, depth_multiplier=0.25, finegrained_output=True, tf_padding=True, **_labels()
        )
    ),
    "wav2vec2": lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SPEECH, **_labels())),
    "hubert": lambda: tf.HubertForSequenceClassification(tf.HubertConfig(**SPEECH, **_labels())),
    "whisper": _whisper,
    "ast": lambda: tf.ASTForAudioClassification(
        tf.ASTConfig(
            **{k: v for k, v in VIT.items() if k != "image_size"},
            num_mel_bins=16,
            max_length=24,
            frequency_stride=8,
            time_stride=8,
            **_labels(),
        )
    ),
    "clip": _clip,
}
NAMES = list(BUILDERS)

# Weights that are no layers: the tables of positions.
LEAST_COVERAGE = {"opt": 85.0}


@cache
def folder_of(name: str, root: str) -> str:
    """Save the float model once under ``root``; returns its folder."""
    path = f"{root}/{name}"
    build(name).save_pretrained(path)
    return path


def build(name: str) -> tf.PreTrainedModel:
    """The float model, in evaluation mode; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BUILDERS[name]().eval()
        # Batch norms and other tables start at values that hide mistakes.
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        return model


def samples(name: str, count: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples without a batch dimension, as ``dataset=`` takes them."""
    generator = torch.Generator().manual_seed(seed)
    return [_sample(build_kind(name), generator) for _ in range(count)]


def batch(name: str, count: int = 3) -> dict[str, Tensor]:
    """A batch for ``model(**batch)``."""
    rows = samples(name, count, seed=1)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def build_kind(name: str) -> str:
    """Which inputs a model takes."""
    special = {"t5": "seq2seq", "whisper": "whisper", "ast": "ast", "clip": "clip", "mobilenet_v2": "image32"}
    special |= {"wav2vec2": "wave", "hubert": "wave"}
    vision = ("vit", "deit", "swin", "convnext", "resnet")
    return special.get(name, "image" if name in vision else "text")


def _sample(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    def ids() -> Tensor:
        return torch.randint(3, 96, (10,), generator=generator)

    def image(size: int = 16) -> Tensor:
        return torch.randn(3, size, size, generator=generator)

    makers: dict[str, Callable[[], dict[str, Tensor]]] = {
        "text": lambda: {"input_ids": ids(), "attention_mask": torch.ones(10, dtype=torch.int64)},
        "seq2seq": lambda: {"input_ids": ids(), "decoder_input_ids": ids()},
        "image": lambda: {"pixel_values": image()},
        "image32": lambda: {"pixel_values": image(32)},
        "wave": lambda: {"input_values": torch.randn(800, generator=generator)},
        "whisper": lambda: {"input_features": torch.randn(8, 32, generator=generator), "decoder_input_ids": ids()},
        "ast": lambda: {"input_values": torch.randn(24, 16, generator=generator)},
        "clip": lambda: {"input_ids": ids(), "pixel_values": image()},
    }
    return makers[kind]()


def main_output(output: Any) -> Tensor:
    """The tensor that models are compared by."""
    for key in ("logits", "logits_per_image"):
        if key in output:
            return output[key]
    return output[0]
