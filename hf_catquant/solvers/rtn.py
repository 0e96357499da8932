"""Round to nearest on the best grid: needs no data.

Every group gets the scale and offset of least squared weight error (:mod:`._grid`), then every weight the nearest
level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, check_group_size
from ..weight import QuantizedWeight
from ._common import Moments, check_weight, row_slices
from ._grid import fit_grid, nearest_codes

NEEDS_MOMENTS = False


def solve(weight: Tensor, fmt: Format, group_size: int, moments: Moments | None = None) -> QuantizedWeight:
    """Codes, scales and offsets of least squared error ||W - W_hat||^2 for ``weight`` (N, K) float.

    Args:
        weight: (N, K) float; it is not changed.
        fmt: the format.
        group_size: columns that share a scale, -1 for all.
        moments: not used.

    Raises:
        ValueError: the weight is not a finite, non-empty matrix, or the group size breaks its rule.
    """
    check_weight(weight)
    weight = weight.detach()
    scale, offset = fit_grid(weight, fmt, check_group_size(group_size))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_slices(weight):
        part = None if offset is None else offset[rows]
        codes[rows] = nearest_codes(weight[rows], scale[rows], part, fmt, group_size)
    return QuantizedWeight(codes, scale, offset)
