"""Saving and loading quantized models that are no transformers models (timm, plain torch).

    save_quantized(model, "folder")
    model = load_quantized(timm.create_model(name), "folder")

The folder has ``model.safetensors`` and ``catquant.json``, which holds what ``quantization_config`` holds elsewhere. Loading
builds the layers into a float model of the same architecture and refuses a file that is not the one that was saved.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .config import CatQuantConfig
from .correction import attach, corrections
from .correction_file import check_values, empty_correction, entry_of
from .entries import check_tensors, entries_checksum, seal, verify_entries
from .integrity import checksums, verify_files
from .load_checks import check_room
from .model import prepare, quantized_modules
from .report import config_of

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
    state = {name: tensor.detach().contiguous() for name, tensor in _once(model.state_dict()).items()}
    config.corrections = {name: entry_of(correction) for name, correction in corrections(model).items()}
    config.checksums = checksums(state)
    config.entries_checksum = entries_checksum(config.modules or {}, config.corrections, config.checksums)
    config.provenance = seal(config.to_dict())
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
        ValueError: the folder is not whole, or is that of another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it is not a folder that save_quantized wrote")
    config = CatQuantConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    assert isinstance(config, CatQuantConfig)
    if config.modules is None:
        raise ValueError(f"{folder / CONFIG} has no 'modules': it is a request, not a quantized model")
    verify_entries(config.modules, config.corrections, config.checksums, config.entries_checksum)
    check_tensors(config.modules, config.checksums)
    verify_files([folder / WEIGHTS], config.checksums)
    prepare(model, config.modules)
    for name, entry in config.corrections.items():
        attach(model, name, empty_correction(entry, next(model.buffers()).device))
    check_room(model, (folder / WEIGHTS).stat().st_size)
    missing, extra = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    lost = [name for name in missing if name in _once(model.state_dict())]
    if lost or extra:
        raise ValueError(
            f"{folder} is of another {type(model).__name__}: it lacks {lost[:5]}, and has {extra[:5]} more"
        )
    for module in quantized_modules(model).values():
        module.check_values()
    for name, correction in corrections(model).items():
        check_values(name, correction)
    model.quantization_config = config  # type: ignore[assignment]
    return model.eval()


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
