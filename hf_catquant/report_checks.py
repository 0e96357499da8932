"""Whether a report says of a checkpoint what can be computed from the checkpoint: shapes, formats, bits, bytes, reasons."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from .config import CatQuantConfig
from .integrity import Stored
from .report import Report
from .saving import notes_of
from .stored_tensors import expected_kind

_BYTES = {"U8": 1, "F16": 2, "F32": 4}


def check_report(path: Path, report: Report, config: CatQuantConfig, headers: Mapping[str, Stored]) -> None:
    """Refuse a report with a number that the checkpoint contradicts.

    How many parameters stay in float is not told by a checkpoint, which has tables beside them: it is not compared.

    Args:
        path: of the report, for the message.
        report: what it says.
        config: of the checkpoint.
        headers: of the checkpoint's tensors.

    Raises:
        ValueError: naming the field, what it says and what the checkpoint has.
    """
    for field, said, held in _pairs(report, config, headers):
        if said != held:
            raise ValueError(
                f"{path} is not a report of this checkpoint: {field} is {said!r:.200}, the checkpoint has {held!r:.200}: "
                "delete it, and it is made again from the model"
            )


def _pairs(report: Report, config: CatQuantConfig, headers: Mapping[str, Stored]) -> list[tuple[str, Any, Any]]:
    """(field, what the report says, what the checkpoint has)"""
    entries, known = config.modules or {}, config.provenance
    errors = known.get("errors") or {}
    pairs: list[tuple[str, Any, Any]] = [
        ("layers", sorted(layer.name for layer in report.layers), sorted(entries)),
        (
            "quantized_parameters",
            report.quantized_parameters,
            sum(prod(entry["shape"]) for entry in entries.values() if entry["tied_to"] is None),
        ),
        ("bytes_before", report.bytes_before, known.get("bytes_before", 0)),
        ("corrections", report.corrections, known.get("fits") or {}),
        ("notes", list(report.notes), notes_of(known)),
    ]
    for layer in report.layers:
        entry = entries.get(layer.name)
        if entry is not None:
            said = (
                list(layer.shape),
                layer.weights,
                layer.group_size,
                layer.activations,
                layer.rotation,
                layer.tied_to,
            )
            names = ("shape", "weights", "group_size", "activations", "rotation", "tied_to")
            pairs.append((f"layer {layer.name}", said, tuple(entry[name] for name in names)))
            pairs.append((f"bits of {layer.name}", round(layer.bits, 6), round(_bits(entry), 6)))
            pairs.append((f"error of {layer.name}", layer.error, errors.get(layer.name)))
    for name, reason in (known.get("skipped") or {}).items():
        pairs.append((f"skipped {name}", report.skipped.get(name), reason))
    small, large = _bytes(headers)
    pairs.append(("bytes_after", min(max(report.bytes_after, small), large), report.bytes_after))
    return pairs


def _bits(entry: dict[str, Any]) -> float:
    if entry["tied_to"] is not None:
        return 0.0
    stored = sum(_BYTES[kind[0]] * prod(kind[1]) for kind in expected_kind(entry) if kind is not None)
    return 8 * stored / prod(entry["shape"])


def _bytes(headers: Mapping[str, Stored]) -> tuple[int, int]:
    """The bytes of all tensors without and with the one-byte tensors that make other loaders fail."""
    large = sum(stored.end - stored.begin for stored in headers.values())
    marks = [s for name, s in headers.items() if s.dtype == "U8" and not name.endswith(".weight_packed")]
    return large - sum(stored.end - stored.begin for stored in marks), large
