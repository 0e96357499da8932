"""What tests/quantization/sinq/test_sinq.py of transformers asks, asked of this quantizer."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.model import select
from peer_bnb import llama

FREE = {"solver": "rtn", "correction": None}
EXTRAS = {
    "activations": "int8",
    "seed": 3,
    "num_samples": 17,
    "batch_size": 5,
    "strict": True,
    "edge_weights": None,
    "overrides": {"lm_head": {"weights": "int8"}},
    "modules_to_not_convert": ["lm_head"],
}


@pytest.mark.parametrize("name", EXTRAS)
def test_every_extra_field_survives_a_dict_and_a_copy(name):
    config = CatQuantConfig(**{name: EXTRAS[name]})
    for other in (CatQuantConfig.from_dict(config.to_dict()), copy.deepcopy(config)):
        assert getattr(other, name) == EXTRAS[name]
        assert other == config
    assert config != CatQuantConfig()


def test_unknown_extras_are_refused_and_not_swallowed():
    with pytest.raises(ValueError, match="CatQuantConfig has no field 'tiling_mode'"):
        CatQuantConfig.from_dict({**CatQuantConfig().to_dict(), "tiling_mode": "1D"})


def test_a_copy_passes_the_data_on_and_a_pickle_leaves_it():
    data = (row for row in [{"input_ids": torch.arange(4)}])
    config = CatQuantConfig(dataset=data)
    assert copy.deepcopy(config).dataset is data
    assert config.__getstate__()["dataset"] is None


@pytest.mark.parametrize(
    ("listed", "skipped"),
    [
        (None, set()),
        ([], set()),
        (["lm_head"], {"lm_head"}),
        (["model.layers.1.mlp"], {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        (["o_proj"], {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}),
    ],
)
def test_what_is_skipped_is_what_was_listed(listed, skipped):
    selection = select(llama(), CatQuantConfig(modules_to_not_convert=listed, **FREE))
    assert {name for name, reason in selection.skipped.items() if "modules_to_not_convert" in reason} == skipped
    assert not skipped & {site.name for site in selection.sites}


def test_the_report_says_why_something_was_skipped():
    model = llama()
    quantize(model, CatQuantConfig(modules_to_not_convert=["lm_head"], **FREE))
    assert report(model).skipped["lm_head"] == "listed in modules_to_not_convert"
    assert "not quantized: lm_head: listed in modules_to_not_convert" in str(report(model))
