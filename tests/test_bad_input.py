"""Whatever a user gets wrong is said in words that name the thing, the rule, the value and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_catquant import CatConfig, CatQuantConfig, quantize
from hf_catquant.packed_model import quantized_modules


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A float BERT on disk."""
    path = tmp_path_factory.mktemp("float") / "bert"
    bert().save_pretrained(path)
    return str(path)


TOKENS = [{"input_ids": torch.arange(6) + i} for i in range(12)]
IMAGES = [{"pixel_values": torch.full((3, 8, 8), float(i))} for i in range(12)]


def images(value: float) -> list[dict[str, torch.Tensor]]:
    broken = [{"pixel_values": image["pixel_values"].clone()} for image in IMAGES]
    broken[3]["pixel_values"][0, 1, 1] = value
    return broken


CONFIGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weights": "int5"}, ValueError, r"weights must be one of binary, ternary.*got 'int5'"),
    ({"weights": None}, ValueError, r"weights must be one of .*got None"),
    ({"edge_weights": "fp4"}, ValueError, r"edge_weights must be None or one of .*got 'fp4'"),
    ({"activations": "ternary"}, ValueError, r"activations must be None or one of int2.*got 'ternary'"),
    ({"group_size": 20}, ValueError, r"group_size must be -1 or a positive multiple of 8, got 20"),
    ({"group_size": 0}, ValueError, r"group_size must be .*got 0"),
    ({"group_size": "all"}, ValueError, r"group_size must be .*got 'all'"),
    ({"solver": "awq"}, ValueError, r"solver must be one of gptq.*rtn.*got 'awq'"),
    ({"correction": "dog"}, ValueError, r"correction must be None, \"cat\" or a CatConfig, got 'dog'"),
    ({"num_samples": 0}, ValueError, r"num_samples must be an integer of at least 2, got 0"),
    ({"batch_size": 2.5}, ValueError, r"batch_size must be an integer of at least 1, got 2\.5"),
    ({"seed": -1}, ValueError, r"seed must be an integer from 0 to 2\*\*32 - 1, got -1"),
    ({"seed": 1 << 64}, ValueError, r"seed must be an integer from 0 to 2\*\*32 - 1, got 18446744073709551616"),
    ({"seed": True}, ValueError, r"seed must be an integer from 0 to .*, got True"),
    ({"strict": "yes"}, TypeError, r"strict must be True or False, got 'yes'"),
    ({"bit": 2}, ValueError, r"CatQuantConfig has no field 'bit'; its fields are weights"),
    (
        {"modules_to_not_convert": "classifier"},
        TypeError,
        r"modules_to_not_convert must be None or a list.*classifier",
    ),
    ({"overrides": {"(": {"weights": "int8"}}}, ValueError, r"overrides: '\(' is not a regular expression"),
    ({"overrides": {"a": {"solver": "rtn"}}}, ValueError, r"overrides\['a'\] must set weights.*got 'solver'"),
    ({"overrides": {"a": {"weights": "int9"}}}, ValueError, r"overrides\['a'\]: weights must be one of .*'int9'"),
    ({"overrides": ["a"]}, TypeError, r"overrides must be \{regex: \{field: value\}\}, got \['a'\]"),
    ({"overrides": []}, TypeError, r"overrides must be \{regex: \{field: value\}\}, got \[\]"),
    ({"solver_options": []}, TypeError, r"solver_options must be \{option: value\}, got \[\]"),
    ({"solver_options": ""}, TypeError, r"solver_options must be \{option: value\}, got ''"),
    ({"corrections": []}, ValueError, r"corrections must be \{name: entry\}, got \[\]"),
    ({"checksums": []}, ValueError, r"checksums must be \{tensor: CRC-32\}, got \[\]"),
    ({"overrides": {"a": "int4"}}, TypeError, r"overrides must be \{regex: .*got 'a': 'int4'"),
    ({"overrides": {1: {"weights": "int8"}}}, TypeError, r"overrides must be .*got 1: "),
    ({"modules_to_not_convert": 5}, TypeError, r"modules_to_not_convert must be None or a list.*got 5"),
    ({"modules_to_not_convert": ["*"]}, ValueError, r"modules_to_not_convert: '\*' is not a regular expression"),
    ({"format_version": 99}, ValueError, r"format_version must be 1, got 99: .*install a version"),
    ({"quant_method": "gptq"}, ValueError, r"quant_method must be 'catquant', got 'gptq'"),
]


