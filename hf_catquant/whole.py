"""Whether a checkpoint has every tensor that the model's class reads.

What is missing, or has another shape, transformers fills with random numbers and a warning. Quantized or measured, these
would look like any others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

# Read in training only: speech models of the Hub come with it or without.
_TRAINING = re.compile(r"(^|\.)masked_spec_embed$")
_SHOWN = 5


def load_whole(auto: Any, name: str, **options: Any) -> PreTrainedModel:
    """The float model called ``name`` as ``auto.from_pretrained`` loads it.

    Raises:
        ValueError: the checkpoint lacks tensors, or has them in another shape.
    """
    model, found = auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    check_whole(model, name, found)
    return model


def check_whole(model: PreTrainedModel, name: str, found: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model that was not filled from its checkpoint alone.

    Args:
        model: as it was loaded.
        name: folder or Hub id of the checkpoint.
        found: the loading info of ``from_pretrained``. Tied weights and buffers that are not stored are no part of it.

    Raises:
        ValueError: naming the tensors.
    """
    kind = type(model).__name__
    way_out = (
        f"fetch or save the model again; if its class is not {kind}, name that in architectures of its config.json, or "
        "load it with that class in Python and pass it to hf_catquant.quantize"
    )
    missing = sorted(key for key in found["missing_keys"] if not _TRAINING.search(key))
    if missing:
        raise ValueError(
            f"{name} has no tensor {_first(missing)}, which {kind} reads and would get as random numbers: {way_out}"
        )
    wrong = sorted(f"{key} ({list(there)} instead of {list(own)})" for key, there, own in found["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{name} has tensors of other shapes than {kind} reads with this config.json: {_first(wrong)}: {way_out}"
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
