"""The search by cumulative sums against trying every threshold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_iris

from feature_helpers import pooled_pairs, random_features, standardise
from hf_catquant.discrimination import binary_discrimination, feature_discrimination, ternary_discrimination
from hf_catquant.metrics.feature_discrimination import thresholds
from hf_catquant.metrics.feature_discrimination.thresholds import curve, search


def codes(z, threshold, ternary):
    return np.sign(z) * (np.abs(z) > threshold) if ternary else (z > threshold).astype(float)


def cases():
    x, y = random_features(rows=40, columns=4, classes=3)
    x[:, 1] = np.round(x[:, 1])  # ties
    x[:, 2] = 7.0  # constant
    y[:5] = 0  # classes of several sizes
    return standardise(x), y


@pytest.mark.parametrize("ternary", [False, True])
def test_every_point_of_the_curve_is_that_of_all_pairs(ternary):
    x, y = cases()
    for z in x.T:
        found = curve(z, y, np.bincount(y), ternary)
        for threshold in np.unique(found.values):
            position = np.searchsorted(found.values, [threshold], side="right")
            between, inside = found.between[position], found.inside[position]
            expected = pooled_pairs(codes(z, threshold, ternary)[:, None], y)
            if inside[0] > 1e-12:
                assert between[0] / inside[0] == pytest.approx(expected, rel=1e-10)
            else:
                assert abs(between[0]) < 1e-12
                assert expected == 0.5


@pytest.mark.parametrize("ternary", [False, True])
def test_the_threshold_of_a_feature_is_the_best_there_is(ternary):
    x, y = cases()
    found = search(x, y, np.bincount(y), (0.0, 1.0), ternary, per_feature=True)
    for z, threshold in zip(x.T, found, strict=True):
        sizes = np.unique(np.abs(z) if ternary else z)
        cuts = [0.0, *(sizes[1:] + sizes[:-1]) / 2]
        tries = [pooled_pairs(codes(z, t, ternary)[:, None], y) for t in cuts]
        reached = pooled_pairs(codes(z, threshold, ternary)[:, None], y)
        assert reached == pytest.approx(max(tries, default=0.5), rel=1e-10)
    assert found[2] == 0


def test_the_ternary_threshold_of_a_feature_may_be_0():
    z, y = np.array([[-2], [-1.9], [-1], [1], [1.9], [2]]), np.array([0, 0, 0, 1, 1, 1])
    assert search(z, y, np.bincount(y), (0.0, 1.0), True, per_feature=True) == [0.0]
    assert search(z, y, np.bincount(y), (0.0, 1.0), True, per_feature=False) == 0.0


@pytest.mark.parametrize("ternary", [False, True])
def test_the_shared_threshold_beats_a_fine_grid(ternary):
    x, y = random_features(rows=80, columns=6)
    z, counts = standardise(x), np.bincount(y)
    found = search(x, y, counts, (x.mean(0), 1 / x.std(0)), ternary, per_feature=False)
    tries = [pooled_pairs(codes(z, t, ternary), y) for t in np.linspace(0 if ternary else -2, 2, 200)]
    assert pooled_pairs(codes(z, found, ternary), y) >= max(tries) * (1 - 2e-3)


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_the_best_threshold_has_the_highest_d_that_is_reported(kind):
    """Over more than two classes the mean of ratios, not the ratio of sums."""
    x, y = load_iris(return_X_y=True)
    best = feature_discrimination(x, y, **{f"{kind}_threshold": "best"})[kind]
    tries = [feature_discrimination(x, y, **{f"{kind}_threshold": t})[kind] for t in np.linspace(0, 1.5, 31)]
    assert best >= max(tries) * (1 - 2e-3)


@pytest.mark.parametrize("ternary", [False, True])
def test_the_d_of_every_candidate_is_the_one_that_is_reported(ternary, monkeypatch):
    x, y = random_features(rows=40, columns=5, classes=4)
    x[:, 2] = 7.0  # constant
    z, grid, kind = standardise(x), np.linspace(0, 2.5, 7), "ternary" if ternary else "binary"
    expected = [feature_discrimination(x, y, **{f"{kind}_threshold": t})[kind] for t in grid]
    for products in (2**24, 1):  # all features at once, and one at a time
        monkeypatch.setattr(thresholds, "PRODUCTS", products)
        found = thresholds.mean_over_pairs(z, y, np.bincount(y), (np.zeros(5), np.ones(5)), grid, ternary)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_infinite_d_of_one_pair_is_the_highest():
    """Two classes of three can be parted without spread, the third is not."""
    x = np.array([0.0, 0.1, 0.2, 1.0, 1.1, 1.3, *(0.3, 0.4) * 4, *(4.0, 5.0) * 4])[:, None]
    y = np.repeat([0, 1, 2], [3, 3, 16])
    assert feature_discrimination(x, y, binary_threshold="best")["binary"] == np.inf


def test_two_gaussians_have_the_thresholds_of_theory():
    mu, n = 0.8, 400_000
    y = np.arange(n) % 2
    x = 0.6 * np.random.default_rng(0).normal(size=(n, 1)) + np.where(y[:, None] == 0, mu, -mu)
    found = feature_discrimination(x, y, binary_threshold="best", ternary_threshold="best")
    assert found["binary_threshold"] == pytest.approx(0, abs=0.05)
    assert found["ternary_threshold"] == pytest.approx(0.217, abs=0.03)
    assert found["binary"] == pytest.approx(binary_discrimination(mu, 0.6, 0), rel=0.01)
    assert found["ternary"] == pytest.approx(ternary_discrimination(mu, 0.6, 0.217), rel=0.01)


def test_classes_that_a_threshold_parts_are_infinitely_apart():
    x = np.array([[0.0], [0.1], [0.2], [1.0], [1.1], [1.3]])
    found = feature_discrimination(x, [0, 0, 0, 1, 1, 1], binary_threshold="best")
    assert found["binary"] == np.inf
    assert search(x, np.array([0, 0, 0, 1, 1, 1]), np.array([3, 3]), (0.0, 1.0), False, True) == pytest.approx(0.6)
