"""Feature discrimination: the closed forms of the two-Gaussian model, and the measure of real features.

Two classes X ~ N(mu, sigma^2) and Y ~ N(-mu, sigma^2); features standardised over both have mu^2 + sigma^2 = 1
(arXiv 2504.13792). Discrimination is the expected squared distance between the classes over that inside the classes,

    D = E(X - Y)^2 / (E(X - X')^2 + E(Y - Y')^2) = 1/2 + (m_X - m_Y)^2 / (2 (v_X + v_Y))

of values with means m and variances v. D_b and D_t are the same of binary 1[x > tau] and of ternary sign(x) 1[|x| > tau].
Quantizing standardised features can *raise* it: binary for some tau if mu > 0.7648, ternary if mu > 0.6635.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .metrics.feature_discrimination.measure import feature_discrimination, stream_discrimination
from .metrics.feature_discrimination.streaming import FeatureStatistics

__all__ = [
    "BINARY_CROSSOVER",
    "FEATURE_DISCRIMINATION",
    "TERNARY_CROSSOVER",
    "TERNARY_CROSSOVER_TAU",
    "FeatureStatistics",
    "binary_discrimination",
    "discrimination",
    "feature_discrimination",
    "normal_distribution",
    "stream_discrimination",
    "ternary_discrimination",
]

# What ``evaluate.load`` takes: the folder of the metric, which works offline.
FEATURE_DISCRIMINATION = str(Path(__file__).resolve().parent / "metrics" / "feature_discrimination")

# Standardised features, least mu for which D_b > D at some tau. The best tau is 0, where D_b > D if
# 2 Phi(mu / sigma) - 1 > mu; this is the root.
BINARY_CROSSOVER = 0.7647883442
# Least mu for which D_t > D at some tau, that is (p - q)^2 > mu^2 (p + q), and the tau at which it happens first.
TERNARY_CROSSOVER = 0.6635118961
TERNARY_CROSSOVER_TAU = 0.33847057


def discrimination(mu: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
    """D = 1/2 + mu^2 / sigma^2 of the float features.

    Args:
        mu: half the distance between the class means, any shape.
        sigma: deviation inside a class, of a shape that broadcasts with ``mu``.

    Returns:
        float64 of the broadcast shape; a scalar for scalars.

    Raises:
        ValueError: mu is not finite, or sigma is not finite and positive.
    """
    mu, sigma = _model(mu, sigma)
    return 0.5 + np.square(mu / sigma)


def binary_discrimination(mu: ArrayLike, sigma: ArrayLike, tau: ArrayLike) -> NDArray[np.float64]:
    """D_b of 1[x > tau]: 1/2 + (a - b)^2 / (2 (a (1 - a) + b (1 - b))), a = P(X > tau), b = P(Y > tau).

    {-1, +1} instead of {0, 1} has the same D_b. Arguments, shapes and errors are those of :func:`discrimination`; where
    every value falls on one side of ``tau``, D_b is 1/2.

    Raises:
        ValueError: mu or tau is not finite, or sigma is not finite and positive.
    """
    mu, sigma = _model(mu, sigma)
    tau = _finite(tau, "tau")
    a, b = normal_distribution((mu - tau) / sigma), normal_distribution((-mu - tau) / sigma)
    # 1 - a as a tail of its own: a itself rounds to 1 where the classes are far apart.
    not_a, not_b = normal_distribution((tau - mu) / sigma), normal_distribution((tau + mu) / sigma)
    return _ratio(np.square(a - b), 2 * (a * not_a + b * not_b))


def ternary_discrimination(mu: ArrayLike, sigma: ArrayLike, tau: ArrayLike) -> NDArray[np.float64]:
    """D_t of sign(x) 1[|x| > tau]: 1/2 + (p - q)^2 / ((p + q) - (p - q)^2), p = P(X > tau), q = P(X < -tau).

    tau = 0 gives the D_b of tau = 0. Arguments, shapes and errors are those of :func:`discrimination`; where every value
    becomes 0, D_t is 1/2.

    Raises:
        ValueError: mu is not finite, sigma is not finite and positive, or tau is not finite or negative.
    """
    mu, sigma = _model(mu, sigma)
    tau = _finite(tau, "tau")
    if np.any(tau < 0):
        raise ValueError(f"tau of ternary features must be at least 0, got {float(np.min(tau))}")
    p, q = normal_distribution((mu - tau) / sigma), normal_distribution((-mu - tau) / sigma)
    zero = normal_distribution((tau - mu) / sigma) - q
    # (p + q) - (p - q)^2 = (p + q) P(X becomes 0) + 4 p q: the same without cancellation where the classes are far apart.
    return _ratio(np.square(p - q), (p + q) * zero + 4 * p * q)


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {float(array[~np.isfinite(array)][0])}")
    return array


def _model(mu: ArrayLike, sigma: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mu, sigma = _finite(mu, "mu"), _finite(sigma, "sigma")
    if np.any(sigma <= 0):
        raise ValueError(f"sigma must be positive, got {float(np.min(sigma))}")
    return mu, sigma


def normal_distribution(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(N(0, 1) < x); by erfc because torch.special.ndtr is 0 below -8.3."""
    return 0.5 * torch.special.erfc(torch.as_tensor(-x / math.sqrt(2), dtype=torch.float64)).numpy()


def _ratio(between: NDArray[np.float64], inside: NDArray[np.float64]) -> NDArray[np.float64]:
    """1/2 + between / inside; 1/2 where no value differs from another, inf where only those of a class are the same."""
    empty = np.where(between > 0, np.inf, 0.0)
    return 0.5 + np.divide(between, inside, out=empty, where=inside > 0)[()]
