"""A float model: every weight dequantized, corrections folded where that is exact; loads in plain transformers.

Weights are what the quantized model multiplies by, in the dtype it computes in; a rotated layer's are turned back, which
agrees to the rounding of float32. Another dtype that is asked for rounds them once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..packed_model import quantized_modules
from .common import Exported, Source, copy_processor, fold_corrections, settle_losses, weight_bytes, written_beside


def write(source: Source, out: Path, *, lossy: bool = False, dtype: torch.dtype | str | None = None) -> Exported:
    """Write a folder with the float model.

    Args:
        source: is taken apart.
        out: folder.
        lossy: leave out what does not fold.
        dtype: of the weights; None: the one that the model has.

    Raises:
        ValueError: something would be lost, the dtype is none or does not reach as far as a weight, or the folder does
            not give the model back.
    """
    model: Any = source.model
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype of torch like float32 or bfloat16, got {dtype!r}")
    lost = settle_losses(source, fold_corrections(model), lossy, "safetensors")
    for name, module in quantized_modules(model).items():
        if module.dtype != torch.float32:
            exact = module.matrix(torch.float32)
            _check_range(f"{name}.weight", exact, exact.to(module.dtype), "load the model")
    model.dequantize()
    rounded = [] if wanted is None else _rounding(model, wanted)
    if wanted is not None:
        model = model.to(wanted)
    with written_beside(out) as folder:
        model.save_pretrained(folder)
        _check(model, folder)
        notes = [*rounded, *copy_processor(source, folder)]
        size = weight_bytes(folder)
    return Exported(out, "safetensors", size, lost, notes)


def _rounding(model: Any, dtype: torch.dtype) -> list[str]:
    """What weights lose in ``dtype``, a note; none if it holds all of them.

    Raises:
        ValueError: one of them is beyond its range.
    """
    total, moved, gone, before = 0, 0, 0, set()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            new = value.to(dtype)
            _check_range(name, value, new)
            differs = new.to(torch.float64) != value.to(torch.float64)
            total, moved = total + value.numel(), moved + int(differs.sum())
            gone += int((differs & (new.to(torch.float64) == 0)).sum())
            before |= {_word(value.dtype)} if bool(differs.any()) else set()
    if not moved:
        return []
    zeros = f", {gone:,} of them to 0" if gone else ""
    return [
        f"rounded once more, from {' and '.join(sorted(before))} to {_word(dtype)}: {moved:,} of {total:,} values{zeros}"
    ]


def _check_range(name: str, value: Tensor, new: Tensor, way: str = "export (--dtype)") -> None:
    """Refuse a finite value that is none any more.

    Raises:
        ValueError: naming the tensor, the value, and dtypes that hold it.
    """
    beyond = value.isfinite() & ~new.to(torch.float64).isfinite()
    if not bool(beyond.any()):
        return
    found, dtype = value[beyond], new.dtype
    worst = found[found.abs().argmax()]
    ways = [_word(other) for other in (torch.bfloat16, torch.float32, torch.float64) if worst.to(other).isfinite()]
    raise ValueError(
        f"{name}: {float(worst):.6g} is beyond {_word(dtype)}, whose largest value is {torch.finfo(dtype).max:.6g}: {way} "
        f"with dtype={' or '.join(map(repr, ways))}"
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
