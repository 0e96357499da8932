"""What fitting promises on rows that it never saw: the default does no harm, and finds what is there to be found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_catquant import CatConfig
from hf_catquant.cluster_fit import fit

HELD_OUT = 1500


def kl(y: Tensor, f: Tensor) -> Tensor:
    log_p = f.log_softmax(-1)
    return (log_p.exp() * (log_p - y.log_softmax(-1))).sum(-1)


def held_out_gain(config: CatConfig, bend: Callable[[Tensor], Tensor], rows: int, width: int, seed: int) -> Tensor:
    """Divergence saved on each of HELD_OUT rows by a correction fitted on ``rows`` others of a noisy, bent teacher."""
    g = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(rows + HELD_OUT, width, generator=g)
    q = bend(f + torch.randn(f.shape, generator=g))
    correction = fit(q[:rows], f[:rows], config, "classes").correction
    new, target = q[rows:], f[rows:]
    return torch.zeros(HELD_OUT) if correction is None else kl(new, target) - kl(correction(new), target)


@pytest.mark.parametrize(("rows", "width"), [(20, 10), (60, 10), (100, 2), (250, 10)])
def test_the_default_does_no_harm_where_little_can_be_gained(rows, width):
    gains = torch.stack([held_out_gain(CatConfig(), lambda q: 0.9 * q, rows, width, seed) for seed in range(12)])
    low = gains.mean(1) + 3 * gains.std(1) / HELD_OUT**0.5  # of every fit: three standard errors of its own rows
    assert float(low.min()) >= 0
    # And not on average either, between the fits, whose rows for fitting differ too.
    means = gains.mean(1)
    assert float(means.mean() + 2 * means.std() / len(means) ** 0.5) >= 0


def test_the_published_estimator_explodes_where_the_default_does_not():
    """256 rows in 64 clusters, four rows each: what shrinkage and cross-validation are there for."""
    published = held_out_gain(CatConfig.paper(), lambda q: q, 256, 10, seed=0)
    default = held_out_gain(CatConfig(), lambda q: q, 256, 10, seed=0)
    assert float(published.mean()) < -0.05
    assert float(default.mean()) >= 0


def test_shrinkage_tames_clusters_of_few_rows():
    """Four rows a cluster, asked for outright: no promise that they help, but they must not explode."""
    tamed, bare = (
        held_out_gain(CatConfig(num_clusters=64, alpha=1.0, shrinkage=prior), lambda q: 0.8 * q, 256, 10, seed=0)
        for prior in (32.0, 0.0)
    )
    assert float(tamed.mean()) > float(bare.mean()) + 0.1


def test_two_classes_differ_by_one_number_only():
    """Logits moved together are the same probabilities: nothing to correct, however far they moved."""
    g = torch.Generator().manual_seed(0)
    f = 2 * torch.randn(600, 2, generator=g)
    moved = fit(f + 5 * torch.randn(600, 1, generator=g), f, CatConfig(), "classes")
    assert moved.loss_before == pytest.approx(0, abs=1e-5)
    assert moved.correction is None
    bent = fit(f * torch.tensor([0.5, 0.5]) + torch.tensor([2.0, 0.0]), f, CatConfig(), "classes")
    assert bent.correction is not None
    assert bent.loss_after < 0.2 * bent.loss_before


def test_alpha_is_folded_into_the_tensors():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(300, 6, generator=g)
    q = 0.5 * f + 1
    whole, half = (fit(q, f, CatConfig(num_clusters=4, alpha=alpha), "values").correction for alpha in (1.0, 0.5))
    torch.testing.assert_close(half.gamma, 1 + 0.5 * (whole.gamma - 1))
    torch.testing.assert_close(half(q), q + 0.5 * (whole(q) - q))
