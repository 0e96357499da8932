"""Feature discrimination: the closed forms of the two-Gaussian model, and the measure of real features.

Two classes of standardised features X ~ N(mu, sigma^2), Y ~ N(-mu, sigma^2), mu^2 + sigma^2 = 1 (arXiv 2504.13792).
Discrimination is the expected squared distance between the classes over that inside the classes,

    D = E(X - Y)^2 / (E(X - X')^2 + E(Y - Y')^2) = 1/2 + mu^2 / sigma^2

and D_b, D_t are the same for binary 1[x > tau] and ternary sign(x) 1[|x| > tau]. Quantizing can *raise* it: binary for
some tau if mu > 0.7647883442, ternary if mu > 0.6635118961.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

FEATURE_DISCRIMINATION = str(Path(__file__).parent / "metrics" / "feature_discrimination")

# Least mu for which some threshold improves discrimination, and the threshold at which it does so first.
BINARY_CROSSOVER = 0.7647883442
TERNARY_CROSSOVER = 0.6635118961
TERNARY_CROSSOVER_TAU = 0.3384705700


def discrimination(mu: ArrayLike) -> NDArray[np.float64]:
    """D of the float features; ``mu`` in (-1, 1), any shape.

    Raises:
        ValueError: mu is not in (-1, 1).
    """
    mu, sigma = _standardised(mu)
    return np.asarray(0.5 + mu**2 / sigma**2)


def binary_discrimination(mu: ArrayLike, tau: ArrayLike = 0.0) -> NDArray[np.float64]:
    """D_b of 1[x > tau]: with a, b the chances that X, Y exceed tau, 1/2 + (a-b)^2 / (2 (a(1-a) + b(1-b))).

    Raises:
        ValueError: mu is not in (-1, 1).
    """
    mu, sigma = _standardised(mu)
    tau = np.asarray(tau, np.float64)
    a, b = ndtr((mu - tau) / sigma), ndtr((-mu - tau) / sigma)
    # 1 - a as a tail of its own: a itself rounds to 1 for classes that are far apart.
    not_a, not_b = ndtr((tau - mu) / sigma), ndtr((tau + mu) / sigma)
    return np.asarray(0.5 + (a - b) ** 2 / (2 * (a * not_a + b * not_b)))


def ternary_discrimination(mu: ArrayLike, tau: ArrayLike) -> NDArray[np.float64]:
    """D_t of sign(x) 1[|x| > tau]: with p, q the chances that X > tau, X < -tau, 1/2 + (p-q)^2 / ((p+q) - (p-q)^2).

    Raises:
        ValueError: mu is not in (-1, 1), or tau is negative.
    """
    mu, sigma = _standardised(mu)
    tau = np.asarray(tau, np.float64)
    if np.any(~(tau >= 0)):
        raise ValueError(f"tau must be at least 0, got {float(np.min(tau))}")
    p, q = ndtr((mu - tau) / sigma), ndtr((-mu - tau) / sigma)
    zero = ndtr((tau - mu) / sigma) - q  # p + q = 1 - zero
    # (p + q) - (p - q)^2 = zero (1 - zero) + 4 p q, without the cancellation
    return np.asarray(0.5 + (p - q) ** 2 / (zero * (1 - zero) + 4 * p * q))


def feature_discrimination(features: Any, labels: Any, eta: float = 0.75) -> dict[str, Any]:
    """How well the classes stay apart in real features, and in their binary and ternary quantization.

    Features are standardised one by one; binary is 1[x > 0], ternary has the threshold eta times the mean magnitude.

    Args:
        features: (n, d) of any float dtype, array or tensor.
        labels: (n,) integers.
        eta: of the ternary threshold, at least 0.

    Returns:
        discrimination (mean over pairs of classes), discrimination_min, binary, ternary, binary_ratio, ternary_ratio, n,
        num_classes, num_features: the same as ``evaluate.load(FEATURE_DISCRIMINATION).compute(...)``.

    Raises:
        ValueError: features are not a finite matrix, labels do not match, or there are too few of a class.
    """
    # evaluate is a heavy import that plain use of the package does not need.
    from .metrics.feature_discrimination.feature_discrimination import feature_discrimination as measure

    return measure(_array(features), _array(labels), eta)


def _array(values: Any) -> Any:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return values


def _standardised(mu: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mu = np.asarray(mu, np.float64)
    if np.any(~(np.abs(mu) < 1)):
        raise ValueError(f"mu must be in (-1, 1), got {float(np.max(np.abs(mu)))}: features are standardised")
    return mu, np.sqrt((1 - mu) * (1 + mu))


def best_ternary_threshold(mu: float) -> float:
    """The tau of highest D_t for this mu, by golden section on [0, 2].

    Raises:
        ValueError: mu is not in (0, 1).
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu must be in (0, 1), got {mu!r}")
    ratio, low, high = (math.sqrt(5) - 1) / 2, 0.0, 2.0
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if ternary_discrimination(mu, a) >= ternary_discrimination(mu, b):
            high = b
        else:
            low = a
    return (low + high) / 2
