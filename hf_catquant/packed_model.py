"""A model with packed layers: built empty from what a checkpoint stores, found, counted, made float again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import CatQuantConfig
from .entries import Entries, entry_scheme
from .layers import QuantizedModule, layer_for
from .modules import close_experts, holds, move_correction, open_experts, opened_experts, replace_module
from .offloaded import bring_back, forget_hooks


def prepare(model: nn.Module, modules: Entries) -> None:
    """Replace float modules by the empty quantized layers that a checkpoint stores, in place.

    Args:
        model: float model, possibly on the meta device.
        modules: stored entries by module name, as :func:`hf_catquant.entries.module_entry` makes them.

    Raises:
        ValueError: an entry names no module, a module of another type, or another shape.
    """
    open_experts(model, lambda name: holds(name, modules))
    for name, entry in modules.items():
        original = _get(model, name)
        layer = None if original is None else layer_for(original)
        if original is None or layer is None:
            kind = "no module" if original is None else f"a {type(original).__name__}"
            raise ValueError(f"the checkpoint quantizes {name!r}, but the model has {kind} there")
        if list(layer.matrix_shape(original)) != list(entry["shape"]):
            raise ValueError(
                f"{name}: the checkpoint stores a weight of shape {entry['shape']}, "
                f"the model expects {list(layer.matrix_shape(original))}"
            )
        replace_module(model, name, layer(original, entry_scheme(entry)))
    close_experts(model)
    for name, entry in modules.items():
        if entry["tied_to"] is not None:
            share_weight(model, name, entry["tied_to"])


def share_weight(model: nn.Module, name: str, source: str) -> None:
    """Make the quantized module ``name`` hold the packed weight of ``source``."""
    module: Any = model.get_submodule(name)
    module.share(model.get_submodule(source))


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """Quantized layers by name; a module that sits at two names counts once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def remember_sites(model: nn.Module, config: CatQuantConfig) -> None:
    """Have every quantized layer know the config of the model that it belongs to, and its name there."""
    for name, module in quantized_modules(model).items():
        module.site, module.origin = name, config


def dequantize_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized layer by a float one with the same weights, in place; ties stay ties.

    Weights that are offloaded are read, and stay in memory.

    Raises:
        ValueError: a tensor has no values anywhere; nothing has been changed then.
    """
    inside = tuple(f"{name}." for name in opened_experts(model))
    bring_back(model, [*quantized_modules(model), *(n for n, _ in model.named_modules() if n.startswith(inside))])
    for experts in opened_experts(model).values():
        forget_hooks(experts)  # those of a module that goes
    made: dict[nn.Module, Tensor] = {}
    for name, module in quantized_modules(model).items():
        new = module.to_float()
        if dtype is not None:
            new = new.to(dtype)
        shared = made.setdefault(module.owner or module, new.weight)  # type: ignore[arg-type]
        if shared is not new.weight and shared.shape == new.weight.shape:
            new.weight = shared
        move_correction(module, new)
        replace_module(model, name, new)
    close_experts(model)


def parameter_count(model: nn.Module) -> int:
    """Parameters of the float model that ``model`` stands for, shared ones once."""
    packed = sum(m.rows_ * m.columns for m in quantized_modules(model).values() if m.owner is None)
    return packed + sum(p.numel() for p in float_parameters(model))


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are no codes, tied ones once, also where they are offloaded and no longer one object."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    named = dict(model.named_parameters())
    return [value for name, value in named.items() if not (name in tied and tied[name] in named)]


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
