"""Two factors in float16 whose product keeps what it can: every rank is free to shift its size from one to the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 65504.0  # of float16, whose values have all their bits down to 2**-14
_SHIFTS = (0, *(sign * shift for shift in range(2, 21, 2) for sign in (1, -1)))  # in powers of two
_ROUNDING = 2.0**-20  # square of an error that is float16's rounding and no more
_BETWEEN = 2.0**-8, 2.0**4  # a model in float16 multiplies by ``into`` first: what comes out has to fit as well


def balanced(out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the product ``out`` (N, r) times ``into`` (r, K), in float32, each rank scaled by a power of two.

    Both factors of a rank get the same largest value, or another share of it where fewer values are below the range of
    float16 then. Rows of ``out`` may differ by many decades: each counts by its error relative to its own size, as long as
    neither factor as a whole loses more than its rounding.

    Args:
        out, into: finite, in float32.
    """
    logs, used, start = _same_size(out, into)
    units = [x * (-log).exp2() for x, log in ((out, logs[0]), (into.T, logs[1]))]
    norm = units[1].norm(dim=0)
    best, least = start, torch.full_like(start, torch.inf)
    for shift in _SHIFTS:
        sizes = (logs[0] + start + shift).exp2(), (logs[1] - start - shift).exp2()
        lost = _lost(units[0], sizes[0]) + _lost(units[1], sizes[1])
        between = norm * sizes[1]
        fits = (between >= _BETWEEN[0]) & (between <= _BETWEEN[1])
        better = used & (lost < least) & (fits if shift else used)
        best, least = torch.where(better, start + shift, best), torch.where(better, lost, least)
    return out * best.exp2(), into * (-best).exp2().unsqueeze(1)


def fits_float16(out: Tensor, into: Tensor) -> bool:
    """Whether :func:`balanced` factors of this product, in float32, are within the range of float16."""
    logs, _, start = _same_size(out, into)
    return bool((torch.maximum(logs[0] + start, logs[1] - start) <= math.log2(LARGEST)).all())


def _same_size(out: Tensor, into: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Of each rank: the largest value of both factors as a power of two, whether neither is zero, and the whole power of two
    times which ``out`` is about as large as ``into``.
    """
    sizes = out.abs().amax(0), into.abs().amax(1)
    used = (sizes[0] > 0) & (sizes[1] > 0)
    logs = sizes[0].where(used, 1).log2(), sizes[1].where(used, 1).log2()
    return logs, used, ((logs[1] - logs[0]) / 2).round()


def _lost(unit: Tensor, size: Tensor) -> Tensor:
    """A score of what float16 loses of columns (., r) whose largest value is 1, once that is ``size`` (r,).

    Infinite beyond its range. Else it is the mean square of the errors of all values, each relative to itself, and far more
    than that where the column as a whole is off by more than its rounding.
    """
    error = (unit * size).half().float() / size - unit
    relative = (error / unit.abs().clamp_min(1e-30)).square().mean(0)
    whole = error.square().sum(0) / unit.square().sum(0).clamp_min(1e-30)
    score = relative + 1e6 * (whole - _ROUNDING).clamp_min(0)
    return score.where(score.isfinite(), torch.inf)
