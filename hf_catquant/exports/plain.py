"""A float model: every weight dequantized, corrections folded where that is exact; loads in plain transformers.

Weights are what the quantized model multiplies by, in the dtype it computes in; a rotated layer's are turned back, which
agrees to the rounding of float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common import Exported, Source, copy_processor, fold_corrections, settle_losses, weight_bytes, written_beside


def write(source: Source, out: Path, *, lossy: bool = False, dtype: torch.dtype | str | None = None) -> Exported:
    """Write a folder with the float model.

    Args:
        source: is taken apart.
        out: folder.
        lossy: leave out what does not fold.
        dtype: of the weights; None: the one that the model has.

    Raises:
        ValueError: something would be lost, the dtype is none, or the folder does not give the model back.
    """
    model: Any = source.model
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype of torch like float32 or bfloat16, got {dtype!r}")
    lost = settle_losses(source, fold_corrections(model), lossy, "safetensors")
    model.dequantize()
    if wanted is not None:
        model = model.to(wanted)
    with written_beside(out) as folder:
        model.save_pretrained(folder)
        _check(model, folder)
        notes = copy_processor(source, folder)
        size = weight_bytes(folder)
    return Exported(out, "safetensors", size, lost, notes)


def _check(model: Any, folder: Path) -> None:
    """Load what was written, and compare: a name that the class does not know would be dropped without a word."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    expected, found = model.state_dict(), loaded.state_dict()
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    wrong += [name for name in expected if name not in found or not _same(expected[name], found[name])]
    if wrong:
        raise ValueError(
            f"{type(model).__name__} does not load its own float weights back: {', '.join(map(str, wrong[:5]))}"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.cpu(), second.cpu())
