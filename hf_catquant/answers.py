"""What a model's answers say, and how far those of two models are apart.

classes   one of them is right: softmax, Kullback-Leibler divergence
labels    each is right or not: a sigmoid for each, divergences added up
values    numbers, such as those of a regression or hidden features: mean squared error
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Kind = Literal["classes", "labels", "values"]


def problem_of(model: nn.Module) -> str | None:
    """The ``problem_type`` of a model's config, None if it names none."""
    return getattr(getattr(model, "config", None), "problem_type", None)


def answer_kind(problem: str | None, width: int) -> Kind:
    """What logits of ``width`` classes say, for a model whose config names the ``problem`` as transformers does.

    A single logit is a number: no other one shares its softmax, whose divergence would be zero whatever it says.
    """
    if problem == "multi_label_classification":
        return "labels"
    return "values" if width == 1 or problem == "regression" else "classes"


def divergences(wanted: Tensor, found: Tensor, kind: Kind = "classes") -> Tensor:
    """How far (...) the answers ``found`` are from ``wanted``, (..., C) both: in nats, or as a mean square of values."""
    wanted, found = wanted.float(), found.float()
    if kind == "values":
        return (found - wanted).square().mean(-1)
    if kind == "labels":
        yes, no = (_terms(logsigmoid(sign * wanted), logsigmoid(sign * found)) for sign in (1, -1))
        return (yes + no).sum(-1)
    return _terms(wanted.log_softmax(-1), found.log_softmax(-1)).sum(-1)


def agreement(wanted: Tensor, found: Tensor, kind: Kind) -> Tensor:
    """How far the answers ``found`` are those ``wanted``, 0 to 1 for each row (M,): the same class, the share of labels."""
    if kind == "values":
        return torch.ones(len(found))
    if kind == "labels":
        return ((found > 0) == (wanted > 0)).float().mean(-1)
    return (found.argmax(-1) == wanted.argmax(-1)).float()


def _terms(expected: Tensor, log_q: Tensor) -> Tensor:
    """Terms of a divergence. An answer that is never given, by minus infinity, is none."""
    p = expected.exp()
    return (p * (expected - log_q)).masked_fill(p == 0, 0)
