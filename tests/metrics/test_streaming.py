"""Statistics that stream and merge give what all rows at once give; options of the measure against definitions."""

from __future__ import annotations

import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, TensorDataset

from feature_helpers import all_pairs, pooled_pairs, random_features, standardise
from helpers import global_rng_untouched
from hf_catquant.discrimination import FeatureStatistics, feature_discrimination, stream_discrimination
from hf_catquant.metrics.feature_discrimination import bootstrap, streaming
from hf_catquant.metrics.feature_discrimination.accuracy import NEIGHBORS


def split(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_give_what_all_rows_give(size):
    x, y = random_features(rows=300, columns=9, classes=4)
    x[:, 0] = 0.1  # constant
    x[:, 1] += 1e3
    options = {"per_feature": True, "pairs": True, "eta": 0.6}
    expected, found = feature_discrimination(x, y, **options), stream_discrimination(split(x, y, size), **options)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-9, err_msg=key)


def test_a_data_loader_and_a_function_are_read_three_times():
    x, y = random_features()
    expected = feature_discrimination(x, y)
    loader = DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=7)
    assert stream_discrimination(loader) == pytest.approx(expected, rel=1e-9)
    assert stream_discrimination(lambda: iter(split(x, y, 7))) == pytest.approx(expected, rel=1e-9)
    fixed = stream_discrimination(split(x, y, 7), ternary_threshold=0.3, binary_threshold=-0.1)
    again = feature_discrimination(x, y, ternary_threshold=0.3, binary_threshold=-0.1)
    assert fixed == pytest.approx(again, rel=1e-9)
    assert (fixed["ternary_threshold"], fixed["binary_threshold"]) == (0.3, -0.1)
    with pytest.raises(ValueError, match=r"same rows at every look, got 60 and then 0: a generator can be read once"):
        stream_discrimination(iter(split(x, y, 7)))


def test_parts_of_several_processes_merge():
    x, y = random_features(rows=90)
    y = np.array(["a", "b", "c"])[y]
    whole, parts = FeatureStatistics(), [FeatureStatistics() for _ in range(4)]
    whole.add(x, y)
    # The first part has one class only, the last one nothing at all.
    order = np.argsort(y == "a", kind="stable")[::-1]
    for part, rows in zip(parts, np.split(order, [20, 50]), strict=False):
        part.add(x[rows], y[rows])
    merged = FeatureStatistics()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert merged.classes == ["a", "b", "c"]
    assert merged.count == 90
    expected, found = (s.compute(per_feature=True, pairs=True) for s in (whole, merged))
    assert found["pairs"] == [pytest.approx(row, rel=1e-12) for row in expected["pairs"]]
    assert found["per_feature"] == pytest.approx(expected["per_feature"], rel=1e-12)
    coded = merged.quantized(0.5, ternary=True)
    coded.add(x, y)
    again = feature_discrimination(x, y, ternary_threshold=0.5)
    assert coded.compute()["discrimination"] == pytest.approx(again["ternary"], rel=1e-12)


def test_pairs_and_features_are_those_of_all_pairs_of_samples():
    x, y = random_features()
    names = np.array(["dog", "cat", "eel"])[y]
    found = feature_discrimination(x, names, eta=0.6, pairs=True, per_feature=True)
    standard, labels = standardise(x), np.unique(names)
    ternary = np.sign(standard) * (np.abs(standard) > 0.6 * np.abs(standard).mean())
    assert found["classes"] == ["cat", "dog", "eel"]
    for key, values in (("pairs", standard), ("binary_pairs", standard > 0), ("ternary_pairs", ternary)):
        matrix = np.array(found[key])
        np.testing.assert_allclose(matrix[np.triu_indices(3, 1)], all_pairs(values.astype(float), names), rtol=1e-12)
        np.testing.assert_array_equal(matrix, matrix.T)
        np.testing.assert_array_equal(np.diag(matrix), 0.5)
    for key, values in (("", standard), ("binary_", standard > 0), ("ternary_", ternary)):
        expected = [pooled_pairs(column[:, None].astype(float), names) for column in values.T]
        np.testing.assert_allclose(found[f"{key}per_feature"], expected, rtol=1e-12)
    assert len(labels) == found["num_classes"]


def test_bootstrap_intervals_hold_what_they_promise():
    """Of two Gaussians the D of all samples is known: it should lie in about 95 of 100 intervals."""
    generator = np.random.default_rng(0)
    truth, hits = 0.5 + 0.8**2, 0
    for trial in range(100):
        y = np.arange(80) % 2
        x = generator.normal(size=(80, 3)) + np.where(y[:, None] == 0, 0.8, -0.8)
        # D of raw features of unit variance is that of standardised ones: all three are alike.
        found = feature_discrimination(x, y, bootstrap=200, seed=trial)
        hits += found["discrimination_low"] <= truth <= found["discrimination_high"]
    assert 88 <= hits <= 100


