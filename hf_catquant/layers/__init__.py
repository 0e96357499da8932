"""Layers: modules whose weight is a matrix (N, K), held packed.

The folder is the registry: adding a layer type is adding a file with a subclass of :class:`QuantizedModule`.
:func:`layer_for` finds it by the exact type of the module, so that a subclass with a forward of its own is never replaced
by mistake.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .base import LAYERS, QuantizedModule, Scheme, Window, layer_for

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["LAYERS", "QuantizedModule", "Scheme", "Window", "layer_for"]
