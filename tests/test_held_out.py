"""Judgement of corrections: whole samples are held out and drawn again; columns that are never answered are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from hf_catquant import CatConfig, fit_correction, held_out
from hf_catquant.cluster_fit import fit
from hf_catquant.held_out import FOLDS, folds_of, interval, losses, standard_error

LOWEST = torch.finfo(torch.float32).min


def test_interval_is_the_bootstrap_of_scipy():
    """Of a skewed gain: both ends, which the normal approximation puts elsewhere."""
    gain = torch.distributions.LogNormal(0.0, 1.5).sample((80,))
    mean, low, high = interval(gain, torch.arange(80), seed=0)
    wanted = stats.bootstrap((gain.numpy(),), np.mean, n_resamples=20_000, method="percentile").confidence_interval
    assert mean == pytest.approx(float(gain.mean()))
    assert (low, high) == pytest.approx(tuple(wanted), rel=0.06)
    assert high - mean > 1.15 * (mean - low)


def test_rows_of_a_sample_are_drawn_together():
    """Forty copies of each row say no more than the row itself."""
    gain = torch.randn(30, generator=torch.Generator().manual_seed(3))
    samples = torch.arange(30).repeat_interleave(40)
    once, copied = interval(gain, torch.arange(30), 0), interval(gain.repeat_interleave(40), samples, 0)
    assert copied == pytest.approx(once, rel=1e-6)
    assert standard_error(gain.repeat_interleave(40), samples) == pytest.approx(float(gain.std()) / 30**0.5, rel=1e-5)


def test_very_many_samples_are_not_drawn_again(monkeypatch):
    """The normal interval is that of the bootstrap by then, and takes no minutes."""
    gain = torch.randn(1500, generator=torch.Generator().manual_seed(5)) + 0.1
    samples = torch.arange(300).repeat_interleave(5)
    drawn = interval(gain, samples, seed=0)
    monkeypatch.setattr(held_out, "MANY", 299)
    monkeypatch.setattr(np.random, "default_rng", None)
    assert interval(gain, samples, seed=0) == pytest.approx(drawn, rel=0.05)


def test_a_class_that_is_never_answered_is_no_divergence():
    f, q = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    wanted = losses(q, f, "classes")
    never = torch.full((6, 1), -torch.inf)
    torch.testing.assert_close(losses(torch.cat((q, never), 1), torch.cat((f, never), 1), "classes"), wanted)


def test_folds_hold_whole_samples():
    samples = torch.arange(12).repeat_interleave(7)
    folds = folds_of(samples, seed=1)
    assert set(folds.tolist()) == set(range(FOLDS))
    assert all(len(folds[samples == sample].unique()) == 1 for sample in range(12))


def shifted(samples: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that lack an offset of the sample: within a sample rows predict each other, samples do not."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(samples * rows, width, generator=g)
    offsets = 2 * torch.randn(samples, width, generator=g)
    return q, q + offsets.repeat_interleave(rows, 0), torch.arange(samples).repeat_interleave(rows)


def test_what_only_holds_within_samples_is_no_gain():
    q, f, samples = shifted(6, 100, 8)
    config = CatConfig(num_clusters=1, gamma="ls")
    assert fit(q, f, config, "values").clusters == 1
    assert fit(q, f, config, "values", samples=samples).clusters == 0


def test_samples_without_rows_leave_no_hole_in_the_folds():
    """Numbers of samples are names: what has no row is in no fold."""
    q, f, samples = shifted(6, 20, 4)
    config = CatConfig(num_clusters=1)
    numbers = torch.tensor([3, 40, 41, 200, 305, 999])[samples]
    assert fit(q, f, config, "logits", samples=numbers) == fit(q, f, config, "logits", samples=samples)


def test_few_samples_are_judged_by_rows_with_a_note():
    q, f, samples = shifted(3, 100, 8)
    assert any("fewer than 5 samples" in note for note in fit(q, f, CatConfig(), "values", samples=samples).notes)
    assert fit(q, f, CatConfig(), "values").notes == []


@pytest.mark.parametrize("projection", [None, 3])
def test_classes_that_are_never_answered_stay_as_they_are(projection):
    g = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(600, 6, generator=g)
    q = 0.5 * f + 1
    masked = torch.tensor([True, False, True, True, False, True])
    wide_q, wide_f = (torch.full((600, 6), LOWEST) for _ in range(2))
    wide_q[:, masked], wide_f[:, masked] = q[:, masked], f[:, masked]
    config = CatConfig(num_clusters=4, projection=projection)
    result = fit(wide_q, wide_f, config, "classes")
    assert any("2 columns with values beyond 1e+15" in note for note in result.notes)
    narrow = fit(q[:, masked], f[:, masked], config, "classes").correction
    corrected = result.correction(wide_q)
    assert torch.equal(corrected[:, ~masked], wide_q[:, ~masked])
    torch.testing.assert_close(corrected[:, masked], narrow(q[:, masked].contiguous()))


def test_columns_that_are_left_alone_count_for_the_size():
    g = torch.Generator().manual_seed(0)
    kind = (torch.arange(400) % 2)[:, None]
    f = torch.randn(400, 4, generator=g) + torch.tensor([[8.0, 0.0, 0.0, 0.0]]) * kind
    q = f - 3 * kind * torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    wide_q, wide_f = (torch.cat((t, torch.full((400, 300), LOWEST)), 1) for t in (q, f))
    config = CatConfig(projection=None)
    free, bounded = (fit(wide_q, wide_f, config, "values", size) for size in (None, 9000))
    assert free.clusters > 1
    assert bounded.clusters == 1
    assert (
        sum(held.nbytes for held in bounded.correction.buffers())
        <= 9000
        < sum(held.nbytes for held in free.correction.buffers())
    )


def test_nothing_but_marks_is_refused():
    rows = torch.full((20, 3), LOWEST)
    with pytest.raises(ValueError, match=r"all outputs are beyond 1e\+15"):
        fit(rows, rows, CatConfig(), "classes")


def test_a_model_that_masks_a_class():
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).index_fill(-1, torch.tensor([2]), LOWEST)

    torch.manual_seed(0)
    teacher = nn.Sequential(Masked(8, 5))
    model = nn.Sequential(Masked(8, 5))
    with torch.no_grad():
        model[0].weight.copy_(0.5 * teacher[0].weight)
        model[0].bias.copy_(teacher[0].bias + 1)
    data = list(torch.randn(200, 8).split(20))
    config = CatConfig(at="0")
    report = fit_correction(model, teacher, [{"input": batch} for batch in data], config, num_samples=200)
    assert report["0"]["clusters"] == 1
    assert bool((model(data[0])[:, 2] == LOWEST).all())
