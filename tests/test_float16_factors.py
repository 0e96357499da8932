"""Factors of a product in float16: what is added to a packed weight keeps its bits as far as two factors can hold them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_catquant import CatQuantConfig, quantize
from hf_catquant.layers.float16_factors import balanced, fits_float16


def errors(out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Of the product's rows, and of its columns: how far they are off, relative to their own size."""
    factors = [factor.half().double() for factor in balanced(out, into)]
    wanted = out.double() @ into.double()
    difference = factors[0] @ factors[1] - wanted
    return difference.norm(dim=1) / wanted.norm(dim=1), difference.norm(dim=0) / wanted.norm(dim=0)


@pytest.mark.parametrize(("least", "most"), [(-2, -2), (-6, 3), (-4, 4), (-6, 0)])
def test_rows_of_many_sizes_are_right_to_rounding(least: int, most: int, generator: torch.Generator):
    out = torch.randn(64, 4, generator=generator) * torch.logspace(least, most, 64)[:, None]
    into = torch.randn(4, 48, generator=generator) / 12
    rows, columns = errors(out, into)
    assert rows.max() < 2e-3
    assert columns.max() < 2e-3


def test_neither_factor_is_given_up_for_the_other(generator: torch.Generator):
    """Rows that float16 cannot hold at all do not cost the others their bits, nor a model in float16 its range."""
    out = torch.randn(64, 4, generator=generator) * torch.logspace(-20, 0, 64)[:, None]
    into = torch.randn(4, 48, generator=generator)
    rows, columns = errors(out, into)
    assert rows[-16:].max() < 2e-3
    assert columns.max() < 2e-3
    for first, second in ((out, into), (into.T, out.T)):
        found = balanced(first, second)
        assert found[1].norm(dim=1).max() < 64
        torch.testing.assert_close(found[0] @ found[1], first @ second)


def test_zero_ranks_and_the_edge_of_float16():
    out, into = torch.ones(3, 2), torch.ones(2, 4)
    out[:, 1] = 0
    assert torch.equal(torch.stack(errors(out, into)[:1])[0], torch.zeros(3, dtype=torch.float64))
    for size, fits in ((2.0**30, True), (2.0**33, False)):
        assert fits_float16(out * size, into) == fits
        assert all(bool(factor.half().isfinite().all()) for factor in balanced(out * size, into)) == fits


def test_what_a_layer_cannot_add_leaves_it_as_it_was():
    model = quantize(nn.Sequential(nn.Linear(16, 8)), CatQuantConfig(group_size=8, solver="rtn", correction=None))
    layer = model[0]
    before, scheme = layer.matrix(torch.float32), layer.scheme
    for out, message in (
        (torch.full((8, 1), 1e30), "float16, which end at 65504"),
        (torch.full((8, 1), torch.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.add_product(out, torch.ones(1, 16))
        assert layer.scheme == scheme
        assert torch.equal(layer.matrix(torch.float32), before)
