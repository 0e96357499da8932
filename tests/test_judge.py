"""Corrections of hidden features are judged by the answers: what is nearer to float and answers worse is taken off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, fit_correction, quantize, report
from hf_catquant.correction import corrections
from hf_catquant.judge import NOT_JUDGED, Judge


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pair() -> tuple[Model, Model, list[Tensor]]:
    torch.manual_seed(0)
    teacher = Model().eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.layers[0].linear.weight.mul_(0.6)
        model.layers[0].linear.bias.add_(0.5)
    return model, teacher, list(torch.randn(120, 8))


def kl(model: nn.Module, teacher: nn.Module, rows: list[Tensor]) -> float:
    x = torch.stack(rows)
    with torch.no_grad():
        log_p, log_q = teacher(x).log_softmax(-1), model(x).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_what_helps_the_answers_stays():
    model, teacher, rows = pair()
    before = kl(model, teacher, rows)
    fit = fit_correction(model, teacher, rows, CatConfig(at=("layers.0", "logits")), num_samples=120)["layers.0"]
    assert set(corrections(model)) >= {"layers.0"}
    assert fit["answers_low"] > 0
    assert kl(model, teacher, rows) < 0.2 * before


def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every divergence with a new correction seems worse than without."""
    real, seen = Judge.losses, []

    def losses(self: Judge, outputs: Any) -> Tensor:
        seen.append(1)
        return real(self, outputs) + float(len(seen))

    monkeypatch.setattr(Judge, "losses", losses)


def test_what_harms_the_answers_is_taken_off(monkeypatch):
    spoilt(monkeypatch)
    model, teacher, rows = pair()
    before = kl(model, teacher, rows)
    fit = fit_correction(model, teacher, rows, CatConfig(at="layers.0"), num_samples=120)["layers.0"]
    assert not corrections(model)
    assert (fit["clusters"], fit["gain"] > 0, fit["answers_high"] < 0) == (0, True, True)
    assert "off: nearer to float itself" in fit["notes"][-1]
    assert kl(model, teacher, rows) == pytest.approx(before)


def test_a_smaller_divergence_does_not_buy_other_answers():
    torch.manual_seed(0)
    wanted = torch.randn(400, 10) * 4
    faint, near = wanted / 10, wanted.clone()
    top = wanted[:40].topk(2).indices  # a tenth of the answers change places with the second best
    near[:40] = wanted[:40].scatter(1, top, wanted[:40].gather(1, top.flip(1)))
    judge = Judge(seed=0, batches=1)
    judge.expect(wanted, -1, None, 400)
    for other, stays in ((near, False), (wanted, True)):
        fit = {"notes": []}
        assert judge.helps("x", judge.losses([faint]), judge.losses([other]), fit) is stays
        assert fit["answers_low"] > 0
        assert ("0.00 and 10.00 % of them were not the float model's" in "".join(fit["notes"])) is not stays


def test_a_fixed_correction_is_not_judged(monkeypatch):
    spoilt(monkeypatch)
    model, teacher, rows = pair()
    config = CatConfig(num_clusters=1, alpha=1.0, gamma="ls", at="layers.0")
    fit_correction(model, teacher, rows, config, num_samples=120)
    assert set(corrections(model)) == {"layers.0"}


@pytest.mark.parametrize(("answer", "judged"), [("scores", False), ("logits", True)])
def test_what_no_logits_judge_says_so(answer, judged):
    class Named(Model):
        def forward(self, x: Tensor) -> Any:
            return {answer: super().forward(x)}

    torch.manual_seed(0)
    teacher = Named().eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.layers[0].linear.bias.add_(0.5)
    fits = fit_correction(model, teacher, list(torch.randn(120, 8)), CatConfig(at="layers.0"), num_samples=120)
    fit = fits["layers.0"]
    assert fit["clusters"]
    assert ("answers_gain" in fit, NOT_JUDGED in fit["notes"]) == (judged, not judged)
    fixed = CatConfig(num_clusters=1, alpha=1.0, gamma="ls", at="layers.0")
    config = CatQuantConfig("binary", 8, correction=fixed, dataset=list(torch.randn(120, 8)))
    found = [fit for fit in report(quantize(teacher, config)).corrections.values() if fit["clusters"]]
    assert found
    assert all((NOT_JUDGED in fit["notes"]) != judged for fit in found)


