"""Sentinels: tensors of one byte under the names of the float weights that packed ones have replaced.

A loader that knows nothing of this package finds them where it wants a weight, and refuses their shape. So without them, or
with whole weights in their place, one file would be two models.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .integrity import Stored, read_header
from .layers import QuantizedModule
from .layers.experts import DOWN, UP, Experts

_PACKED = ".weight_packed"
_WEIGHTS = ("weight", "parametrizations.weight.original1")  # what float layers call theirs


def sentinels_of(model: nn.Module, tensors: Container[str]) -> dict[str, Tensor]:
    """The sentinels of a checkpoint of ``model`` that holds ``tensors``."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    stored = {n: m for n, m in layers.items() if m.sentinel and f"{n}{_PACKED}" in tensors}
    found = {f"{name}.{module.sentinel}": torch.zeros(1, dtype=torch.uint8) for name, module in stored.items()}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found |= {f"{name}.{key}": value for key, value in module.sentinel().items()}
    return found


def check_sentinels(headers: Mapping[str, Stored]) -> None:
    """Refuse the tensors of a checkpoint, by the names in its files, if another loader would take them for a float model.

    Raises:
        ValueError: a packed weight has no sentinel beside it, or a tensor in its place is more than one.
    """
    packed = {name.removesuffix(_PACKED) for name in headers if name.endswith(_PACKED)}
    for stem in sorted(packed):
        own = [name for name in (f"{stem}.{weight}" for weight in _WEIGHTS) if name in headers]
        found = own or _of_experts(stem, headers)
        if not found:
            raise ValueError(
                f"{stem}: beside its packed weight there is no tensor of one byte under the name of the float weight, which "
                f"makes loaders refuse that do not know the format: this is no checkpoint as it was saved, fetch it again"
            )
        for name in found:
            stored = headers[name]
            one = stored.shape == (1,) if own else math.prod(stored.shape[1:]) == 1
            if stored.dtype != "U8" or not one:
                raise ValueError(
                    f"{name} is {stored.dtype} of shape {stored.shape}, but where a weight is packed its name has one byte: "
                    "a loader that does not know the format would take it for the weight; fetch the checkpoint again"
                )


def check_files(files: Iterable[str | Path]) -> None:
    """:func:`check_sentinels` of all tensors in safetensors files."""
    headers: dict[str, Stored] = {}
    for path in files:
        headers |= read_header(path)
    check_sentinels(headers)


def _of_experts(stem: str, headers: Mapping[str, Stored]) -> list[str]:
    """What stands for the weights of fused experts, for all of them or for each: beside the two layers that they became."""
    parent, _, child = stem.rpartition(".")
    beside = [name for name in headers if name.startswith(f"{parent}.") and len(headers[name].shape) > 1]
    opened = tuple(f"{parent}.{name}." for name in (UP, DOWN))
    return [name for name in beside if not name.startswith(opened)] if child in (UP, DOWN) else []
