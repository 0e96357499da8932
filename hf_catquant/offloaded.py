"""Tensors that wait elsewhere until their module runs: the model holds meta tensors in their place.

accelerate offloads so: a hook on each module knows a table of tensors, on the disk or in memory, and fills the module from
it before every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers.state import SHARED, PackedState


def read(model: nn.Module, name: str) -> Tensor:
    """The tensor called ``name`` from where it waits.

    Raises:
        ValueError: it waits nowhere.
    """
    return _find(model, name)[0]


def bring_back(model: nn.Module, modules: Iterable[str]) -> None:
    """Put the values that the own tensors of these modules wait for into them, on the device that they run on.

    Hooks stay, and take the values away again after the next call.

    Args:
        model: a module, whose submodules have hooks or not.
        modules: names of submodules.

    Raises:
        ValueError: a tensor waits nowhere; nothing has been changed then.
    """
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    shared: list[tuple[PackedState, str]] = []
    for name in modules:
        module = model.get_submodule(name)
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table, key in [(each, key) for each in own for key, held in each.items() if _is_away(held)]:
            if isinstance(module, PackedState) and module.owner is not None and key in SHARED:
                shared.append((module, key))
                continue
            value, device = _find(model, f"{name}.{key}" if name else key)
            held = table[key]
            new = value.to(device)
            is_parameter = isinstance(held, nn.Parameter)
            found.append((table, key, nn.Parameter(new, held.requires_grad) if is_parameter else new))
    for table, key, new in found:
        table[key] = new
    for layer, key in shared:
        assert layer.owner is not None
        layer._buffers[key] = layer.owner._buffers[key]


def forget_hooks(model: nn.Module) -> None:
    """Take the hooks of accelerate off ``model`` and all in it, whose tensors are back."""
    if any("_hf_hook" in vars(module) for module in model.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
    vars(model).pop("hf_device_map", None)


def _is_away(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def _find(model: nn.Module, name: str) -> tuple[Tensor, torch.device]:
    """The tensor, and the device that its module runs on."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):  # the innermost module first
        holder = model.get_submodule(".".join(parts[:end]))
        hook = vars(holder).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            table: Mapping[str, Tensor] | None = getattr(each, "weights_map", None)
            try:
                value = None if table is None else table[".".join(parts[end:])]
            except KeyError:
                continue
            if value is not None:
                device = getattr(each, "execution_device", None)
                return value, torch.device("cpu" if device is None else device)
    raise ValueError(
        f"{name} is on the meta device, and no hook of accelerate says where its values are: the model has none, load it "
        "anew"
    )
