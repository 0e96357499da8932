"""Closed forms against reference values and an independent simulation; the empirical measure against all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split

from feature_helpers import all_pairs, random_features, standardise
from helpers import global_rng_untouched
from hf_catquant import feature_discrimination
from hf_catquant.discrimination import (
    BINARY_CROSSOVER,
    TERNARY_CROSSOVER,
    TERNARY_CROSSOVER_TAU,
    binary_discrimination,
    discrimination,
    ternary_discrimination,
)
from hf_catquant.metrics.feature_discrimination import streaming
from hf_catquant.metrics.feature_discrimination.moments import Moments, pairwise
from hf_catquant.metrics.feature_discrimination.streaming import FeatureStatistics

# mu, tau, D, D_b, D_t with mu^2 + sigma^2 = 1; checked by a Monte Carlo run of two million samples.
REFERENCE = np.array(
    [
        (0.20, 0.25, 0.541667, 0.526197, 0.531529),
        (0.40, 0.50, 0.690476, 0.611998, 0.661479),
        (0.60, 0.00, 1.062500, 0.926392, 0.926392),
        (0.60, 0.50, 1.062500, 0.832962, 1.017770),
        (0.70, 0.25, 1.460784, 1.246545, 1.504865),
        (0.70, 0.50, 1.460784, 1.063421, 1.438300),
        (0.75, 0.25, 1.785714, 1.570731, 1.997405),
        (0.80, 0.00, 2.277778, 2.515982, 2.515982),
        (0.80, 0.10, 2.277778, 2.445973, 2.798099),
        (0.80, 0.25, 2.277778, 2.138113, 2.920257),
        (0.80, 0.50, 2.277778, 1.502056, 2.335817),
        (0.80, 1.00, 2.277778, 0.789138, 1.075824),
        (0.85, 0.25, 3.103604, 3.324355, 5.024497),
        (0.90, 0.25, 4.763158, 6.878859, 11.941036),
        (0.90, 0.75, 4.763158, 1.367954, 2.235178),
        (0.95, 0.25, 9.756410, 39.841882, 78.429229),
    ]
)
# mu, the tau of highest D_t and that D_t.
BEST_TAU = [
    (0.50, 0.454, 0.79331),
    (0.70, 0.308, 1.51229),
    (0.75, 0.265, 1.99830),
    (0.80, 0.217, 2.93059),
    (0.85, 0.167, 5.22703),
    (0.90, 0.113, 14.82046),
    (0.95, 0.056, 249.064),
]
# loader, then D, D_b and the eta and D_t of the training half (70 %, stratified, random_state 0).
REAL = [
    (load_digits, 0.7599, 0.7616, [(1.0, 0.8371), (0.75, 0.8333)]),
    (load_breast_cancer, 0.9023, 0.9824, [(0.25, 1.0475)]),
    (load_wine, 1.1602, 1.0449, [(0.5, 1.1247)]),
]


def sigma_of(mu):
    return np.sqrt(1 - np.square(mu))


def real_split(loader):
    x, y = loader(return_X_y=True)
    x, _, y, _ = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    return x, y


def test_closed_forms_match_the_reference_values():
    mu, tau, *expected = REFERENCE.T
    sigma = sigma_of(mu)
    found = discrimination(mu, sigma), binary_discrimination(mu, sigma, tau), ternary_discrimination(mu, sigma, tau)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5.1e-7)


@pytest.mark.parametrize(("mu", "tau", "best"), BEST_TAU)
def test_best_ternary_threshold_matches_the_reference_values(mu, tau, best):
    grid = np.arange(0, 2, 1e-3)
    values = ternary_discrimination(mu, sigma_of(mu), grid)
    assert grid[values.argmax()] == pytest.approx(tau, abs=1e-9)
    assert values.max() == pytest.approx(best, rel=5e-6)


def test_best_ternary_threshold_just_before_the_crossover():
    mu = 0.66
    values = ternary_discrimination(mu, sigma_of(mu), np.arange(0, 2, 1e-3))
    assert values.argmax() == 341
    assert values.max() < discrimination(mu, sigma_of(mu))


@pytest.mark.parametrize(
    ("form", "mu", "low", "high"),
    [
        (ternary_discrimination, 0.7, 0.1528, 0.4666),
        (ternary_discrimination, 0.8, 0.0, 0.5177),
        (ternary_discrimination, 0.9, 0.0, 0.5145),
        (binary_discrimination, 0.8, -0.1917, 0.1917),
        (binary_discrimination, 0.9, -0.3474, 0.3474),
    ],
)
def test_thresholds_that_improve_discrimination(form, mu, low, high):
    grid = np.arange(low, 2, 1e-4) if form is ternary_discrimination else np.arange(-2, 2, 1e-4)
    better = grid[form(mu, sigma_of(mu), grid) > discrimination(mu, sigma_of(mu))]
    assert better.min() == pytest.approx(low, abs=1.01e-4)
    assert better.max() == pytest.approx(high, abs=1.01e-4)


def test_crossovers_are_where_quantizing_starts_to_help():
    def gain(form, mu, tau):
        return form(mu, sigma_of(mu), tau) - discrimination(mu, sigma_of(mu))

    phi = 0.5 * (1 + math.erf(BINARY_CROSSOVER / sigma_of(BINARY_CROSSOVER) / math.sqrt(2)))
    assert 2 * phi - 1 == pytest.approx(BINARY_CROSSOVER, abs=1e-10)
    taus = np.linspace(0, 2, 4001)
    for form, mu in ((binary_discrimination, BINARY_CROSSOVER), (ternary_discrimination, TERNARY_CROSSOVER)):
        near = np.append(taus, TERNARY_CROSSOVER_TAU)
        assert gain(form, mu - 1e-9, near).max() < 0 < gain(form, mu + 1e-9, near).max()
    assert gain(ternary_discrimination, TERNARY_CROSSOVER, TERNARY_CROSSOVER_TAU) == pytest.approx(0, abs=1e-9)


def test_quantizing_helps_exactly_where_the_inequalities_say():
    """D_b > D iff (a - b)^2 > mu^2 S (2 - S), S = a + b; D_t > D iff (p - q)^2 > mu^2 (p + q)."""
    generator = np.random.default_rng(0)
    mu, tau = generator.uniform(0.05, 0.97, 20_000), generator.uniform(0, 1.5, 20_000)
    sigma = sigma_of(mu)
    tail = np.vectorize(lambda z: 0.5 * math.erfc(z / math.sqrt(2)))
    a, b = tail((tau - mu) / sigma), tail((tau + mu) / sigma)  # P(X > tau), P(Y > tau) = P(X < -tau)
    plain = discrimination(mu, sigma)
    for form, between, rule in (
        (binary_discrimination, np.square(a - b), np.square(mu) * (a + b) * (2 - a - b)),
        (ternary_discrimination, np.square(a - b), np.square(mu) * (a + b)),
    ):
        sure = np.abs(between - rule) > 1e-12
        better = form(mu, sigma, tau) > plain
        assert sure.mean() > 0.99
        assert 0.02 < better.mean() < 0.98  # both sides are met
        np.testing.assert_array_equal(better[sure], (between > rule)[sure])


def test_closed_forms_match_a_simulation():
    mu, sigma, tau = 0.8, 0.6, 0.25
    normal = np.random.default_rng(0).normal(size=(2, 1_000_000)) * sigma + np.array([[mu], [-mu]])
    for form, values in (
        (discrimination(mu, sigma), normal),
        (binary_discrimination(mu, sigma, tau), normal > tau),
        (ternary_discrimination(mu, sigma, tau), np.sign(normal) * (np.abs(normal) > tau)),
    ):
        simulated = 0.5 + np.square(np.diff(values.mean(1))) / (2 * values.var(1).sum())
        assert form == pytest.approx(simulated[0], rel=0.01)


def test_closed_forms_broadcast_and_give_scalars_for_scalars():
    mu, tau = np.array([0.2, 0.5, 0.8]), np.array([[0.1], [0.4]])
    for form in (binary_discrimination, ternary_discrimination):
        grid = form(mu, sigma_of(mu), tau)
        assert grid.shape == (2, 3)
        assert grid[1, 2] == form(0.8, sigma_of(0.8), 0.4)
        assert np.ndim(form(0.8, 0.6, 0.4)) == 0


def test_closed_forms_hold_at_the_far_ends():
    mu = 0.9999  # classes 141 deviations apart
    both = [form(mu, sigma_of(mu), 0.5) for form in (binary_discrimination, ternary_discrimination)]
    assert np.isfinite(both).all()
    assert min(both) > discrimination(mu, sigma_of(mu)) > 1000
    for mu in (0.99, 0.999):
        tail = math.erfc(mu / sigma_of(mu) / math.sqrt(2)) / 2
        exact = 1 / (4 * tail * (1 - tail)) - 0.5
        assert binary_discrimination(mu, sigma_of(mu), 0) == pytest.approx(exact, rel=1e-10)
    for tau in (5.0, 10.0, 30.0, 1000.0):  # hardly anything exceeds the threshold, or nothing at all
        assert binary_discrimination(0.2, 0.98, tau) == pytest.approx(0.5, abs=1e-4)
        assert ternary_discrimination(0.2, 0.98, tau) == pytest.approx(0.5, abs=1e-4)
    assert ternary_discrimination(0.6, 0.8, 0) == pytest.approx(binary_discrimination(0.6, 0.8, 0), rel=1e-14)
    assert discrimination(0, 1) == binary_discrimination(0, 1, 0.3) == ternary_discrimination(0, 1, 0.3) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: discrimination([0.1, math.nan], 1), "mu must be finite, got nan"),
        (lambda: discrimination(0.1, [1, -2]), "sigma must be positive, got -2.0"),
        (lambda: binary_discrimination(0.1, 0, 0), "sigma must be positive, got 0.0"),
        (lambda: binary_discrimination(0.1, 1, math.inf), "tau must be finite, got inf"),
        (lambda: ternary_discrimination(0.1, 1, [0.5, -0.5]), "tau of ternary features must be at least 0, got -0.5"),
    ],
)
def test_closed_forms_refuse_what_is_no_model(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("loader", "plain", "binary", "ternary"), REAL)
def test_real_data_match_the_reference_values(loader, plain, binary, ternary):
    x, y = real_split(loader)
    found = feature_discrimination(x, y)
    assert found["discrimination"] == pytest.approx(plain, abs=5.1e-5)
    assert found["binary"] == pytest.approx(binary, abs=5.1e-5)
    assert found["binary_ratio"] == found["binary"] / found["discrimination"]
    for eta, expected in ternary:
        assert feature_discrimination(x, y, eta)["ternary"] == pytest.approx(expected, abs=5.1e-5)
    assert (found["n"], found["num_classes"], found["num_features"]) == (len(y), len(set(y)), x.shape[1])


def test_all_pairs_of_samples_give_the_same_number():
    x, y = real_split(load_digits)
    x, y = standardise(x)[:200], y[:200]
    statistics = FeatureStatistics()
    statistics.add(x, y)
    found = pairwise(statistics.moments())
    assert found.mean() == pytest.approx(0.7510846533, abs=5.1e-11)
    np.testing.assert_allclose(found, all_pairs(x, y), rtol=1e-12)


def test_every_entry_is_that_of_all_pairs():
    x, y = random_features()
    standard, found = standardise(x), feature_discrimination(x, y, eta=0.6)
    ternary = np.sign(standard) * (np.abs(standard) > 0.6 * np.abs(standard).mean())
    plain = all_pairs(standard, y)
    assert found["discrimination"] == pytest.approx(plain.mean(), rel=1e-12)
    assert found["discrimination_min"] == pytest.approx(plain.min(), rel=1e-12)
    assert found["binary"] == pytest.approx(all_pairs((standard > 0).astype(float), y).mean(), rel=1e-12)
    assert found["ternary"] == pytest.approx(all_pairs(ternary, y).mean(), rel=1e-12)
    assert found["ternary_ratio"] == found["ternary"] / found["discrimination"]


def test_a_value_at_the_mean_is_binary_zero():
    # Codes 0 0 0 and 0 1 1: p = 0 and 2/9, u = 0 and 1/3, |m|^2 = 4/9.
    assert feature_discrimination([[-2], [0], [0], [0], [1], [1]], [0, 0, 0, 1, 1, 1])["binary"] == pytest.approx(1.0)


def test_two_gaussians_give_the_closed_forms():
    mu, sigma = 0.8, 0.6
    y = np.arange(40_000) % 2
    x = np.random.default_rng(0).normal(size=(len(y), 4)) * sigma + mu * (1 - 2 * y)[:, None]
    found = feature_discrimination(x, y, eta=0.5)
    tau = 0.5 * np.abs(x).mean()
    assert found["discrimination"] == pytest.approx(discrimination(mu, sigma), rel=0.02)
    assert found["binary"] == pytest.approx(binary_discrimination(mu, sigma, 0), rel=0.02)
    assert found["ternary"] == pytest.approx(ternary_discrimination(mu, sigma, tau), rel=0.02)


def test_order_scale_and_place_of_the_data_do_not_matter():
    x, y = random_features()
    found, order = feature_discrimination(x, y), np.random.default_rng(1).permutation(len(y))
    moved = feature_discrimination(x[order] * [1e-6, 1, 1e6, 3, 0.5] + 1000, -7 * y[order])
    assert moved == pytest.approx(found, rel=1e-6)


def test_features_of_small_values_keep_their_discrimination():
    x, y = random_features()
    expected = feature_discrimination(x, y, per_feature=True, pairs=True)
    small = np.hstack([x * 1e-156, np.zeros((len(x), 1)), np.ones((len(x), 1))])
    found = feature_discrimination(small, y, per_feature=True, pairs=True)
    np.testing.assert_allclose(found["pairs"], expected["pairs"], rtol=1e-9)
    np.testing.assert_allclose(found["per_feature"][:-2], expected["per_feature"], rtol=1e-9)
    for size in (1e-156, 1e-170):
        with pytest.raises(
            ValueError, match=r"must not all be less than 1e-150 in size, got .* from row 0 on: multiply"
        ):
            feature_discrimination(x * size, y)


def test_rows_in_parts_give_the_same_moments(monkeypatch):
    x, y = random_features()
    x[:, 0] = 0.1
    whole = feature_discrimination(x, y)
    monkeypatch.setattr(streaming, "CHUNK", 3 * x.shape[1])
    assert feature_discrimination(x, y) == pytest.approx(whole, rel=1e-12)
    parts = Moments()
    for rows in np.split(x, [1, 7, 50]):
        parts.add(rows)
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose((parts.squares / len(x))[1:], x.var(0)[1:], rtol=1e-12)
    assert parts.squares[0] == 0  # exactly, though numpy's variance of a column of 0.1 is not


def test_features_without_spread_tell_nothing():
    y = np.arange(9) % 3
    constant = np.full((9, 2), 0.1)  # whose mean rounds to another number
    found = feature_discrimination(constant, y)
    assert [found[k] for k in ("discrimination", "discrimination_min", "binary", "ternary")] == [0.5] * 4
    x, y = random_features()
    wider = feature_discrimination(np.hstack([x, np.full((len(x), 1), 0.1)]), y)
    assert wider["discrimination"] == pytest.approx(feature_discrimination(x, y)["discrimination"], rel=1e-12)


def test_classes_without_spread_are_infinitely_apart():
    found = feature_discrimination([[0.1], [0.1], [0.1], [0.7], [0.7], [0.7]], [0, 0, 0, 1, 1, 1])
    assert found["discrimination"] == found["binary"] == found["ternary"] == math.inf
    assert found["binary_ratio"] == found["ternary_ratio"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_of_tensors_and_arrays(dtype):
    x, y = random_features()
    tensor = torch.tensor(x, dtype=dtype, requires_grad=True)
    exact = tensor.detach().double().numpy()
    expected = feature_discrimination(exact, y)
    assert feature_discrimination(tensor, torch.tensor(y)) == expected
    assert feature_discrimination(list(tensor), y.tolist()) == expected
    assert feature_discrimination(exact.tolist(), y.astype(np.uint8)) == expected
    if dtype != torch.bfloat16:
        assert feature_discrimination(tensor.detach().numpy(), y) == expected


def test_numbers_are_features_however_they_are_stored():
    x, y = random_features()
    expected = feature_discrimination(x, y)
    column = np.empty(len(x), object)  # of vectors, as a table holds embeddings
    column[:] = list(x)
    of_tensors = np.empty(len(x), object)
    of_tensors[:] = list(torch.tensor(x))
    for stored in (x.astype(object), np.ma.masked_greater(x, x.max()), column, of_tensors):
        assert feature_discrimination(stored, y) == expected


def test_integers_and_their_input_are_left_alone():
    x, y = (np.array([[1, 0], [2, 0], [2, 1], [4, 1]], np.uint8)), [True, True, False, False]
    before = x.copy()
    with global_rng_untouched():
        assert feature_discrimination(x, y) == feature_discrimination(x.astype(float), [1, 1, 0, 0])
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("labels", [[1.0, 1.0, 2.0, 2.0], np.array([1, 1, 2, 2], object), [np.int64(1), 1, 2, 2]])
def test_whole_numbers_are_labels_however_they_are_stored(labels):
    x = [[1.0], [2.0], [2.5], [4.0]]
    found = feature_discrimination(x, labels, pairs=True)
    assert found == feature_discrimination(x, [1, 1, 2, 2], pairs=True)
    assert found["classes"] == [1, 2]


def test_strings_are_labels_however_they_are_stored():
    x, names = [[1.0], [2.0], [2.5], [4.0]], ["no", "no", "yes", "yes"]
    forms = [names, np.array(names), np.array(names, object)]
    if hasattr(np.dtypes, "StringDType"):
        forms.append(np.array(names, np.dtypes.StringDType()))
    for labels in forms:
        assert feature_discrimination(x, labels, pairs=True)["classes"] == ["no", "yes"]


ONES = np.ones((4, 2))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([], [], r"\(n, d\) with at least one row and column, got shape \(0,\)"),
        (np.ones((0, 3)), [], r"at least one row and column, got shape \(0, 3\)"),
        (np.ones((2, 3, 4)), [0, 1], r"must be \(n, d\).*got shape \(2, 3, 4\)"),
        ([[1.0], [2.0], [1.0, 2.0]], [0, 0, 1], "rows of one length, got 1 values in row 0 and 2 in row 2"),
        ([torch.ones(2), torch.ones(3)], [0, 1], "rows of one length, got 2 values in row 0 and 3 in row 1"),
        ([["a"], ["b"]], [0, 1], "real numbers, got <U1"),
        (ONES * 1j, [0, 0, 1, 1], "real numbers, got complex128"),
        ([[1.0, "a"], [2, 3]], [0, 1], "real numbers, got <U32"),
        (np.array([[1.0, "a"], [2, 3]], object), [0, 1], "real numbers, got 'a'"),
        ([[1.0], [None]], [0, 1], "real numbers, got None"),
        (None, [0, 1], r"must be \(n, d\).*got NoneType"),
        (iter(ONES), [0, 1], r"must be \(n, d\).*got iterator"),
        (csr_matrix(ONES), [0, 0, 1, 1], r"dense, got a sparse csr_matrix: call its toarray\(\)"),
        (torch.ones(4, 2).to_sparse(), [0, 0, 1, 1], r"dense, got a sparse Tensor: call its to_dense\(\)"),
        (np.ma.masked_equal(ONES * [[1], [2], [1], [1]], 2), [0, 0, 1, 1], "no masked values"),
        (ONES, np.ma.masked_equal([0, 0, 1, 2], 2), "no masked values"),
        (ONES, None, r"\(n,\) integers or strings, got NoneType"),
        (ONES * [[1], [1], [math.nan], [1]], [0, 0, 1, 1], "finite and less than 1e.150 in size, got nan in row 2"),
        (ONES * [[1], [1], [1], [-math.inf]], [0, 0, 1, 1], "got -inf in row 3"),
        (ONES * 1e200, [0, 0, 1, 1], r"got 1e\+200 in row 0"),
        (ONES, [0, 0, 1], "of one length, got 4 and 3"),
        (ONES, [5, 5, 5, 5], "at least two classes, got only 5"),
        (ONES, [0, 0, 0, 3], "at least two samples, class 3 has one"),
        (ONES, [0, 0, 1, 1.5], r"\(n,\) integers or strings, got 1.5 in float64"),
        (ONES, [0, 0, 1, math.nan], r"\(n,\) integers or strings, got nan in float64"),
        (ONES, [0, 0, 1, None], r"\(n,\) integers or strings, got None"),
        (ONES, [1, "1", 2, "2"], "all integers or all strings, got both"),
        (ONES, [0, 0, 1, 2**70], "must be integers of 64 bits, got 1180591620717411303424: pass them as strings"),
        (ONES, [[0], [0], [1], [1]], r"\(n,\) integers or strings, got int64 of shape \(4, 1\)"),
        (ONES, [[0], [0, 1], [1], [1]], r"\(n,\) integers or strings, got rows of several lengths"),
    ],
)
def test_bad_input_is_named(features, labels, message):
    with pytest.raises(ValueError, match=message):
        feature_discrimination(features, labels)


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf, "0.5", None])
def test_eta_must_be_a_number(eta):
    with pytest.raises(ValueError, match="eta must be a finite number of at least 0, got"):
        feature_discrimination(*random_features(), eta=eta)


def test_bad_value_far_down_is_named_by_its_row(monkeypatch):
    x, y = random_features()
    x[41, 3] = math.nan
    monkeypatch.setattr(streaming, "CHUNK", 7 * x.shape[1])
    with pytest.raises(ValueError, match="got nan in row 41"):
        feature_discrimination(x, y)


def test_many_classes_and_rows_are_cheap():
    # All differences of 400 class means at once would take 5 GB.
    generator = np.random.default_rng(0)
    x = generator.normal(size=(4000, 128)).astype(np.float32)
    assert feature_discrimination(x, np.arange(4000) % 400)["discrimination"] == pytest.approx(0.5, abs=0.01)
