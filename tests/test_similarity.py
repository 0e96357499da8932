"""Bit counts against dot products of the dense codes; search against sorting all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_catquant import BinaryQuantizer, TernaryQuantizer
from hf_catquant.kernels import native, reference_bits
from hf_catquant.similarity import PackedIndex


def packed(kind, x):
    return kind(standardize=False, packing="bits").fit(x).transform(x)


def dense(kind, x):
    codes = kind(standardize=False).fit(x).transform(x).astype(int)
    return codes if kind is TernaryQuantizer else 2 * codes - 1


def embeddings(rows, columns):
    return np.random.default_rng(columns).normal(size=(rows, columns)).astype(np.float32)


WAYS = [*native.available_paths(), "numpy", "table"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way to count bits: compiled, numpy's instruction (numpy 2), a table."""
    if request.param == "numpy" and not hasattr(np, "bitwise_count"):
        pytest.skip("numpy before 2.0 does not count bits")
    compiled = request.param not in ("numpy", "table")
    monkeypatch.setattr(native, "PATH", request.param if compiled else "reference")
    monkeypatch.setattr(native, "path_number", native.PATHS.get(request.param, -1))
    count = reference_bits.count_by_table if request.param == "table" else reference_bits.count_natively
    monkeypatch.setattr(reference_bits, "count_bits", count)
    monkeypatch.setattr(reference_bits, "TOGETHER", 1)


@pytest.mark.parametrize("kind", [BinaryQuantizer, TernaryQuantizer])
@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 384, 1000, 2100])
def test_scores_are_dot_products(way, kind, columns):
    x = embeddings(1300 if columns < 100 else 520, columns)  # tiles have 256 rows
    index = PackedIndex(packed(kind, x), columns, ternary=kind is TernaryQuantizer, num_threads=3)
    codes = dense(kind, x)
    for count in (1, 2, 9):  # kernels take two queries at a time
        np.testing.assert_array_equal(index.scores(packed(kind, x)[:count]), codes[:count] @ codes.T)
    out = np.full((9, len(x)), 99, np.int16)
    assert index.scores(packed(kind, x)[:9], out) is out
    np.testing.assert_array_equal(out, codes[:9] @ codes.T)


@pytest.mark.parametrize("kind", [BinaryQuantizer, TernaryQuantizer])
def test_all_alike_and_all_unlike_do_not_overflow(way, kind):
    columns = 2**14 - 1
    x = np.ones((3, columns), np.float32) * np.array([[1], [-1], [1]], np.float32)
    index = PackedIndex(packed(kind, x), columns, ternary=kind is TernaryQuantizer)
    expected = np.array([[columns, -columns, columns]])
    np.testing.assert_array_equal(index.scores(packed(kind, x)[:1]), expected)
    assert index.search(packed(kind, x)[:1], 3)[0].tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("kind", [BinaryQuantizer, TernaryQuantizer])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [1, 10, 1300])
def test_search_finds_the_best_and_of_equal_ones_the_first(way, kind, threads, k):
    x = embeddings(1300, 12)  # few features: many equal scores
    index = PackedIndex(packed(kind, x), 12, ternary=kind is TernaryQuantizer, num_threads=threads)
    codes = dense(kind, x)
    products = codes[:7] @ codes.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    rows, scores = index.search(packed(kind, x)[:7], k)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(products, order, 1))


@pytest.mark.parametrize("order", [1, -1])
def test_search_in_rows_that_grow_or_fall(way, order):
    """The worst and the best case for keeping the best: every row is better than all before it, or none is."""
    rows = np.packbits(np.arange(600)[:, None] > np.arange(600)[::order][None], axis=1, bitorder="little")
    index = PackedIndex(rows, 600, num_threads=2)
    asked = np.full((1, 75), 255, np.uint8)
    expected = np.argsort(-index.scores(asked).astype(int), axis=1, kind="stable")[:, :50]
    np.testing.assert_array_equal(index.search(asked, 50)[0], expected)


@pytest.mark.parametrize("kind", [BinaryQuantizer, TernaryQuantizer])
def test_rows_that_fill_up_the_last_tile_are_never_found(way, kind):
    """Every real row is the opposite of the query, so that a row of zeros would be better."""
    x = np.ones((300, 70), np.float32)
    index = PackedIndex(packed(kind, x), 70, ternary=kind is TernaryQuantizer, num_threads=2)
    rows, scores = index.search(packed(kind, -x[:1]), 5)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(scores, np.full((1, 5), -70))


def test_scoring_again_sorts_the_nearest_by_their_floats():
    x = embeddings(500, 32)
    index = PackedIndex(packed(BinaryQuantizer, x), 32)
    exact = np.argsort(-(x[:20] @ x.T), axis=1)[:, :5]
    codes = packed(BinaryQuantizer, x)[:20]
    recalls = []
    for oversample in (1, 4, 100):
        rows, scores = index.search(codes, 5, embeddings=x, float_queries=x[:20], oversample=oversample)
        np.testing.assert_allclose(scores, np.take_along_axis(x[:20] @ x.T, rows, 1), rtol=1e-5)
        assert (np.diff(scores) <= 0).all()
        recalls.append(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows, exact, strict=True)]))
    assert recalls[0] < recalls[1] < recalls[2] == 1


X = embeddings(20, 12)
CODES = packed(BinaryQuantizer, X)
INDEX = PackedIndex(CODES, 12)


