"""What a checkpoint says of a model at the moment it is saved, of transformers or not: also of what was done to it since it
was quantized, adapters that were merged, layers that were replaced by float ones or taken out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .config import CatQuantConfig
from .correction import corrections
from .correction_file import entry_of
from .entries import Entries, entries_checksum, module_entry, seal
from .integrity import checksums
from .layers import QuantizedModule
from .log import logger
from .modules import adapted
from .packed_model import quantized_modules

MERGED = "merged_adapters"  # of a provenance: rank by module
REPLACED, GONE = "replaced_layers", "removed_layers"  # of a provenance: names of layers that were quantized

_STRANGE = (
    "{} of its layers ({} ...) were quantized in another model: calibration data, notes and gains are not of them"
)


def update_config(
    config: CatQuantConfig, model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, int] | None = None
) -> None:
    """Have ``config`` say what ``model`` is now, in place: its layers, corrections, checksums, and what was done to it.

    Args:
        config: what quantizing or loading left on the model.
        tensors: what the file will hold, under the names that it will have.
        fields: checksums of the fields of the model's own config, where it has one.
    """
    modules = entries_now(config, model)
    check_entries(modules, model)
    _warn_of_corrections(config, model)
    write_down(config, model, modules, provenance_now(config, model), tensors, fields)


def write_down(
    config: CatQuantConfig,
    model: nn.Module,
    modules: Entries,
    provenance: dict[str, Any],
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, int] | None,
) -> None:
    """Put all that a checkpoint says into ``config``, its checksums last."""
    config.provenance = provenance | ({} if fields is None else {"fields": dict(fields)})
    config.modules = modules
    # What sits on the model now: corrections can be fitted, loaded and taken off after quantizing.
    config.corrections = {name: entry_of(correction) for name, correction in corrections(model).items()}
    config.checksums = checksums(dict(tensors))
    config.entries_checksum = entries_checksum(modules, config.corrections, config.checksums)
    config.provenance = seal(config.to_dict())


def entries_now(config: CatQuantConfig, model: nn.Module) -> Entries:
    """The entries of the layers that are packed in ``model`` now, those that ``config`` has, too, in its order first."""
    layers = quantized_modules(model)
    names: dict[nn.Module | None, str] = {layer: name for name, layer in layers.items()}
    made = {n: module_entry(m.scheme, (m.rows_, m.columns), names.get(m.owner)) for n, m in layers.items()}
    return {name: made[name] for name in (*(name for name in config.modules or {} if name in made), *made)}


def check_merged(model: nn.Module) -> None:
    """Refuse to save a model with adapters.

    Raises:
        ValueError: naming a layer that has one, and the way out.
    """
    wrapped = adapted(model)
    if wrapped:
        raise ValueError(
            f"adapters are on {len(wrapped)} of its layers ({wrapped[0]} ...), and a checkpoint of "
            "the model with them could not be loaded: save them with save_pretrained of the PeftModel, or merge them with "
            "merge_and_unload and save what it returns"
        )


def check_entries(modules: Entries, model: nn.Module) -> None:
    """Refuse to save a model with adapters, with no packed layer, or with one that could not be loaded.

    Raises:
        ValueError: naming it and the way out.
    """
    check_merged(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer any more: call model.dequantize(), which takes the quantization "
            "off its config, and save it as a float model"
        )
    for name, layer in quantized_modules(model).items():
        try:
            layer.check_values()
        except ValueError as error:
            raise ValueError(f"{name}: {error}: a checkpoint of {type(model).__name__} could not be loaded") from error


def _warn_of_corrections(config: CatQuantConfig, model: nn.Module) -> None:
    """Say which corrections were fitted with a layer that is no longer in the module that they sit on."""
    replaced, _ = lost_layers(config, model)
    for name in corrections(model) if replaced else ():
        inside = [layer for layer in replaced if layer.startswith(f"{name}." if name else "")]
        if inside:
            logger.warning(
                "the correction at %s was fitted with %s as it was quantized, and goes on correcting what the float layer "
                "in its place returns: take it off with hf_catquant.correction.detach, or fit it again with fit_correction",
                name or type(model).__name__,
                inside[0],
            )


def lost_layers(config: CatQuantConfig, model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of ``config``'s layers that are no longer packed: those with a float module in their place, and the others.

    Of a part of a model nothing can be told of the rest: it is no loss.
    """
    layers = quantized_modules(model)
    strange = from_elsewhere(config, layers)
    held = {name if name in strange else layer.site or name for name, layer in layers.items()}
    lost = [name for name in config.modules or {} if name not in held]
    if not lost or any(layer.site and layer.site.endswith(f".{name}") for name, layer in layers.items()):
        return [], []
    present = {name for name, _ in model.named_modules()}
    packed = {name[:end] for name in layers for end in _ends(name)}  # and the modules around them
    replaced = [name for name in lost if name in present and name not in packed]
    return replaced, [name for name in lost if name not in replaced]


