"""How corrected rows are judged: by folds of whole samples, and by a paired bootstrap over samples.

Rows of one sample (tokens of a text, places of an image) are no independent witnesses: a sample is left out of a fit whole,
and drawn again whole.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .answers import Kind, divergences

FOLDS = 5
RESAMPLES = 2000
AGREEMENT_LOSS = 0.0025  # share of held-out rows that may turn from the teacher's answer, beyond what is chance
CHUNK = 1 << 24  # floats that are worked on at once
MANY = 2000  # of more samples the mean is normal, and drawing them again would take minutes


def folds_of(samples: Tensor, seed: int) -> Tensor:
    """The fold (M,) int64 of each row; ``samples`` (M,) int64 numbers what the rows belong to from 0 on."""
    order = torch.randperm(int(samples.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return order[samples] % FOLDS


def interval(gain: Tensor, samples: Tensor, seed: int) -> tuple[float, float, float]:
    """Mean of ``gain`` (M,) over all rows, and its 95 % interval: percentiles of samples drawn again with all their rows.

    Of more than ``MANY`` samples it is the normal one, which is the same by then.
    """
    total, count = _by_sample(gain, samples)
    if len(count) > MANY:
        mean, half = float(gain.double().mean()), 1.96 * standard_error(gain, samples)
        return mean, mean - half, mean + half
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, RESAMPLES, size := max(1, CHUNK // len(count))):
        drawn = generator.multinomial(len(count), np.full(len(count), 1 / len(count)), min(size, RESAMPLES - start))
        means.append((drawn @ total) / np.maximum(drawn @ count, 1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(gain.double().mean()), float(low), float(high)


def standard_error(difference: Tensor, samples: Tensor) -> float:
    """That of the mean of ``difference`` (M,) over all rows, samples being independent."""
    total, count = _by_sample(difference, samples)
    residual = total - count * float(difference.double().mean())
    kept = len(count)
    return math.sqrt(float((residual**2).sum()) * kept / max(kept - 1, 1)) / len(difference)


def keeps_answers(change: Tensor, samples: Tensor) -> bool:
    """Whether the teacher's answers are kept, from the ``change`` (M,) of each row's agreement, -1 to 1.

    A gain in divergence can be a mere change of confidence that costs right answers: not for sale. Of few rows a handful
    turns this way and that, so a loss counts from one standard error on.
    """
    return float(change.mean()) >= -AGREEMENT_LOSS - standard_error(change, samples)


def losses(q: Tensor, f: Tensor, kind: Kind) -> Tensor:
    """Distance of every row (M,) from the teacher's ``f`` (M, D)."""
    size = max(1, CHUNK // q.shape[1])
    return torch.cat(
        [divergences(wanted, found, kind) for found, wanted in zip(q.split(size), f.split(size), strict=True)]
    )


def _by_sample(values: Tensor, samples: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of rows (S,) of each sample that has any."""
    _, index = np.unique(samples.numpy(), return_inverse=True)
    return np.bincount(index, values.double().numpy()), np.bincount(index).astype(np.float64)
