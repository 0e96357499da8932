"""Samples that are there twice are one witness, and data of one class are none."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, fit_correction, quantize, report
from hf_catquant.cluster_fit import fit
from hf_catquant.copies import firsts, without_copies


def test_a_copy_is_found_in_any_batch_whatever_its_padding():
    ids = torch.tensor([[5, 6, 7], [5, 6, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    longer = torch.tensor([[5, 6, 9, 9], [5, 6, 7, 1]])
    other = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = firsts([{"input_ids": ids, "attention_mask": mask}, {"input_ids": longer, "attention_mask": other}])
    assert [first.tolist() for first in found] == [[True, True, False], [False, True]]


def test_rows_of_copies_are_left_out():
    first = torch.tensor([True, False])
    output, mask = torch.zeros(2, 3, 4), torch.tensor([True, False, True, True, True, True])
    assert without_copies(None, first, output, -1).tolist() == [True] * 3 + [False] * 3
    assert without_copies(mask, first, output, -1).tolist() == [True, False, True, False, False, False]
    assert without_copies(None, torch.tensor([True, True]), output, -1) is None
    assert without_copies(None, first, torch.zeros(3, 4), -1) is None  # packed: no rows of a sample


def clips(count: int, times: int) -> list[dict[str, torch.Tensor]]:
    return tiny_models.samples("bert", count, seed=0) * times


def test_copies_do_not_vouch_for_each_other():
    config = CatQuantConfig("ternary", -1, solver="rtn", dataset=clips(5, 9), num_samples=45, batch_size=4)
    found = report(quantize(tiny_models.build("bert"), config))
    assert any("40 of 45 samples are copies of others" in note for note in found.notes)
    assert any("5 rows of samples are fewer than 10" in note for note in found.notes)
    assert not found.corrections or all(not fit["clusters"] for fit in found.corrections.values())


def test_copies_are_said_and_left_out_where_a_model_is_given():
    teacher = tiny_models.build("bert")
    once, thrice = (
        fit_correction(
            quantize(copy.deepcopy(teacher), CatQuantConfig("binary", 8, solver="rtn", correction=None)),
            teacher,
            clips(20, times),
            num_samples=20 * times,
        )
        for times in (1, 3)
    )
    for name, found in thrice.items():
        assert any("40 of 60 samples are copies of others" in note for note in found["notes"])
        assert (found["rows"], found["gain"]) == pytest.approx((once[name]["rows"], once[name]["gain"]), abs=1e-5)


@pytest.mark.parametrize(("others", "is_off"), [(0, True), (2, True), (10, False)])
def test_data_of_one_class_judge_no_correction(others, is_off):
    torch.manual_seed(0)
    teacher = torch.randn(100, 4)
    teacher[:, 1] += 9
    teacher[:others, 2] += 20
    found = fit(teacher * 0.3, teacher, CatConfig(), "classes")
    assert (found.clusters == 0) is is_off
    assert any("gives one answer to more than 95 % of 100 rows" in note for note in found.notes) is is_off