def from_elsewhere(config: CatQuantConfig, layers: Mapping[str, QuantizedModule]) -> list[str]:
    """Names of those of ``layers`` that were quantized with another config, in another model."""
    origins = {id(layer.origin): layer.origin for layer in layers.values() if layer.origin is not None}
    others = {key for key, origin in origins.items() if origin is not config and origin != config}  # or a copy of it
    return [name for name, layer in layers.items() if id(layer.origin) in others]


def _ends(name: str) -> list[int]:
    """Where the names of the modules around ``name`` end in it, and it itself."""
    return [*(at for at, letter in enumerate(name) if letter == "."), len(name)]


def provenance_now(config: CatQuantConfig, model: nn.Module) -> dict[str, Any]:
    """The provenance of ``config`` with what was done to ``model`` since: adapters that were merged, without errors of those
    layers, and layers that are float now or not there, without what was known of them. Of layers that came from another
    quantized model it says what was known there.

    Raises:
        ValueError: the provenance has a table of merged adapters that no save wrote.
    """
    known, layers = config.provenance, quantized_modules(model)
    merged, errors = {}, {}
    for name, layer in layers.items():
        of, site = layer.origin or config, layer.site or name
        entry = (of.modules or {}).get(site)
        rank = merged_adapters(of.provenance).get(site, 0)
        rank += 0 if entry is None else layer.scheme.low_rank - entry["low_rank"]
        if rank > 0:
            merged[name] = rank
        elif site in of.provenance.get("errors", {}):
            errors[name] = of.provenance["errors"][site]
    replaced, gone = lost_layers(config, model)
    new = dict(known)
    if merged or MERGED in known:
        new[MERGED] = merged
    if errors != known.get("errors", {}):
        new["errors"] = errors
    strange = from_elsewhere(config, layers)
    if strange:
        notes = [*(known.get("notes") or []), _STRANGE.format(len(strange), strange[0])]
        new["notes"] = list(dict.fromkeys(notes))
    return _without(new, model, replaced, gone) if replaced or gone else new


def _without(known: dict[str, Any], model: nn.Module, replaced: list[str], gone: list[str]) -> dict[str, Any]:
    """The provenance ``known`` of a model of which layers were ``replaced`` and others are ``gone``."""
    named = (*model.named_modules(), *model.named_parameters(remove_duplicate=False))
    kinds = {name: type(value).__name__ for name, value in named}
    skipped = {name: reason for name, reason in known.get("skipped", {}).items() if name in kinds}
    skipped |= {name: f"replaced by a float {kinds[name]} after it was quantized" for name in replaced}
    fits = {name: fit for name, fit in known.get("fits", {}).items() if _still_fits(name, fit, model, replaced)}
    tables = {REPLACED: [*known.get(REPLACED, []), *replaced], GONE: [*known.get(GONE, []), *gone]}
    return {**known, "skipped": skipped, "fits": fits, **{name: table for name, table in tables.items() if table}}


def _still_fits(name: str, fit: Mapping[str, Any], model: nn.Module, replaced: Collection[str]) -> bool:
    """Whether what a fit says of the module ``name`` is said of what is there now."""
    there = name in corrections(model) or (not fit.get("clusters") and name in dict(model.named_modules()))
    return there and not any(f"{layer}.".startswith(f"{name}." if name else "") for layer in replaced)


def merged_adapters(provenance: Mapping[str, Any]) -> dict[str, int]:
    """Rank of all adapters that were merged into a layer after it was quantized, by its name.

    Raises:
        ValueError: what the provenance has is no such table.
    """
    found = provenance.get(MERGED, {})
    if not isinstance(found, dict) or not all(type(rank) is int and rank > 0 for rank in found.values()):
        raise ValueError(f"quantization_config: provenance.{MERGED} must be {{module: rank}}, got {found!r:.200}")
    return dict(found)


def merges_of(provenance: Mapping[str, Any]) -> str | None:
    """In words what was merged into the layers after they were quantized, None if nothing was."""
    ranks = merged_adapters(provenance)
    if not ranks:
        return None
    low, high = min(ranks.values()), max(ranks.values())
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"adapters of {rank} were merged into {len(ranks)} {'layer' if len(ranks) == 1 else 'layers'}"


def notes_of(provenance: Mapping[str, Any]) -> list[str]:
    """Notes of a report: what quantizing left, what was merged since, and which layers were replaced or taken out."""
    merges = merges_of(provenance)
    notes = [*(provenance.get("notes") or [])]
    if merges:
        notes.append(
            f"{merges} after quantizing, a fine-tuning: on what data, and what else it changed (a head, norms, biases), is "
            "not recorded; errors of other layers and gains of corrections were measured before it"
        )
    for key, what in (
        (REPLACED, "float now ({}): errors of other layers and gains of corrections were measured before"),
        (GONE, "no longer there ({}): errors were measured, and the float model's size taken, with them"),
    ):
        names = provenance.get(key)
        if isinstance(names, list) and names:
            few = ", ".join(map(str, names[:3])) + (" ..." if len(names) > 3 else "")
            notes.append(
                f"{len(names)} quantized {'layer is' if len(names) == 1 else 'layers are'} {what.format(few)}"
            )
    return notes
