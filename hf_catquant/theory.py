"""When quantization raises discrimination: in the two-Gaussian model, and what the model says of real features.

Standardised features have mu^2 + sigma^2 = 1 (see ``discrimination.py``). With a, b = P(X > tau), P(Y > tau) and
p, q = P(X > tau), P(Y > tau) = P(X < -tau),

    D_b > D  if and only if  (a - b)^2 > mu^2 (a + b) (2 - a - b)
    D_t > D  if and only if  (p - q)^2 > mu^2 (p + q)

because D, D_b and D_t are all 1/2 + r / (1 - r): D with r = mu^2, the others with r the left side over what mu^2 stands
before. Binary is best at tau = 0. Setting the derivative of r to 0 gives the best ternary tau,

    tanh(mu tau / sigma^2) = (p - q) / (2 (p + q)),

whose right side is at most 1/2, so that it lies in (0, atanh(1/2) sigma^2 / mu].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .discrimination import (
    FeatureStatistics,
    binary_discrimination,
    discrimination,
    normal_distribution,
    ternary_discrimination,
)
from .metrics.feature_discrimination.inputs import checked_number, checked_pair
from .metrics.feature_discrimination.moments import pooled
from .metrics.feature_discrimination.streaming import Coder

STEPS = 80  # halvings of a bracket of at most 40: to the last bit of a float64
NEAR = 1e-6  # below it p - q has lost its digits, and the best ternary tau is its limit at mu = 0 to 1e-11
LIMIT = 0.6120031809624809  # root of tau = phi(tau) / (2 Phi(-tau)), phi and Phi of N(0, 1)
FAR = 30.0  # deviations; a tail of the normal distribution is 1e-197 there, and still a number

Array = NDArray[np.float64]


def binary_improves(mu: ArrayLike, tau: ArrayLike) -> NDArray[np.bool_]:
    """Whether D_b at ``tau`` is larger than D of standardised features; both broadcast.

    Raises:
        ValueError: mu is not between 0 and 1, or tau is not finite.
    """
    mu, sigma = _standardised(mu)
    return _binary_share(mu, sigma, _finite(tau)) > np.square(mu)


def ternary_improves(mu: ArrayLike, tau: ArrayLike) -> NDArray[np.bool_]:
    """Whether D_t at ``tau`` is larger than D of standardised features; both broadcast.

    Raises:
        ValueError: mu is not between 0 and 1, or tau is not finite or negative.
    """
    mu, sigma = _standardised(mu)
    tau = _finite(tau)
    if np.any(tau < 0):
        raise ValueError(f"tau of ternary features must be at least 0, got {float(np.min(tau))}")
    return _ternary_share(mu, sigma, tau) > np.square(mu)


def best_ternary_threshold(mu: ArrayLike) -> Array:
    """The tau of highest D_t of standardised features, float64 of the shape of ``mu``.

    Raises:
        ValueError: mu is not between 0 and 1.
    """
    mu, sigma = _standardised(mu)

    def before_best(tau: Array) -> NDArray[np.bool_]:
        p, q = _tails(mu, sigma, tau)
        return np.tanh(mu * tau / np.square(sigma)) < (p - q) / (2 * (p + q))

    # Of the smallest mu the bound is far out, where nothing is left of either tail.
    end = np.minimum(math.atanh(0.5) * np.square(sigma) / mu, FAR * sigma)
    found = _bisect(before_best, np.zeros_like(mu), end)
    return np.where(mu < NEAR, LIMIT, found)[()]


def improving_thresholds(mu: ArrayLike, ternary: bool) -> tuple[Array, Array]:
    """Ends (low, high) of the interval of tau where quantizing standardised features raises D; nan where it never does.

    Args:
        mu: any shape.
        ternary: which codes. That of ternary starts at 0 where tau = 0 raises D already; that of binary is (-high, high).

    Raises:
        ValueError: mu is not between 0 and 1.
    """
    mu, sigma = _standardised(mu)
    share = _ternary_share if ternary else _binary_share
    best = best_ternary_threshold(mu) if ternary else np.zeros_like(mu)
    ever = share(mu, sigma, best) > np.square(mu)
    high = _bisect(lambda tau: share(mu, sigma, tau) > np.square(mu), best, best + 1 + FAR * sigma)
    low = -high
    if ternary:
        low = _bisect(lambda tau: share(mu, sigma, tau) <= np.square(mu), np.zeros_like(mu), best)
        low = np.where(share(mu, sigma, np.zeros_like(mu)) > np.square(mu), 0.0, low)
    return np.where(ever, low, np.nan)[()], np.where(ever, high, np.nan)[()]


@dataclass(frozen=True)
class Prediction:
    """What the model says of real features of two classes, and what is measured; arrays (d,).

    Attributes:
        mu: half the distance of the class means over the deviation, both classes counting the same.
        ternary_threshold: in deviations from the middle between the classes; the binary one is 0.
        discrimination, binary, ternary: D, D_b and D_t of the model with that mu.
        measured, measured_binary, measured_ternary: of the features and of their codes.
    """

    mu: Array
    ternary_threshold: Array
    discrimination: Array
    binary: Array
    ternary: Array
    measured: Array
    measured_binary: Array
    measured_ternary: Array

    def agreement(self) -> dict[str, float]:
        """Shares of all features: {binary,ternary}_predicted and _measured to gain, _right where both say the same."""
        result: dict[str, float] = {}
        for name in ("binary", "ternary"):
            predicted = getattr(self, name) > self.discrimination
            measured = getattr(self, f"measured_{name}") > self.measured
            result |= {
                f"{name}_predicted": float(predicted.mean()),
                f"{name}_measured": float(measured.mean()),
                f"{name}_right": float((predicted == measured).mean()),
            }
        return result


def predict(features: Any, labels: Any, ternary_threshold: float | None = None) -> Prediction:
    """Predict for every feature of two classes whether binary or ternary codes raise D, and measure it.

    The model takes the classes for Gaussians of one variance; a feature without spread has mu = 0 and D = 1/2, one whose
    classes have none is left out of the model: D is inf for all three.

    Args:
        features: (n, d) of any real dtype.
        labels: (n,), of two classes.
        ternary_threshold: in deviations; None: the best one by the model, feature by feature.

    Raises:
        ValueError: features or labels are not what they must be, there are not two classes, or the threshold is negative.
    """
    x, y = checked_pair(features, labels)
    statistics = FeatureStatistics()
    statistics.add(x, y)
    moments = statistics.moments()
    if len(moments) != 2:
        raise ValueError(f"labels must have two classes, got {len(moments)}: keep the rows of two")
    first, second = moments
    half = np.abs(first.mean - second.mean) / 2
    inside = (first.squares / first.count + second.squares / second.count) / 2
    deviation = np.sqrt(np.square(half) + inside)
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    mu = half * inverse
    modelled = (inside > 0) & (mu > 0) & (mu < 1)  # classes far apart round to 1
    safe = np.where(modelled, mu, 0.5)
    if ternary_threshold is None:
        tau = np.where(modelled, best_ternary_threshold(safe), 0.0)
    else:
        tau = np.full_like(mu, checked_number(ternary_threshold, "ternary_threshold", 0))
    sigma = np.sqrt(1 - np.square(safe))
    by_model = (
        discrimination(safe, sigma),
        binary_discrimination(safe, sigma, 0),
        ternary_discrimination(safe, sigma, tau),
    )
    alike = np.where(mu > 0, np.inf, 0.5)  # of features that are not modelled
    measured = [pooled(moments, inverse)]
    for threshold, ternary in ((0.0, False), (tau, True)):
        codes = FeatureStatistics(Coder((first.mean + second.mean) / 2, inverse, threshold, ternary))
        codes.add(x, y)
        measured.append(pooled(codes.moments()))
    return Prediction(mu, tau, *(np.where(modelled, values, alike) for values in by_model), *measured)


def _standardised(mu: ArrayLike) -> tuple[Array, Array]:
    mu = np.asarray(mu, np.float64)
    inside = (mu > 0) & (mu < 1)
    if not inside.all():
        raise ValueError(f"mu of standardised features must lie between 0 and 1, got {float(mu[~inside].flat[0])}")
    return mu, np.sqrt((1 - mu) * (1 + mu))


def _finite(tau: ArrayLike) -> Array:
    tau = np.asarray(tau, np.float64)
    if not np.isfinite(tau).all():
        raise ValueError(f"tau must be finite, got {float(tau[~np.isfinite(tau)].flat[0])}")
    return tau


def _tails(mu: Array, sigma: Array, tau: Array) -> tuple[Array, Array]:
    """P(X > tau), P(Y > tau)."""
    return normal_distribution((mu - tau) / sigma), normal_distribution((-mu - tau) / sigma)


def _binary_share(mu: Array, sigma: Array, tau: Array) -> Array:
    """r of D_b."""
    a, b = _tails(mu, sigma, tau)
    return _share(np.square(a - b), (a + b) * (2 - a - b))


def _ternary_share(mu: Array, sigma: Array, tau: Array) -> Array:
    """r of D_t."""
    p, q = _tails(mu, sigma, tau)
    return _share(np.square(p - q), p + q)


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _bisect(holds: Callable[[Array], NDArray[np.bool_]], low: Array, high: Array) -> Array:
    """Where ``holds``, true at ``low`` and false at ``high``, changes; element by element."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        true = holds(middle)
        low, high = np.where(true, middle, low), np.where(true, high, middle)
    return ((low + high) / 2)[()]
