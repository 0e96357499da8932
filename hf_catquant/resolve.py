"""Where a checkpoint's entries belong in the model that is being loaded, and whether the two fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .entries import Entries
from .layers import layer_for
from .log import logger


def check_complete(model: PreTrainedModel, written: Mapping[str, Tensor], stored: Collection[str]) -> None:
    """Refuse a model of the stored class that has parameters the checkpoint does not have.

    Args:
        model: filled from the checkpoint.
        written: its parameters under every name that a save would give them.
        stored: names of the tensors in the checkpoint.

    Raises:
        ValueError: naming them.
    """
    if not is_stored_class(model):  # a head of its own is fresh, and transformers says so
        return
    there = {id(value) for name, value in written.items() if name in stored}
    missing = [name for name, value in written.items() if name not in stored and id(value) not in there]
    if missing:
        raise ValueError(
            f"the checkpoint has no tensor {', '.join(missing[:5])}, which this {type(model).__name__} needs: it was "
            "saved from a model of another size, or the config.json was changed after the save"
        )


def is_stored_class(model: PreTrainedModel) -> bool:
    """Whether ``model`` is of the very class that was saved."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or [])


def resolve_names(model: PreTrainedModel, modules: Entries) -> dict[str, str]:
    """Where each stored module is in this model: a base model and its task models differ by a prefix.

    Raises:
        ValueError: a module is not there although the model is of the very class that was saved.
    """
    names = _found(model, modules)
    missing = [name for name in modules if name not in names]
    if not is_stored_class(model):  # a head of another kind under the same name is a fresh one
        names = {k: v for k, v in names.items() if layer_for(model.get_submodule(v)) is not None}
    if not names or (missing and is_stored_class(model)):
        raise ValueError(
            f"the checkpoint quantizes {', '.join((missing or list(modules))[:5])}, "
            f"which {type(model).__name__} does not have: it is a checkpoint of another model"
        )
    resized = {stored for stored, name in names.items() if _is_resized_head(model, name, modules[stored])}
    for stored in resized:
        logger.warning(
            "%s: the checkpoint has %d outputs and the model another number: it loads as a fresh float layer, with "
            "ignore_mismatched_sizes=True",
            stored,
            modules[stored]["shape"][0],
        )
    return {stored: name for stored, name in names.items() if stored not in resized}


def resolve_corrections(
    model: PreTrainedModel, corrections: Entries, filled: Collection[str], fresh: Collection[str]
) -> dict[str, str]:
    """Where each stored correction goes in this model; those of parts that it does not have are left out.

    Args:
        model: the model being loaded.
        corrections: the stored ones.
        filled: stored names of the modules that are filled from the checkpoint.
        fresh: stored names of the modules that are not filled from the checkpoint: what they return is not corrected.

    Raises:
        ValueError: a module is not there although the model is of the very class that was saved, or a stored layer returns
            another number of features than its correction takes.
    """
    names = _found(model, corrections)
    missing = [name for name in corrections if name not in names]
    if missing and is_stored_class(model):
        raise ValueError(
            f"the checkpoint corrects {', '.join(missing)}, which {type(model).__name__} does not have: "
            "the config.json was changed after the save"
        )
    of_fresh = {stored for stored in names if any(f"{name}.".startswith(f"{stored}.") for name in fresh)}
    resized = {stored for stored, name in names.items() if _is_resized(model, name, corrections[stored]["width"])}
    for stored in sorted(resized & set(filled)):
        raise ValueError(
            f"the correction at {stored} takes {corrections[stored]['width']} features, but the layer that is stored there "
            "returns another number: the config.json was changed after the save"
        )
    of_fresh |= resized
    for stored in of_fresh:
        logger.warning("%s: its correction is left out, it belongs to the head that was stored", stored)
    return {stored: name for stored, name in names.items() if stored not in of_fresh}


def renamed(entries: Entries, names: Mapping[str, str]) -> Entries:
    """Stored entries under the names they have in this model; entries without one are not part of it.

    Raises:
        ValueError: a module shares the weight of one that is not part of this model.
    """
    found = {}
    for stored, name in names.items():
        entry = dict(entries[stored])
        owner = entry.get("tied_to")
        if owner is not None and owner not in names:
            raise ValueError(
                f"{stored} shares the weight of {owner}, which this model does not have: load the class that was saved"
            )
        if owner is not None:
            entry["tied_to"] = names[owner]
        found[name] = entry
    return found


def tied_elsewhere(model: PreTrainedModel, modules: Entries, stored: Collection[str]) -> Entries:
    """Entries of layers that share a packed weight by the ties of their class, which the class that was saved has not.

    A base model is saved without the head that holds the weight of its embedding in the model that generates.

    Args:
        model: being loaded, of float layers still.
        modules: entries of the checkpoint, under their names in ``model``.
        stored: names of the tensors in the checkpoint: a layer with a weight of its own there is not tied.

    Raises:
        ValueError: such a layer is none that can be packed.
    """
    found: Entries = {}
    for target, source in {} if is_stored_class(model) else model.all_tied_weights_keys.items():
        name, owner = target.removesuffix(".weight"), source.removesuffix(".weight")
        own = {target, target.removeprefix(f"{model.base_model_prefix}.")} & {*stored}
        if name == target or owner not in modules or name in modules or own:
            continue
        if layer_for(model.get_submodule(name)) is None:
            raise ValueError(
                f"{name} of {type(model).__name__} shares the weight of {owner}, which is packed, and cannot itself be: "
                f"load {', '.join(model.config.architectures or ['the class'])}, which was saved"
            )
        found[name] = {**modules[owner], "tied_to": modules[owner]["tied_to"] or owner}
    return found


def _found(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    present = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix
    found = {}
    for name in stored:
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in present:
                found[name] = candidate
                break
    return found


def _is_resized_head(model: PreTrainedModel, name: str, entry: dict[str, Any]) -> bool:
    """Whether this is a head with another number of classes: it stays float and fresh, where transformers allows that.

    Without ``ignore_mismatched_sizes=True`` the one-byte tensor under the weight's name makes transformers raise.
    """
    module = model.get_submodule(name)
    layer = layer_for(module)
    same_input = layer is not None and layer.matrix_shape(module)[1] == entry["shape"][1]
    return same_input and entry["tied_to"] is None and _is_resized(model, name, entry["shape"][0])


def _is_resized(model: PreTrainedModel, name: str, width: int) -> bool:
    """Whether the layer called ``name`` belongs to a head and returns another number of features than ``width``."""
    if name.startswith(f"{model.base_model_prefix}.") or model.base_model is model:
        return False
    module = model.get_submodule(name)
    layer = layer_for(module)
    return layer is not None and layer.matrix_shape(module)[0] != width
