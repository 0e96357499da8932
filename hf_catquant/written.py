"""What ``save_pretrained`` writes of a model: the tensors, under the names that it gives them, and fields of its config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from .as_built import as_built, check_as_built
from .correction import corrections
from .entries import ABSENT, CHANGED, check_absent
from .fields import field_checksums
from .offloaded import read
from .packed_model import quantized_modules
from .sentinels import sentinels_of


def tensors_to_save(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ``model``, with the one-byte ones that make other loaders fail.

    What waits on the disk is read: its checksum is needed before it is written.

    Args:
        model: any module that holds packed layers.
        given: float parameters and buffers that stand in for those of the model, which may have been trained elsewhere.

    Raises:
        ValueError: ``given`` is of another model.
    """
    own = model.state_dict()
    state = own if given is None else _instead(model, own, given)
    state = {name: read(model, name) if tensor.is_meta else tensor for name, tensor in state.items()}
    return {**state, **sentinels_of(model, state)}


def _instead(model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``own`` with the values that are ``given``, without those that are left out there because they are tied."""
    optional = {*(getattr(model, "_keys_to_ignore_on_save", None) or ())}
    optional |= set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in own if name not in given and name not in optional]
    unknown = [name for name in given if name not in own and name not in sentinels_of(model, own)]
    held = {**quantized_modules(model), **{f"{n}.correction": c for n, c in corrections(model).items()}}
    fixed = {f"{name}.{buffer}" for name, module in held.items() for buffer in module._buffers}
    other = [name for name, tensor in own.items() if name in given and given[name].shape != tensor.shape]
    other += [n for n in own if n in given and n in fixed and n not in other and not _same(model, n, own[n], given[n])]
    for names, what in (
        (missing, "lacks {}, without which no checkpoint loads"),
        (unknown, "has {}, which the model does not have"),
        (other, "and the model differ in the shape, or in the packed values, of {}"),
    ):
        if names:
            few = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise ValueError(
                f"state_dict must be one of this {type(model).__name__}, with other float values at most: it "
                f"{what.format(few)}; leave it out, or load it into the model that it is of and save that"
            )
    return {name: given[name] for name in own if name in given}


def _same(model: nn.Module, name: str, own: Tensor, given: Tensor) -> bool:
    if given is own or (given.is_meta and own.is_meta):
        return True
    first, second = (read(model, name) if tensor.is_meta else tensor for tensor in (own, given))
    return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())


def asked_of_save(model: PreTrainedModel) -> Mapping[str, Any]:
    """The arguments of the ``save_pretrained`` that has called the caller: transformers does not hand them on."""
    frame: Any = inspect.currentframe()
    caller = frame.f_back.f_back
    is_save = caller.f_code.co_name == "save_pretrained" and caller.f_locals.get("self") is model
    return caller.f_locals if is_save else {}


def fields_as_written(model: PreTrainedModel, config: PretrainedConfig | None = None) -> dict[str, int]:
    """Checksums of the config as save_pretrained writes it: it sets two fields only after it has asked for the tensors."""
    name = type(model).__name__.removeprefix("FSDP")
    written = {"dtype": str(model.dtype).removeprefix("torch."), "architectures": [name]}
    return field_checksums((config or model.config).to_dict() | written)


def say_absent(provenance: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``provenance`` with the modules that the class of ``model`` builds from its config and that are None in ``model``.

    A model can be built with less than its config says: the ``RobertaModel`` of a ``RobertaForSequenceClassification`` has
    no pooler, and a load, which knows the class and the config alone, builds one.

    Raises:
        ValueError: a module that the class builds is not None in ``model`` but gone, as layers that were cut off, or
            another one, as :func:`hf_catquant.as_built.check_as_built` says.
    """
    known = {name: value for name, value in provenance.items() if name != ABSENT}
    usual = as_built(model)
    if usual is None:
        return known
    present, absent = dict(model.named_modules(remove_duplicate=False)), []
    for name in _missing(model, usual, present):
        parent, _, leaf = name.rpartition(".")
        if getattr(present[parent], leaf, model) is not None:
            raise ValueError(
                f"{type(model).__name__} has no {name}, which its class builds from model.config, and a checkpoint of it "
                "would not load: set what says so there (num_hidden_layers, lists by layer) to what the model has"
            )
        absent.append(name)
    check_as_built(model, usual)
    return known | ({ABSENT: absent} if absent else {})


def _missing(model: nn.Module, usual: nn.Module, present: Mapping[str, nn.Module]) -> list[str]:
    """Modules with parameters that ``usual`` has beside those that are ``present``."""
    packed = tuple(f"{name}." for name in quantized_modules(model))
    names = [
        name for name, part in usual.named_modules() if name not in present and any(True for _ in part.parameters())
    ]
    return [name for name in names if name.rpartition(".")[0] in present and not f"{name}.".startswith(packed)]


def leave_out(model: PreTrainedModel, provenance: Mapping[str, Any], stored: Collection[str]) -> None:
    """Take out of ``model``, of the class that was saved, what :func:`say_absent` found that the saved one had not.

    Raises:
        ValueError: as :func:`hf_catquant.entries.check_absent`, or such a module has no parameters, which no save says.
    """
    check_absent(provenance, stored)
    present = dict(model.named_modules())
    for name in (name for name in provenance.get(ABSENT, []) if name in present):
        if not any(True for _ in present[name].parameters()):
            raise ValueError(
                f"quantization_config: provenance.{ABSENT} must be modules with parameters, got {name!r}: {CHANGED}"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(present[parent], leaf, None)


def as_written(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that ``save_pretrained`` gives them: ties once, original names of the Hub."""
    ignored = model._keys_to_ignore_on_save or ()
    state = {k: v for k, v in state.items() if k not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def parameters_as_written(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters that every checkpoint of ``model`` holds, shared ones under all their names."""
    optional = [*(model._keys_to_ignore_on_save or ()), *(model._keys_to_ignore_on_load_missing or ())]
    state: dict[str, Tensor] = {
        name: value
        for name, value in model.named_parameters(remove_duplicate=False)
        if name not in model.all_tied_weights_keys and not any(re.search(key, name) for key in optional)
    }
    return revert_weight_conversion(model, state)
