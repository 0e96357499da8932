"""A small training loop: Adam, a cosine, and the best state by a held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fitting import sample_count

WARM_UP = 20  # steps
CHECKS = 8  # looks at the held-out loss
PATIENCE = 4  # looks in a row without a better one that end the training
RETREAT = 2  # such looks in a row that make it go back to the best state
BACK_OFF = 0.4  # what the rates are multiplied by then
STEP = 3  # forwards that a step takes, its gradient included
HELD_OUT = 4  # one batch of so many is kept from learning
FEW, HELD_OUT_OF_FEW = 8, 8  # of fewer batches one sample of so many: learning needs the others more


def set_apart(batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], range]:
    """The batches, and the indices of those, at their end, that are kept from learning.

    Of few batches one may be split: its last samples become a batch of their own. At least one sample is kept.

    Args:
        batches: tensors (B, ...) by name; at least two samples in all.
    """
    count = len(batches)
    if count >= FEW:
        return batches, range(count - count // HELD_OUT, count)
    wanted = max(1, sum(map(sample_count, batches)) // HELD_OUT_OF_FEW)
    first = count
    while wanted and sample_count(batches[first - 1]) <= wanted:
        first -= 1
        wanted -= sample_count(batches[first])
    if wanted == 0:
        return batches, range(first, count)
    *before, split = batches[:first]
    parts = ({name: t[:-wanted] for name, t in split.items()}, {name: t[-wanted:] for name, t in split.items()})
    return [*before, *parts, *batches[first:]], range(first, count + 1)


def forwards(steps: int, batches: int, held_out: int) -> int:
    """How many forwards :func:`train` takes at most with so many steps, batches to learn from and held-out ones."""
    return STEP * steps + 2 * batches + (CHECKS + 1) * (held_out or batches)


@dataclass(frozen=True)
class Progress:
    """What training did.

    Attributes:
        before, after: mean loss over the batches that were learned from.
        held_out_before, held_out_after: over those that were not; None if there are none.
        steps: steps taken until the state that was kept, 0 if nothing was better than the start.
    """

    before: float
    after: float
    held_out_before: float | None
    held_out_after: float | None
    steps: int

    def summary(self) -> str:
        """Its losses in a few words."""
        if self.held_out_before is None or self.held_out_after is None:
            return f"loss {self.before:.4f} -> {self.after:.4f}"
        return f"held-out loss {self.held_out_before:.4f} -> {self.held_out_after:.4f}"


Group = dict[str, Any]  # of parameters and their learning rate, as torch.optim takes it


def train(
    groups: list[Group],
    loss_of: Callable[[int, bool], Tensor],
    batches: Sequence[int],
    held_out: Sequence[int],
    steps: int,
    seed: int,
    after_check: Callable[[int, float], None] | None = None,
) -> Progress:
    """Minimise ``loss_of(batch, learning)`` over ``batches`` by Adam; leave the parameters at their best by ``held_out``.

    The held-out loss is looked at ``CHECKS`` times. After ``RETREAT`` looks without a better one training goes on from the
    best state, more slowly. Without held-out batches the batches themselves are looked at. The start counts: nothing gets
    worse than it was.

    Args:
        groups: parameters with their learning rates, which rise for ``WARM_UP`` steps and fall to 0 as a cosine.
        loss_of: the loss of one batch, and whether it is one to learn from.
        batches, held_out: indices of batches.
        steps: batches to learn from, in random order, again and again.
        seed: of the order.
        after_check: told the steps so far and the loss at every check.
    """
    parameters = [p for group in groups for p in group["params"]]
    judges = held_out or batches

    def mean_loss(indices: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(float(loss_of(batch, False)) for batch in indices) / len(indices)

    before, start = mean_loss(batches), mean_loss(judges)
    best = _Best(parameters, start)
    order = _order(batches, steps, seed)
    every = max(1, steps // CHECKS)
    factor = 1.0
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(order, start=1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor * _share(step, steps)
        optimizer.zero_grad()
        loss_of(batch, True).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            loss = mean_loss(judges)
            if after_check is not None:
                after_check(step, loss)
            best.look(loss, step)
            if best.misses >= PATIENCE:
                break
            if best.misses and best.misses % RETREAT == 0:
                best.restore()
                optimizer.state.clear()
                factor *= BACK_OFF
    best.restore()
    after = mean_loss(batches)
    return Progress(before, after, start if held_out else None, best.loss if held_out else None, best.step)


class _Best:
    """The best state of ``parameters`` so far, and how many looks in a row have not found a better one."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float) -> None:
        self.parameters = parameters
        self.misses = 0
        self.keep(loss, 0)

    def look(self, loss: float, step: int) -> None:
        """Keep the state as it is now if its ``loss`` is the least."""
        if loss < self.loss:
            self.keep(loss, step)
            self.misses = 0
        else:
            self.misses += 1

    def keep(self, loss: float, step: int) -> None:
        """Keep the state as it is now."""
        self.loss, self.step = loss, step
        self._state = [parameter.detach().clone() for parameter in self.parameters]

    def restore(self) -> None:
        """Put the best state back."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._state, strict=True):
                parameter.copy_(value)


@contextmanager
def learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients reach ``parameters`` for the time of a ``with``; then they are as they were."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
            parameter.grad = None


def _share(step: int, steps: int) -> float:
    """Of the learning rate at ``step``: a warm-up, and a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, step / WARM_UP)


def _order(batches: Sequence[int], steps: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return order[:steps]