def test_bootstrap_repeats_itself_and_leaves_the_rest_alone():
    x, y = random_features()
    with global_rng_untouched():
        first = feature_discrimination(x, y, bootstrap=100)
    assert first == feature_discrimination(x, y, bootstrap=100)
    assert first != feature_discrimination(x, y, bootstrap=100, seed=1)
    plain = feature_discrimination(x, y)
    assert {key: first[key] for key in plain} == plain
    for name in ("discrimination", "binary", "ternary", "binary_ratio", "ternary_ratio"):
        assert first[f"{name}_low"] < first[name] < first[f"{name}_high"]


def test_bootstrap_of_small_classes_is_centred():
    # Samples drawn twice make a class of 8 look narrower by (7 / 8)^2: uncorrected, every resample has a higher D.
    y = np.repeat(np.arange(20), 8)
    x = np.random.default_rng(0).normal(size=(len(y), 300)) + 0.05 * y[:, None]
    found = feature_discrimination(x, y, bootstrap=200)
    for name in ("discrimination", "binary", "ternary"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]


def test_bootstrap_holds_no_copy_of_the_features(monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", 10)  # many parts of a class: the same intervals
    x, y = random_features()
    in_parts = feature_discrimination(x, y, bootstrap=20)
    monkeypatch.undo()
    assert in_parts == pytest.approx(feature_discrimination(x, y, bootstrap=20), rel=1e-12)
    x = np.random.default_rng(0).standard_normal((200_000, 32), dtype=np.float32)
    y = np.arange(len(x)) % 2
    statistics = FeatureStatistics()
    statistics.add(x[:1000], y[:1000])
    tracemalloc.start()
    bootstrap.intervals(x, {"float": statistics.reader()}, y, np.bincount(y), 4, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * x.nbytes  # draws, and parts of 4 MiB; in float64 the features alone are twice their size


def test_bootstrap_of_classes_without_spread_is_infinite():
    found = feature_discrimination([[0.1]] * 3 + [[0.7]] * 3, [0, 0, 0, 1, 1, 1], bootstrap=20)
    assert found["discrimination_low"] == found["ternary_high"] == math.inf
    assert found["binary_ratio_low"] == found["binary_ratio_high"] == 1.0


def test_accuracy_learns_from_the_training_folds_only():
    x, y = load_digits(return_X_y=True)
    x, y = x[:600], y[:600]
    with global_rng_untouched():
        found = feature_discrimination(x, y, accuracy=("knn", "linear"))
    names = {f"{c}_accuracy{q}" for c in ("knn", "linear") for q in ("", "_binary", "_ternary")}
    assert names <= found.keys()
    assert all(0.8 < found[name] <= 1 for name in names)
    assert "linear_accuracy" not in feature_discrimination(x, y, accuracy="knn")
    # On labels without a pattern, a classifier that saw the test rows would be better than chance.
    shuffled = np.random.default_rng(0).permutation(y)
    nothing = feature_discrimination(x, shuffled, accuracy="knn", ternary_threshold="best")
    assert nothing["knn_accuracy_ternary"] < 0.2
    alone = KNeighborsClassifier(NEIGHBORS).fit(standardise(x), shuffled).score(standardise(x), shuffled)
    assert alone > 0.25  # what leaking would give


def test_a_classifier_named_twice_counts_once():
    x, y = random_features()
    twice = feature_discrimination(x, y, accuracy=["knn", "knn"])
    assert twice == feature_discrimination(x, y, accuracy="knn")


def test_accuracy_needs_three_samples_of_a_class():
    x, y = random_features(rows=11)
    with pytest.raises(ValueError, match="accuracy needs at least 3 samples of every class, class b has 2: add some"):
        feature_discrimination(x[:5], list("abaab"), accuracy="knn")
    assert 0 <= feature_discrimination(x, y, accuracy=("knn", "linear"))["linear_accuracy"] <= 1  # 3 folds


def test_integers_and_strings_do_not_mix_over_batches():
    statistics = FeatureStatistics()
    statistics.add([[1.0], [2.0]], [0, 1])
    statistics.add([[1.0], [2.0]], ["0", "1"])
    with pytest.raises(ValueError, match="all integers or all strings, got both"):
        statistics.compute()


def test_batches_are_checked_as_they_come():
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match="no features yet"):
        statistics.standard()
    statistics.add(np.ones((3, 2)), [0, 0, 1])
    with pytest.raises(ValueError, match="one width, got 2 columns and now 3"):
        statistics.add(np.ones((3, 3)), [0, 0, 1])
    wider = FeatureStatistics()
    wider.add(np.ones((3, 3)), [0, 0, 1])
    with pytest.raises(ValueError, match="one width, got 2 columns and now 3"):
        statistics.merge(wider)
    with pytest.raises(ValueError, match="got nan in row 4"):
        statistics.add([[1, 2], [math.nan, 1]], [0, 1])
    with pytest.raises(ValueError, match="class 1 has one"):
        statistics.compute()
    with pytest.raises(ValueError, match="at least two classes, got none"):
        FeatureStatistics().compute()


ONES = np.ones((2, 2))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "one after the other, got NoneType"),
        ([(ONES,)], "a pair .*, got a tuple of 1"),
        ([(ONES, [0, 1], 2)], "a pair .*, got a tuple of 3"),
        ([{"features": ONES, "labels": [0, 1]}], "a pair .*, got a dict"),
        (ONES, "a pair .*, got a ndarray"),
    ],
)
def test_batches_must_be_pairs(batches, message):
    with pytest.raises(ValueError, match=message):
        stream_discrimination(batches)


