"""The table: what its numbers mean, checked against direct computation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_catquant.correction import ClusterAffine, attach, corrections
from hf_catquant.evaluation import evaluate_classifier, evaluate_language_model, variants


class Head(nn.Module):
    """A linear classifier that returns ``logits`` as transformers models do."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(x))


class Bigram(nn.Module):
    """Logits of the next token from a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids) * self.scale)


@pytest.fixture
def case(generator):
    x = torch.randn(60, 5, generator=generator)
    weight = torch.randn(4, 5, generator=generator)
    noise = 0.5 * torch.randn(4, 5, generator=generator)
    labels = (x @ weight.T).argmax(1)
    labels[:10] = 0
    return Head(weight), Head(weight + noise), [{"x": part} for part in x.split(16)], x, labels


def test_numbers_of_a_classifier(case):
    teacher, model, batches, x, labels = case
    table = evaluate_classifier(teacher, model, batches, labels.tolist())
    first, second = teacher(x).logits, model(x).logits
    right = [(z.argmax(1) == labels) for z in (first, second)]
    row = table.rows[1]
    assert [r.name for r in table.rows] == ["float", "quantized"]
    assert row.metric == pytest.approx(100 * right[1].double().mean().item())
    assert row.low < row.metric < row.high
    assert row.agreement == pytest.approx(100 * (first.argmax(1) == second.argmax(1)).double().mean().item())
    assert row.lost == int((right[0] & ~right[1]).sum())
    assert row.won == int((~right[0] & right[1]).sum())
    expected = nn.functional.kl_div(
        second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert row.kl == pytest.approx(expected.item(), rel=1e-5)
    assert table.rows[0].kl == 0
    assert row.bytes == 4 * 5 * 4
    assert table.gain is None
    assert table.significantly_worse is None


def test_the_correction_is_measured_and_comes_back(case):
    teacher, model, batches, _, labels = case
    harm = ClusterAffine.of(None, torch.zeros(1, 4), -torch.ones(1, 4), torch.zeros(1, 4))
    attach(model, "head", harm)
    table = evaluate_classifier(teacher, model, batches, labels.tolist())
    assert [r.name for r in table.rows] == ["float", "quantized", "quantized + CAT"]
    assert table.rows[2].metric < table.rows[1].metric
    assert table.significantly_worse
    assert table.gain == pytest.approx(table.rows[2].metric - table.rows[1].metric)
    assert corrections(model) == {"head": harm}
    assert table.rows[1].discrimination == table.rows[2].discrimination  # features enter before the correction
    assert "quantized + CAT" in str(table)
    assert "quantized + CAT" in table.to_markdown()
    assert json.loads(json.dumps(table.to_dict()))["significantly_worse"]


def test_label_offset_and_bad_labels(case):
    teacher, model, batches, _, labels = case
    shifted = evaluate_classifier(teacher, model, batches, (labels % 3).tolist(), offset=1)
    assert shifted.n == 60
    with pytest.raises(ValueError, match="there are 59 labels for 60 rows"):
        evaluate_classifier(teacher, model, batches, labels[:-1].tolist())
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\.\. 3, got 0 \.\.\. 9"):
        evaluate_classifier(teacher, model, batches, [9, *labels[1:].tolist()])
    with pytest.raises(ValueError, match=r"the label offset must be in 0 \.\.\. 3, as Head has 4 outputs, got 4"):
        evaluate_classifier(teacher, model, batches, labels.tolist(), offset=4)
    with pytest.raises(ValueError, match="the float model has 3 classes and the quantized one 4"):
        evaluate_classifier(Head(teacher.head.weight[:3]), model, batches, (labels % 3).tolist())


def test_numbers_of_a_language_model(generator):
    table = torch.randn(11, 11, generator=generator)
    teacher, model = Bigram(table), Bigram(table + 0.3 * torch.randn(11, 11, generator=generator))
    ids = torch.randint(11, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    result = evaluate_language_model(teacher, model, batches)
    losses = nn.functional.cross_entropy(
        model(ids, mask).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    kept = mask[:, 1:].flatten().bool()
    assert result.rows[1].metric == pytest.approx(float(losses[kept].mean().exp()), rel=1e-5)
    assert result.rows[1].low < result.rows[1].metric < result.rows[1].high
    assert 0 < result.rows[1].agreement < 100 == result.rows[0].agreement
    assert result.rows[1].kl > 0
    assert result.n == 6
    with pytest.raises(ValueError, match="needs input_ids, the batch has x"):
        evaluate_language_model(teacher, teacher, [{"x": ids}])


def test_wilson_interval():
    """Published values for 8 of 10 and for 0 of 10."""
    from hf_catquant.evaluation import _wilson

    assert _wilson(8, 10) == pytest.approx((49.02, 94.33), abs=0.01)
    assert _wilson(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)


def test_sizes_are_read_after_all_answers():
    """A model that answers otherwise once its state dict was read, as NF4 of bitsandbytes does on a CPU."""
    calls = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
    model = nn.Sequential(model)
    attach(model, "0", ClusterAffine(3, 1, None))
    model[0].register_state_dict_pre_hook(lambda *args: calls.append("size"))
    variants(model, lambda: calls.append("answers"))
    assert calls[:2] == ["answers", "answers"]
    assert "size" in calls
