"""What every export does: open the model, fold what folds exactly, refuse or say what is lost, write beside and rename."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import INDEX, index_file, read_object, weight_files
from ..correction import ClusterAffine, corrections, detach
from ..identity import CARD, EVALUATION, PLOTS, REPORT, fetched, files_of
from ..inventory import PATTERNS, names_in, shortly
from ..layers import QuantizedModule
from ..modules import check_no_adapters, replace_module
from ..offloaded import bring_back, forget_hooks
from ..packed_model import quantized_modules
from ..tasks import load_quantized
from ..verify import stored_config


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        path: folder, or file.
        target: which export.
        size: bytes of the weights.
        lost: what the quantized model has and the export does not; empty unless it was allowed to lose something.
        notes: what a user wants to know of it and changes no output.
    """

    path: Path
    target: str
    size: int = 0
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.target}, {self.size / 1e6:,.2f} MB"]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"LOST: {text}" for text in self.lost]
        return "\n".join(lines)


@dataclass
class Source:
    """A quantized model that an export may take apart.

    Attributes:
        model: with its packed layers.
        name: folder or Hub id that it came from, None for one that was in memory.
    """

    model: PreTrainedModel
    name: str | None


def open_model(model: str | Path | PreTrainedModel, trust_remote_code: bool = False) -> Source:
    """The model, loaded, or a copy of the one in memory.

    Raises:
        ValueError: it is not a quantized transformers model, or has adapters that are not merged.
    """
    is_name = isinstance(model, str | Path)
    held: Any = load_quantized(str(model), trust_remote_code) if is_name else model
    if isinstance(held, nn.Module):
        check_no_adapters(held, "exported")
    if not is_name and not isinstance(held, PreTrainedModel):
        raise ValueError(f"model must be a folder, a Hub id or a transformers model, got a {type(model).__name__}")
    source = Source(held, str(model)) if is_name else Source(_in_memory(copy.deepcopy(held)), None)
    if not quantized_modules(source.model):
        raise ValueError(
            f"{model if source.name else type(model).__name__} is not quantized: there is nothing to export"
        )
    return source


def _in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the CPU, with what accelerate offloaded."""
    away = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    bring_back(model, [name for name, _ in model.named_modules()])
    forget_hooks(model)
    if away:
        model.tie_weights()
    return model.cpu()


def free_place(out: str | Path) -> Path:
    """``out`` as a path where nothing is.

    Raises:
        ValueError: something is there.
    """
    place = Path(out)
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"{place} exists and is not an empty folder: name another place")
    return place


def settle_losses(source: Source, lost: list[str], lossy: bool, target: str) -> list[str]:
    """What is left out; corrections that did not fold are taken off.

    Raises:
        ValueError: something is, and ``lossy`` is not set.
    """
    lost = [*_inputs_lost(source.model), *lost]
    if lost and not lossy:
        raise ValueError(
            f"an export to {target} would lose: {'; '.join(lost)}. Pass lossy=True (--lossy) to leave that out, or "
            "quantize again without it"
        )
    for name in corrections(source.model):
        detach(source.model, name)
    return lost


def fold_corrections(model: nn.Module) -> list[str]:
    """Fold every correction that folds exactly into the linear it sits on, in place; why the others do not.

    A correction of one cluster is y <- gamma * y + beta: it folds into rows of a weight and a bias. Where there is no bias
    in the architecture it has nowhere to go: a file with one more would load without it.
    """
    left = []
    for name, correction in corrections(model).items():
        site = model.get_submodule(name)
        reason = _why_not(model, site, correction)
        if reason is not None:
            left.append(f"the correction at {name}: {reason}")
            continue
        detach(model, name)
        linear: Any = site.to_float() if isinstance(site, QuantizedModule) else site
        weight, bias = correction.fold_into(linear.weight.detach(), linear.bias)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        if linear is not site:
            linear._forward_hooks.update(site._forward_hooks)
            replace_module(model, name, linear)
    return left


def _why_not(model: nn.Module, site: nn.Module, correction: ClusterAffine) -> str | None:
    linear: Any = site
    kind = site.wraps if isinstance(site, QuantizedModule) else type(site)
    if len(correction.gamma) != 1:
        return f"it has {len(correction.gamma)} clusters, and only one folds into a weight"
    if kind is not nn.Linear or correction.dim != -1:
        return f"it sits on a {kind.__name__}, not on a linear that it could fold into"
    if linear.bias is None and bool(correction.beta.any()):
        return f"{type(model).__name__} has no bias there to take its shift"
    shared = isinstance(site, QuantizedModule) and (
        site.owner is not None or any(other.owner is site for other in quantized_modules(model).values())
    )
    held = linear._parameters.get("weight")
    if shared or (held is not None and sum(m._parameters.get("weight") is held for m in model.modules()) > 1):
        return "its weight is tied to another layer's"
    return None


def _inputs_lost(model: nn.Module) -> list[str]:
    rounded = {m.scheme.activations for m in quantized_modules(model).values()} - {None}
    return [f"inputs rounded to {', '.join(sorted(map(str, rounded)))}: they stay in float"] if rounded else []


@contextmanager
def written_beside(place: Path) -> Iterator[Path]:
    """A path beside ``place`` to write to, that becomes it at the end; nothing is left of it after an error."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        yield beside
        if place.is_dir():  # an empty one
            place.rmdir()
        beside.replace(place)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


def source_folder(source: Source) -> Path | None:
    """The folder that a model came from, or a snapshot of what came with it on the Hub; None of one in memory."""
    if source.name is None:
        return None
    there = Path(source.name)
    return there if there.is_dir() else fetched(source.name, PATTERNS)


def copy_processor(source: Source, folder: Path) -> list[str]:
    """Put what came with the model (tokenizer, processor, licence, code) into ``folder``; a note of what was left out.

    Card, plots, report and evaluation are of the quantized model, and stay with it.
    """
    there = source_folder(source)
    if there is None:
        return []
    own = {"config.json", INDEX, CARD, REPORT, EVALUATION, *PLOTS, *(path.name for path in weight_files(there))}
    index = index_file(there)
    own |= set() if index is None else {index.name}
    left, along = [], files_of(there, stored_config(read_object(there / "config.json"), there))
    for name in names_in(there):
        if name in own or (folder / name).exists():
            continue
        if name in along and (there / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there / name, folder / name)
        else:
            left.append(name)
    return [f"not copied, as they are no part of the model: {shortly(left)}"] if left else []


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