def test_statistics_of_other_codes_do_not_merge():
    x, y = random_features()
    plain = FeatureStatistics()
    plain.add(x, y)
    low, high, binary = plain.quantized(0.3, True), plain.quantized(0.6, True), plain.quantized(0.3, False)
    for part in (low, high, binary):
        part.add(x, y)
    for one, other in ((plain, low), (low, plain), (low, high), (low, binary)):
        with pytest.raises(ValueError, match="cannot take in those of"):
            one.merge(other)
    with pytest.raises(TypeError, match="merge takes FeatureStatistics, got list: merge them one by one"):
        plain.merge([low])
    again = pickle.loads(pickle.dumps(low))
    low.merge(again)
    assert low.count == 2 * len(x)


@pytest.mark.parametrize(
    ("threshold", "ternary", "message"),
    [
        (math.nan, True, "threshold must be a finite number of at least 0, got nan"),
        (-3, True, "threshold must be a finite number of at least 0, got -3"),
        ("mean", True, "threshold must be a finite number of at least 0, got 'mean'"),
        (np.ones(4), False, r"threshold must be a number or \(5,\), one a feature, got shape \(4,\)"),
        (-np.ones(5), True, "threshold must be finite and at least 0 for ternary codes, got -1.0"),
        (np.full(5, np.nan), False, "threshold must be finite, got nan"),
    ],
)
def test_thresholds_of_codes_are_checked(threshold, ternary, message):
    statistics = FeatureStatistics()
    statistics.add(*random_features())
    with pytest.raises(ValueError, match=message):
        statistics.quantized(threshold, ternary)


def test_a_batch_that_is_refused_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 10)
    x, y = random_features()
    statistics = FeatureStatistics()
    bad = x.copy()
    bad[40, 1] = math.nan
    with pytest.raises(ValueError, match="got nan in row 40"):
        statistics.add(np.hstack([bad, bad]), y)
    assert (statistics.count, statistics.classes) == (0, [])
    statistics.add(x, y)
    assert statistics.compute()["discrimination"] == feature_discrimination(x, y)["discrimination"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"binary_threshold": "mean"}, "binary_threshold must be a finite number or 'best', got 'mean'"),
        ({"binary_threshold": math.inf}, "binary_threshold must be a finite number or 'best', got inf"),
        (
            {"ternary_threshold": -1},
            "ternary_threshold must be a finite number of at least 0 or 'mean' or 'best', got -1",
        ),
        ({"accuracy": "svm"}, "accuracy must name classifiers of knn, linear, got 'svm'"),
        ({"accuracy": ["knn", 3]}, "accuracy must name classifiers of knn, linear, got 3"),
        ({"accuracy": None}, "accuracy must name classifiers of knn, linear, got None"),
        ({"accuracy": True}, "accuracy must name classifiers of knn, linear, got True"),
        ({"bootstrap": -1}, "bootstrap must be an integer of at least 0, got -1"),
        ({"bootstrap": 1.5}, "bootstrap must be an integer of at least 0, got 1.5"),
        ({"per_feature": "yes"}, "per_feature must be True or False, got 'yes'"),
        ({"pairs": 1}, "pairs must be True or False, got 1"),
        ({"seed": "0"}, "seed must be an integer of at least 0, got '0'"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        feature_discrimination(*random_features(), **option)


def test_options_of_batches_are_checked():
    with pytest.raises(ValueError, match="pairs must be True or False, got 'no'"):
        stream_discrimination([random_features()], pairs="no")


def test_the_best_threshold_needs_all_features():
    with pytest.raises(
        ValueError, match="ternary_threshold must be a finite number of at least 0 or 'mean', got 'best'"
    ):
        stream_discrimination([random_features()], ternary_threshold="best")
