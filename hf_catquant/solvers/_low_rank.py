"""A low-rank product beside the codes, where the error weighs most (EoRA, arXiv 2410.21271).

    min ||(W* - W_hat - A B) H^1/2||,   A (N, r), B (r, K)

is solved by the r leading directions of (W* - W_hat) H^1/2. Codes and product are then found in turn: codes for W* - A B, a
product for what they leave (as LoftQ, arXiv 2310.08659, does without H).

W* is what ``gptq`` aims at, and the product acts on the inputs of the quantized stream: what is left for the codes is aimed
already. So they are solved as if both streams were one; aimed once more, W* - A B would move by A B (G - H) H^-1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..threads import one_thread
from ..weight import QuantizedWeight
from ._common import Moments, check_moments
from .gptq import aim, drifted, factorise, trust, unit_factor

_ROUNDS = 3

Solve = Callable[[Tensor, Moments | None], QuantizedWeight]
Values = Callable[[QuantizedWeight], Tensor]


def solve_with_product(
    weight: Tensor, rank: int, moments: Moments | None, solve: Solve, values: Values
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """Codes of ``weight`` (N, K) float32, and the product A (N, r) float16, B (r, K) float16 that is added to them.

    Args:
        weight: (N, K) float32.
        rank: r; more than there are rows or columns is filled up with zeros.
        moments: statistics of the inputs; None: every direction counts the same.
        solve: finds the codes of a matrix from the statistics of its inputs.
        values: what the stored codes stand for, (N, K) float32.
    """
    target, root = _target(weight, moments)
    aimed = None if moments is None else moments._replace(cross=moments.gram)
    quantized = solve(target, aimed)
    for left in reversed(range(_ROUNDS)):
        with one_thread():  # products of few rows with many columns are split by threads, too
            out, into = _leading(target - values(quantized), root, rank)
        if left:
            quantized = solve(target - out.float() @ into.float(), aimed)
    return quantized, out, into


def _target(weight: Tensor, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """W* (N, K), and a square root (K, K) of the second moments of its inputs, in the mean of all runs."""
    if moments is None:
        return weight, torch.eye(weight.shape[1], device=weight.device)
    moments = check_moments(moments, weight, "with a low-rank product")
    factor = unit_factor(moments.gram)
    gram = moments.gram * factor
    gram, _ = factorise(gram, torch.arange(weight.shape[1], device=weight.device).expand(gram.shape[:2]))
    runs = weight.view(len(gram), -1, weight.shape[1])
    target = aim(runs, drifted(runs, moments, factor), gram, *trust(moments.count, weight.shape[1]))
    with one_thread():
        return target.reshape(weight.shape), torch.linalg.cholesky(gram.mean(0))


def _leading(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (N, r), B (r, K) float16 with A B nearest to ``error`` under ``root``, both factors of one size."""
    weighted = (error @ root).double()
    if weighted.shape[0] <= weighted.shape[1]:
        out = torch.linalg.eigh(weighted @ weighted.T).eigenvectors[:, -rank:]
        into = out.T @ error.double()
    else:
        basis = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]
        out = weighted @ basis
        into = torch.linalg.solve_triangular(root.double(), basis.T, upper=False, left=False)
    sizes = (out.norm(dim=0) / into.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    out, into = (out / sizes).half(), (into * sizes[:, None]).half()
    missing = rank - out.shape[1]
    return torch.nn.functional.pad(out, (0, missing)), torch.nn.functional.pad(into, (0, 0, 0, missing))
