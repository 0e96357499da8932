"""Saving and loading quantized models that are no transformers models (timm, plain torch).

    save_quantized(model, "folder")
    model = load_quantized(timm.create_model(name), "folder")

The folder has ``model.safetensors`` and ``catquant.json``, which holds what ``quantization_config`` holds elsewhere. Loading
builds the layers into a float model of the same architecture and refuses a file that is not the one that was saved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoint import read_object
from .config import CatQuantConfig
from .correction import attach, corrections
from .correction_file import check_values, empty_correction
from .entries import check_tensors, verify_entries
from .integrity import verify_files
from .load_checks import check_room
from .packed_model import prepare, quantized_modules, remember_sites
from .report import config_of
from .saving import update_config
from .ties import adopt_orphans

WEIGHTS, CONFIG = "model.safetensors", "catquant.json"


@torch.no_grad()
def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write a quantized model to ``folder``, each file beside its place and then renamed.

    Raises:
        ValueError: it was not quantized by this package.
    """
    config = config_of(model)
    if config is None or not quantized_modules(model):
        raise ValueError(f"{type(model).__name__} is not quantized by hf_catquant: call quantize first")
    config = copy.deepcopy(config)
    adopt_orphans(model)
    state = {name: tensor.detach().contiguous() for name, tensor in _once(model.state_dict()).items()}
    update_config(config, model, state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{WEIGHTS}.part", folder / f"{CONFIG}.part"
    save_file(state, written[0], metadata={"format": "pt"})
    written[1].write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
    for path in written:
        path.replace(path.with_suffix(""))


@torch.no_grad()
def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Make the float ``model`` the quantized one that :func:`save_quantized` wrote, in place, and return it.

    Raises:
        ValueError: the folder is not whole, or is that of another model; ``model`` is as it was then.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it is not a folder that save_quantized wrote")
    config = CatQuantConfig.from_dict(read_object(folder / CONFIG))
    assert isinstance(config, CatQuantConfig)
    if config.modules is None:
        raise ValueError(f"{folder / CONFIG} has no 'modules': it is a request, not a quantized model")
    verify_entries(config.modules, config.corrections, config.checksums, config.entries_checksum)
    check_tensors(config.modules, config.checksums)
    verify_files([folder / WEIGHTS], config.checksums)
    with _as_it_was_if_refused(model) as numbers:
        _fill(model, config, folder / WEIGHTS, numbers)
    model.quantization_config = config  # type: ignore[assignment]
    remember_sites(model, config)
    return model.eval()


def _fill(
    model: nn.Module, config: CatQuantConfig, weights: Path, numbers: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Put the layers and corrections of ``config`` into the float ``model``, and the tensors of a file into all of it.

    ``numbers`` is given every tensor of the float model that the file writes over, and a copy.
    """
    prepare(model, config.modules or {})
    for name, entry in config.corrections.items():
        attach(model, name, empty_correction(entry, next(model.buffers()).device))
    check_room(model, weights.stat().st_size)
    loaded, wanted = load_file(weights), model.state_dict()
    lost, extra = (
        [name for name in _once(wanted) if name not in loaded],
        [name for name in loaded if name not in wanted],
    )
    kind = type(model).__name__
    if lost or extra:
        raise ValueError(f"{weights.parent} is of another {kind}: it lacks {lost[:5]}, and has {extra[:5]} more")
    for name, tensor in loaded.items():
        if tensor.shape != wanted[name].shape:
            here, there = list(wanted[name].shape), list(tensor.shape)
            raise ValueError(f"{weights.parent} is of another {kind}: {name} has shape {there} there, and {here} here")
    new = {id(tensor) for layer in quantized_modules(model).values() for tensor in layer.buffers(recurse=False)}
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in new]
    numbers += [(tensor, tensor.detach().clone()) for tensor in held]
    model.load_state_dict(loaded, strict=False)
    for module in quantized_modules(model).values():
        module.check_values()
    for name, correction in corrections(model).items():
        check_values(name, correction)


@contextmanager
def _as_it_was_if_refused(model: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Give ``model`` back the modules and hooks that it had if the ``with`` ends in an exception.

    The tensors that are put into the list with a copy each get its numbers back, too.
    """
    tables = [
        (table, dict(table))
        for module in model.modules()
        for table in (module._modules, module._parameters, module._buffers, module._forward_hooks)
    ]
    numbers: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        yield numbers
    except BaseException:
        for table, before in tables:
            table.clear()
            table.update(before)  # type: ignore[arg-type]
        for tensor, value in numbers:
            tensor.data.copy_(value)
        raise


def _once(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with tensors that are one tensor under their first name only."""
    seen: set[tuple[int, tuple[int, ...], torch.dtype]] = set()
    found = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if not tensor.numel() or key not in seen:
            found[name] = tensor
        seen.add(key)
    return found
