"""Statistics of calibration, all of them sums over rows, so that batches can come one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .solvers import Moments

_BAND = 256  # rows or columns of a square that are rotated at once
_SUMMED = 512  # rows of a square that are summed at once: more repeat more of the gram, fewer are slow products


class MomentSums:
    """Running second moments of the rows that meet a matrix, in both streams."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, ...] | None = None

    def add(self, float_rows: Tensor, rows: Tensor) -> None:
        """Add rows x of the float stream and x~ of the quantized stream, (B, M, K) each, row by row the same tokens."""
        x, y = float_rows.float(), rows.float()
        self.count += x.shape[1]
        if self._sums is None:
            runs, _, columns = y.shape
            shapes = (runs, columns, columns), (runs, columns, columns), (runs, columns), (runs, columns)
            self._sums = tuple(y.new_zeros(shape) for shape in shapes)
        gram, cross, mean, float_mean = self._sums
        # The gram is symmetric: half of it will do.
        for band in _bands(y.shape[2]):
            gram[:, band, band.start :].baddbmm_(y[..., band].mT, y[..., band.start :])
            cross[:, band].baddbmm_(x[..., band].mT, y)
        mean += y.sum(1)
        float_mean += x.sum(1)

    def result(self) -> Moments | None:
        """The moments, or None if no row came. Ask once: the sums become the moments."""
        if self._sums is None or self.count == 0:
            return None
        gram, cross, mean, float_mean = (total.div_(self.count) for total in self._sums)
        for band in _bands(gram.shape[2]):
            gram[:, band.stop :, band] = gram[:, band, band.stop :].mT
        self._sums = None  # they are the moments now
        return Moments(gram, cross, mean, float_mean, self.count)


def _bands(columns: int) -> Iterator[slice]:
    return (slice(start, min(start + _SUMMED, columns)) for start in range(0, columns, _SUMMED))


def rotated(moments: Moments | None) -> Moments | None:
    """The moments of R x and R x~ from those of x and x~ (``rotation.py``): R G R^T, R m.

    They take the place of ``moments``: of many columns, two more squares are more than all else that calibration holds.
    """
    if moments is None:
        return None
    for square in (moments.gram, moments.cross):
        for rows in square.split(_BAND, dim=1):
            rows.copy_(_rotate(rows))
        for columns in square.split(_BAND, dim=2):
            columns.copy_(_rotate(columns.mT).mT)
    return moments._replace(mean=_rotate(moments.mean), float_mean=_rotate(moments.float_mean))


def _rotate(rows: Tensor) -> Tensor:
    turned: Tensor = torch.ops.catquant.rotate(rows, False)
    return turned


class ChannelSums:
    """Running mean and variance of every channel of (B, C, ...) tensors."""

    def __init__(self) -> None:
        self.count = 0
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add a batch (B, C, ...)."""
        values = x.float().reshape(*x.shape[:2], -1)
        # In float32 deviations from the mean of few positions are exact enough; what they add up to is float64.
        var, mean = (t.double() for t in torch.var_mean(values, dim=2, correction=0))
        positions = values.shape[2]
        first, second = (t.sum(0) * positions for t in (mean, var + mean.square()))
        self.count += len(values) * positions
        self._first = first if self._first is None else self._first + first
        self._second = second if self._second is None else self._second + second

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and population variance (C,) float64."""
        assert self._first is not None
        assert self._second is not None
        mean = self._first / self.count
        return mean, (self._second / self.count - mean.square()).clamp_min(0)


def match_batch_norm(norm: nn.Module, float_stream: ChannelSums, quantized_stream: ChannelSums) -> None:
    """Move the running statistics of ``norm`` so that its output keeps the mean and deviation it had in float.

    With r = var_q / var_f over the calibration data: running_var + eps is multiplied by r, and running_mean becomes
    mean_q - (mean_f - running_mean) * sqrt(r). Only the *change* between the streams is estimated from the few
    calibration samples; the running statistics of the training set stay the base. Channels that are constant in either
    stream keep their variance.
    """
    mean_f, var_f = float_stream.result()
    mean_q, var_q = quantized_stream.result()
    usable = (var_f > 1e-12) & (var_q > 1e-12)
    ratio = torch.where(usable, var_q / var_f.clamp_min(1e-12), torch.ones_like(var_f)).clamp(0.01, 100)
    live: Any = norm
    mean, var, eps = live.running_mean, live.running_var, float(live.eps)
    live.running_var = ((var.double() + eps) * ratio - eps).clamp_min(1e-12).to(var.dtype)
    live.running_mean = (mean_q - (mean_f - mean.double()) * ratio.sqrt()).to(mean.dtype)
