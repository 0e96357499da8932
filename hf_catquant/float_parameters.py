"""Which float parameters of a model do not learn: with one unit those that others hold, too, and at all what was listed.

And whether any can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .config import CatQuantConfig
from .model import is_listed


def listed_parameters(model: nn.Module, config: CatQuantConfig) -> set[str]:
    """Names of those inside what ``modules_to_not_convert`` means."""
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if "." in name and is_listed(name.rpartition(".")[0], config)}


def parameters_of_several(model: nn.Module, blocks: Sequence[str]) -> set[str]:
    """All names of those that lie in several of the ``blocks``, or in one and outside."""
    inside = tuple(f"{block}." for block in blocks)
    found: dict[int, dict[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((block for block in inside if name.startswith(block)), "")
        found.setdefault(id(parameter), {})[name] = owner
    return {name for names in found.values() if len(set(names.values())) > 1 for name in names}


def check_gradients(model: nn.Module) -> None:
    """Refuse what no gradient can reach, before anything is solved.

    Raises:
        RuntimeError: inference mode is on, or something of ``model`` was made in it.
    """
    made = next((n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_inference()), None)
    if made is None and not torch.is_inference_mode_enabled():
        return
    found = "is on" if made is None else f"was on when {made} of the model was made"
    raise RuntimeError(
        f'solver="reconstruct" learns by gradients, which torch.inference_mode() rules out, and it {found}: load and '
        'quantize the model outside of it (torch.no_grad() does no harm), or choose solver="gptq"'
    )
