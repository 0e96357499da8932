"""CUDA kernels behind the ops, and what is left to torch on CUDA.

    linear          a product from packed tiles for few tokens (float16, bfloat16; any dtype with dynamic activations),
                    else dequantization in pieces and cuBLAS
    conv            few positions are a linear of their patches; else dequantization and cuDNN
    embedding, dequantize, rotate, cluster_affine    one kernel each (a wide projection is cuBLAS)
    unpack          the reference

Nothing here touches CUDA before an op is called on a CUDA tensor. Kernels are compiled then (``cuda_compile.py``). Where
they cannot be, or do not serve a case, the reference is called and the log says why, once. ``CATQUANT_CUDA=cuda`` raises
instead, ``CATQUANT_CUDA=reference`` never uses a kernel.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops  # noqa: F401  defines what is registered here
from ..formats import get_format
from ..log import logger
from ..op_checks import check_cluster_affine, check_conv, check_indices, check_input, check_rotate, check_weight
from ..weight import quantize_activation
from . import cuda_driver, cuda_table, reference
from .cuda_calls import correct, dense, expand
from .cuda_calls import rotate as rotate_rows
from .cuda_compile import Unserved
from .cuda_driver import require
from .cuda_layout import Layout, Layouts
from .cuda_products import multiply
from .patches import patches

SWITCH = "CATQUANT_CUDA"
layouts = Layouts()


def mode() -> str:
    """``auto``, ``cuda`` or ``reference``: what ``CATQUANT_CUDA`` asks for.

    Raises:
        ValueError: it is none of these.
    """
    asked = os.environ.get(SWITCH, "auto")
    if asked not in ("auto", "cuda", "reference"):
        raise ValueError(f"{SWITCH} must be auto, cuda or reference, got {asked!r}")
    return asked


def served(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op of the kernel's name: the kernel, or the reference where the kernel does not serve the case."""
    plain = getattr(reference, kernel.__name__)

    @functools.wraps(kernel)
    def op(*args: Any, **kwargs: Any) -> Tensor:
        asked = mode()
        with reference.types_as_they_are(args[0]):
            if asked == "reference":
                return plain(*args, **kwargs)
            try:
                return kernel(*args, **kwargs)
            except Unserved as why:
                if asked == "cuda":
                    raise RuntimeError(f"{SWITCH}=cuda, but {kernel.__name__} has no kernel here: {why}") from why
                _say(f"{kernel.__name__} runs on the reference: {why}")
            return plain(*args, **kwargs)

    return op


@served
def linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    activations: str | None,
) -> Tensor:
    """x_hat (..., K) times w_hat (N, K) transposed, plus bias (N,): (..., N) in the dtype of x."""
    columns, rows = x.shape[-1], weight_packed.shape[0]
    check_weight(weight_packed, weight_scale, weight_offset, weights, group_size, columns)
    check_input(x, weight_packed, bias, activations, input_scale)
    if x.dtype == torch.float64:
        raise Unserved("products take float32, float16 and bfloat16, not float64")
    if bias is not None:
        bias = bias.to(x.dtype)
    stored = (weight_packed, weight_scale, weight_offset, weights, group_size, columns)
    if not x.numel() or not rows:
        return x.new_zeros(*x.shape[:-1], rows)  # no rows of x, or no outputs: K is never 0
    layout = None
    if x.dtype != torch.float32 or activations is not None:
        layout = _layout(*stored)
    if layout is not None and _in_tiles(x, layout, activations, input_scale):
        return multiply(x, layout, bias, activations)
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    return dense(x, *stored[:5], bias, layout)


def _layout(packed: Tensor, *others: Any) -> Layout | None:
    """The layout of a weight in use, None at its first; nothing is built where no kernel could run.

    Raises:
        Unserved: no kernel runs on the device, or the format has no layout.
    """
    if packed.is_cuda:
        require(packed.device)
    return layouts.of(packed, *others)


