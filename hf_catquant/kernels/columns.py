"""The passes of :mod:`..solvers._descent` over a block of columns, by the compiled library.

In torch a column is ten calls on few values each, which take longer than all else that a solver does with a small matrix.
The library takes the same steps in the same order, so both give the same bits.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..formats import Format
from . import native

BLOCK = 128  # columns of a block at most, as in csrc/columns.c


def descend(
    slope: Tensor,
    gram: Tensor,
    old: Tensor,
    scale: Tensor,
    offset: Tensor,
    fmt: Format,
    columns: slice,
    levels: Tensor,
    change: Tensor,
) -> bool:
    """Put the levels of ``columns`` and the change of their values where they belong; False if the library does not serve.

    Args:
        slope, old, scale, offset: (B, K, n) float32, contiguous.
        gram: (B, K, K) float32, symmetric.
        fmt: the format.
        columns: the block, at most ``BLOCK`` of them.
        levels: (B, K, n) float32, those of the columns are written.
        change: (B, columns, n) float32, written.
    """
    return _run("cq_descend", gram, scale, offset, fmt, columns, (slope, old, levels, change))


def feed_back(
    target: Tensor,
    lower: Tensor,
    carried: Tensor,
    scale: Tensor,
    offset: Tensor,
    fmt: Format,
    columns: slice,
    levels: Tensor,
    error: Tensor,
) -> bool:
    """Put the levels and errors of ``columns`` where they belong; False if the library does not serve.

    Args:
        target, scale, offset: (B, K, n) float32, contiguous.
        lower: (B, K, K) float32, lower triangular.
        carried: (B, columns, n) float32, contiguous: what the errors of later columns add up to.
        fmt: the format.
        columns: the block, at most ``BLOCK`` of them.
        levels, error: (B, K, n) float32, those of the columns are written.
    """
    return _run("cq_feed_back", lower, scale, offset, fmt, columns, (target, carried, levels, error))


def _run(
    name: str,
    square: Tensor,
    scale: Tensor,
    offset: Tensor,
    fmt: Format,
    columns: slice,
    matrices: tuple[Tensor, Tensor, Tensor, Tensor],
) -> bool:
    runs, count, rows = scale.shape
    step = fmt.level_step
    whole = all(t.is_contiguous() for t in (scale, offset, *matrices)) and square.stride(0) == count**2
    known = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (square, scale, offset, *matrices))
    fits = columns.stop - columns.start <= BLOCK
    if native.PATH == "reference" or step is None or not (whole and known and fits):
        return False
    block = native.Columns(
        *(t.data_ptr() for t in (scale, offset, square)),
        *(count, rows, columns.start, columns.stop, *square.stride()[1:]),
        *(fmt.levels[0], step, fmt.radix - 1),
    )
    function = getattr(native.loaded(), name)
    pointers = (t.data_ptr() for t in matrices)
    function(ctypes.addressof(block), runs, *pointers, native.path_number, torch.get_num_threads())
    return True
