"""What is checked between a model that is being filled and its checkpoint: room, fields of the config, filled buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .correction import corrections
from .entries import is_provenance_saved
from .fields import CHOSEN_AT_LOAD, changed_fields, unknown_fields
from .integrity import checksum
from .layers.state import SHARED
from .log import logger
from .packed_model import quantized_modules

OF_A_HEAD = ("id2label", "label2id", "problem_type")  # fields that say nothing of the layers below it


def check_room(model: nn.Module, size: int) -> None:
    """Refuse entries that ask for more memory than the files hold, before any of it is taken.

    Args:
        model: prepared and empty, on the meta device.
        size: of all files, bytes.

    Raises:
        ValueError: naming both sizes.
    """
    held = (*quantized_modules(model).values(), *corrections(model).values())
    wanted = sum(
        buffer.nbytes
        for module in held
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )
    if wanted > size:
        raise ValueError(
            f"quantization_config: modules and corrections describe {wanted:,} bytes, but the files of the checkpoint "
            f"have {size:,}: it is incomplete, or its config.json was changed"
        )


def warn_of_changes(
    model: PreTrainedModel, provenance: dict[str, Any], read: dict[str, Any] | None, is_stored_class: bool
) -> None:
    """Say which fields of the model's config are not those that were saved: they can change what it computes.

    Args:
        model: as it is built.
        read: its config as it was read, if it is known: some classes change fields while they are built.
        is_stored_class: whether the model is of the class that was saved. Another one has a head of its own.
        provenance: of its checkpoint; its ``fields`` are the checksums of what was saved. Without them nothing can be told
            of any, which is said.

    Raises:
        ValueError: ``fields`` is no table of checksums.
    """
    fields = provenance.get("fields")
    if fields is None or fields == {}:
        logger.warning(
            "provenance of config.json has no fields: whether other fields were changed after the save cannot be told; "
            "fetch the file again, or save the model again if you trust it"
        )
        return
    config = model.config.to_dict() if read is None else read
    chosen = CHOSEN_AT_LOAD if is_stored_class else (*CHOSEN_AT_LOAD, *OF_A_HEAD)
    changed = [name for name in changed_fields(config, fields) if name not in chosen]
    if changed:
        logger.warning(
            "%s of config.json are not what was saved: unless you changed them, the file is damaged, and the model does "
            "not compute what was saved",
            ", ".join(changed),
        )
    # The config of a part of the model has fields that the whole has not: that it is another one was said above.
    unknown = [] if "model_type" in changed else unknown_fields(config, _chosen(model.config, config), fields)
    unknown = [name for name in unknown if name not in chosen]
    if unknown:
        logger.warning(
            "%s of config.json have no checksum, which every save writes: unless you added them, the file was changed or "
            "damaged after the save",
            ", ".join(unknown),
        )
    elif not is_provenance_saved(provenance):
        logger.warning(
            "provenance of config.json is not what was saved: whether its other fields were changed cannot be told; fetch "
            "the file again, or save the model again if you trust it"
        )


def _chosen(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The ``fields`` of a config that are not as its class has them, none if the class cannot be built without words.

    A field that a newer transformers has beyond the one that saved is as the class has it, and no change.
    """
    try:
        usual = type(config)().to_dict()
    except Exception:  # of the model's own config class, which may want anything
        return {}
    return {name: value for name, value in fields.items() if name not in usual or usual[name] != value}


def check_biases(model: nn.Module, names: Mapping[str, str], checksums: Mapping[str, int]) -> None:
    """Refuse a checkpoint with a bias that the model, prepared, would not read: without it it computes something else.

    Args:
        model: prepared.
        names: of its packed layers, by their name in the checkpoint.
        checksums: of the tensors that the checkpoint has.

    Raises:
        ValueError: naming the bias.
    """
    layers = quantized_modules(model)
    for stored, name in names.items():
        if f"{stored}.bias" in checksums and name in layers and layers[name].bias is None:
            raise ValueError(
                f"the checkpoint has {stored}.bias, and {type(model).__name__} builds {name} without a bias: it was saved "
                "from a model that was changed, or the config.json was changed after the save; build that model yourself, "
                "or save it with hf_catquant.plain.save_quantized"
            )


def check_loaded(name: str, module: nn.Module) -> None:
    """Refuse buffers that no file filled.

    Raises:
        ValueError: naming the tensor.
    """
    for buffer_name, buffer in module.named_buffers(recurse=False):
        if buffer_name in module._non_persistent_buffers_set or hasattr(module, "_hf_hook"):
            continue
        if not getattr(buffer, "_is_hf_initialized", False):
            raise ValueError(f"the checkpoint has no tensor {name}.{buffer_name}: it is incomplete")


def check_given(tensors: Mapping[str, Tensor], checksums: Mapping[str, int]) -> None:
    """Refuse packed weights and corrections that came in a ``state_dict=`` and are not those of the config.

    Float parameters may have been trained since, and are not compared.

    Args:
        tensors: of the model that was filled, under the names that a file has.
        checksums: of the config.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in tensors.items():
        fixed = name.rpartition(".")[2] in SHARED or ".correction." in name
        if fixed and name in checksums and not tensor.is_meta and checksum(tensor) != checksums[name]:
            raise ValueError(
                f"{name} of the state_dict is not the tensor that the config was saved with: pass the config of the model "
                "that the state_dict is of, as its save_pretrained wrote it"
            )


def stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether the float layer is loaded in float32 although the model is in ``dtype`` (T5's ``wo``)."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept)
