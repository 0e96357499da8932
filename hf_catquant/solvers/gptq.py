"""GPTQ (arXiv 2210.17323) on a least-squares grid, aimed at the float stream, with a joint re-fit.

The objective is the output error over the calibration rows, x in the float and x~ in the quantized stream:

    min ||W x - W_hat x~||^2  =  min tr((W* - W_hat) H (W* - W_hat)^T),   W* = W + W (G - H) H^-1

with H the second moment of x~ (damped) and G the cross moment of x with x~. The steps: move the target part of the
way to W* (:func:`aim`); fit the grid with the diagonal of H as weights; choose levels with error feedback, important
columns first; then alternate the joint least squares of all scales and offsets of a row with sweeps of coordinate
descent over the levels. Each of those steps lowers the objective or leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import Format, check_group_size, group_count, group_width
from ..threads import one_thread
from ..weight import QuantizedWeight, expand_groups
from ._common import AT_ONCE, Moments, check_moments, check_weight
from ._descent import ColumnGrid, descend, feed_back
from ._grid import fit_grid, level_codes
from ._refit import refit

NEEDS_MOMENTS = True

_DAMPING = 0.01  # of the mean of the diagonal of H
_REPAIRS = 5  # times ten each: 1e-2 to 1e3
_SWEEPS = 3
_BAND = 256  # rows of (K, K) that are rearranged at once
_LARGE = 4096  # columns: a matrix of so many squared takes 64 MiB
_SILENT = 1e-30  # mean squares below are no input: float32 has no room for their products


def solve(weight: Tensor, fmt: Format, group_size: int, moments: Moments | None = None) -> QuantizedWeight:
    """Codes, scales and offsets of low output error for ``weight`` (N, K) float.

    Args:
        weight: (N, K) float; it is not changed.
        fmt: the format.
        group_size: columns that share a scale, -1 for all.
        moments: statistics of the inputs; B, their number of runs, divides N.

    Raises:
        ValueError: the weight or the moments are missing, of a wrong shape or not finite, the group size breaks its
            rule, or the gram is so far from a second moment that damping cannot repair it.
    """
    check_weight(weight)
    moments = check_moments(moments, weight, "gptq")
    check_group_size(group_size)
    runs = weight.detach().float().view(len(moments.gram), -1, weight.shape[1])
    factor = unit_factor(moments.gram)
    gram = moments.gram * factor
    order = act_order(gram)
    gram, lower = factorise(gram, order)
    share, ridge = trust(moments.count, weight.shape[1])
    # Rows do not know each other.
    pieces = runs.split(max(1, AT_ONCE // (len(runs) * weight.shape[1])), dim=1)
    scarce = weight.shape[1] >= _LARGE and runs.shape[1] <= weight.shape[1]
    if scarce:  # targets take less memory than what they are made from, and a factor is sooner made again than kept
        del lower
    ridged = ridge_factor(gram, ridge)
    targets: Iterator[Tensor] = (
        aim(w, drifted(w, moments, factor), gram, share, ridge, ridged).mT.contiguous() for w in pieces
    )
    if scarce:
        targets = iter(list(targets))
        del ridged
        lower, _ = _cholesky(_permuted(gram, order))
    codes = torch.empty(runs.shape, dtype=torch.uint8, device=weight.device)
    grids = torch.empty(2, *runs.shape[:2], group_count(weight.shape[1], group_size), device=weight.device)
    start = 0
    for target in targets:
        rows = slice(start, start := start + target.shape[-1])
        levels, *grid = _fit(target, gram, lower, order, fmt, group_size)
        codes[:, rows] = level_codes(levels, fmt).mT
        for held, found in zip(grids, grid, strict=True):
            if found is not None:
                held[:, rows] = found
    scale, offset = grids.flatten(1, 2)
    return QuantizedWeight(codes.view(weight.shape), scale, offset if fmt.affine else None)


def unit_factor(gram: Tensor) -> Tensor:
    """What makes the mean diagonal 1 in every run (B, 1, 1), which changes no solution; 0 where no input came."""
    size = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    size = torch.where(size < 0, torch.ones_like(size), size)  # no second moment: :func:`factorise` refuses it
    return torch.where(size > _SILENT, 1 / size, torch.zeros_like(size))


def drifted(runs: Tensor, moments: Moments, factor: Tensor) -> Tensor:
    """W (G - H) (B, n, K) for ``runs`` W (B, n, K), with both moments times ``factor``; their difference is never whole."""
    out = torch.empty_like(runs)
    for columns in _bands(moments.gram, 4 * _BAND):
        out[..., columns] = runs @ (moments.cross[..., columns] * factor).sub_(moments.gram[..., columns] * factor)
    return out


def act_order(gram: Tensor) -> Tensor:
    """Columns (B, K) int64 by ascending second moment: feed_back starts from the last, so the largest come first."""
    return gram.diagonal(dim1=1, dim2=2).sort(dim=-1, stable=True).indices


def trust(count: int, columns: int) -> tuple[float, float]:
    """Share of W* - W to take and ridge of its regression, relative to the mean diagonal of H.

    With r calibration rows a column the ridge is 1 / sqrt(r): while data is short, only directions with plenty of
    signal are re-aimed. The share is 0.7 and goes to 1 as r / (r + 256): a regression on a noisy stream shrinks the
    outputs, which costs more in later layers than the error of this one shows. Both are fits to what worked best on
    held-out rows of text and vision models, r from 0.3 to 200.
    """
    ratio = count / columns
    return 0.7 + 0.3 * ratio / (ratio + 256), 1 / math.sqrt(ratio)


def factorise(gram: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """H (B, K, K), the damped gram, and the lower Cholesky factor of H with its columns in ``order`` (B, K).

    Where one percent of the mean diagonal is not enough damping for a run, it is multiplied by ten, and again.

    Args:
        gram: it is overwritten, and becomes H.
        order: of the columns.

    Raises:
        ValueError: that did not help.
    """
    _symmetrise(gram)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    given, mean = diagonal.clone(), diagonal.mean(-1)
    damping = torch.where(mean > 0, _DAMPING * mean, torch.ones_like(mean))  # no input at all: every H will do
    for _ in range(_REPAIRS + 1 if bool((mean >= 0).all()) else 0):
        torch.add(given, damping.unsqueeze(-1), out=diagonal)
        lower, failed = _cholesky(_permuted(gram, order))
        if not bool(failed.any()):
            return gram, lower
        damping = torch.where(failed > 0, 10 * damping, damping)
    raise ValueError(
        f"moments.gram must be a mean of x^T x, got a matrix that is not positive definite even with "
        f"{_DAMPING * 10**_REPAIRS:g} times its mean diagonal added; calibrate again, or use solver rtn"
    )


def ridge_factor(gram: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factor of H + ridge * mean(diag H) I, (B, K, K)."""
    ridged = gram.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(ridge * gram.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True))
    return _cholesky(ridged, check_errors=True)[0]


