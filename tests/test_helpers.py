"""The measures that other tests trust can fail."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from helpers import assert_product, global_rng_untouched, naive_dequantize, sqnr
from hf_catquant.formats import FORMATS


def test_sqnr_sees_a_wrong_scale():
    x = torch.tensor([1.0, -2.0, 3.0])
    assert sqnr(x, x) == float("inf")
    assert sqnr(x, x / 2) == pytest.approx(20 * np.log10(2))
    assert sqnr(x, -x) < 0


def test_assert_product_allows_rounding_and_nothing_else():
    expected, magnitude = torch.tensor([1.0], dtype=torch.float64), torch.tensor([4.0])
    assert_product(torch.tensor([1.0 + 3e-7]), expected, magnitude)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_product(torch.tensor([1.0 + 3e-6]), expected, magnitude)


def test_naive_dequantize_by_hand():
    codes = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    scale, offset = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, -1.0]])
    assert naive_dequantize(codes, scale, offset, FORMATS["ternary"], 2).tolist() == [[-1.5, 0.5, 2.0]]


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(1), lambda: torch.manual_seed(1), random.random, np.random.rand, lambda: np.random.seed(1)],  # noqa: NPY002
    ids=["torch", "torch seed", "random", "numpy", "numpy seed"],
)
def test_use_of_a_global_generator_is_seen(draw):
    with pytest.raises(AssertionError, match="global generator"), global_rng_untouched():
        draw()


def test_own_generators_are_free(generator):
    with global_rng_untouched():
        torch.rand(1, generator=generator)
        np.random.default_rng(0).random()


@pytest.fixture(scope="module")
def drawn() -> list[float]:
    return []


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_starts_from_the_same_seed(turn, drawn):
    drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 1


@pytest.mark.realdata
def test_realdata_is_the_folder_of_models_and_data(realdata):
    assert (realdata / "models").is_dir()
    assert (realdata / "data").is_dir()
