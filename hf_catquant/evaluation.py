"""Evaluation: float, quantized, and quantized with correction, on the same rows, side by side with intervals.

Classifiers are judged by accuracy, language models by token perplexity; both by agreement with the float model's first
choice, by the flips, and by the Kullback-Leibler divergence to it. Differences are paired: the same rows in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .answers import answer_kind, divergences, problem_of
from .correction import ClusterAffine, attach, corrections, detach
from .discrimination import feature_discrimination
from .evaluation_table import Evaluation, Row
from .extract import Place, catch, head_place
from .fitting import placed
from .packed_model import parameter_count
from .replay import run
from .report import parameter_bytes, stored_bytes

RESAMPLES = 2000


@torch.no_grad()
def evaluate_classifier(
    teacher: nn.Module, model: nn.Module, batches: Sequence[dict[str, Tensor]], labels: Sequence[int], offset: int = 0
) -> Evaluation:
    """Compare a quantized classifier with its float teacher.

    Args:
        teacher, model: called with each batch as keyword arguments; they return ``logits`` (B, C).
        labels: class of every row of the batches, in order.
        offset: classes before class 0 of the labels (1 where the first output is "background").

    Raises:
        ValueError: labels and rows differ in number, a label has no output, the offset leaves none, or the models do not
            return logits (B, C) of one C that name one class of several.
    """
    wanted = torch.as_tensor(labels)
    head = head_place(teacher, batches[0])
    site = head if head.entering else None
    truth = _classify(teacher, site, batches, offset)
    kind = answer_kind(problem_of(teacher), truth.logits.shape[1] + offset)
    if kind != "classes":
        raise ValueError(
            f"evaluation counts right classes, the logits of {type(teacher).__name__} are {kind} (problem_type="
            f"{problem_of(teacher)!r}, {truth.logits.shape[1] + offset} outputs): use a metric of your own on its answers"
        )
    if len(truth.logits) != len(wanted):
        raise ValueError(f"there are {len(wanted)} labels for {len(truth.logits)} rows")
    if wanted.min() < 0 or wanted.max() >= truth.logits.shape[1]:
        raise ValueError(
            f"labels must be in 0 ... {truth.logits.shape[1] - 1}, got {int(wanted.min())} ... {int(wanted.max())}"
        )
    seen = [("float", teacher, truth, _size(teacher))]
    seen += [
        (name, model, out, size)
        for name, out, size in variants(model, lambda: _classify(model, site, batches, offset))
    ]
    classes = [out.logits.shape[1] for _, _, out, _ in seen]
    if len(set(classes)) > 1:
        raise ValueError(f"the float model has {classes[0]} classes and the quantized one {classes[1]}: they differ")
    rows = tuple(_class_row(name, out, truth, wanted, size) for name, _, out, size in seen)
    if len(seen) < 3:
        return Evaluation("accuracy", len(wanted), rows)
    right = [(out.logits.argmax(1) == wanted).double() for _, _, out, _ in seen]
    return Evaluation("accuracy", len(wanted), rows, *_mean_interval(100 * (right[2] - right[1])))


@torch.no_grad()
def evaluate_language_model(teacher: nn.Module, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Evaluation:
    """Compare a quantized causal language model with its float teacher; intervals resample documents.

    Args:
        teacher, model: return ``logits`` (B, T, V) for batches with ``input_ids`` (B, T) and ``attention_mask``.

    Raises:
        ValueError: a batch has no ``input_ids``.
    """
    truth = _read(teacher, teacher, batches)
    seen = [("float", truth, _size(teacher))]
    seen += variants(model, lambda: _read(model, teacher, batches))
    rows = tuple(_language_row(name, out, size) for name, out, size in seen)
    if len(seen) < 3:
        return Evaluation("perplexity", len(truth), rows)
    draws = _resamples(len(truth))
    saved = _perplexity(seen[1][1], draws) - _perplexity(seen[2][1], draws)
    low, high = np.percentile(saved, [2.5, 97.5])
    return Evaluation("perplexity", len(truth), rows, rows[1].metric - rows[2].metric, float(low), float(high))


@dataclass
class _Classified:
    logits: Tensor
    features: Tensor | None


def _classify(model: nn.Module, site: Place | None, batches: Sequence[dict[str, Tensor]], offset: int) -> _Classified:
    logits: list[Tensor] = []
    features: list[Tensor] = []
    for batch in batches:
        output, caught = catch(model, () if site is None else (site,), batch, "mean")
        found = getattr(output, "logits", None)
        if found is None or found.dim() != 2:
            shape = "no logits" if found is None else f"logits {tuple(found.shape)}"
            raise ValueError(
                f"evaluation needs a model that classifies whole rows, {type(model).__name__} has {shape}"
            )
        if not 0 <= offset < found.shape[1]:
            raise ValueError(
                f"the label offset must be in 0 ... {found.shape[1] - 1}, as {type(model).__name__} has "
                f"{found.shape[1]} outputs, got {offset}"
            )
        logits.append(found[:, offset:].float().cpu())
        features += caught.values()
    return _Classified(torch.cat(logits), torch.cat(features) if features else None)


def variants(model: nn.Module, measure: Callable[[], Any]) -> list[tuple[str, Any, tuple[int, float]]]:
    """Name, measurement and size of the model without and with its corrections, which come back in any case."""
    found = corrections(model)
    plain = _without(model, found, measure)
    corrected = measure() if found else None
    # Sizes come last: reading its state dict changes what a model in NF4 of bitsandbytes 0.50 answers on a CPU.
    seen = [("quantized", plain, _without(model, found, lambda: _size(model)))]
    return [*seen, ("quantized + CAT", corrected, _size(model))] if found else seen


def _without(model: nn.Module, found: dict[str, ClusterAffine], measure: Callable[[], Any]) -> Any:
    try:
        for name in found:
            detach(model, name)
        return measure()
    finally:
        for name, correction in found.items():
            attach(model, name, correction)


def _size(model: nn.Module) -> tuple[int, float]:
    return stored_bytes(model), 8 * parameter_bytes(model) / max(1, parameter_count(model))


def _class_row(name: str, out: _Classified, truth: _Classified, wanted: Tensor, size: tuple[int, float]) -> Row:
    choice, first = out.logits.argmax(1), truth.logits.argmax(1)
    right, right_before = choice == wanted, first == wanted
    low, high = _wilson(int(right.sum()), len(wanted))
    return Row(
        name,
        100 * float(right.double().mean()),
        low,
        high,
        100 * float((choice == first).double().mean()),
        int((right_before & ~right).sum()),
        int((~right_before & right).sum()),
        float(divergences(truth.logits, out.logits).mean()),
        mean_discrimination(out.features, wanted),
        *size,
    )


def mean_discrimination(features: Tensor | None, labels: Tensor) -> float | None:
    """D of the classes that have two rows; None if there are not two such classes."""
    if features is None or len(features) != len(labels):
        return None
    classes, counts = labels.unique(return_counts=True)
    kept = torch.isin(labels, classes[counts >= 2])
    if len(labels[kept].unique()) < 2:
        return None
    return float(feature_discrimination(features[kept], labels[kept])["discrimination"])


def _read(model: nn.Module, teacher: nn.Module, batches: Sequence[dict[str, Tensor]]) -> np.ndarray:
    """(documents, 4): tokens, and sums of negative log-likelihood, of agreement and of divergence."""
    documents = []
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(f"a language model needs input_ids, the batch has {', '.join(batch)}")
        ids = batch["input_ids"][:, 1:]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].bool()
        log_q = run(model, placed(batch, model)).logits[:, :-1].float().cpu().log_softmax(-1)
        same = model is teacher
        log_p = log_q if same else run(teacher, placed(batch, teacher)).logits[:, :-1].float().cpu().log_softmax(-1)
        loss = -log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        agree = (log_q.argmax(-1) == log_p.argmax(-1)).float()
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        sums = [(value * mask).sum(1).double() for value in (torch.ones_like(loss), loss, agree, divergence)]
        documents.append(torch.stack(sums, 1).numpy())
    return np.concatenate(documents)


def _language_row(name: str, sums: np.ndarray, size: tuple[int, float]) -> Row:
    tokens, loss, agree, divergence = sums.sum(0)
    low, high = np.percentile(_perplexity(sums, _resamples(len(sums))), [2.5, 97.5])
    return Row(
        name,
        math.exp(loss / tokens),
        float(low),
        float(high),
        100 * agree / tokens,
        None,
        None,
        divergence / tokens,
        None,
        *size,
    )


def _resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, (RESAMPLES, n))


def _perplexity(sums: np.ndarray, draws: np.ndarray) -> np.ndarray:
    drawn = sums[:, :2][draws].sum(1)
    return np.exp(drawn[:, 1] / drawn[:, 0])


def _wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval in percent."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


def _mean_interval(values: Tensor) -> tuple[float, float, float]:
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half