def test_a_model_that_names_its_head_otherwise_is_refused():
    class Renamed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.out = self.head
            del self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.layers[1](self.layers[0](x)))

    _, teacher, rows = pair()
    with pytest.raises(ValueError, match="Renamed has no module 'head', which returns the teacher's logits"):
        fit_correction(Renamed(), teacher, rows, CatConfig(at="layers.0"), num_samples=120)
    fixed = CatConfig(num_clusters=1, alpha=1.0, gamma="ls", at="layers.0")
    assert fit_correction(Renamed(), teacher, rows, fixed, num_samples=120)["layers.0"]["clusters"] == 1


@pytest.mark.parametrize(("harm", "kept"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("solver", ["gptq", "reconstruct"])
def test_while_quantizing(harm, kept, solver, monkeypatch):
    """On blocks: fitted while the walk passes them, or after all has learned; judged at the end, and not stored if off."""
    helps = Judge.helps

    def verdict(self: Judge, name: str, before: Tensor, after: Tensor, fit: dict[str, Any]) -> bool:
        return helps(self, name, before, before + (1 if harm else -1), fit)

    monkeypatch.setattr(Judge, "helps", verdict)
    samples = tiny_models.samples("bert", 64, seed=0)
    options = {"block_steps": 2, "model_steps": 2} if solver == "reconstruct" else {}
    config = CatQuantConfig(
        "binary", 8, correction=CatConfig(at="blocks"), dataset=samples, solver=solver, solver_options=options,
        num_samples=64, batch_size=8,
    )  # fmt: skip
    model = quantize(tiny_models.build("bert"), config)
    fits = report(model).corrections
    assert len(fits) == 2
    on = {name for name, fit in fits.items() if fit["clusters"]}
    assert set(corrections(model)) == on
    assert set(model.config.quantization_config.corrections) == on
    assert (len(on) > 0) == bool(kept)
    assert all("answers_gain" in fit for fit in fits.values() if fit["clusters"] or (harm and fit["gain"]))


def test_divergences_are_those_of_the_rows_asked_for():
    torch.manual_seed(0)
    f, q = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 3, 6)
    masks = torch.rand(2, 12) > 0.3
    judge = Judge(seed=0, batches=2)
    for batch in range(2):
        judge.expect(f[batch], -1, masks[batch], 4)
    rows_f, rows_q = (torch.cat([t[i].flatten(0, 1)[masks[i]] for i in range(2)]) for t in (f, q))
    log_p = rows_f.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - rows_q.log_softmax(-1))).sum(-1)
    found = judge.losses(list(q))
    torch.testing.assert_close(found[:, 0], wanted)
    torch.testing.assert_close(found[:, 1], (rows_f.argmax(1) != rows_q.argmax(1)).float())


def test_the_reason_is_in_the_report(monkeypatch):
    helps = Judge.helps
    monkeypatch.setattr(
        Judge, "helps", lambda self, name, before, after, fit: helps(self, name, before, before + 1, fit)
    )
    config = CatQuantConfig(
        "binary", 8, correction=CatConfig(at="blocks"), dataset=tiny_models.samples("bert", 64, seed=0),
        num_samples=64, batch_size=8,
    )  # fmt: skip
    text = str(report(quantize(tiny_models.build("bert"), config)))
    assert "off: nearer to float itself" in text


def test_the_logits_are_corrected_last():
    """A head that the model holds before its blocks is fitted after them; they are judged without its correction."""

    class HeadFirst(Model):
        def __init__(self) -> None:
            super().__init__()
            layers = self.layers
            del self.layers
            self.layers = layers  # behind the head in the order of modules

    torch.manual_seed(0)
    teacher = HeadFirst().eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.layers[0].linear.bias.add_(0.5)
        model.head.bias.add_(0.5)
    rows = list(torch.randn(120, 8))
    fits = fit_correction(model, teacher, rows, CatConfig(at=("layers.0", "logits")), num_samples=120)
    assert list(fits) == ["layers.0", "head"]
