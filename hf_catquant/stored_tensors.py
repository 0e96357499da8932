"""Whether the tensors of a checkpoint are what its entries say: names, dtypes, shapes, and codes and scales in range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .config import CatQuantConfig
from .entries import Entries, check_tensors, verify_entries
from .fields import check_depth, check_labels
from .formats import get_format, group_count
from .integrity import Stored, read_header, verify_files
from .layers.state import SHARED
from .modules import ADAPTED
from .op_checks import COMPUTE
from .packing import check_bytes, packed_width

_SCALES = {"float16": "F16", "float32": "F32"}

Kind = tuple[tuple[str, tuple[int, ...]] | None, ...]  # dtype and shape of each of SHARED, None where there is none


def check_stored(config: CatQuantConfig, raw: dict[str, Any], files: list[Path]) -> dict[str, Stored]:
    """Refuse anything that loading would refuse and that needs no model to see; the headers of all files.

    Raises:
        ValueError, TypeError: naming what is wrong.
    """
    modules = config.modules or {}
    verify_entries(modules, config.corrections, config.checksums, config.entries_checksum)
    check_tensors(modules, config.checksums)
    check_depth(raw, len(config.checksums))
    _check_dtype(raw)
    verify_files(files, config.checksums)
    headers: dict[str, Stored] = {}
    for path in files:
        header = read_header(path)
        both = sorted(header.keys() & headers.keys())
        if both:
            raise ValueError(f"{path}: tensor {both[0]!r} is in another file of the checkpoint too")
        headers |= header
    shapes = [stored.shape for stored in headers.values()] + [tuple(entry["shape"]) for entry in modules.values()]
    check_labels(raw, max((shape[0] for shape in shapes if shape), default=0))
    formats = match(modules, headers)
    for path in files:
        _check_values(path, formats)
    return headers


def _check_dtype(raw: dict[str, Any]) -> None:
    known = [str(dtype).removeprefix("torch.") for dtype in COMPUTE]
    for name in ("dtype", "torch_dtype"):
        found = raw.get(name)
        if found is not None and str(found).removeprefix("torch.") not in known:
            raise ValueError(f"config.json: {name} must be one of {', '.join(known)}, got {found!r:.40}")


def expected_kind(entry: dict[str, Any]) -> Kind:
    """Dtype and shape of the tensors that hold the weight of an entry, in the order of ``SHARED``."""
    fmt, (rows, columns), size = get_format(entry["weights"]), entry["shape"], entry["group_size"]
    scale = (_SCALES[entry["scale_dtype"]], (rows, group_count(columns, size)))
    rank = entry["low_rank"]
    return (
        ("U8", (rows, packed_width(fmt, columns, size))),
        scale,
        scale if fmt.affine else None,
        ("F16", (rows, rank)) if rank else None,
        ("F16", (rank, columns)) if rank else None,
    )


def match(modules: Entries, headers: dict[str, Stored]) -> dict[str, str]:
    """Format of every packed weight, by the name that its tensors have in the files before the last dot.

    Some architectures have other names in files than in memory; their modules are found by the sizes of their tensors.

    Raises:
        ValueError: the tensors of a module have another dtype or shape, or are not there.
    """
    adapter = next((name for name in headers if f"{ADAPTED}." in name), None)
    if adapter is not None:
        raise ValueError(
            f"{adapter} is the name of a layer with an adapter: the model was saved with one that was not merged, and loads "
            "without it nowhere; save the adapter by the PeftModel's save_pretrained, or merge it first"
        )
    kinds = {stem: _kind(stem, headers) for stem in _stems(headers)}
    wanted = {name: expected_kind(entry) for name, entry in modules.items() if entry["tied_to"] is None}
    named = {name for name in wanted if name in kinds}
    for name in named:
        if kinds[name] != wanted[name]:
            raise ValueError(f"{name}: its tensors are {kinds[name]}, but its entry says {wanted[name]}")
    rest = {wanted[name]: modules[name]["weights"] for name in wanted.keys() - named}
    renamed = kinds.keys() - named
    if Counter(kinds[stem] for stem in renamed) != Counter(wanted[name] for name in wanted.keys() - named):
        names = ", ".join(sorted(wanted.keys() - named)[:5]) or ", ".join(sorted(renamed)[:5])
        raise ValueError(f"the tensors and the entries of modules do not have the same dtypes and shapes, see {names}")
    return {stem: rest[kinds[stem]] if stem in renamed else modules[stem]["weights"] for stem in kinds}


def _stems(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]


def _kind(stem: str, headers: dict[str, Stored]) -> Kind:
    held = [headers.get(f"{stem}.{buffer}") for buffer in SHARED]
    return tuple(None if stored is None else (stored.dtype, stored.shape) for stored in held)


def _check_values(path: Path, formats: dict[str, str]) -> None:
    """Refuse bytes that no codes pack to, and numbers that are not finite; of the model's own float tensors only NaN, as a
    mask may hold infinities."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            stem, _, buffer = name.rpartition(".")
            if buffer == "weight_packed" and stem in formats:
                try:
                    check_bytes(file.get_tensor(name), get_format(formats[stem]))
                except ValueError as error:
                    raise ValueError(f"{path}: {name}: {error}") from error
                continue
            value = file.get_tensor(name)
            if not value.is_floating_point():
                continue
            own = stem in formats or ".correction." in name or buffer in ("input_scale", "input_offset")
            if own and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{path}: {name} has values that are not finite")
            if bool(value.isnan().any()):
                raise ValueError(f"{path}: {name} holds NaN: whatever reads it answers NaN")
