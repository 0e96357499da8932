"""Checks on the arguments of ops, made where their fakes and kernels begin: torch's own checks, so that they also hold in
a traced graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import ACTIVATION_FORMATS, get_format, group_count
from .packing import packed_width

COMPUTE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes that a model can compute in


def check_devices(first: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors that are on other devices: kernels read all of them where the first one lies.

    Raises:
        RuntimeError: naming the devices.
    """
    for other in others:
        torch._check(
            other is None or other.device == first.device,
            lambda other=other: (
                f"the input and all tensors of a layer must be on one device, got {first.device} and {other.device}: "
                "move them with .to(), and load what is on meta"
            ),
        )


def check_weight(
    packed: Tensor, scale: Tensor, offset: Tensor | None, weights: str, group_size: int, columns: int
) -> None:
    """Refuse packed weights whose dtypes or shapes do not agree with the format.

    Raises:
        RuntimeError: naming the tensor, the rule and the value.
    """
    fmt = get_format(weights)
    check_packed(packed, weights, group_size, columns)
    check_devices(packed, scale, offset)
    shape = (packed.shape[0], group_count(columns, group_size))
    torch._check(
        tuple(scale.shape) == shape, lambda: f"weight_scale must be (N, G) = {shape}, got {tuple(scale.shape)}"
    )
    torch._check(
        (offset is not None) == fmt.affine,
        lambda: f"weight_offset must be {'given' if fmt.affine else 'None'} for {weights}",
    )
    if offset is not None:
        torch._check(
            tuple(offset.shape) == shape, lambda: f"weight_offset must be (N, G) = {shape}, got {tuple(offset.shape)}"
        )


def check_packed(packed: Tensor, weights: str, group_size: int, columns: int) -> None:
    """Refuse packed codes of another dtype or width than the format has.

    Raises:
        RuntimeError: naming the rule and the value.
    """
    width = packed_width(get_format(weights), columns, group_size)
    torch._check(packed.dtype == torch.uint8, lambda: f"weight_packed must be uint8, got {packed.dtype}")
    torch._check(
        packed.dim() == 2 and packed.shape[1] == width,
        lambda: (
            f"weight_packed must be (N, {width}) for {columns} {weights} columns in groups of {group_size}, "
            f"got {tuple(packed.shape)}"
        ),
    )


def check_input(
    x: Tensor, packed: Tensor, bias: Tensor | None, activations: str | None, input_scale: Tensor | None
) -> None:
    """Refuse inputs that are not floating point or not where the weight is, a bias of another length than it has rows, or
    an unknown activation format.

    Raises:
        RuntimeError: naming the tensor, the rule and the value.
    """
    rows = packed.shape[0]
    check_devices(x, packed, bias)
    torch._check(x.dtype in COMPUTE, lambda: f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if bias is not None:
        torch._check(tuple(bias.shape) == (rows,), lambda: f"bias must be (N,) = ({rows},), got {tuple(bias.shape)}")
    if activations is not None:
        torch._check(
            activations in ACTIVATION_FORMATS,
            lambda: f"activations must be None or one of {', '.join(ACTIVATION_FORMATS)}, got {activations!r}",
        )
    torch._check(
        input_scale is None or activations is not None, lambda: "input_scale was given but activations is None"
    )


def check_experts(
    x: Tensor,
    ends: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    activations: str | None,
) -> int:
    """Refuse rows x (S, K) that are no matrix, and ends (E,) that do not divide the rows of the weight (E * N, K).

    Returns:
        N.

    Raises:
        RuntimeError: naming the tensor, the rule and the value.
    """
    torch._check(x.dim() == 2, lambda: f"x must be (S, K), got {tuple(x.shape)}")
    torch._check(
        ends.dim() == 1 and ends.dtype == torch.int64 and len(ends) > 0,
        lambda: f"ends must be (E,) int64 with E > 0, got {tuple(ends.shape)} {ends.dtype}",
    )
    check_devices(x, ends, bias)
    check_weight(packed, scale, offset, weights, group_size, x.shape[-1])
    torch._check(
        packed.shape[0] % len(ends) == 0,
        lambda: f"weight_packed must have a multiple of the {len(ends)} experts as rows, got {packed.shape[0]}",
    )
    rows = packed.shape[0] // len(ends)
    check_input(x, packed, None, activations, None)
    torch._check(
        bias is None or tuple(bias.shape) == (len(ends), rows),
        lambda: f"bias must be (E, N) = {(len(ends), rows)}, got {() if bias is None else tuple(bias.shape)}",
    )
    return rows


def check_cluster_affine(y: Tensor, basis: Tensor | None, centroids: Tensor, gamma: Tensor, beta: Tensor) -> None:
    """Refuse correction tensors whose shapes do not agree with y (..., D).

    Raises:
        RuntimeError: naming the tensor, the rule and the value.
    """
    torch._check(y.is_floating_point(), lambda: f"y must be floating point, got {y.dtype}")
    check_devices(y, basis, centroids, gamma, beta)
    width, clusters = y.shape[-1], gamma.shape[0]
    rank = width if basis is None else basis.shape[-1]
    for name, tensor, shape in (
        ("basis", basis, (width, rank)),
        ("centroids", centroids, (clusters, rank)),
        ("gamma", gamma, (clusters, width)),
        ("beta", beta, (clusters, width)),
    ):
        if tensor is not None:
            torch._check(
                tuple(tensor.shape) == shape,
                lambda name=name, tensor=tensor, shape=shape: (
                    f"{name} must be {shape} for y of width {width}, got {tuple(tensor.shape)}"
                ),
            )


def check_conv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    weights: str,
    group_size: int,
    kernel_size: Sequence[int],
    groups: int,
) -> None:
    """Refuse a convolution input whose rank or channels do not agree with the packed weight.

    Raises:
        RuntimeError: naming the rule and the value.
    """
    rank = len(kernel_size) + 2
    torch._check(
        rank in (3, 4) and x.dim() == rank,
        lambda: (
            f"x must be (B, C, *spatial) with {len(kernel_size)} spatial dimensions (1 or 2), got {tuple(x.shape)}"
        ),
    )
    torch._check(
        x.shape[1] % groups == 0 and packed.shape[0] % groups == 0,
        lambda: f"channels in {x.shape[1]} and out {packed.shape[0]} must be multiples of groups {groups}",
    )
    columns = x.shape[1] // groups
    for size in kernel_size:
        columns *= size
    check_weight(packed, scale, offset, weights, group_size, columns)


def check_indices(indices: Tensor, packed: Tensor) -> None:
    """Refuse row indices that are not int32 or int64, or not where the packed rows are.

    Raises:
        RuntimeError: naming the dtype or the devices.
    """
    check_devices(indices, packed)
    torch._check(
        indices.dtype in (torch.int32, torch.int64), lambda: f"indices must be int32 or int64, got {indices.dtype}"
    )


def check_rotate(x: Tensor) -> None:
    """Refuse what has no rows of floating-point numbers.

    Raises:
        RuntimeError: naming the rule and the value.
    """
    torch._check(
        x.dim() > 0 and x.is_floating_point() and x.shape[-1] > 0,
        lambda: f"x must be (..., K) floating point with K > 0, got {tuple(x.shape)} {x.dtype}",
    )
