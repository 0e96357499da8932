"""Criteria, best thresholds and improving intervals against the closed forms; predictions against Gaussian features."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_catquant.discrimination import (
    BINARY_CROSSOVER,
    TERNARY_CROSSOVER,
    TERNARY_CROSSOVER_TAU,
    binary_discrimination,
    discrimination,
    ternary_discrimination,
)
from hf_catquant.theory import (
    best_ternary_threshold,
    binary_improves,
    improving_thresholds,
    predict,
    ternary_improves,
)

# mu, then the improving interval of ternary and the end of that of binary.
INTERVALS = [
    (0.70, 0.1528, 0.4666, math.nan),
    (0.80, 0.0, 0.5177, 0.1917),
    (0.90, 0.0, 0.5145, 0.3474),
]


def test_criteria_are_those_of_the_closed_forms():
    generator = np.random.default_rng(0)
    mu, tau = generator.uniform(0.01, 0.97, 200_000), generator.uniform(0, 1.5, 200_000)
    sigma = np.sqrt(1 - mu**2)
    plain = discrimination(mu, sigma)
    for improves, quantized in ((binary_improves, binary_discrimination), (ternary_improves, ternary_discrimination)):
        gain = quantized(mu, sigma, tau) - plain
        clear = np.abs(gain) > 1e-9
        np.testing.assert_array_equal(improves(mu, tau)[clear], gain[clear] > 0)
        assert 0 < improves(mu, tau).mean() < 1


@pytest.mark.parametrize(("mu", "low", "high", "binary"), INTERVALS)
def test_improving_intervals_match_the_reference_values(mu, low, high, binary):
    assert improving_thresholds(mu, ternary=True) == pytest.approx((low, high), abs=5.1e-5)
    assert improving_thresholds(mu, ternary=False) == pytest.approx((-binary, binary), abs=5.1e-5, nan_ok=True)


def test_improving_intervals_end_where_nothing_is_gained():
    mu = np.linspace(0.02, 0.99, 98)
    sigma = np.sqrt(1 - mu**2)
    for ternary, quantized, crossover in (
        (False, binary_discrimination, BINARY_CROSSOVER),
        (True, ternary_discrimination, TERNARY_CROSSOVER),
    ):
        low, high = improving_thresholds(mu, ternary)
        np.testing.assert_array_equal(np.isfinite(high), mu > crossover)
        ends = mu > crossover
        plain = discrimination(mu, sigma)[ends]
        np.testing.assert_allclose(quantized(mu[ends], sigma[ends], high[ends]), plain, rtol=1e-9)
        inner = ends & (low != 0)
        np.testing.assert_allclose(
            quantized(mu[inner], sigma[inner], low[inner]), discrimination(mu, sigma)[inner], rtol=1e-9
        )


def test_the_crossover_is_where_the_interval_shrinks_to_a_point():
    low, high = improving_thresholds(TERNARY_CROSSOVER + 1e-9, ternary=True)
    assert low == pytest.approx(TERNARY_CROSSOVER_TAU, abs=1e-3)
    assert high == pytest.approx(TERNARY_CROSSOVER_TAU, abs=1e-3)
    assert low < TERNARY_CROSSOVER_TAU < high
    assert np.isnan(improving_thresholds(TERNARY_CROSSOVER - 1e-9, ternary=True)).all()
    assert best_ternary_threshold(TERNARY_CROSSOVER) == pytest.approx(TERNARY_CROSSOVER_TAU, abs=1e-7)


def test_the_best_threshold_beats_every_other():
    for mu in (0.05, 0.3, 0.5, 0.66, 0.8, 0.9, 0.95, 0.98):
        sigma, best = math.sqrt(1 - mu**2), best_ternary_threshold(mu)
        grid = ternary_discrimination(mu, sigma, np.linspace(0, 4, 4001))
        assert ternary_discrimination(mu, sigma, best) >= grid.max()
    assert best_ternary_threshold(np.array([0.8])) == pytest.approx([0.217], abs=5.1e-4)
    with np.errstate(all="raise", under="ignore"):
        assert best_ternary_threshold(1e-6) == pytest.approx(best_ternary_threshold(1e-3), abs=1e-3)
        for mu in (1e-7, 1e-9, 1e-12, 1e-17, 1e-300):
            assert best_ternary_threshold(mu) == pytest.approx(0.612003, abs=1e-6)


def test_gaussian_features_do_as_predicted():
    generator = np.random.default_rng(0)
    mu = np.array([0.3, 0.5, 0.7, 0.72, 0.8, 0.85])
    y = np.arange(60_000) % 2
    x = generator.normal(size=(len(y), len(mu))) * np.sqrt(1 - mu**2) + np.where(y[:, None] == 0, mu, -mu)
    found = predict(3 * x + 7, np.array(["one", "two"])[y])
    np.testing.assert_allclose(found.mu, mu, atol=0.01)
    np.testing.assert_allclose(found.ternary_threshold, best_ternary_threshold(mu), atol=0.02)
    for name in ("", "_binary", "_ternary"):
        predicted = getattr(found, name.strip("_") or "discrimination")
        np.testing.assert_allclose(getattr(found, f"measured{name}"), predicted, rtol=0.05)
    shares = {"binary": 2 / 6, "ternary": 4 / 6}
    for name, share in shares.items():
        assert found.agreement()[f"{name}_predicted"] == found.agreement()[f"{name}_measured"] == share
        assert found.agreement()[f"{name}_right"] == 1
    fixed = predict(x, y, ternary_threshold=0.5)
    np.testing.assert_array_equal(fixed.ternary_threshold, 0.5)
    assert (fixed.measured_ternary <= found.measured_ternary * 1.01).all()


def test_features_without_spread_are_not_modelled():
    x = np.array([[0.1, 0.0], [0.1, 0.0], [0.1, 1.0], [0.1, 1.0]])
    found = predict(x, [0, 0, 1, 1])
    for name in ("discrimination", "binary", "ternary", "measured", "measured_binary", "measured_ternary"):
        np.testing.assert_array_equal(getattr(found, name), [0.5, np.inf])


def test_features_of_small_values_are_predicted():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 2)) + np.arange(40)[:, None] % 2, np.arange(40) % 2
    expected, found = predict(x, y), predict(x * [1, 1e-156], y)
    np.testing.assert_allclose(found.measured, expected.measured, rtol=1e-9)
    np.testing.assert_allclose(found.mu, expected.mu, rtol=1e-9)


def test_features_far_apart_are_not_modelled():
    found = predict([[1 + 1e-9], [1 - 1e-9], [-1 + 1e-9], [-1 - 1e-9]], [0, 0, 1, 1])
    assert found.mu == 1
    assert found.discrimination == found.binary == found.ternary == np.inf
    assert found.measured > 1e16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_ternary_threshold([0.5, 1.0]), "between 0 and 1, got 1.0"),
        (lambda: improving_thresholds(math.nan, True), "between 0 and 1, got nan"),
        (lambda: binary_improves(0.5, math.inf), "tau must be finite, got inf"),
        (lambda: ternary_improves(0.5, -1), "at least 0, got -1.0"),
        (lambda: predict(np.ones((6, 2)), [0, 0, 1, 1, 2, 2]), "two classes, got 3: keep the rows of two"),
        (lambda: predict(np.ones((4, 2)), [0, 0, 1, 1], -0.1), "ternary_threshold must be .* at least 0, got -0.1"),
        (lambda: predict(np.ones((3, 2)), [0, 0, 1]), "class 1 has one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
