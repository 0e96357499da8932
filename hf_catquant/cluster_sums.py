"""Sums over rows, and the affine maps that they give: the estimator of a correction.

For rows q of the quantized and f of the float model, per cluster k and channel, with prior weight lambda
(``shrinkage``), the affine map (gamma_g, beta_g) of all rows as the prior of the clusters, one slope shared by all channels
as its prior, and the identity as the prior of that:

    gamma "ls"    (n cov_k + lambda gamma_g v) / (n var_k(q) + lambda v)                       v: variance of all rows
    gamma "std"   sqrt((n var_k(f) + lambda gamma_g^2 v) / (n var_k(q) + lambda v))
    beta          (n (f_k - gamma q_k) + lambda (gamma_g q_k + beta_g - gamma q_k)) / (n + lambda)

With lambda = 0 and "ls" this is the published estimator (arXiv 2509.26277; population variance, floor 1e-8, an empty
cluster is the identity), which explodes on few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8


class Sums:
    """Sums over rows by fold and cluster: all that fitting needs, so that batches and processes can add up."""

    def __init__(self, clusters: int, width: int, folds: int = 1) -> None:
        self.count = torch.zeros(folds, clusters, dtype=torch.float64)
        self.values = torch.zeros(5, folds, clusters, width, dtype=torch.float64)  # q, f, q^2, f^2, q f

    def add(self, q: Tensor, f: Tensor, cluster: Tensor, fold: Tensor) -> None:
        """Add rows q, f (M, D) of clusters and folds (M,) int64."""
        folds, clusters = self.count.shape
        slot = fold * clusters + cluster
        self.count.view(-1).index_add_(0, slot, torch.ones(len(slot), dtype=torch.float64))
        q, f = q.double(), f.double()
        for total, part in zip(self.values, (q, f, q * q, f * f, q * f), strict=True):
            total.view(folds * clusters, -1).index_add_(0, slot, part)

    def without(self, fold: int | None) -> tuple[Tensor, Tensor]:
        """Count (C,) and sums (5, C, D) over all folds but one."""
        count, values = self.count.sum(0), self.values.sum(1)
        return (count, values) if fold is None else (count - self.count[fold], values - self.values[:, fold])


def solve(count: Tensor, values: Tensor, gamma: str, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Gamma and beta (C, D) float64 from count (C,) and sums (5, C, D)."""
    everything = values.sum(1, keepdim=True)
    total = _affine(count.sum().view(1), everything, gamma, shrinkage, _one_slope(count.sum(), everything, shrinkage))
    return _affine(count, values, gamma, shrinkage, total)


def _one_slope(count: Tensor, values: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """The map of all rows and channels together: one slope, which keeps the order of the logits, and no offset."""
    n = count.clamp_min(1)
    mean_q, mean_f, square_q, _, product = values / n
    var_q = (square_q - mean_q**2).clamp_min(0).mean()
    cov = (product - mean_q * mean_f).mean()
    v = var_q.clamp_min(VARIANCE_FLOOR)
    slope = ((count * cov + prior * v) / (count * var_q + prior * v).clamp_min(VARIANCE_FLOOR)).clamp_min(0.1)
    return slope.expand_as(mean_q), torch.zeros_like(mean_q)


def _affine(
    count: Tensor, values: Tensor, kind: str, prior: float, outer: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    n = count.clamp_min(1).unsqueeze(-1)
    mean_q, mean_f, square_q, square_f, product = values / n
    var_q, var_f = (square_q - mean_q**2).clamp_min(0), (square_f - mean_f**2).clamp_min(0)
    cov = product - mean_q * mean_f
    weight = count.unsqueeze(-1)
    gamma_g, beta_g = outer
    # The scale of the prior is the variance of all rows: rows of all clusters together.
    whole = values.sum(1, keepdim=True) / count.sum().clamp_min(1)
    v = (whole[2] - whole[0] ** 2).clamp_min(VARIANCE_FLOOR)
    if kind == "ls":
        gamma = (weight * cov + prior * gamma_g * v) / (weight * var_q + prior * v).clamp_min(
            VARIANCE_FLOOR * weight.clamp_min(1)
        )
    else:
        floor = VARIANCE_FLOOR * weight.clamp_min(1)
        gamma = ((weight * var_f + prior * gamma_g**2 * v) / (weight * var_q + prior * v).clamp_min(floor)).sqrt()
        constant = (var_q <= VARIANCE_FLOOR) | (var_f <= VARIANCE_FLOOR)
        gamma = torch.where(constant, gamma_g.expand_as(gamma), gamma)
    pull = gamma_g * mean_q + beta_g - gamma * mean_q
    beta = (weight * (mean_f - gamma * mean_q) + prior * pull) / (weight + prior).clamp_min(1e-12)
    empty = weight == 0
    # Without a prior an empty cluster has nothing to fall back on: it is the identity, as published.
    gamma_e, beta_e = outer if prior > 0 else (torch.ones_like(gamma_g), torch.zeros_like(beta_g))
    return torch.where(empty, gamma_e.expand_as(gamma), gamma), torch.where(empty, beta_e.expand_as(beta), beta)
