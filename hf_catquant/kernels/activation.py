"""How the CPU kernels turn rows of x into digits of 8 bits: ``cq_activation`` of ``csrc/catquant.h``."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..formats import ACTIVATION_FORMATS, get_format
from .native import Activation

# 24 bits beside one scale a row are as exact as float32; 16 are more exact than either half.
DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
_ONE_RANGE_A_ROW, _GIVEN_RANGE = 1, 2


class How:
    """Digits of an activation; ``address`` is that of the C structure, which lives as long as this does."""

    def __init__(self, structure: Activation) -> None:
        self.structure = structure
        self.digits: int = structure.parts
        self.address = ctypes.addressof(structure)


@cache
def row_range(activations: str | None, dtype: torch.dtype) -> How | None:
    """Rows of ``dtype`` as they are, or with a range of their own in the format ``activations``; None if that is
    none."""
    if activations is None:
        return How(Activation(parts=DIGITS[dtype]))
    if activations not in ACTIVATION_FORMATS:
        return None
    fmt = get_format(activations)
    return How(Activation(1, _ONE_RANGE_A_ROW, fmt.affine, fmt.levels[0], fmt.levels[-1]))


def given_range(activations: str, scale: Tensor, offset: Tensor | None) -> How | None:
    """One calibrated range () for all rows; None where zero is none of its levels."""
    fmt = get_format(activations)
    step, shift = float(scale), 0.0 if offset is None else float(offset)
    zero = -shift / step if step > 0 else float("nan")
    if not fmt.levels[0] - 0.001 < zero < fmt.levels[-1] + 0.001 or abs(zero - round(zero)) > 0.001:
        return None
    return How(Activation(1, _GIVEN_RANGE, offset is not None, fmt.levels[0], fmt.levels[-1], step, shift))
