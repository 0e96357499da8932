"""What a checkpoint says of its quantized modules and corrections, and the checks of what is read back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from .correction_file import empty_correction
from .formats import ACTIVATION_FORMATS, FORMATS, check_group_size
from .layers import Scheme
from .rotation import ROTATIONS

Entries = dict[str, dict[str, Any]]

MAX_SIZE = 1 << 30  # rows, columns or ranks: the bytes of no product of two overflow
_SCHEME = tuple(field.name for field in fields(Scheme))
# What quantizing found, which has checksums of its own; everything else of a quantization_config is the request.
_FOUND = ("modules", "corrections", "checksums", "entries_checksum", "provenance")

CHANGED = "the config.json was changed or damaged after the save, fetch it again"
ABSENT = "absent"  # of a provenance: modules that the class builds, and that are None in the model that was saved


def module_entry(scheme: Scheme, shape: tuple[int, int], tied_to: str | None) -> dict[str, Any]:
    """What the checkpoint stores of one quantized module: its scheme, its logical (N, K), and whose weight it shares."""
    return {**asdict(scheme), "shape": list(shape), "tied_to": tied_to}


def entry_scheme(entry: dict[str, Any]) -> Scheme:
    """The scheme in an entry of :func:`module_entry`."""
    return Scheme(**{name: entry[name] for name in _SCHEME})


def entries_checksum(modules: Entries, corrections: Entries, checksums: dict[str, int]) -> int:
    """CRC-32 of all entries and of the checksums of the tensors.

    An entry that changes a format but no shape would load as other weights; a tensor that is gone together with its
    checksum would not be missed.
    """
    return zlib.crc32(json.dumps([modules, corrections, checksums], sort_keys=True).encode())


def verify_entries(modules: Entries, corrections: Entries, checksums: dict[str, int], expected: int) -> None:
    """Refuse entries that are not those that were saved.

    Raises:
        ValueError: naming both checksums.
    """
    found = entries_checksum(modules, corrections, checksums)
    if found != expected:
        raise ValueError(
            f"quantization_config: modules, corrections and checksums are not those that were saved (CRC-32 {found:08x}, "
            f"expected {expected:08x}): the config.json was changed or damaged after the save, fetch it again"
        )


def seal(stored: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a ``quantization_config``, with the CRC-32 of the request and that of the provenance itself.

    Args:
        stored: all that ``config.json`` will hold of it, with everything else of the provenance in place.
    """
    provenance = {**stored["provenance"], "request_checksum": _request_checksum(stored)}
    return {**provenance, "checksum": _provenance_checksum(provenance)}


def broken_seals(stored: Mapping[str, Any]) -> list[str]:
    """What of the request and the provenance of a ``quantization_config``, as the file has it, is not what was saved.

    Nothing of either is needed to load, but a card prints both. Of what was saved before these checksums there were
    nothing can be told: see :func:`is_sealed`.
    """
    provenance, found = stored.get("provenance") or {}, []
    sealed = "request_checksum" in provenance
    if sealed and provenance["request_checksum"] != _request_checksum(stored):
        found.append("the request (weights, group_size, solver and so on)")
    if not is_provenance_saved(provenance) or (sealed and "checksum" not in provenance):
        found.append("provenance")
    return [
        f"quantization_config: {what} is not what was saved: the config.json was changed or damaged after the save, "
        "fetch it again"
        for what in found
    ]


def is_sealed(provenance: Mapping[str, Any]) -> bool:
    """Whether a provenance has the checksums of :func:`seal`."""
    return {"checksum", "request_checksum"} <= provenance.keys()


def is_provenance_saved(provenance: Mapping[str, Any]) -> bool:
    """Whether a provenance is the one that was saved, or has no checksum that could tell."""
    return provenance.get("checksum") in (None, _provenance_checksum(provenance))


def _request_checksum(stored: Mapping[str, Any]) -> int:
    """Of the fields that the file has, whatever fields another version knows."""
    return _crc({name: value for name, value in stored.items() if name not in _FOUND})


def _provenance_checksum(provenance: Mapping[str, Any]) -> int:
    return _crc({name: value for name, value in provenance.items() if name != "checksum"})