@pytest.mark.parametrize("kind", [BinaryQuantizer, TernaryQuantizer])
def test_bits_behind_the_last_feature_are_not_counted(kind):
    codes = packed(kind, X)
    dirty = codes.copy()
    dirty[:, 1::2] |= 0b11110000
    ternary = kind is TernaryQuantizer
    expected = PackedIndex(codes, 12, ternary=ternary).scores(codes)
    np.testing.assert_array_equal(PackedIndex(dirty, 12, ternary=ternary).scores(dirty), expected)


def test_bytes_of_other_tools_serve_where_they_are_full():
    x = embeddings(50, 24)
    other = np.packbits(x > 0, axis=1)  # the first feature in the highest bit: as sentence-transformers' "ubinary"
    signs = 2 * (x > 0).astype(int) - 1
    np.testing.assert_array_equal(PackedIndex(other, 24).scores(other[:5]), signs[:5] @ signs.T)
    with pytest.raises(ValueError, match=r"uint8.*got int8"):
        PackedIndex((other.astype(np.int16) - 128).astype(np.int8), 24)


def test_embeddings_may_be_rows_or_tensors():
    expected = INDEX.search(CODES, 3, embeddings=X, float_queries=X)
    for form in (X.tolist(), torch.tensor(X)):
        found = INDEX.search(CODES, 3, embeddings=form, float_queries=form)
        np.testing.assert_array_equal(found[0], expected[0])
    half = torch.tensor(X).bfloat16()
    assert INDEX.search(CODES, 3, embeddings=half, float_queries=half)[1].shape == (20, 3)


def test_bytes_that_are_no_ternary_codes_are_refused():
    base3 = TernaryQuantizer(packing="base3").fit(X)
    with pytest.raises(ValueError, match="a packed ternary byte must be at most 242, got 255"):
        base3.unpack(np.full((2, 3), 255, np.uint8))
    bits = TernaryQuantizer(packing="bits").fit(X)
    with pytest.raises(ValueError, match='no bit "negative" where the bit "not 0" is unset'):
        bits.unpack(np.array([[0, 0, 1, 0]], np.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PackedIndex(np.zeros((3, 2), np.uint8), 0), "num_features must be an integer of at least 1, got 0"),
        (lambda: PackedIndex(np.zeros((3, 2), np.uint8), 10.0), "num_features must be an integer .*, got 10.0"),
        (lambda: PackedIndex(np.zeros((3, 2), np.uint8), 2**14), "num_features must be from 1 to 16383, got 16384"),
        (lambda: PackedIndex(CODES, 12, num_threads=2.5), "num_threads must be an integer of at least 1, got 2.5"),
        (lambda: PackedIndex(CODES, 12, num_threads=-1), "num_threads must be an integer of at least 1, got -1"),
        (
            lambda: INDEX.scores(CODES, X),
            r"out must be .* int16 array of shape \(20, 20\), got float32 of shape \(20, 12\)",
        ),
        (
            lambda: INDEX.scores(CODES, np.zeros((20, 20), np.int16).T),
            r"out must be a C-contiguous, writable int16 array of shape \(20, 20\), got int16 of shape \(20, 20\)",
        ),
        (lambda: INDEX.scores(CODES, [0]), "out must be a .* int16 array .*, got list"),
        (lambda: INDEX.search(CODES, 2.5), "k must be an integer of at least 1, got 2.5"),
        (lambda: INDEX.search(CODES, "3"), "k must be an integer of at least 1, got '3'"),
        (lambda: INDEX.search(CODES, True), "k must be an integer of at least 1, got True"),
        (
            lambda: INDEX.search(CODES, 2, embeddings=X, float_queries=X, oversample=1.5),
            "oversample must be an integer of at least 1, got 1.5",
        ),
        (
            lambda: INDEX.search(CODES, 2, embeddings=X[:, 0], float_queries=X),
            r"must be \(n, e\) of real numbers, got float32 of shape \(20,\)",
        ),
        (
            lambda: INDEX.search(CODES, 2, embeddings=X * np.nan, float_queries=X),
            "embeddings and float_queries must be finite, got a product of nan of query 0",
        ),
        (lambda: PackedIndex(np.zeros((3, 2), np.uint8), 17), r"packed must be \(n, 3\) uint8, a plane of 17 bits"),
        (lambda: PackedIndex(np.zeros((3, 3), np.uint8), 12, ternary=True), r"must be \(n, 4\) uint8, two planes"),
        (lambda: PackedIndex(np.zeros((0, 2), np.uint8), 12), r"got uint8 of shape \(0, 2\)"),
        (lambda: INDEX.scores(X), r"queries must be \(n, 2\) uint8.*got float32 of shape \(20, 12\)"),
        (lambda: INDEX.search(packed(BinaryQuantizer, X), 21), "k must be from 1 to the 20 rows, got 21"),
        (
            lambda: INDEX.search(packed(BinaryQuantizer, X), 2, oversample=0),
            "oversample must be an integer of at least 1, got 0",
        ),
        (lambda: INDEX.search(packed(BinaryQuantizer, X), 2, embeddings=X), "go together, got one"),
        (
            lambda: INDEX.search(packed(BinaryQuantizer, X), 2, embeddings=X, float_queries=X[:3]),
            r"must be \(20, e\) and \(20, e\), got \(20, 12\) and \(3, 12\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
