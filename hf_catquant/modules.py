"""Putting one module in the place of another; opening modules of fused experts, and closing them again; adapters of PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import nn

from .layers import QuantizedModule
from .layers.experts import Experts, Fused, does_the_same

ADAPTED = ".base_layer"  # what PEFT adds to the name of a layer that has adapters


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at every place that holds the module called ``name``: some models use one module at several."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child in [child for child, module in parent._modules.items() if module is old]:
            setattr(parent, child, new)


def open_experts(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Open the fused experts of ``model`` whose names are ``wanted``, in place, where that changes no output."""
    for name, module in list(model.named_modules()):
        fused = Fused.of(module) if name and not isinstance(module, Experts) else None
        if fused is not None and wanted(name):
            opened = Experts(module, fused)
            if does_the_same(opened, module):
                replace_module(model, name, opened)


def close_experts(model: nn.Module) -> None:
    """Close the experts of which nothing is quantized, in place: the model has the parameters again that it had."""
    for name, module in opened_experts(model).items():
        if module.is_float:
            closed = module.close()
            move_correction(module, closed)
            replace_module(model, name, closed)


def opened_experts(model: nn.Module) -> dict[str, Experts]:
    """Opened experts by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def holds(name: str, stored: Iterable[str]) -> bool:
    """Whether a stored name is that of a child of the module ``name``, which may have a prefix more or less."""
    holders = {child.rpartition(".")[0] for child in stored}
    return any(f".{name}".endswith(f".{holder}") or f".{holder}".endswith(f".{name}") for holder in holders if holder)


def adapted(model: nn.Module) -> list[str]:
    """Names of the layers that have adapters, and of what else PEFT has put in the place of modules of ``model``."""
    packed = {
        n.removesuffix(ADAPTED)
        for n, m in model.named_modules()
        if isinstance(m, QuantizedModule) and n.endswith(ADAPTED)
    }
    return [name for name, module in model.named_modules() if _is_of_peft(module) or name in packed]


def _is_of_peft(module: nn.Module) -> bool:
    """PEFT is not imported for that."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def check_no_adapters(model: nn.Module, done: str) -> None:
    """Refuse a model with a module of PEFT in it or around it; PEFT is not imported for that.

    Args:
        model: any.
        done: what is refused, as "quantized".

    Raises:
        ValueError: naming the module and the way out.
    """
    for name, module in model.named_modules():
        if _is_of_peft(module):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} of PEFT, and adapters are not {done}: "
                f"merge them first, model = model.merge_and_unload(), or take them off, model.unload()"
            )


def move_correction(old: nn.Module, new: nn.Module) -> None:
    """Let the correction that sits on ``old`` sit on ``new``."""
    correction = old._modules.get("correction")
    if correction is not None:
        new.correction = correction
        new._forward_hooks.update(old._forward_hooks)


def part_twins(model: nn.Module) -> None:
    """Give a module that sits at two names, which its class ties, one of its own at each, with the same parameters.

    ``resize_token_embeddings`` puts one embedding into encoder and decoder; the class builds several, and ties their
    weights, which is what a checkpoint says.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    first: dict[nn.Module, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if first.setdefault(module, name) != name and f"{name}.weight" in tied:
            twin = copy.copy(module)
            for table in ("_parameters", "_buffers", "_modules"):
                vars(twin)[table] = dict(vars(module)[table])
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, twin)  # replace_module puts it at every name
