"""Ops as layers call them: past torch's dispatcher where all it would do is find the CPU kernel.

A call through ``torch.ops`` costs 5 microseconds in ``inference_mode`` and 10 in ``no_grad``, where the gradient of an op
that is written in Python is asked first. Wherever somebody watches (a gradient, a trace, a transform, a mode, a subclass of
Tensor) the dispatcher is asked as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu, native

_C: Any = torch._C
_NEEDED = ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state", "_functorch")
# Private names of torch: where one is not there, nobody can be seen watching.
_can_see = (
    native.PATH != "reference"
    and all(hasattr(_C, name) for name in _NEEDED)
    and hasattr(_C._functorch, "peek_interpreter_stack")
)


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether an op on x, with nothing else that could need a gradient than ``bias``, is a call of its CPU kernel alone."""
    if torch.compiler.is_compiling() or not _can_see or type(x) is not Tensor or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not (
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._get_tracing_state() is not None
        or _C._functorch.peek_interpreter_stack() is not None
    )


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """``catquant::linear``."""
    op: Callable[..., Tensor] = cpu.linear if is_plain(x, arguments[5]) else torch.ops.catquant.linear
    return op(x, *arguments)


def conv(x: Tensor, *arguments: Any) -> Tensor:
    """``catquant::conv``."""
    op: Callable[..., Tensor] = cpu.conv if is_plain(x, arguments[5]) else torch.ops.catquant.conv
    return op(x, *arguments)


def rotate(x: Tensor, inverse: bool) -> Tensor:
    """``catquant::rotate``."""
    op: Callable[..., Tensor] = cpu.rotate if is_plain(x, None) else torch.ops.catquant.rotate
    return op(x, inverse)
