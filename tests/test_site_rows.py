"""The rows of outputs that corrections are fitted on: the same of both models, few of many, each with its sample."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, quantize, site_rows
from hf_catquant.correction import corrections
from hf_catquant.site_rows import SiteRows


@pytest.mark.parametrize(
    ("dim", "shape"), [(-1, (4, 5, 3)), (1, (4, 3, 5, 2)), (-1, (4, 3)), (-1, (20, 3)), (1, (20, 3, 2))]
)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_know_their_samples(dim, shape, masked):
    """Also where the model lays the tokens or windows of a batch end to end."""
    rows, generator = SiteRows(seed=0, batches=2), torch.Generator().manual_seed(0)
    for _ in range(2):
        value = (torch.arange(shape[0]) // (shape[0] // 4)).float().view(-1, *[1] * (len(shape) - 1)).expand(shape)
        mask = torch.rand(value.numel() // 3, generator=generator) > 0.5 if masked else None
        rows.expect(value, dim, mask, 4)
    assert torch.equal(rows.samples % 4, torch.cat(rows.teacher)[:, 0].long())
    assert 4 <= int(rows.samples.max()) <= 7


def test_rows_of_no_sample_stand_for_themselves():
    rows = SiteRows(seed=0, batches=2)
    for _ in range(2):
        rows.expect(torch.zeros(7, 3), -1, None, 4)
    assert rows.samples.tolist() == list(range(14))


@pytest.mark.parametrize("dim", [-1, 1])
def test_both_models_give_the_same_rows(dim, monkeypatch):
    monkeypatch.setattr(site_rows, "MAX_VALUES", 60)  # of two batches with 30 features: one row each
    torch.manual_seed(0)
    rows, outputs = SiteRows(seed=0, batches=2), torch.randn(2, 4, 30, 30)
    for output in outputs:
        rows.expect(output, dim, torch.arange(120) > 100, 4)
    assert rows.count == 2
    for batch, output in enumerate(outputs):
        assert torch.equal(rows.of(output, batch), rows.teacher[batch])
        features_last = output.movedim(dim, -1).reshape(120, 30)[101:]
        assert (features_last == rows.teacher[batch]).all(-1).any()
    assert torch.equal(rows.samples, torch.tensor([3, 7]))


def test_another_seed_takes_other_rows(monkeypatch):
    monkeypatch.setattr(site_rows, "MAX_VALUES", 5 * 8)
    found = []
    for seed in (0, 0, 1):
        rows = SiteRows(seed, batches=1)
        rows.expect(torch.arange(800.0).view(100, 8), -1, None, 100)
        found.append(rows.teacher[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_few_rows_of_wide_logits_are_kept(monkeypatch):
    """The float model's logits are let go batch by batch: what is kept does not grow with the classes."""
    monkeypatch.setattr(site_rows, "MAX_VALUES", 1 << 12)
    kept = []
    expect = SiteRows.expect

    def spy(self, *args):
        expect(self, *args)
        kept.append(sum(rows.numel() for rows in self.teacher))
        assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in self.teacher)  # no view of the whole

    monkeypatch.setattr(SiteRows, "expect", spy)
    config = CatQuantConfig("int2", 8, dataset=tiny_models.samples("llama", 32, seed=0), num_samples=32, batch_size=4)
    quantize(tiny_models.build("llama"), config)
    assert len(kept) == 8
    assert max(kept) <= 1 << 12


def test_corrections_of_convolutional_blocks_that_wait_for_the_whole_model_sit_on_channels():
    config = CatQuantConfig(
        "binary", 8, correction=CatConfig(at="blocks", num_clusters=2, alpha=0.5, gamma="std"), solver="reconstruct",
        solver_options={"block_steps": 1, "model_steps": 1}, dataset=tiny_models.samples("resnet", 32, seed=0),
        num_samples=32, batch_size=4,
    )  # fmt: skip
    found = corrections(quantize(tiny_models.build("resnet"), config))
    assert found
    assert {correction.dim for correction in found.values()} == {1}
