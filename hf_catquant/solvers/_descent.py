"""Choosing levels under a second moment H: column after column, each one knowing the errors of the others.

Both passes lower tr((W* - W_hat) H (W* - W_hat)^T) on a fixed grid. Tensors are (B, K, n): the n rows of each of B
runs, transposed, so that a column of the weight is contiguous. Columns go in blocks: inside a block every choice
reaches the next column at once, the rest of the matrix hears of a whole block by one product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import Format
from ..kernels import columns
from ._grid import divisor, nearest_level

_BLOCK = columns.BLOCK


class ColumnGrid(NamedTuple):
    """The grid of every weight: scale and offset (B, K, n) float32 (a zero offset where the format has none)."""

    scale: Tensor
    offset: Tensor

    def nearest(self, column: int, wanted: Tensor, fmt: Format) -> Tensor:
        """The levels (B, n) nearest to the values ``wanted`` (B, n) of a column."""
        return nearest_level((wanted - self.offset[:, column]) / divisor(self.scale[:, column]), fmt)

    def values(self, levels: Tensor) -> Tensor:
        """W_hat (B, K, n)."""
        return torch.addcmul(self.offset, self.scale, levels)


def feed_back(target: Tensor, lower: Tensor, grid: ColumnGrid, fmt: Format) -> Tensor:
    """Levels (B, K, n) by error feedback, from the last column to the first (GPTQ, arXiv 2210.17323).

    With H = L L^T the objective is ||E L||^2, E = W* - W_hat, and column j of E L meets only the errors of columns
    i >= j. So each level is the nearest to

        target[j] + sum_{i > j} E[i] L[i, j] / L[j, j]

    which is GPTQ's update: its factor of H^-1 is L^-1, and needs no inverse this way.

    Args:
        target: W*, (B, K, n).
        lower: L, (B, K, K), in the same order of columns: the most important ones last.
        grid: the grid in that order.
        fmt: the format.
    """
    levels, error = torch.empty_like(target), torch.zeros_like(target)
    for end in range(target.shape[1], 0, -_BLOCK):
        block = slice(max(0, end - _BLOCK), end)
        carried = lower[:, end:, block].mT @ error[:, end:]
        if not columns.feed_back(target, lower, carried, *grid, fmt, block, levels, error):
            _feed_back(target, lower, carried, grid, fmt, block, levels, error)
    return levels


def _feed_back(
    target: Tensor,
    lower: Tensor,
    carried: Tensor,
    grid: ColumnGrid,
    fmt: Format,
    block: slice,
    levels: Tensor,
    error: Tensor,
) -> None:
    """Put levels and errors of the columns of ``block`` where they belong. ``carried`` (B, columns, n) is overwritten."""
    pivot = lower.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    for k in range(block.stop - 1, block.start - 1, -1):
        at = k - block.start
        levels[:, k] = grid.nearest(k, target[:, k] + carried[:, at] / pivot[:, k], fmt)
        error[:, k] = target[:, k] - grid.scale[:, k] * levels[:, k] - grid.offset[:, k]
        carried[:, :at].addcmul_(lower[:, k, block.start : k, None], error[:, k, None])


def descend(slope: Tensor, gram: Tensor, levels: Tensor, grid: ColumnGrid, fmt: Format) -> Tensor:
    """One sweep of coordinate descent: each level in turn becomes the best one, given all others.

    The objective never rises.

    Args:
        slope: H (W* - W_hat), (B, K, n); it is overwritten.
        gram: H, (B, K, K).
        levels: (B, K, n), those of W_hat.
        grid: the grid.
        fmt: the format.
    """
    new = levels.clone()
    for start in range(0, levels.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, levels.shape[1]))
        change = torch.empty_like(levels[:, block], memory_format=torch.contiguous_format)
        if not columns.descend(slope, gram, levels, *grid, fmt, block, new, change):
            _descend(slope, gram, levels, grid, fmt, block, new, change)
        slope[:, block.stop :] -= gram[:, block.stop :, block] @ change
    return new


def _descend(
    slope: Tensor,
    gram: Tensor,
    levels: Tensor,
    grid: ColumnGrid,
    fmt: Format,
    block: slice,
    new: Tensor,
    change: Tensor,
) -> None:
    """Put new levels, and the change of values (B, columns, n), of the columns of ``block`` where they belong."""
    pivot = gram.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    for k in range(block.start, block.stop):
        value = grid.scale[:, k] * levels[:, k] + grid.offset[:, k]
        new[:, k] = grid.nearest(k, value + slope[:, k] / pivot[:, k], fmt)
        change[:, k - block.start] = grid.scale[:, k] * (new[:, k] - levels[:, k])
        later = slice(k + 1, block.stop)
        slope[:, later].addcmul_(gram[:, later, k, None], change[:, k - block.start, None], value=-1)
