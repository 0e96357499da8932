"""What logits say decides how far they are apart: classes, labels or numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, fit_correction, quantize, report
from hf_catquant.answers import agreement, answer_kind, divergences
from hf_catquant.evaluation import evaluate_classifier


def bert(**fields: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.BertForSequenceClassification(tf.BertConfig(**tiny_models.TEXT, **fields)).eval()


DATA = tiny_models.samples("bert", 96, seed=0)
LABELS = {"num_labels": 6, "problem_type": "multi_label_classification"}


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in DATA])).logits


@pytest.mark.parametrize(
    ("problem", "width", "kind"),
    [
        (None, 2, "classes"),
        (None, 1, "values"),
        ("regression", 3, "values"),
        ("single_label_classification", 3, "classes"),
        ("multi_label_classification", 1, "labels"),
    ],
)
def test_what_logits_say(problem, width, kind):
    assert answer_kind(problem, width) == kind


def test_labels_are_as_many_models_of_two_classes():
    f, q = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    pairs = [torch.stack((t, torch.zeros_like(t)), -1) for t in (f, q)]
    torch.testing.assert_close(divergences(f, q, "labels"), divergences(*pairs).sum(-1))
    assert torch.equal(agreement(f, q, "labels"), ((f > 0) == (q > 0)).float().mean(1))


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_what_is_never_answered_is_no_divergence(kind):
    f, q = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    never = torch.full((5, 2), -torch.inf)
    wide = [torch.cat((t, never), 1) for t in (f, q)]
    torch.testing.assert_close(divergences(*wide, kind), divergences(f, q, kind))


@pytest.mark.parametrize("fields", [{"num_labels": 1}, LABELS])
def test_a_shift_of_all_logits_is_seen_and_corrected(fields):
    """Softmax sees no shift of all logits; the answers of these models are wrong by it."""
    teacher, model = bert(**fields), bert(**fields)
    with torch.no_grad():
        model.classifier.bias += 3
    wanted = answers(teacher)
    (fit,) = fit_correction(model, teacher, DATA).values()
    assert fit["clusters"]
    assert (answers(model) - wanted).abs().mean() < 0.3  # of 3


@pytest.mark.parametrize("fields", [{"num_labels": 1}, LABELS])
def test_bits_are_spent_by_what_the_model_answers(fields):
    model = bert(**fields)
    request: dict[str, Any] = {"group_size": 16, "correction": None, "average_bits": 5.0}
    quantize(model, CatQuantConfig(dataset=DATA[:16], **request))
    assert len({layer.weights for layer in report(model).layers}) > 1


def test_models_that_answer_with_flat_outputs_have_mixed_formats():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.BertForQuestionAnswering(tf.BertConfig(**tiny_models.TEXT)).eval()
    quantize(model, CatQuantConfig(group_size=16, dataset=DATA[:16], average_bits=5.0))
    assert any(note.startswith("mixed formats") for note in report(model).notes)


def test_every_answer_judges_where_bits_go():
    """Of the layers between the first and the last, only the one behind the second answer is worth more bits."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"first": self.layers[0](x) + 0 * self.layers[1](x), "second": self.layers[3](self.layers[2](x))}

    torch.manual_seed(0)
    model = Two()
    data = [{"x": x} for x in torch.randn(16, 16)]
    quantize(model, CatQuantConfig(group_size=16, dataset=data, correction=None, average_bits=6.0))
    bits = {layer.name: layer.bits for layer in report(model).layers}
    assert bits["layers.2"] > bits["layers.1"]


def test_a_teacher_that_is_minus_infinite_somewhere_gets_no_correction(caplog):
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).index_fill(-1, torch.tensor([1]), -torch.inf)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), Masked(16, 4))
    quantize(model, CatQuantConfig(group_size=8, dataset=list(torch.randn(32, 8)), correction=CatConfig(at="2")))
    assert any("off, the teacher outputs have values that are not finite" in note for note in report(model).notes)


def test_rounding_is_no_gain():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 5))
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight *= 1 + 1e-6
    (fit,) = fit_correction(model, teacher, list(torch.randn(100, 6)), CatConfig(at="0")).values()
    assert fit["clusters"] == 0


def test_what_is_asked_for_is_reported_as_not_judged():
    model = bert(num_labels=3)
    quantize(model, CatQuantConfig(group_size=16, dataset=DATA, correction=CatConfig.paper()))
    assert "64 clusters, alpha 0.4, as asked for: its gain was not measured" in str(report(model))


@pytest.mark.parametrize("config", ["cat", {"num_clusters": 1}, CatConfig(num_clusters=1)])
def test_a_correction_is_asked_for_as_in_a_request(config):
    assert fit_correction(bert(num_labels=3), bert(num_labels=3), DATA[:16], config)


@pytest.mark.parametrize(
    ("config", "seed", "message"),
    [
        (None, 0, "config must say which correction to fit"),
        ("dog", 0, 'correction must be None, "cat"'),
        ("cat", -1, "seed must be an integer from 0 to"),
        ("cat", "a", "seed must be an integer from 0 to"),
    ],
)
def test_what_is_no_request_is_refused(config, seed, message):
    with pytest.raises(ValueError, match=message):
        fit_correction(bert(num_labels=3), bert(num_labels=3), DATA[:16], config, seed=seed)


@pytest.mark.parametrize(("fields", "kind"), [({"num_labels": 1}, "values"), (LABELS, "labels")])
def test_answers_that_name_no_class_have_no_accuracy(fields, kind):
    model = bert(**fields)
    batches = [{"input_ids": torch.stack([row["input_ids"] for row in DATA[:4]])}]
    with pytest.raises(ValueError, match=f"the logits of BertForSequenceClassification are {kind}"):
        evaluate_classifier(model, model, batches, [0, 0, 0, 0])
