"""The CPU backend: which ops the compiled library computes, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from ..log import logger
from . import native, reference
from .cpu_conv import conv
from .cpu_float import cluster_affine, rotate
from .cpu_linear import linear
from .cpu_rows import dequantize, embedding, unpack

KERNELS = (linear, conv, embedding, dequantize, unpack, cluster_affine, rotate)


@cache
def _say_that_there_is_no_library() -> None:
    logger.warning(
        "hf_catquant was installed without its CPU kernels and computes with plain torch, slower: "
        "install it again with a C compiler"
    )


def _without_library(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(kernel)
    def call(*arguments: Any) -> Tensor:
        _say_that_there_is_no_library()
        return kernel(*arguments)

    return call


for _kernel in KERNELS:
    if native.PATH != "reference":
        torch.library.register_kernel(f"catquant::{_kernel.__name__}", "cpu", _kernel)
    elif native.library() is None:
        _plain = getattr(reference, _kernel.__name__)
        torch.library.register_kernel(f"catquant::{_kernel.__name__}", "cpu", _without_library(_plain))
