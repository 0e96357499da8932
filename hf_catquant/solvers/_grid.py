"""Grids: scale and offset of every group, by least squares and without data.

For one group the problem is to minimise, over scale, offset and codes,

    sum_k p[k] * (w[k] - scale * level[code[k]] - offset)^2        p >= 0: how much a column counts

Two levels are a weighted 2-means in one dimension, solved exactly by sorting. More levels alternate the nearest code
with the least squares of (scale, offset), which never raises the sum (iterative ternary fitting, PT2-LLM), from the
best of several starts. Min-max or absmax rounding is one of the candidates, so the result is never worse than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import Format, group_count, group_width
from ..weight import expand_groups

# Elements fitted at once: they and their temporaries stay in a processor's cache; a GPU wants larger pieces.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}
# Many levels gain from small steps below the full range, few levels from large ones.
_SHRINK = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.62, 0.54, 0.46)
_ROUNDS, _TRIAL = 16, 4
_TINY = 1e-12  # shares sum to 1 in float32: a sum as small as this is none

Pair = tuple[Tensor, Tensor]  # scale and offset of some groups


def fit_grid(
    weight: Tensor, fmt: Format, group_size: int, column_weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset (N, G) float32 of the groups of ``weight`` (N, K); the offset is None if not affine.

    Args:
        weight: (N, K) float.
        fmt: the format.
        group_size: columns that share a scale, -1 for all.
        column_weight: (B, K) float, at least zero, with B a divisor of N: how much the error of a column counts in
            each of B equal runs of rows. None: all the same.
    """
    rows, columns = weight.shape
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    shares = _shares(torch.ones_like(weight[:1]) if column_weight is None else column_weight, width, groups)
    step = max(1, _CHUNK.get(weight.device.type, _CHUNK["cpu"]) // (groups * width))
    # Made before the temporaries: small results that are kept among large blocks that are freed keep the C library's
    # heap from shrinking, and from using them again.
    found = torch.empty(2, rows, groups, device=weight.device)
    for start in range(0, rows, step):
        values = weight[start : start + step].float()
        # The filler of a narrow last group repeats one of its values, so that it widens no range.
        values = torch.cat((values, values[:, -1:].expand(-1, groups * width - columns)), -1)
        run = torch.arange(start, start + len(values), device=weight.device) // (rows // len(shares))
        part = _fit_groups(values.view(-1, width), shares[run].view(-1, width), fmt)
        for held, new in zip(found, part, strict=True):
            held[start : start + step] = new.view(-1, groups)
    scale, offset = found.unbind()
    return scale, offset if fmt.affine else None


def nearest_codes(weight: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format, group_size: int) -> Tensor:
    """Codes (N, K) uint8 of the levels nearest to ``weight`` (N, K) on the grid (N, G)."""
    values = weight.float() if offset is None else weight.float() - expand_groups(offset, weight.shape[1], group_size)
    values = values / expand_groups(divisor(scale), weight.shape[1], group_size)
    return level_codes(nearest_level(values, fmt), fmt)


def divisor(scale: Tensor) -> Tensor:
    """``scale``, or 1 where it is 0: a group of scale 0 is its offset, whichever codes it has."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def nearest_level(values: Tensor, fmt: Format) -> Tensor:
    """The level nearest to each value, float32 in the shape of ``values``."""
    first, step = fmt.levels[0], fmt.level_step
    if step is not None:
        return ((values - first) / step).round_().clamp_(0, fmt.radix - 1).mul_(step).add_(first)
    levels = torch.tensor(fmt.levels, device=values.device)
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def level_codes(levels: Tensor, fmt: Format) -> Tensor:
    """Codes uint8 of exact ``levels``, in their shape."""
    table = torch.tensor(fmt.levels, device=levels.device)
    return torch.bucketize(levels.contiguous(), (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)


def _shares(column_weight: Tensor, width: int, groups: int) -> Tensor:
    """Weights (B, K) as shares (B, G, width) that sum to 1 in each group; the filler of the last group has none."""
    filler = groups * width - column_weight.shape[1]
    given, even = (
        torch.nn.functional.pad(value.float(), (0, filler)).view(-1, groups, width)
        for value in (column_weight, torch.ones_like(column_weight))
    )
    peak = given.amax(-1, keepdim=True)
    given = torch.where(peak > 0, given / divisor(peak), even)  # first the peak: a sum could overflow
    return given / given.sum(-1, keepdim=True)


def _fit_groups(values: Tensor, shares: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset (R,) of groups (R, w); the offset of a format without one is 0."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if fmt.affine:
        center, half = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
    else:
        center, half = torch.zeros_like(low), torch.maximum(-low, high)
    values = (values - center) / divisor(half)  # in [-1, 1]
    best = _plain(fmt, half)
    error = _error(values, shares, *best, fmt)
    for start in _starts(values, shares, fmt):
        best, error = _better(best, error, start, values, shares, fmt)
    best, _ = _better(best, error, _alternate(values, shares, *best, fmt, _ROUNDS), values, shares, fmt)
    scale, offset = best
    # A constant group has half = 0: its scale is 0 and its offset the constant itself.
    return (scale * half).squeeze(-1), (center + offset * half).squeeze(-1)


def _plain(fmt: Format, like: Tensor) -> Pair:
    """Min-max rounding of values in [-1, 1], or absmax rounding where there is no offset."""
    low, high = fmt.levels[0], fmt.levels[-1]
    if not fmt.affine:
        return torch.full_like(like, 1 / high), torch.zeros_like(like)
    return torch.full_like(like, 2 / (high - low)), torch.full_like(like, -(high + low) / (high - low))


def _starts(values: Tensor, shares: Tensor, fmt: Format) -> Iterator[Pair]:
    """Promising (scale, offset) pairs (R, 1) for values in [-1, 1]; the caller finishes the best one of each group."""
    mean = (shares * values).sum(-1, keepdim=True)
    scale, offset = _plain(fmt, mean)
    if not fmt.affine and fmt.radix == 3:
        yield symmetric_scale(values, shares), offset
    elif not fmt.affine:
        for shrink in _SHRINK:
            yield scale * shrink, offset
    elif fmt.radix == 2:
        yield _two_means(values, shares, fmt)
    elif fmt.radix == 3:
        spread = (shares * (values - mean).square()).sum(-1, keepdim=True).sqrt()
        for center in (mean, mean - 0.5 * spread, mean + 0.5 * spread, torch.zeros_like(mean)):
            yield _alternate(values, shares, symmetric_scale(values - center, shares), center, fmt, _TRIAL)
        yield _alternate(values, shares, scale * 0.7, offset, fmt, _TRIAL)
        yield _alternate(values, shares, scale, offset, fmt, _TRIAL)
    else:
        for shrink in _SHRINK:
            yield _alternate(values, shares, scale * shrink, offset * shrink, fmt, 1)
            yield _alternate(values, shares, scale * shrink, offset * shrink + mean * (1 - shrink), fmt, 1)


def _two_means(values: Tensor, shares: Tensor, fmt: Format) -> Pair:
    """The two levels of least error: the best cut of the sorted values, a global optimum."""
    if values.shape[-1] == 1:
        return _plain(fmt, values)
    ordered, order = values.sort(-1)
    shares = shares.gather(-1, order)
    weight, moment = shares.cumsum(-1), (shares * ordered).cumsum(-1)
    weights = torch.stack((weight[:, :-1], weight[:, -1:] - weight[:, :-1])).clamp_min(_TINY)
    moments = torch.stack((moment[:, :-1], moment[:, -1:] - moment[:, :-1]))
    cut = (moments.square() / weights).sum(0).argmax(-1, keepdim=True)
    low, high = (moments / weights).gather(-1, cut.expand(2, -1, -1))
    scale = (high - low).clamp_min(0) / (fmt.levels[1] - fmt.levels[0])
    return scale, low - scale * fmt.levels[0]


def symmetric_scale(values: Tensor, shares: Tensor) -> Tensor:
    """The scale (R, 1) of levels -s, 0, s with the least error on values (R, w), exactly.

    With the m largest magnitudes off zero, s is their mean and the error falls by (sum p |v|)^2 / sum p, so it is
    enough to try every m.
    """
    size, order = values.abs().sort(-1, descending=True)
    shares = shares.gather(-1, order)
    total, weight = (shares * size).cumsum(-1), shares.cumsum(-1)
    best = (total.square() / weight.clamp_min(_TINY)).argmax(-1, keepdim=True)
    return (total / weight.clamp_min(_TINY)).gather(-1, best)


def _alternate(values: Tensor, shares: Tensor, scale: Tensor, offset: Tensor, fmt: Format, rounds: int) -> Pair:
    """Alternate nearest levels and least squares, up to ``rounds`` times or until no level changes."""
    mean = (shares * values).sum(-1, keepdim=True)
    previous = None
    for _ in range(rounds):
        level = nearest_level((values - offset) / divisor(scale), fmt)
        if previous is not None and torch.equal(level, previous):
            break
        previous = level
        weighted = shares * level
        product, square = (weighted * values).sum(-1, keepdim=True), (weighted * level).sum(-1, keepdim=True)
        if fmt.affine:
            level_mean = weighted.sum(-1, keepdim=True)
            product, spread = product - level_mean * mean, square - level_mean.square()
        else:
            spread = square
        # All values on one level leave the scale free: it stays.
        scale = torch.where(spread > 1e-6 * square, product / divisor(spread), scale).clamp_min(0)
        if fmt.affine:
            offset = mean - scale * level_mean
    return scale, offset


def _error(values: Tensor, shares: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> Tensor:
    level = nearest_level((values - offset) / divisor(scale), fmt)
    return (shares * (values - scale * level - offset).square()).sum(-1, keepdim=True)


def _better(best: Pair, error: Tensor, pair: Pair, values: Tensor, shares: Tensor, fmt: Format) -> tuple[Pair, Tensor]:
    """Of each group the better of two pairs, with its error; the first one on a tie."""
    new_error = _error(values, shares, *pair, fmt)
    better = new_error < error
    scale, offset = (torch.where(better, new, old) for new, old in zip(pair, best, strict=True))
    return (scale, offset), torch.where(better, new_error, error)
