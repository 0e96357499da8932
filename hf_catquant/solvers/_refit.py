"""The joint re-fit: with the codes fixed, all scales and offsets of a row together, by least squares under H.

With the codes fixed W_hat of a row is linear in its p = 2 G (or G) numbers theta, so

    f(theta) = theta^T M theta - 2 b^T theta + const,   M = A^T H A,   b = A^T H w*

where the columns of A (K, p) are, group after group, the levels of that group, then its ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..threads import one_thread

_RIDGE = 1e-3
_ELEMENTS = 1 << 25  # of the systems that are held at once: 128 MiB


def refit(
    aim: Tensor, gram: Tensor, levels: Tensor, scale: Tensor, offset: Tensor | None, width: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset (B, n, G) of least error under H, row by row; a row keeps what it had if that is better.

    A ridge toward the given grid, relative to the diagonal of M, keeps directions that the data cannot tell apart
    where they were.

    Args:
        aim: H W*, (B, K, n).
        gram: H, (B, K, K).
        levels: (B, K, n).
        scale: (B, n, G).
        offset: (B, n, G) or None.
        width: columns of a group.
    """
    groups = scale.shape[-1]
    filler = groups * width - gram.shape[-1]
    aim, levels = aim.mT, levels.mT
    if filler:  # without any it would be a copy
        gram = torch.nn.functional.pad(gram, (0, filler, 0, filler))
        aim, levels = (torch.nn.functional.pad(t, (0, filler)) for t in (aim, levels))
    theta = scale if offset is None else torch.cat((scale, offset), -1)
    step = max(1, _ELEMENTS // (len(gram) * theta.shape[-1] ** 2))
    parts = []
    for start in range(0, theta.shape[1], step):
        some = slice(start, start + step)
        system, right = _system(aim[:, some], gram, levels[:, some], groups, offset is not None)
        parts.append(_solve(system, right, theta[:, some], groups))
    theta = torch.cat(parts, 1)
    return theta[..., :groups], None if offset is None else theta[..., groups:]


def _system(aim: Tensor, gram: Tensor, levels: Tensor, groups: int, affine: bool) -> tuple[Tensor, Tensor]:
    """M (B, n, p, p) and b (B, n, p)."""
    shape = (*levels.shape[:2], groups, -1)
    grouped = levels.reshape(shape)
    right = (levels * aim).reshape(shape).sum(-1)
    size = 2 * groups if affine else groups
    whole = levels.new_empty(*levels.shape[:2], size, size)
    system = whole[..., :groups, :groups]
    for g in range(groups):
        columns = slice(g * grouped.shape[-1], (g + 1) * grouped.shape[-1])
        # The upper triangle is enough: columns up to those of group g.
        product = levels[..., columns] @ gram[:, columns, : columns.stop]
        product = product.mul_(levels[..., : columns.stop]).reshape(*shape[:2], g + 1, -1).sum(-1)
        system[..., : g + 1, g] = product
        system[..., g, : g + 1] = product
    if not affine:
        return whole, right
    sums = gram.reshape(*gram.shape[:2], groups, -1).sum(-1)  # (B, K, G)
    mixed = (grouped.transpose(1, 2) @ sums.reshape(len(gram), groups, -1, groups)).transpose(1, 2)
    whole[..., :groups, groups:], whole[..., groups:, :groups] = mixed, mixed.mT
    whole[..., groups:, groups:] = sums.reshape(len(gram), groups, -1, groups).sum(2).unsqueeze(1)
    return whole, torch.cat((right, aim.reshape(shape).sum(-1)), -1)


def _solve(system: Tensor, right: Tensor, theta: Tensor, groups: int) -> Tensor:
    """The better of ``theta`` and the ridge solution around it; scales are the first ``groups`` and stay positive."""
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    size = diagonal.clamp_min(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))  # a group of only zero levels
    slope = right - (system @ theta.unsqueeze(-1)).squeeze(-1)
    scaled = size.unsqueeze(-1) * size.unsqueeze(-2)
    # Column by column, as LAPACK has it: the factor then takes the place of its matrix.
    scaled = torch.div(system.mT, scaled, out=scaled).mT
    scaled.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    failed = torch.empty(scaled.shape[:2], dtype=torch.int32, device=scaled.device)
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(scaled, out=(scaled, failed))
    step = torch.cholesky_solve((slope / size).unsqueeze(-1), factor).squeeze(-1) / size
    step[..., :groups] = torch.maximum(step[..., :groups], -theta[..., :groups])
    # f(theta + step) - f(theta); not true of NaN, so a failed system changes nothing
    change = (step * (system @ step.unsqueeze(-1)).squeeze(-1)).sum(-1) - 2 * (step * slope).sum(-1)
    return torch.where(((change < 0) & (failed == 0)).unsqueeze(-1), theta + step, theta)
