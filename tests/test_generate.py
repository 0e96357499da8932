"""Samples that a language model writes itself."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from helpers import global_rng_untouched
from hf_catquant import CatQuantConfig, generate_samples, quantize


def test_texts_are_sampled_from_the_model_and_end_at_their_end():
    model = tiny_models.build("llama")
    model.train()
    with global_rng_untouched():
        rows = generate_samples(model, 40, length=24, batch_size=16, seed=1)
    assert model.training
    assert len(rows) == 40
    ended = 0
    for row in rows:
        ids = row["input_ids"]
        assert ids.dtype == torch.int64
        assert ids[0] == model.config.bos_token_id
        assert 2 <= len(ids) <= 24
        assert row["attention_mask"].shape == ids.shape
        stops = (ids[1:] == model.config.eos_token_id).nonzero().flatten() + 1
        assert not len(stops) or int(stops[0]) == len(ids) - 1
        ended += len(stops) > 0
        assert len(ids) == 24 or len(stops)
    assert 0 < ended < 40  # an untrained model ends one text in a hundred tokens
    assert len({tuple(row["input_ids"].tolist()) for row in rows}) == 40


def test_the_seed_decides():
    model = tiny_models.build("gpt2")
    first, again, other = (generate_samples(model, 3, length=8, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))


def test_they_calibrate():
    model = tiny_models.build("llama")
    rows = generate_samples(model, 20, length=12)
    quantize(model, CatQuantConfig(group_size=16, dataset=rows, num_samples=20))
    assert model.config.quantization_config.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert", "does not write text from nothing"), ("t5", "does not write text"), ("whisper", "does not write text")],
)
def test_models_that_write_nothing(name, message):
    with pytest.raises(ValueError, match=message):
        generate_samples(tiny_models.build(name), 2)


def test_bad_numbers():
    model = tiny_models.build("llama")
    for fields in ({"num_samples": 0}, {"num_samples": 1, "length": 1}, {"num_samples": 2, "batch_size": True}):
        with pytest.raises(ValueError, match="must be an integer of at least"):
            generate_samples(model, **fields)
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*32 - 1, got -1"):
        generate_samples(model, 1, seed=-1)
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(ValueError, match="has no start token"):
        generate_samples(model, 2)
