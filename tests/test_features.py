"""Quantizers as scikit-learn sees them, their thresholds and their bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from feature_helpers import pooled_pairs, random_features, standardise
from hf_catquant import BinaryQuantizer, TernaryQuantizer, feature_discrimination

QUANTIZERS = [
    BinaryQuantizer(),
    TernaryQuantizer(),
    BinaryQuantizer("discrimination"),
    TernaryQuantizer("discrimination", per_feature=True),
    BinaryQuantizer("mean", standardize=False, packing="bits"),
    TernaryQuantizer(packing="base3"),
]


@parametrize_with_checks(QUANTIZERS)
def test_scikit_learn_takes_it_for_an_estimator(estimator, check):
    check(estimator)


def test_pipelines_cross_validate_and_search():
    x, y = load_digits(return_X_y=True)
    x, y = x[:500], y[:500]
    pipeline = make_pipeline(TernaryQuantizer("discrimination"), KNeighborsClassifier())
    assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.85
    grid = {"ternaryquantizer__threshold": [0.2, 5.0], "ternaryquantizer__per_feature": [False]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(x, y)
    assert search.best_params_["ternaryquantizer__threshold"] == 0.2
    assert clone(pipeline)[0].get_params() == pipeline[0].get_params()


def test_codes_are_those_of_the_equation():
    x, y = random_features()
    z = standardise(x)
    size = np.abs(z).mean()
    np.testing.assert_array_equal(BinaryQuantizer().fit_transform(x), z > 0)
    np.testing.assert_array_equal(BinaryQuantizer(0.3).fit_transform(x), z > 0.3)
    np.testing.assert_array_equal(BinaryQuantizer("mean", eta=0.5).fit_transform(x), z > 0.5 * size)
    np.testing.assert_array_equal(TernaryQuantizer(eta=0.5).fit_transform(x), np.sign(z) * (np.abs(z) > 0.5 * size))
    np.testing.assert_array_equal(
        TernaryQuantizer("mean", eta=0.5, per_feature=True).fit_transform(x),
        np.sign(z) * (np.abs(z) > 0.5 * np.abs(z).mean(0)),
    )
    raw = BinaryQuantizer(0.1, standardize=False).fit(x[:10])
    np.testing.assert_array_equal(raw.transform(x), x > 0.1)
    found = TernaryQuantizer("discrimination").fit(x, y)
    best = feature_discrimination(x, y, ternary_threshold="best")["ternary_threshold"]
    np.testing.assert_allclose(found.threshold_, best, rtol=1e-12)


def test_only_training_rows_set_scale_and_threshold():
    x, y = random_features(rows=90)
    fitted = TernaryQuantizer("discrimination", per_feature=True).fit(x[:60], y[:60])
    z = (x[60:] - x[:60].mean(0)) / x[:60].std(0)
    np.testing.assert_array_equal(fitted.transform(x[60:]), np.sign(z) * (np.abs(z) > fitted.threshold_))
    # Each feature has its own best threshold: no other one does better on the training rows.
    train = standardise(x[:60])
    for column, threshold in zip(train.T, fitted.threshold_, strict=True):
        own = pooled_pairs((np.sign(column) * (np.abs(column) > threshold))[:, None], y[:60])
        for other in np.linspace(0, 2, 21):
            assert own >= pooled_pairs((np.sign(column) * (np.abs(column) > other))[:, None], y[:60]) - 1e-12


def test_a_constant_feature_becomes_zero():
    x = np.hstack([random_features()[0], np.full((60, 1), 0.1)])
    for quantizer in (BinaryQuantizer(), TernaryQuantizer(0)):
        assert not quantizer.fit_transform(x)[:, -1].any()


@pytest.mark.parametrize("columns", [1, 5, 8, 9, 40, 67])
@pytest.mark.parametrize(
    ("kind", "packing", "width"),
    [
        (BinaryQuantizer, "bits", lambda d: -(-d // 8)),
        (TernaryQuantizer, "bits", lambda d: 2 * -(-d // 8)),
        (TernaryQuantizer, "base3", lambda d: -(-d // 5)),
    ],
)
def test_packed_codes_are_the_dense_ones(columns, kind, packing, width):
    x, _ = random_features(columns=columns)
    packer = kind(packing=packing).fit(x)
    packed = packer.transform(x)
    assert packed.dtype == np.uint8
    assert packed.shape == (60, width(columns))
    assert len(packer.get_feature_names_out()) == packed.shape[1]
    np.testing.assert_array_equal(packer.unpack(packed), kind().fit_transform(x))
    with pytest.raises(ValueError, match=rf"must be \(n, {width(columns)}\) uint8"):
        packer.unpack(packed[:, 1:])
    with pytest.raises(ValueError, match="packing=None"):
        kind().fit(x).unpack(packed)


def test_bytes_by_hand():
    x = np.array([[1.0, -1, 0, 2, -2, 0, 0, 0, 3, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, -1]])
    binary = BinaryQuantizer(standardize=False, packing="bits").fit_transform(x)
    np.testing.assert_array_equal(binary, [[0b00001001, 0b01], [0, 0]])
    planes = TernaryQuantizer(0.5, standardize=False, packing="bits").fit_transform(x)
    np.testing.assert_array_equal(planes, [[0b00011011, 0b01, 0b00010010, 0], [0, 0b10, 0, 0b10]])
    trits = TernaryQuantizer(0.5, standardize=False, packing="base3").fit_transform(x)
    ones = 1 + 3 + 9 + 27 + 81
    np.testing.assert_array_equal(trits, [[ones + 1 - 3 + 27 - 81, ones + 27], [ones, ones - 81]])


def test_large_inputs_go_in_parts(monkeypatch):
    x, _ = random_features()
    whole = TernaryQuantizer(packing="base3").fit_transform(x)
    monkeypatch.setattr("hf_catquant.features.CHUNK", 7 * x.shape[1])
    np.testing.assert_array_equal(TernaryQuantizer(packing="base3").fit_transform(x), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_float_dtype(dtype):
    tensor = torch.tensor(random_features()[0], dtype=dtype)
    found = BinaryQuantizer().fit(tensor).transform(tensor)
    np.testing.assert_array_equal(found, BinaryQuantizer().fit_transform(tensor.float().numpy()))


@pytest.mark.parametrize(
    ("quantizer", "labels", "message"),
    [
        (
            BinaryQuantizer("median"),
            None,
            "threshold must be a finite number or 'mean' or 'discrimination', got 'median'",
        ),
        (TernaryQuantizer(-1), None, "threshold must be a finite number of at least 0 or .*, got -1"),
        (TernaryQuantizer(eta=math.nan), None, "eta must be a finite number of at least 0, got nan"),
        (BinaryQuantizer(standardize="no"), None, "standardize must be True or False, got 'no'"),
        (TernaryQuantizer(per_feature="all"), None, "per_feature must be True or False, got 'all'"),
        (BinaryQuantizer(packing="base3"), None, "packing must be one of None, 'bits', got 'base3'"),
        (TernaryQuantizer("discrimination"), None, "requires y to be passed"),
        (TernaryQuantizer("discrimination"), [1] * 60, "at least two classes, got one class, 1"),
        (TernaryQuantizer("discrimination"), ["a"] * 59 + ["b"], "class b has one"),
        (TernaryQuantizer("discrimination"), [0, 1], "inconsistent numbers of samples"),
    ],
)
def test_bad_parameters_and_labels_are_named(quantizer, labels, message):
    with pytest.raises(ValueError, match=message):
        quantizer.fit(random_features()[0], labels)
