"""The fields of a model's config.json: whether they are those that were saved, and none asks for more than there is.

A checksum of the tensors does not see that ``hidden_act`` changed from "gelu" to "relu": the model would load and compute
something else. So a CRC-32 of every field that can change an output is stored, and what differs is named. It is a warning,
because ``from_pretrained(folder, rope_scaling=...)`` changes a field on purpose.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

# Names, switches of what is returned, and what transformers writes anew: they change nothing that a model computes.
_FREE = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "auto_map",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# Classes that a model without a head may say it has, and that one with a float head may have (ImageNet has 21,841).
_FEW_LABELS, _MANY_LABELS = 1 << 10, 1 << 17
# What the numbers mean to a user: the class that a pipeline builds, the dtype it computes in, the names of its answers. They
# are compared for the model as a whole; the config of a part has them too, and nothing reads them there.
_OF_THE_WHOLE = {"architectures", "dtype", "id2label", "label2id"}
# A load may be asked for another dtype or class, and the file is none the worse: only ``verify`` compares them.
CHOSEN_AT_LOAD = frozenset({"architectures", "dtype"})
# How many modules a model builds follows from fields like num_hidden_layers, n_layer and depths.
_DEPTH = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)$")


def field_checksums(config: Mapping[str, Any]) -> dict[str, int]:
    """CRC-32 of every field of a config that can change what the model computes or what its answers mean, by name."""
    found = {**dict(_kept(config)), **{name: config[name] for name in _OF_THE_WHOLE & config.keys()}}
    return {name: zlib.crc32(_text(value).encode()) for name, value in sorted(found.items())}


def changed_fields(config: Mapping[str, Any], stored: Any) -> list[str]:
    """Names of the fields that are not those of ``stored``, which :func:`field_checksums` made when the model was saved.

    A field that this version of transformers does not have, or that the one which saved did not have, is not compared;
    :func:`unknown_fields` are the latter.

    Raises:
        ValueError: ``stored`` is no such table.
    """
    check_fields(stored)
    return sorted(name for name, value in field_checksums(config).items() if stored.get(name, value) != value)


def check_fields(stored: Any) -> None:
    """Refuse what is no table of :func:`field_checksums`.

    Raises:
        ValueError: saying what was found.
    """
    if not isinstance(stored, dict) or not all(isinstance(value, int) for value in stored.values()):
        raise ValueError(f"quantization_config: provenance.fields must be {{field: CRC-32}}, got {stored!r:.200}")


def unknown_fields(config: Mapping[str, Any], written: Mapping[str, Any], stored: Mapping[str, int]) -> list[str]:
    """Names of the fields in ``written`` that a model reads, as ``config``, and ``stored`` has no checksum of.

    A save writes a checksum of every field that it writes, and of those that it leaves out because they are as the class
    has them: a field without one was added later, or lost its checksum. Fields that a newer transformers has beyond the one
    that saved are in no file, and as its class has them, so they are none of these.

    Args:
        config: of the model, as transformers read it.
        written: what the file holds or, where the file is not at hand, the fields that are not as their class has them.
        stored: what :func:`field_checksums` gave when the model was saved.
    """
    return sorted((field_checksums(config).keys() & written.keys()) - stored.keys())


def check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a config that asks for more layers than the checkpoint has tensors, before any is built.

    Args:
        config: of the model, as a dict; configs inside it are looked at too.
        tensors: how many the checkpoint holds.

    Raises:
        ValueError: naming the field and its value.
    """
    for name, value in config.items():
        if _is_config(value):
            check_depth(value, tensors)
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in numbers if _DEPTH.search(str(name)) else []:
            if isinstance(number, int) and number > tensors:
                raise ValueError(
                    f"config.json: {name} must be at most the {tensors} tensors of the checkpoint, got {number}: "
                    "the config.json was changed or damaged after the save, fetch it again"
                )


def check_labels(config: Mapping[str, Any], rows: int) -> None:
    """Refuse a config.json that asks for more classes than any tensor has rows: transformers writes a table of them.

    Args:
        config: of the model, as it is in the file; configs inside it are looked at too. What transformers wrote has the
            table itself and no number.
        rows: of the tensor that has most.

    Raises:
        ValueError: naming the value.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_labels(value, rows)
        elif name == "num_labels" and isinstance(value, int | float) and value > max(_FEW_LABELS, rows):
            raise ValueError(_too_many(value, max(_FEW_LABELS, rows)))


def check_tables(config: Any, rows: int) -> None:
    """Refuse a config that has a table of more classes than a model has, before one is built.

    Args:
        config: of the model, as transformers read it; configs inside it are looked at too.
        rows: of the largest quantized layer, which may be the head. It may be in float as well, so many are let in anyway.

    Raises:
        ValueError: naming the number of classes.
    """
    table = getattr(config, "id2label", None) or {}
    if len(table) > max(_MANY_LABELS, rows):
        raise ValueError(_too_many(len(table), max(_MANY_LABELS, rows)))
    for value in vars(config).values():
        if hasattr(value, "id2label"):
            check_tables(value, rows)


def _too_many(found: float, most: int) -> str:
    return (
        f"config.json: num_labels must be at most {most} for this checkpoint, got {found}: the config.json was changed or "
        "damaged after the save, fetch it again"
    )


def _kept(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, _stripped(value)) for name, value in sorted(config.items()) if name not in _FREE | _OF_THE_WHOLE]


def _stripped(value: Any) -> Any:
    """A config inside a config without the fields that are free there too."""
    return dict(_kept(value)) if _is_config(value) else value


def _text(value: Any) -> str:
    """JSON of a value as a file would give it back: the numbers that name classes are words there, and sorted as such."""
    return json.dumps(json.loads(json.dumps(value, default=str)), sort_keys=True)


def _is_config(value: Any) -> bool:
    """Whether this is the config of a part of the model: a table of classes may have one that is called "stage"."""
    return isinstance(value, Mapping) and "model_type" in value
