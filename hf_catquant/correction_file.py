"""Corrections in a safetensors file of their own, and as entries of a quantized model's config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .correction import ClusterAffine, attach, check_place, corrections, is_count
from .integrity import checksums, verify_files

FILE_NAME = "correction.safetensors"
FILE_VERSION = "1"
MAX_SIZE = 1 << 24  # channels, clusters or ranks: the bytes of no product of two overflow


def save_correction(model: nn.Module, path: str | Path) -> Path:
    """Write the corrections of ``model`` to a safetensors file, beside and then renamed; returns its path.

    ``path`` is the file, or a folder that gets ``correction.safetensors``.

    Raises:
        ValueError: the model has no correction.
    """
    found = corrections(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no correction to save: fit one with fit_correction")
    target = _file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{n}.correction.{b}": t.cpu().contiguous() for n, c in found.items() for b, t in c.named_buffers()}
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        sites = json.dumps({name: entry_of(correction) for name, correction in found.items()}, sort_keys=True)
        # One key only: safetensors writes several in any order, and equal corrections shall be equal files.
        head = {"version": FILE_VERSION, "sites": sites, "checksums": checksums(tensors)}
        save_file(tensors, beside, metadata={"catquant": json.dumps(head)})
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def load_correction(model: nn.Module, path: str | Path) -> None:
    """Attach the corrections that :func:`save_correction` wrote; nothing is attached if anything is wrong.

    Raises:
        ValueError: the file is damaged, of another version, has values that are not finite, or names a module that the
            model does not have or that cannot carry its correction.
        FileNotFoundError: there is no such file.
    """
    target = _file(path)
    if not target.exists():
        raise FileNotFoundError(f"{target}: there is no such file")
    made = _read(target)
    names = {name for name, _ in model.named_modules()}
    for name, correction in made.items():
        if name not in names:
            raise ValueError(f"{target}: it corrects {name!r}, which {type(model).__name__} does not have")
        try:
            check_place(name, model.get_submodule(name), correction)
        except ValueError as error:
            raise ValueError(f"{target}: {error}") from error
    for name, correction in made.items():
        attach(model, name, correction.to(_device(model, name)))


def entry_of(correction: ClusterAffine) -> dict[str, Any]:
    """What is stored of a correction beside its tensors."""
    rank = None if correction.basis is None else correction.basis.shape[1]
    clusters, width = correction.gamma.shape
    return {"width": width, "clusters": clusters, "rank": rank, "dim": correction.dim}


def empty_correction(entry: dict[str, Any], device: Any = None) -> ClusterAffine:
    """The correction that a stored entry describes, waiting for its tensors.

    Raises:
        ValueError: the entry has other fields, or sizes that cannot be.
    """
    if not isinstance(entry, dict) or set(entry) != {"width", "clusters", "rank", "dim"}:
        raise ValueError(f"a stored correction must have width, clusters, rank and dim, got {entry!r}")
    sizes = (entry["width"], entry["clusters"], 1 if entry["rank"] is None else entry["rank"])
    if not all(is_count(size) and size <= MAX_SIZE for size in sizes) or entry["dim"] not in (-1, 1):
        raise ValueError(
            f"a stored correction must have positive sizes of at most {MAX_SIZE} and dim -1 or 1, got {entry}"
        )
    return ClusterAffine(entry["width"], entry["clusters"], entry["rank"], entry["dim"], device=device)


def check_values(name: str, correction: ClusterAffine) -> None:
    """Refuse a correction with values that are not finite.

    Raises:
        ValueError: naming the tensor.
    """
    for buffer, value in correction.named_buffers():
        if not value.is_meta and not bool(torch.isfinite(value).all()):  # meta: offloaded to disk
            raise ValueError(f"{name}.correction.{buffer} has values that are not finite")


def _device(model: nn.Module, name: str) -> torch.device:
    """Where the module called ``name`` computes: of its own tensors, or of the model's, the first that is in memory."""
    for module in (model.get_submodule(name), model):
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:  # meta: offloaded to disk
                return tensor.device
    return torch.device("cpu")


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _read(target: Path) -> dict[str, ClusterAffine]:
    try:
        with safe_open(target, framework="pt") as file:
            head = _json_object((file.metadata() or {}).get("catquant", "{}"))
            if head.get("version") != FILE_VERSION:
                raise ValueError(f"{target}: version must be {FILE_VERSION}, got {head.get('version')!r}")
            # On meta: sizes that a damaged file claims must cost no memory before they are checked.
            entries = _json_object(head["sites"])
            made = {name: empty_correction(entry, torch.device("meta")) for name, entry in entries.items()}
            for name, correction in made.items():
                for buffer, expected in list(correction.named_buffers()):
                    value = file.get_tensor(f"{name}.correction.{buffer}")
                    if value.shape != expected.shape or value.dtype != torch.float32:
                        raise ValueError(
                            f"{target}: {name}.correction.{buffer} must be {tuple(expected.shape)} float32, "
                            f"got {tuple(value.shape)} {value.dtype}"
                        )
                    setattr(correction, buffer, value)
                check_values(name, correction)
            verify_files([target], head["checksums"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{target}: not a whole correction file: {error}") from error
    return made


def _json_object(text: Any) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"its metadata must be a JSON object, got {value!r}")
    return value
