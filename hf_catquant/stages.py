"""Which layers of a unit are solved together: neighbours that read the same tensor in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .layers import layer_for
from .model import Site
from .walk import Leaf, Unit


def stages(unit: Unit, sites: Mapping[str, Site]) -> list[list[Leaf]]:
    """The leaves of ``unit`` in the order they run, those that are solved together in one list.

    Args:
        unit: a part of the model.
        sites: the layers that will be quantized, by name in the model.
    """
    found: list[list[Leaf]] = []
    last: Any = None
    for leaf in unit.leaves:
        site = sites.get(joined(unit.name, leaf.name))
        key = None if site is None else (leaf.source, *_reading(site), _geometry(site.module))
        if found and key is not None and key == last:
            found[-1].append(leaf)
        else:
            found.append([leaf])
        last = key
    return found


def joined(unit: str, leaf: str) -> str:
    """Name in the model of a leaf, which may be the unit itself."""
    return f"{unit}.{leaf}" if leaf else unit


def _reading(site: Site) -> tuple[Any, ...]:
    return site.scheme.activations, *(scheme.rotation for scheme in site.schemes)


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    layer = layer_for(module)
    return (layer and layer.static_activations, *(getattr(module, name, None) for name in names))