def aim(runs: Tensor, drift: Tensor, gram: Tensor, share: float, ridge: float, ridged: Tensor | None = None) -> Tensor:
    """The target (B, n, K): W + share * W (G - H) (H + ridge * mean(diag H) I)^-1, for ``runs`` W (B, n, K).

    W (G - H) H^-1 is the regression of the output difference W (x - x~) on x~, estimated from the calibration rows.
    The ridge bounds it where H is nearly singular, and a row never moves by more, measured under H, than its own
    length. ``drift`` is W (G - H); ``ridged`` is :func:`ridge_factor`, where it is known.
    """
    lower = ridge_factor(gram, ridge) if ridged is None else ridged
    # cholesky_solve() would copy the factor.
    move = torch.linalg.solve_triangular(lower, drift.mT, upper=False)
    move = torch.linalg.solve_triangular(lower.mT, move, upper=True).mT
    length, moved = ((t @ gram).mul_(t).sum(-1, keepdim=True).clamp_min(0).sqrt() for t in (runs, move))
    limit = torch.where(moved > length, length / moved, torch.ones_like(moved))
    return runs + move.mul_(share * limit)


def _fit(
    target: Tensor, gram: Tensor, lower: Tensor, order: Tensor, fmt: Format, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels (B, K, n), scale and offset (B, n, G) for the target (B, K, n) under H."""
    runs, columns, rows = target.shape
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale, offset = fit_grid(target.mT.reshape(-1, columns), fmt, group_size, diagonal)
    scale = scale.view(runs, rows, -1)
    offset = None if offset is None else offset.view(scale.shape)
    levels = _fed_back(target, lower, order, _column_grid(scale, offset, columns, group_size), fmt)
    pull = gram @ target
    width = group_width(columns, group_size)
    scale, offset = refit(pull, gram, levels, scale, offset, width)
    for _ in range(_SWEEPS):
        levels = _swept(pull, gram, levels, _column_grid(scale, offset, columns, group_size), fmt)
        scale, offset = refit(pull, gram, levels, scale, offset, width)
    return levels, scale, offset


def _fed_back(target: Tensor, lower: Tensor, order: Tensor, grid: ColumnGrid, fmt: Format) -> Tensor:
    """Levels (B, K, n) by :func:`feed_back`, which takes columns in ``order`` (B, K)."""
    grid = ColumnGrid(*(_reordered(t, order) for t in grid))
    levels = feed_back(_reordered(target, order), lower, grid, fmt)
    return torch.empty_like(target).scatter_(1, order.unsqueeze(-1).expand_as(target), levels)


def _swept(pull: Tensor, gram: Tensor, levels: Tensor, grid: ColumnGrid, fmt: Format) -> Tensor:
    """Levels (B, K, n) after a sweep of :func:`descend`; ``pull`` is H W*."""
    slope = gram @ grid.values(levels)
    return descend(torch.sub(pull, slope, out=slope), gram, levels, grid, fmt)


def _column_grid(scale: Tensor, offset: Tensor | None, columns: int, group_size: int) -> ColumnGrid:
    offset = torch.zeros_like(scale) if offset is None else offset
    return ColumnGrid(*(expand_groups(t, columns, group_size).mT.contiguous() for t in (scale, offset)))


def _reordered(values: Tensor, order: Tensor) -> Tensor:
    """(B, K, n) with its columns in ``order`` (B, K)."""
    return values.gather(1, order.unsqueeze(-1).expand_as(values))


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    """(B, K, K) with rows and columns in ``order`` (B, K)."""
    out = torch.empty_like(gram)
    for rows in _bands(gram):
        band = gram.gather(1, order[:, rows, None].expand_as(out[:, rows]))
        torch.gather(band, 2, order[:, None].expand_as(band), out=out[:, rows])
    return out


def _symmetrise(gram: Tensor) -> None:
    """Let (B, K, K) be half the sum of itself and its transpose, without a copy of it."""
    for rows in _bands(gram):
        half = 0.5 * (gram[:, rows, rows.start :] + gram[:, rows.start :, rows].mT)
        gram[:, rows, rows.start :], gram[:, rows.start :, rows] = half, half.mT


def _bands(gram: Tensor, width: int = _BAND) -> Iterator[slice]:
    """The rows, or columns, of (B, K, K), a few at a time."""
    return (slice(start, min(start + width, gram.shape[1])) for start in range(0, gram.shape[1], width))


def _cholesky(gram: Tensor, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor in the place of ``gram`` (B, K, K), which is contiguous and symmetric, and which (B,) failed.

    LAPACK works column by column: it is given the transpose, which holds the same numbers, and so needs no copy.
    """
    columns, failed = gram.mT, torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    with one_thread():
        return torch.linalg.cholesky_ex(columns, check_errors=check_errors, out=(columns, failed))
