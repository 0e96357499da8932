"""Models that were not quantized as a whole, but hold packed layers: a part of one that was, and a model around one.

Each packed layer knows the config of the model that it was quantized in, and its name there. That is enough to say what a
checkpoint of any module around it is.
"""

from __future__ import annotations

import copy
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .config import CatQuantConfig
from .layers import QuantizedModule
from .packed_model import quantized_modules
from .report import stored_bytes
from .saving import GONE, MERGED, REPLACED, check_entries, entries_now, merged_adapters, write_down
from .ties import adopt_orphans
from .written import say_absent

NOTE = "saved as a part of the model that was quantized, or in another one: data, notes and gains are of that model"
_SEVERAL = "its parts were quantized by {} requests: this one and the calibration data are of that of most layers"


def origins(model: nn.Module) -> list[CatQuantConfig]:
    """The configs that the packed layers of ``model`` were quantized with, that of most layers first."""
    found = [layer.origin for layer in quantized_modules(model).values() if layer.origin is not None]
    counts = Counter(map(id, found))
    return sorted({id(each): each for each in found}.values(), key=lambda each: -counts[id(each)])


def part_config(
    model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, int] | None = None
) -> CatQuantConfig:
    """What a checkpoint of ``model`` says; see :func:`hf_catquant.saving.update_config` for the arguments.

    Raises:
        ValueError: a layer does not know how it was quantized, or the model cannot be saved.
    """
    strange = [name for name, layer in quantized_modules(model).items() if layer.origin is None]
    if strange:
        raise ValueError(
            f"{type(model).__name__} is not whole: {strange[0]} is packed, but quantizing was not finished there; start "
            "again from the float model"
        )
    first, *others = origins(model)
    config = copy.deepcopy(first)
    config.modules = None  # in the order of the model
    modules = entries_now(config, model)
    check_entries(modules, model)
    provenance = say_absent(first.provenance, model)
    tables = [_tables(each, model) for each in (first, *others)]
    for key in dict.fromkeys(key for table in tables for key in table):
        found = [table[key] for table in tables if key in table]
        is_list = isinstance(found[0], list)
        provenance[key] = [name for each in found for name in each] if is_list else dict(ChainMap(*found))
    notes = [note for each in (first, *others) for note in each.provenance.get("notes") or []]
    different = [each for each in others if each != first]  # layers that were copied one by one have copies of one
    notes += [_SEVERAL.format(1 + len(different))] if different else []
    provenance["notes"] = list(dict.fromkeys([*notes, NOTE]))
    provenance["bytes_before"] = _float_bytes(model)
    write_down(config, model, modules, provenance, tensors, fields)
    return config


@contextmanager
def adopted(model: nn.Module) -> Iterator[None]:
    """Layers that share a weight of a layer outside of ``model`` hold it for themselves as long as the ``with`` lasts."""
    layers = list(quantized_modules(model).values())
    outside = {layer: layer.owner for layer in layers if layer.owner is not None and layer.owner not in layers}
    adopt_orphans(model)
    try:
        yield
    finally:
        for layer, owner in outside.items():
            layer.stop_sharing()
            layer.share(owner)


def _tables(origin: CatQuantConfig, model: nn.Module) -> dict[str, Any]:
    """What the provenance of ``origin`` says of modules that are in ``model``, under their names there."""
    known, entries = origin.provenance, origin.modules or {}
    layers = {name: layer for name, layer in quantized_modules(model).items() if layer.origin is origin}
    old, new = _prefixes(layers)

    def moved(table: Mapping[str, Any]) -> dict[str, Any]:
        inside = {name: value for name, value in table.items() if f"{name}.".startswith(old)}
        return {f"{new}{name[len(old) :]}".removesuffix("."): value for name, value in inside.items()}

    found: dict[str, Any] = {key: moved(known.get(key) or {}) for key in ("skipped", "fits", "learned")}
    for key in (REPLACED, GONE):
        names = list(moved(dict.fromkeys(known.get(key) or [])))
        found |= {key: names} if names or key in known else {}
    before = merged_adapters(known)
    sites = {name: str(layer.site) for name, layer in layers.items()}
    ranks = {
        name: before.get(site, 0) + layers[name].scheme.low_rank - entries[site]["low_rank"]
        for name, site in sites.items()
        if site in entries
    }
    merged = {name: rank for name, rank in ranks.items() if rank > 0}
    found |= {MERGED: merged} if merged or MERGED in known else {}
    errors = known.get("errors") or {}
    found["errors"] = {name: errors[site] for name, site in sites.items() if site in errors and name not in merged}
    return found


def _prefixes(layers: Mapping[str, QuantizedModule]) -> tuple[str, str]:
    """How the names of ``layers`` begin where they were quantized and now, where most of them differ no further on."""
    found: Counter[tuple[str, str]] = Counter()
    for name, layer in layers.items():
        before, now = str(layer.site).split("."), name.split(".")
        while before and now and before[-1] == now[-1]:
            before.pop()
            now.pop()
        found["".join(f"{part}." for part in before), "".join(f"{part}." for part in now)] += 1
    return found.most_common(1)[0][0]


def _float_bytes(model: nn.Module) -> int:
    """Bytes that the tensors of ``model`` would take with its weights in float."""
    layers = [layer for layer in quantized_modules(model).values() if layer.owner is None]
    packed = sum(tensor.nbytes for layer in layers for tensor in layer.packed_tensors())
    return stored_bytes(model) - packed + sum(layer.rows_ * layer.columns * layer.dtype.itemsize for layer in layers)
