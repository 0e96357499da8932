"""A convolution's input as rows that meet its weight (N, K) in a plain product."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad


def patches(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The part of x (B, C, *spatial) under the kernel at every position: (B, positions, C * prod(kernel_size))."""
    if any(padding):
        x = pad(x, [side for side in reversed(padding) for _ in range(2)])
    batch, channels = x.shape[:2]
    sides = zip(x.shape[2:], kernel_size, stride, dilation, strict=True)
    spatial = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sides]
    batch_step, channel_step, *steps = x.stride()
    moves = [step * s for step, s in zip(steps, stride, strict=True)]
    inside = [step * d for step, d in zip(steps, dilation, strict=True)]
    shape, strides = (batch, *spatial, channels, *kernel_size), (batch_step, *moves, channel_step, *inside)
    return x.as_strided(shape, strides, x.storage_offset()).reshape(batch, math.prod(spatial), -1)
