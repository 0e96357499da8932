"""Where a model's logits come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .replay import run


def logits_site(model: nn.Module, batch: dict[str, Tensor]) -> str | None:
    """Name of the innermost module that returns the model's logits (its output, if that is a tensor), or None."""
    return find_logits(*observed(model, batch))


def observed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, list[tuple[str, Tensor]]]:
    """What the model returns, and every tensor that one of its modules returned, with the module's name."""
    returned: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(note_into(returned, name)) for name, module in model.named_modules() if name
    ]
    try:
        return run(model, batch), returned
    finally:
        for handle in handles:
            handle.remove()


def named_logits(output: Any) -> Tensor | None:
    """What the model returns under the name "logits", as an attribute or in a mapping, or None."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def step_sites(logits: Tensor, returned: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Modules whose (B, T, C) holds the ``logits`` (B, C) at one step of every row: they chose it after the head."""
    wide = [
        (name, tensor)
        for name, tensor in returned
        if tensor.dim() == 3 and logits.dim() == 2 and tensor[:, 0].shape == logits.shape
    ]
    return [(name, t) for name, t in wide if (t.float() == logits.float().unsqueeze(1)).all(-1).any(1).all()]


def note_into(returned: list[tuple[str, Tensor]], name: str) -> Callable[..., None]:
    """A forward hook that appends what the module called ``name`` returns, if it is a tensor."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            returned.append((name, output))

    return hook


def find_logits(output: Any, returned: list[tuple[str, Tensor]]) -> str | None:
    """Name of the first module that ``returned`` the logits in ``output``, the very tensor or else an equal one."""
    logits = output if isinstance(output, Tensor) else named_logits(output)
    if logits is None:
        return None
    same = [name for name, tensor in returned if tensor is logits]
    equal = [n for n, t in returned if t.shape == logits.shape and torch.equal(t.float(), logits.float())]
    found = same or equal
    return found[0] if found else None