@pytest.mark.parametrize(("fields", "error", "words"), CONFIGS, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_a_request_that_breaks_a_rule(fields, error, words):
    with pytest.raises(error, match=words):
        CatQuantConfig(**fields)


DATA: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (bert, {"dataset": []}, ValueError, r"dataset is empty: pass samples, or solver=\"rtn\""),
    (bert, {"dataset": iter([])}, ValueError, r"dataset is empty \(a generator can be read once\)"),
    (bert, {"dataset": TOKENS[:1]}, ValueError, r"at least 2 samples, got 1: pass more, or solver=\"rtn\" with"),
    (vit, {"dataset": images(float("nan"))}, ValueError, r"(?s)sample 3.*pixel_values.*NaN"),
    (vit, {"dataset": images(float("inf"))}, ValueError, r"(?s)sample 3.*pixel_values.*(inf|Inf)"),
    (bert, {"dataset": [{"pixels": [1.0, 2.0]}] * 4}, ValueError, r"pixels.*(?s:.*)input_ids"),
    (
        bert,
        {"dataset": None},
        ValueError,
        r"solver=\"gptq\" and correction need calibration data, but dataset is None",
    ),
    (bert, {"dataset": None, "solver": "rtn"}, ValueError, r"correction needs calibration data.*solver=\"rtn\""),
    (bert, {"dataset": None, "correction": None}, ValueError, r"solver=\"gptq\" needs calibration data"),
    (bert, {"dataset": [{"text": "good"}, {"text": "bad"}]}, ValueError, r"processor missing.*text.*pass processor="),
    (bert, {"dataset": TOKENS, "processor": 7}, TypeError, r"processor must be a tokenizer.*got int"),
    (bert, {"dataset": "imdb"}, TypeError, r"dataset must be .*got the str 'imdb': load it first"),
    (bert, {"dataset": 5}, TypeError, r"dataset must be .*got int"),
    (bert, {"dataset": TOKENS[0]}, TypeError, r"got a single dict: pass a list of samples"),
    (bert, {"dataset": TOKENS, "overrides": {"lm_hed": {}}}, ValueError, r"overrides: 'lm_hed' matches no module"),
    (
        bert,
        {"dataset": TOKENS, "modules_to_not_convert": ["clasifier"]},
        ValueError,
        r"modules_to_not_convert: 'clasifier' matches no module; module names look like .*classifier",
    ),
    (
        bert,
        {"dataset": TOKENS, "modules_to_not_convert": ["bert", "classifier"]},
        ValueError,
        r"nothing in BertForSequenceClassification can be quantized: .*listed in modules_to_not_convert",
    ),
    (
        bert,
        {"dataset": TOKENS, "strict": True, "modules_to_not_convert": ["classifier"]},
        ValueError,
        r"strict=True, but these would stay in float: classifier: listed",
    ),
    (
        bert,
        {"dataset": TOKENS, "correction": CatConfig(at="nowhere")},
        ValueError,
        r"CatConfig\(at='nowhere'\): no mod",
    ),
    (
        vit,
        {"solver": "rtn", "correction": None, "activations": "int8"},
        ValueError,
        r"a Conv2d have a calibrated range",
    ),
]


@pytest.mark.parametrize(
    ("build", "fields", "error", "words"), DATA, ids=lambda v: v[:30] if isinstance(v, str) else ""
)
def test_a_request_that_does_not_fit_the_model_leaves_it_alone(build, fields, error, words):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words):
        quantize(model, CatQuantConfig(batch_size=4, **fields))
    assert not quantized_modules(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [(fields, error, words) for build, fields, error, words in DATA if build is bert and "iter" not in str(fields)],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_from_pretrained_says_the_same(fields, error, words, folder):
    with pytest.raises(error, match=words):
        BertForSequenceClassification.from_pretrained(
            folder, quantization_config=CatQuantConfig(batch_size=4, **fields)
        )


def test_a_token_that_the_model_does_not_know_is_not_a_bare_traceback():
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)input_ids|cannot run on a batch"):
        quantize(bert(), CatQuantConfig(dataset=[{"input_ids": torch.tensor([1, 99])}] * 4))


def test_quantizing_twice_is_refused():
    model = bert()
    config = CatQuantConfig(solver="rtn", correction=None)
    quantize(model, config)
    with pytest.raises(ValueError, match="BertForSequenceClassification is already quantized: start from the float"):
        quantize(model, config)


def test_a_device_map_over_several_devices_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"needs the whole model on one device, got device_map over \['cpu', 'disk'\]"
    ):
        BertForSequenceClassification.from_pretrained(
            folder,
            quantization_config=CatQuantConfig(solver="rtn", correction=None),
            device_map={"bert": "cpu", "classifier": "disk"},
        )
