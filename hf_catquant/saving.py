"""What a checkpoint says of a model at the moment it is saved, of transformers or not; adapters that were merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from .config import CatQuantConfig
from .correction import corrections
from .correction_file import entry_of
from .entries import entries_checksum, seal
from .integrity import checksums
from .model import quantized_modules

_MERGED = "merged_adapters"  # of a provenance: rank by module


def update_config(
    config: CatQuantConfig, model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, int] | None = None
) -> None:
    """Have ``config`` say what ``model`` is now, in place: its layers, corrections, checksums, and what was done to it.

    Args:
        config: what quantizing or loading left on the model.
        tensors: what the file will hold, under the names that it will have.
        fields: checksums of the fields of the model's own config, where it has one.
    """
    config.provenance = provenance_now(config, model) | ({} if fields is None else {"fields": dict(fields)})
    modules = config.modules or {}
    for name, module in quantized_modules(model).items():  # an adapter that was merged is part of the scheme
        if name in modules:
            modules[name].update(asdict(module.scheme))
    # What sits on the model now: corrections can be fitted, loaded and taken off after quantizing.
    config.corrections = {name: entry_of(correction) for name, correction in corrections(model).items()}
    config.checksums = checksums(dict(tensors))
    config.entries_checksum = entries_checksum(modules, config.corrections, config.checksums)
    config.provenance = seal(config.to_dict())


def provenance_now(config: CatQuantConfig, model: nn.Module) -> dict[str, Any]:
    """The provenance of ``config`` with the adapters that were merged into ``model`` since, without errors of those layers.

    Raises:
        ValueError: the provenance has a table of merged adapters that no save wrote.
    """
    known, entries = config.provenance, config.modules or {}
    merged = merged_adapters(known)
    for name, module in quantized_modules(model).items():
        if name in entries:
            rank = merged.pop(name, 0) + module.scheme.low_rank - entries[name]["low_rank"]
            merged |= {name: rank} if rank > 0 else {}
    if not merged and _MERGED not in known:
        return dict(known)
    errors = {name: error for name, error in known.get("errors", {}).items() if name not in merged}
    return {**known, "errors": errors, _MERGED: merged}


def merged_adapters(provenance: Mapping[str, Any]) -> dict[str, int]:
    """Rank of all adapters that were merged into a layer after it was quantized, by its name.

    Raises:
        ValueError: what the provenance has is no such table.
    """
    found = provenance.get(_MERGED, {})
    if not isinstance(found, dict) or not all(type(rank) is int and rank > 0 for rank in found.values()):
        raise ValueError(f"quantization_config: provenance.{_MERGED} must be {{module: rank}}, got {found!r:.200}")
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
    """Notes of a report: what quantizing left, and what was merged since."""
    merges = merges_of(provenance)
    more = (
        f"{merges} after quantizing, a fine-tuning: on what data, and what else it changed (a head, norms, biases), is not "
        "recorded; errors of other layers and gains of corrections were measured before it"
    )
    return [*(provenance.get("notes") or []), *([more] if merges else [])]