def _in_tiles(x: Tensor, layout: Layout, activations: str | None, input_scale: Tensor | None) -> bool:
    """Whether a product from tiles serves x (..., K)."""
    if activations is not None:
        return input_scale is None
    rows, warp_groups = x.numel() // x.shape[-1], cuda_driver.has_warp_groups(x.device)
    return x.dtype != torch.float32 and cuda_table.serves(layout, rows, warp_groups)


@served
def dequantize(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """w_hat (N, ``columns``) in ``dtype``."""
    check_weight(weight_packed, weight_scale, weight_offset, weights, group_size, columns)
    return expand(weight_packed, weight_scale, weight_offset, weights, group_size, columns, dtype)


@served
def embedding(
    indices: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of w_hat (N, ``columns``) at ``indices`` (...): (..., ``columns``). An index that is not there stops the
    device, as it does in torch's own embedding on CUDA.
    """
    check_indices(indices, weight_packed)
    stored = (weight_packed, weight_scale, weight_offset, weights, group_size, columns)
    check_weight(*stored)
    return expand(*stored, dtype, indices.reshape(-1)).view(*indices.shape, columns)


@served
def conv(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    activations: str | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution of x_hat (B, C, *spatial) with w_hat (N, C / groups * prod(kernel_size)), zero padding."""
    stored = (weight_packed, weight_scale, weight_offset, weights, group_size)
    check_conv(x, *stored, kernel_size, groups)
    check_input(x, weight_packed, bias, activations, input_scale)
    if x.dtype == torch.float64:
        raise Unserved("convolutions take float32, float16 and bfloat16, not float64")
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    bias = None if bias is None else bias.to(x.dtype)
    shape = torch.Size((weight_packed.shape[0], x.shape[1] // groups, *kernel_size))
    sides = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    spatial = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides]
    positions = x.shape[0] * math.prod(spatial)
    if groups == 1 and 0 < positions <= cuda_table.EXACT_TOKENS and x.dtype != torch.float32 and shape.numel():
        layout = _layout(*stored, shape[1:].numel())
        if layout is not None:
            rows = patches(x, kernel_size, stride, padding, dilation).flatten(0, 1)
            out = multiply(rows, layout, bias, None).view(x.shape[0], -1, shape[0])
            maps = out.new_empty(x.shape[0], shape[0], *spatial)  # no view: the caller may write into it
            maps.flatten(2).copy_(out.transpose(1, 2))
            return maps
    weight = expand(*stored, shape[1:].numel(), x.dtype).view(shape)
    function = F.conv1d if len(kernel_size) == 1 else F.conv2d
    return function(x, weight, bias, list(stride), list(padding), list(dilation), groups).contiguous()


@served
def cluster_affine(y: Tensor, basis: Tensor | None, centroids: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """gamma[c] * y + beta[c], c the nearest of the centroids (C, P) to y (..., D) @ basis (D, P)."""
    check_cluster_affine(y, basis, centroids, gamma, beta)
    return correct(y, basis, centroids, gamma, beta)


@served
def rotate(x: Tensor, inverse: bool) -> Tensor:
    """R x of the rows of x (..., K), or R^T x: see ``rotation.py``."""
    check_rotate(x)
    return rotate_rows(x, inverse)


def place(
    packed: Tensor, scale: Tensor, offset: Tensor | None, weights: str, group_size: int, columns: int
) -> Layout | None:
    """Build the layout of a linear's weight that has come to a CUDA device, ahead of its first product.

    Returns:
        The layout; None where products do not run from tiles: on other devices, without NVRTC, by ``CATQUANT_CUDA``, or
        for a format that has none.
    """
    if not packed.is_cuda or mode() == "reference":
        return None
    try:
        require(packed.device)
        return layouts.of(packed, scale, offset, weights, group_size, columns, build_now=True)
    except Unserved:
        return None  # the op says so when it is used


@functools.cache
def _say(message: str) -> None:
    logger.warning(message)


for _kernel in (linear, conv, embedding, dequantize, cluster_affine, rotate):
    torch.library.register_kernel(f"catquant::{_kernel.__name__}", "cuda", _kernel)
