"""Whether a checkpoint has every tensor that the model's class reads, and the class reads every tensor that it has.

What is missing, or has another shape, transformers fills with random numbers and a warning; what is left over, a head
that another class would read, it drops with one. Quantized or measured, neither would be seen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

from .checkpoint import variant_option
from .log import logger

# Read in training only: speech models of the Hub come with it or without.
_TRAINING = re.compile(r"(^|\.)masked_spec_embed$")
# Buffers that checkpoints of older versions hold, and the classes of today compute.
_COMPUTED = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|num_batches_tracked)$")
_SHOWN = 5
_LEFT = "_catquant_left_over"


def load_whole(auto: Any, name: str, **options: Any) -> PreTrainedModel:
    """The float model called ``name`` as ``auto.from_pretrained`` loads it; of a folder, the only variant that is there.

    Raises:
        ValueError: the checkpoint lacks tensors, has them in another shape, or has some for another class.
    """
    options |= variant_option(name)
    model, found = auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    check_whole(model, name, found, auto)
    return model


def check_whole(model: PreTrainedModel, name: str, found: Mapping[str, Collection[Any]], auto: Any = None) -> None:
    """Refuse a model that was not filled from its checkpoint alone, or is not all of it.

    Tensors that the class does not read are refused if config.json does not name the class. If it does, they are no part
    of the model that it describes: the log warns, and the report has a note.

    Args:
        model: as it was loaded.
        name: folder or Hub id of the checkpoint.
        found: the loading info of ``from_pretrained``. Tied weights and buffers that are not stored are no part of it.
        auto: what loaded it, the class itself or an Auto class.

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
    # What a class declares to be ignored is no longer among them.
    rest = sorted(key for key in found["unexpected_keys"] if not _COMPUTED.search(key))
    if not rest:
        return
    if auto is not type(model) and kind not in (model.config.architectures or ()):
        raise ValueError(
            f"{name} has tensors that {kind}, which config.json does not name, does not read, and would lose: "
            f"{_first(rest)}: {way_out}"
        )
    note = f"{kind}, the class that config.json names, does not read {len(rest)} tensors of the files: {_first(rest)}"
    logger.warning("%s: %s", name, note)
    model.__dict__[_LEFT] = note


def left_over(model: Any) -> list[str]:
    """The note for the report, if tensors of its checkpoint were left over when ``model`` was loaded."""
    return [model.__dict__[_LEFT]] if _LEFT in model.__dict__ else []


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