def _crc(value: Any) -> int:
    """CRC-32 of the JSON of a value as a file would give it back, names sorted."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def check_tensors(modules: Entries, names: Iterable[str]) -> None:
    """Refuse entries that are not as many as the packed weights among ``names``, the tensors of the checkpoint.

    Raises:
        ValueError: naming both numbers.
    """
    packed = sum(name.endswith(".weight_packed") for name in names)
    owners = sum(entry["tied_to"] is None for entry in modules.values())
    if packed != owners:
        raise ValueError(
            f"quantization_config: checksums has {packed} packed weights, modules describes {owners}: the config.json "
            "was changed or damaged after the save, fetch it again"
        )


def check_modules(modules: Any) -> None:
    """Refuse entries that :func:`module_entry` cannot have made.

    Raises:
        ValueError: naming the module, the field, its rule and its value.
    """
    if not isinstance(modules, dict) or not all(isinstance(entry, dict) for entry in modules.values()):
        raise ValueError(f"quantization_config: modules must be {{name: entry}}, got {modules!r:.200}")
    if not modules:
        raise ValueError("quantization_config: modules is empty, so nothing is quantized: the config.json is damaged")
    for name, entry in modules.items():
        where = f"quantization_config: modules[{name!r}]"
        wanted = {*_SCHEME, "shape", "tied_to"}
        if set(entry) != wanted:
            raise ValueError(
                f"{where} must have {', '.join(sorted(wanted))}, got {', '.join(sorted(map(str, entry)))}"
            )
        try:
            check_group_size(entry["group_size"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        shape, tied_to = entry["shape"], entry["tied_to"]
        rules = (
            ("weights", ", ".join(FORMATS), entry["weights"] in tuple(FORMATS)),
            (
                "activations",
                f"null, {', '.join(ACTIVATION_FORMATS)}",
                entry["activations"] in (None, *ACTIVATION_FORMATS),
            ),
            ("scale_dtype", "float16, float32", entry["scale_dtype"] in ("float16", "float32")),
            ("low_rank", "the integers from 0", entry["low_rank"] == 0 or _size(entry["low_rank"])),
            ("rotation", f"null, {', '.join(ROTATIONS)}", entry["rotation"] in (None, *ROTATIONS)),
            ("shape", "two positive integers", isinstance(shape, list) and len(shape) == 2 and all(map(_size, shape))),
            ("tied_to", "null, another of its modules of the same shape", _is_owner(tied_to, name, modules)),
        )
        for field, rule, holds in rules:
            if not holds:
                raise ValueError(f"{where}: {field} must be one of {rule}; got {entry[field]!r}")


# What the provenance holds where it is printed, or read again: by name, the type of the whole, and of what is inside.
_PROVENANCE: dict[str, tuple[type, type | tuple[type, ...]]] = {
    "notes": (list, str),
    "skipped": (dict, str),
    "errors": (dict, (int, float, type(None))),
    "fits": (dict, dict),
    ABSENT: (list, str),
}


def check_provenance(provenance: Any) -> None:
    """Refuse a provenance whose tables are of other types than a save writes.

    Raises:
        ValueError: naming the table.
    """
    if not isinstance(provenance, dict):
        raise ValueError(f"quantization_config: provenance must be an object, got {provenance!r:.100}")
    before = provenance.get("bytes_before", 0)
    if type(before) is not int or before < 0:
        raise ValueError(
            f"quantization_config: provenance.bytes_before must be a size, got {before!r:.100}: {CHANGED}"
        )
    for name, (whole, inside) in _PROVENANCE.items():
        found = provenance.get(name, whole())
        values = found.values() if isinstance(found, dict) else found
        if not isinstance(found, whole) or not all(isinstance(value, inside) for value in values):
            raise ValueError(
                f"quantization_config: provenance.{name} must be a {whole.__name__} of "
                f"{getattr(inside, '__name__', 'numbers')}, got {found!r:.100}: {CHANGED}"
            )


def check_absent(provenance: Mapping[str, Any], stored: Iterable[str]) -> None:
    """Refuse a provenance that calls a module absent of which the checkpoint has tensors.

    Args:
        provenance: of a checkpoint.
        stored: names of its tensors.

    Raises:
        ValueError: naming one.
    """
    ends = tuple(f"{name}." for name in provenance.get(ABSENT) or ())
    held = next((name for name in stored if ends and name.startswith(ends)), None)
    if held is not None:
        raise ValueError(
            f"quantization_config: provenance.{ABSENT} must be a list of modules without tensors in the checkpoint, which "
            f"has {held}: {CHANGED}"
        )


def check_corrections(entries: Any) -> None:
    """Refuse stored corrections that cannot be.

    Raises:
        ValueError: naming the module and what is wrong.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"quantization_config: corrections must be {{name: entry}}, got {entries!r:.200}")
    for name, entry in entries.items():
        try:
            empty_correction(entry, "meta")
        except ValueError as error:
            raise ValueError(f"quantization_config: corrections[{name!r}]: {error}") from error


def check_checksums(checksums: Any, entries: Any) -> None:
    """Refuse checksums that are no numbers: those of the tensors by name, and that of the entries.

    Raises:
        ValueError: saying what was found.
    """
    if not isinstance(checksums, dict) or not all(isinstance(value, int) for value in checksums.values()):
        raise ValueError(f"quantization_config: checksums must be {{tensor: CRC-32}}, got {checksums!r:.200}")
    if not isinstance(entries, int):
        raise ValueError(f"quantization_config: entries_checksum must be a CRC-32, got {entries!r:.200}")


def _is_owner(tied_to: Any, name: str, modules: Entries) -> bool:
    """Whether a module may share this one's weight: a module of its own shape that shares nobody else's."""
    if tied_to is None:
        return True
    if not isinstance(tied_to, str) or tied_to == name or tied_to not in modules:
        return False
    return modules[tied_to].get("tied_to") is None and modules[tied_to].get("shape") == modules[name]["shape"]


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE
