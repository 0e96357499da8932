"""Fitting: the published estimator exactly, and a default that is never worse than no correction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from helpers import global_rng_untouched
from hf_catquant import CatConfig, cluster_fit, held_out
from hf_catquant.cluster_fit import fit
from hf_catquant.cluster_sums import Sums, solve


def rows(count: int, width: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher, and the same with noise."""
    g = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(count, width, generator=g)
    return f + noise * torch.randn(count, width, generator=g), f


def kl(y: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    log_p = f.log_softmax(-1)
    return (log_p.exp() * (log_p - y.log_softmax(-1))).sum(-1)


def published(q: np.ndarray, f: np.ndarray, new: np.ndarray, clusters: int, pca: int, alpha: float) -> np.ndarray:
    """The released code's arithmetic, written out: PCA and KMeans with random_state 42, population moments, no guard."""
    reduce = PCA(n_components=pca, random_state=42).fit(q) if pca < q.shape[1] else None
    points = q if reduce is None else reduce.transform(q)
    means = KMeans(n_clusters=clusters, random_state=42).fit(points)
    gamma, beta = np.ones((clusters, q.shape[1])), np.zeros((clusters, q.shape[1]))
    for k in range(clusters):
        a, b = q[means.labels_ == k].astype(np.float64), f[means.labels_ == k].astype(np.float64)
        if len(a):
            cov = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
            gamma[k] = cov / np.maximum(a.var(0), 1e-8)
            beta[k] = b.mean(0) - gamma[k] * a.mean(0)
    k = means.predict(new if reduce is None else reduce.transform(new))
    return new + alpha * (gamma[k] * new + beta[k] - new)


@pytest.mark.parametrize("width", [20, 70])
def test_paper_is_the_published_method(width):
    q, f = rows(2000, width, 1.0)
    new = rows(200, width, 1.0, seed=1)[0]
    result = fit(q, f, CatConfig.paper(), "classes")
    assert (result.clusters, result.alpha) == (64, 0.4)
    expected = published(q.numpy(), f.numpy(), new.numpy(), 64, 50, 0.4)
    same = np.isclose(result.correction(new).numpy(), expected, rtol=1e-3, atol=1e-3).all(1)
    assert same.mean() > 0.99  # a row between two centroids may fall to the other side


def test_sums_add_up(generator):
    q, f = rows(50, 6, 1.0)
    cluster, fold = (torch.randint(3, (50,), generator=generator) for _ in range(2))
    whole, parts = Sums(3, 6, 3), Sums(3, 6, 3)
    whole.add(q, f, cluster, fold)
    for part in torch.arange(50).split(7):
        parts.add(q[part], f[part], cluster[part], fold[part])
    torch.testing.assert_close(whole.values, parts.values)
    count, values = whole.without(1)
    kept = fold != 1
    assert torch.equal(count, torch.bincount(cluster[kept], minlength=3).double())
    torch.testing.assert_close(values[4].sum(0), (q[kept].double() * f[kept].double()).sum(0))


def test_without_a_prior_every_cluster_is_the_published_estimate_and_an_empty_one_the_identity(generator):
    q, f = rows(60, 5, 0.5)
    q[:, 4] = 2.0  # a channel that never moves: variance 0, under the floor
    cluster = torch.tensor([0, 1, 3])[torch.randint(3, (60,), generator=generator)]
    sums = Sums(4, 5)
    sums.add(q, f, cluster, torch.zeros(60, dtype=torch.int64))
    gamma, beta = solve(*sums.without(None), "ls", 0.0)
    for k in (0, 1, 3):
        a, b = q[cluster == k].double(), f[cluster == k].double()
        cov = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
        slope = cov / a.var(0, correction=0).clamp_min(1e-8)
        torch.testing.assert_close(gamma[k], slope, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(beta[k], b.mean(0) - slope * a.mean(0), rtol=1e-6, atol=1e-6)
    for kind in ("ls", "std"):
        gamma, beta = solve(*sums.without(None), kind, 0.0)
        assert torch.equal(gamma[2], torch.ones(5).double())
        assert torch.equal(beta[2], torch.zeros(5).double())


def test_with_a_prior_an_empty_cluster_is_the_map_of_all_rows():
    q, f = rows(60, 3, 0.5)
    zeros = torch.zeros(60, dtype=torch.int64)
    two, one = Sums(2, 3), Sums(1, 3)
    two.add(0.5 * q + 1, f, zeros, zeros)
    one.add(0.5 * q + 1, f, zeros, zeros)
    total = one.without(None)
    for kind in ("ls", "std"):
        gamma, beta = solve(*two.without(None), kind, 8.0)
        # The first cluster holds all rows, and is shrunk to their map once more: the empty one lies between it and 1.
        assert ((gamma[1] > 1.2) & (gamma[1] <= gamma[0] + 1e-9)).all()
        assert not torch.equal(beta[1], torch.zeros(3).double())
        torch.testing.assert_close(gamma[0], solve(*total, kind, 8.0)[0][0])


def test_shrinkage_goes_to_the_identity():
    q, f = rows(500, 5, 0.0)
    sums = Sums(1, 5)
    sums.add(q * 2 + 1, f, *(torch.zeros(500, dtype=torch.int64) for _ in range(2)))
    for kind in ("ls", "std"):
        gamma, beta = solve(*sums.without(None), kind, 0.0)
        torch.testing.assert_close(gamma, torch.full_like(gamma, 0.5), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(beta, torch.full_like(beta, -0.5), rtol=1e-5, atol=1e-5)
        gamma, beta = solve(*sums.without(None), kind, 1e9)
        torch.testing.assert_close(gamma, torch.ones_like(gamma), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(beta, torch.zeros_like(beta), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_256_samples_with_64_clusters_do_not_explode(seed):
    q, f = rows(256, 100, 1.5, seed)
    held_q, held_f = rows(2000, 100, 1.5, seed + 100)
    for config in (CatConfig(), CatConfig(num_clusters=64, alpha=1.0)):
        result = fit(q, f, config, "classes")
        corrected = held_q if result.correction is None else result.correction(held_q)
        change = kl(corrected, held_f) - kl(held_q, held_f)
        worst = 0.0 if config == CatConfig() else 0.05
        assert float(change.mean()) - 2 * float(change.std()) / 2000**0.5 <= worst


def test_a_biased_model_is_won_back():
    q, f = rows(1000, 10, 0.3)
    bent = 0.5 * q + torch.linspace(-2, 2, 10)
    result = fit(bent, f, CatConfig(), "classes")
    assert result.alpha == 1.0
    assert result.gain_low > 0
    new, target = rows(1000, 10, 0.3, seed=1)
    new = 0.5 * new + torch.linspace(-2, 2, 10)
    assert kl(result.correction(new), target).mean() < 0.2 * kl(new, target).mean()


def test_clusters_are_used_where_the_error_has_them():
    g = torch.Generator().manual_seed(0)
    side = torch.randint(0, 2, (2000, 1), generator=g).float() * 2 - 1
    f = torch.randn(2000, 6, generator=g) + 6 * side * torch.eye(6)[0]
    q = torch.where(side > 0, f + torch.eye(6)[1] * 3, f - torch.eye(6)[2] * 3)
    result = fit(q, f, CatConfig(), "classes")
    assert result.clusters >= 4  # the choices are 1, 4, 8 ...
    assert result.loss_after < 0.1 * result.loss_before


def test_noise_is_left_alone():
    q, f = rows(400, 10, 0.0)
    result = fit(q, f, CatConfig(), "classes")
    assert result.correction is None
    assert (result.clusters, result.alpha, result.gain) == (0, 0.0, 0.0)
    assert "off" in result.summary()


@pytest.mark.parametrize("kind", ["values", "classes"])
def test_noise_without_a_bias_gives_off(kind):
    """The teacher is the quantized model plus noise: nothing can be won, and of 12 fits hardly one may think otherwise."""
    off = 0
    for seed in range(12):
        noisy, q = rows(300, 10, 1.0, seed)
        result = fit(q, noisy, CatConfig(), kind)
        off += result.correction is None
        if result.correction is not None:
            assert (result.correction(q) - q).abs().mean() < 0.1 * q.abs().mean()
    assert off >= 11


def test_answers_are_not_sold_for_confidence():
    """Per-class maps of few rows lower the divergence of an over-confident model and change its answers."""
    q, f = rows(64, 1000, 3.0)
    new, target = rows(1000, 1000, 3.0, seed=1)
    result = fit(q, f, CatConfig(), "classes")
    corrected = new if result.correction is None else result.correction(new)
    agreed = [(y.argmax(1) == target.argmax(1)).float().mean() for y in (new, corrected)]
    assert agreed[1] >= agreed[0] - 0.02


def test_wide_outputs_and_small_budgets_get_one_cluster():
    q, f = rows(400, 60, 1.0)
    bent = 0.3 * q
    assert fit(bent, f, CatConfig(), "logits", max_bytes=100).clusters <= 1
    two = fit(*(t[:, :2] for t in (bent, f)), CatConfig(), "classes")
    assert torch.isfinite(two.correction(bent[:, :2])).all()


def test_a_vocabulary_gets_one_cluster_where_more_would_outweigh_the_model():
    q, f = rows(260, 20_000, 1.0)
    config = CatConfig(alpha=1.0, projection=4)
    size = 4 * (4 * 20_000 + 4 * (20_000 + 20_000 + 4))  # basis, then gamma, beta and centroid of four clusters
    just, bounded = (fit(0.5 * q, f, config, "logits", max_bytes=limit) for limit in (size, size - 1))
    assert list(just.candidates) == ["1/1/std", "4/1/std"]  # not 8: fewer than 64 rows a cluster
    assert list(bounded.candidates) == ["1/1/std"]
    assert bounded.clusters == 1
    assert bounded.gain_low > 0


def test_auto_takes_the_gamma_that_fits():
    q, f = rows(600, 6, 0.0)
    assert fit(0.5 * q, f, CatConfig(gamma="auto"), "classes").gamma == "std"  # both are exact: the first
    # A channel of mere noise: its spread says nothing, least squares switches it off.
    noise = 6 * torch.randn(600, generator=torch.Generator().manual_seed(2))
    q, f = (torch.cat((channel[:, None], t), 1) for channel, t in ((noise, q), (noise.roll(1) / 4, f)))
    found = {gamma: fit(q, f, CatConfig(gamma=gamma), "classes") for gamma in ("std", "ls", "auto")}
    assert found["auto"].gamma == "ls"
    assert found["auto"].gain == found["ls"].gain
    assert found["auto"].gain > found["std"].gain
    assert set(found["auto"].candidates) == set(found["std"].candidates) | set(found["ls"].candidates)


def test_more_clusters_than_rows_are_lowered_and_said():
    q, f = rows(20, 4, 1.0)
    for alpha in (0.5, "auto"):
        result = fit(q, f, CatConfig(num_clusters=64, alpha=alpha), "values")
        assert result.clusters <= 20
        assert "num_clusters 64 lowered to 20, the number of rows" in result.notes
    assert fit(q, f, CatConfig(num_clusters=20, alpha=0.5), "values").notes == []


def test_hidden_features_by_squared_error():
    q, f = rows(600, 8, 0.2)
    result = fit(q + 3, f, CatConfig(), "values")
    assert result.metric == "mse"
    assert result.loss_after < 0.1 * result.loss_before


def test_the_same_rows_give_the_same_fit_and_no_global_generator_moves():
    q, f = rows(500, 60, 1.0)
    with global_rng_untouched():
        first, second = (fit(0.5 * q, f, CatConfig(), "classes") for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert torch.equal(first.correction.gamma, second.correction.gamma)


def test_unusable_rows():
    q, f = rows(9, 4, 1.0)
    with pytest.raises(ValueError, match="at least 10 rows, got 9"):
        fit(q, f, CatConfig(), "classes")
    q, f = rows(20, 4, 1.0)
    with pytest.raises(ValueError, match="of one shape"):
        fit(q, f[:, :3], CatConfig(), "classes")
    for bad in (float("nan"), float("inf")):
        broken = q.clone()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="quantized outputs have values that are not finite"):
            fit(broken, f, CatConfig(), "classes")
        with pytest.raises(ValueError, match="teacher outputs have values that are not finite"):
            fit(f, broken, CatConfig(), "classes")


@pytest.mark.parametrize(
    ("lost", "won", "kept"), [(1, 0, True), (4, 2, True), (60, 58, True), (5, 0, False), (60, 40, False)]
)
def test_a_handful_of_answers_that_turn_is_chance(lost, won, kept):
    change = torch.zeros(512)
    change[:lost], change[lost : lost + won] = -1, 1
    assert cluster_fit.keeps_answers(change, torch.arange(512)) == kept


def test_answers_of_one_sample_are_one_witness():
    """Sixty-four tokens of one text that turn are no more than chance; those of many texts are a loss."""
    change = torch.zeros(512)
    change[:64] = -1
    assert cluster_fit.keeps_answers(change, torch.arange(512) // 64)
    assert not cluster_fit.keeps_answers(change, torch.arange(512))


def test_divergence_is_not_bought_with_answers(monkeypatch):
    """The line that brings the logits nearest turns the many rows that are nearly undecided."""
    kind = torch.tensor([0] * 7 + [1] + [2] * 2).repeat(60)
    noise = 0.01 * torch.randn(600, generator=torch.Generator().manual_seed(0))
    q = torch.stack((torch.tensor([0.5, 3.0, -1.0])[kind] + noise, torch.zeros(600)), 1)
    f = torch.stack((torch.tensor([0.1, 6.0, -6.0])[kind], torch.zeros(600)), 1)

    def kept() -> float:
        correction = fit(q, f, CatConfig(num_clusters=1, gamma="ls"), "classes").correction
        answers = q if correction is None else correction(q)
        return float((answers.argmax(1) == f.argmax(1)).float().mean())

    assert kept() == 1
    monkeypatch.setattr(held_out, "AGREEMENT_LOSS", 1.0)
    assert kept() < 0.5
