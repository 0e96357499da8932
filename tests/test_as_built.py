"""No class of transformers is refused as it builds itself: what a save looks at before it writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

from hf_catquant.as_built import as_built, check_as_built

LAYERS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers")


def models() -> Iterator[nn.Module]:
    """A model, on the meta device and with few layers, of every class that an Auto class knows and that a config builds."""
    tables = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]
    found = {}
    for table in tables:
        for kind, names in getattr(modeling_auto, table).items():
            found |= dict.fromkeys(names if isinstance(names, (tuple, list)) else [names], kind)
    for name, kind in found.items():
        try:
            config = configuration_auto.CONFIG_MAPPING[kind]()
            for field in LAYERS if not getattr(config, "layer_types", None) else ():
                if isinstance(getattr(config, field, None), int):
                    setattr(config, field, min(2, getattr(config, field)))
            with torch.device("meta"):
                yield getattr(tf, name)(config)
        except Exception:  # it wants more than a config, or a library that is not there
            continue


@pytest.mark.slow
def test_no_class_is_refused_as_it_builds_itself():
    count = 0
    for model in models():
        usual = as_built(model)
        if usual is not None:
            check_as_built(model, usual)
            count += 1
    assert count > 1000
