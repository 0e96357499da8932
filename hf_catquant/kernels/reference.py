"""The reference: every op in plain torch, on any device. It is the specification that other kernels are compared with.

It dequantizes the whole weight to float32, rounds it to the dtype of x, and calls torch's own product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import ops  # noqa: F401  defines what is registered here
from ..formats import get_format
from ..op_checks import (
    check_cluster_affine,
    check_conv,
    check_devices,
    check_experts,
    check_indices,
    check_input,
    check_packed,
    check_rotate,
    check_weight,
)
from ..packing import unpack as unpack_codes
from ..rotation import rotate as rotate_rows
from ..weight import dequantize_packed, quantize_activation


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
    columns = x.shape[-1]
    check_weight(weight_packed, weight_scale, weight_offset, weights, group_size, columns)
    check_input(x, weight_packed, bias, activations, input_scale)
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    weight = dequantize_packed(weight_packed, weight_scale, weight_offset, get_format(weights), group_size, columns)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def expert_linear(
    x: Tensor,
    ends: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    activations: str | None,
) -> Tensor:
    """Rows x (S, K) from ``ends[e - 1]`` to ``ends[e]`` by run e of the E in w_hat (E * N, K), plus bias (E, N): (S, N).

    Rows after the last end belong to nobody and give zeros. Each run is the device's own ``linear``, so that this is no
    reference but the one kernel there is.
    """
    stored = (weight_packed, weight_scale, weight_offset)
    rows = check_experts(x, ends, *stored, bias, weights, group_size, activations)
    out = x.new_zeros(len(x), rows)
    for expert, start, end in _runs(ends):
        part = (None if t is None else t[expert * rows : (expert + 1) * rows] for t in stored)
        shift = None if bias is None else bias[expert]
        out[start:end] = torch.ops.catquant.linear(
            x[start:end], *part, None, None, shift, weights, group_size, activations
        )
    return out


def expert_transposed(
    x: Tensor,
    ends: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_offset: Tensor | None,
    weights: str,
    group_size: int,
    columns: int,
) -> Tensor:
    """Rows x (S, N) by w_hat of their expert, not transposed: (S, ``columns``). See :func:`expert_linear`."""
    rows = x.shape[1]
    stored = (weight_packed, weight_scale, weight_offset)
    check_devices(x, ends, weight_packed)
    check_weight(*stored, weights, group_size, columns)
    out = x.new_zeros(len(x), columns)
    for expert, start, end in _runs(ends):
        part = (None if t is None else t[expert * rows : (expert + 1) * rows] for t in stored)
        out[start:end] = x[start:end] @ torch.ops.catquant.dequantize(*part, weights, group_size, columns, x.dtype)
    return out


def _runs(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after the last) of every expert that has rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, start, end
            start = end


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
    check_conv(x, weight_packed, weight_scale, weight_offset, weights, group_size, kernel_size, groups)
    check_input(x, weight_packed, bias, activations, input_scale)
    if activations is not None:
        x = quantize_activation(x, get_format(activations), input_scale, input_offset)
    shape = (weight_packed.shape[0], x.shape[1] // groups, *kernel_size)
    columns = shape[1]
    for size in kernel_size:
        columns *= size
    weight = dequantize_packed(weight_packed, weight_scale, weight_offset, get_format(weights), group_size, columns)
    function = torch.nn.functional.conv1d if len(kernel_size) == 1 else torch.nn.functional.conv2d
    bias = None if bias is None else bias.to(x.dtype)
    out = function(x, weight.view(shape).to(x.dtype), bias, list(stride), list(padding), list(dilation), groups)
    return out.contiguous()


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
    """Rows of w_hat (N, ``columns``) at ``indices`` (...): (..., ``columns``); only the gathered rows are unpacked."""
    check_indices(indices, weight_packed)
    check_weight(weight_packed, weight_scale, weight_offset, weights, group_size, columns)
    rows = indices.reshape(-1)
    # F.embedding and not indexing: it refuses negative and too large indices instead of wrapping around.
    packed = torch.nn.functional.embedding(rows, weight_packed)
    scale = torch.nn.functional.embedding(rows, weight_scale)
    offset = None if weight_offset is None else torch.nn.functional.embedding(rows, weight_offset)
    values = dequantize_packed(packed, scale, offset, get_format(weights), group_size, columns)
    return values.to(dtype).view(*indices.shape, columns)


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
    fmt = get_format(weights)
    return dequantize_packed(weight_packed, weight_scale, weight_offset, fmt, group_size, columns).to(dtype)


def unpack(weight_packed: Tensor, weights: str, group_size: int, columns: int) -> Tensor:
    """Codes (N, ``columns``) uint8."""
    check_packed(weight_packed, weights, group_size, columns)
    return unpack_codes(weight_packed, get_format(weights), group_size, columns)


def cluster_affine(y: Tensor, basis: Tensor | None, centroids: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """gamma[c] * y + beta[c], c the nearest of the centroids (C, P) to y (..., D) @ basis (D, P)."""
    check_cluster_affine(y, basis, centroids, gamma, beta)
    rows = y.reshape(-1, y.shape[-1]).float()
    with types_as_they_are(y):
        cluster = nearest_centroid(rows, basis, centroids)
    return (gamma.float()[cluster] * rows + beta.float()[cluster]).to(y.dtype).view(y.shape)


def nearest_centroid(rows: Tensor, basis: Tensor | None, centroids: Tensor) -> Tensor:
    """Index (M,) int64 of the centroid nearest to each projected row; the first one on a tie."""
    projected = rows if basis is None else rows @ basis.float()
    centroids = centroids.float()
    distance = centroids.square().sum(-1) - 2 * projected @ centroids.T  # ||z||^2 is the same for all of them
    return distance.argmin(-1)


def rotate(x: Tensor, inverse: bool) -> Tensor:
    """R x of the rows of x (..., K), or R^T x: see ``rotation.py``."""
    check_rotate(x)
    with types_as_they_are(x):
        return rotate_rows(x, inverse).contiguous()


def types_as_they_are(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast has chosen the types of an op's inputs; the products inside, which are part of it, it leaves alone."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


for _kernel in (linear, expert_linear, expert_transposed, conv, embedding, dequantize, unpack, cluster_affine, rotate):
    torch.library.register_kernel(f"catquant::{_kernel.__name__}", None, _kernel)
