"""What of a model's output counts as its answers, and that the whole model learns all of them."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

import tiny_models
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.outputs import answers
from hf_catquant.training import set_apart

A, B = torch.ones(2, 3), torch.zeros(2, 4)


def questions() -> nn.Module:
    return tf.BertForQuestionAnswering(tf.BertConfig(**tiny_models.TEXT))


def detector() -> nn.Module:
    return tf.YolosForObjectDetection(
        tf.YolosConfig(**{**tiny_models.VIT, "image_size": [16, 16]}, num_detection_tokens=6)
    )


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("t5", ["logits"]),
        ("clip", ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]),
        ("bert.bert", ["last_hidden_state", "pooler_output"]),
        ("questions", ["start_logits", "end_logits"]),
        ("detector", ["logits", "pred_boxes"]),
    ],
)
def test_answers_of_models(name, names):
    kind, _, inner = name.partition(".")
    made, batch_of = {"questions": (questions, "bert"), "detector": (detector, "vit")}.get(kind, (None, kind))
    model, batch = made() if made else tiny_models.build(kind), tiny_models.batch(batch_of)
    more = {"output_hidden_states": True} | ({"labels": batch["input_ids"]} if name == "t5" else {})
    output = model.get_submodule(inner)(**batch, **more)
    assert list(answers(model, output)) == names


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (A, [""]),
        ((A, None, A.long(), [B]), ["0", "3.0"]),
        (namedtuple("Pair", "x y")(A, B), ["x", "y"]),
        ({"loss": A, "out": {"a": A, "mc_loss": A, "last_hidden_state": B}}, ["out.a", "out.last_hidden_state"]),
        ({"mc_logits": A, "last_hidden_state": B, "attentions": (A,)}, ["mc_logits"]),
        (ModelOutput(x=A, inner=BaseModelOutput(last_hidden_state=B)), ["x"]),
        (ModelOutput(x=A, cache=B), ["x"]),
        (SimpleNamespace(logits=A, other="text"), ["logits"]),
        (None, []),
        ("text", []),
    ],
)
def test_answers_of_any_output(output, names):
    model = nn.Module()
    model.config = SimpleNamespace(keys_to_ignore_at_inference=["cache"])
    assert list(answers(model, output)) == names


class Two(nn.Module):
    """Answers twice, of halves of what the last layer but one returns."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 64)
            self.heads = nn.ModuleList([nn.Linear(32, width), nn.Linear(32, 3)])
        self.name = name
        with torch.no_grad():
            self.heads[0].weight *= 8

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = self.last(self.first(x).relu()).relu().chunk(2, -1)
        return {self.name: self.heads[0](a), "boxes": 100 + self.heads[1](b), "loss": a.mean()}


@pytest.mark.parametrize(("name", "width"), [("logits", 5), ("logits", 1), ("start", 5)])
def test_the_whole_model_learns_every_answer(name, width):
    """What is told of the held-out batches is the sum that this works out for itself, and every answer gains."""
    xs = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    batches, _ = set_apart([{"index": rows} for rows in torch.arange(256).split(8)], 0)
    apart = xs[torch.cat([batch["index"] for batch in batches])]  # those that are kept from learning last
    parts, found = [], []
    wanted = {key: value.detach() for key, value in Two(name, width)(apart).items() if key != "loss"}
    for steps in (0, 160):
        model = Two(name, width)
        how: dict[str, Any] = {"solver": "reconstruct", "solver_options": {"model_steps": steps, "model_rate": 1}}
        how |= {"dataset": [{"x": x} for x in xs], "num_samples": 256, "edge_weights": None, "correction": None}
        quantize(model.eval(), CatQuantConfig("ternary", 16, **how, batch_size=8))
        with torch.no_grad():
            found = model(apart)
        rows = slice(192, None)  # a quarter
        parts.append({key: relative(found[key], wanted[key], rows) for key in wanted})
        if name == "logits" and width > 1:
            log_p, log_q = (t[name][rows].log_softmax(-1) for t in (wanted, found))
            parts[-1][name] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    told = model.quantization_config.provenance["learned"][""]
    assert told["held_out_before"] == pytest.approx(sum(parts[0].values()), rel=0.01)
    assert told["held_out_after"] == pytest.approx(sum(parts[1].values()), rel=0.01)
    gains = {key: parts[1][key] / loss for key, loss in parts[0].items()}
    assert max(gains.values()) < 0.9  # of fewer samples some answers gain less


def relative(found: Tensor, wanted: Tensor, rows: slice) -> float:
    """Mean square of a difference, by the mean variance within a batch of 8."""
    return float((found - wanted)[rows].square().mean() / wanted.unflatten(0, (-1, 8)).flatten(1).var(1).mean())
