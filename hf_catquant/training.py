"""A small training loop: Adam, a cosine, and the best state by a held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .fitting import sample_count
from .log import logger
from .steps import Draft

WARM_UP = 20  # steps
CHECKS = 8  # looks at the held-out loss
PATIENCE = 4  # looks in a row without a better one that end the training
RETREAT = 2  # such looks in a row that make it go back to the best state
BACK_OFF = 0.4  # what the rates are multiplied by then
STEP = 3  # forwards that a step takes, its gradient included
HELD_OUT = 4  # one sample of so many is kept from learning
FEW, HELD_OUT_OF_FEW = 8, 8  # of fewer batches one of so many: learning needs the others more


def set_apart(batches: list[dict[str, Tensor]], seed: int) -> tuple[list[dict[str, Tensor]], range]:
    """The batches that are learned from, then those that are kept from learning, and the indices of these.

    Every batch gives its share of samples, drawn at random: data may be sorted, by class or by length, and its last ones
    would stand for one class then. What is left of neighbours that are padded alike is filled up to the size that batches
    had. At least one sample is kept.

    Args:
        batches: tensors (B, ...) by name; at least two samples in all. They are taken out of the list, so that no sample is
            in memory twice.
        seed: of the draw.
    """
    sizes, draws = list(map(sample_count, batches)), torch.Generator().manual_seed(seed)
    total, most = sum(sizes), max(sizes)
    wanted = total // HELD_OUT if len(batches) >= FEW else max(1, total // HELD_OUT_OF_FEW)
    learned: list[dict[str, Tensor]] = []
    kept: list[dict[str, Tensor]] = []
    seen = 0
    for size in sizes:
        batch, order = batches.pop(0), torch.randperm(size, generator=draws)
        share = wanted * (seen + size) // total - wanted * seen // total
        seen += size
        _fill(learned, batch, order[share:], most)
        _fill(kept, batch, order[:share], most)
    return [*learned, *kept], range(len(learned), len(learned) + len(kept))


def _fill(found: list[dict[str, Tensor]], batch: dict[str, Tensor], chosen: Tensor, most: int) -> None:
    """Add the ``chosen`` samples of a batch to the last of ``found``, up to ``most``, and to a new one."""
    rows = chosen.sort().values
    part = {name: tensor[rows.to(tensor.device)] for name, tensor in batch.items()}
    if found and sample_count(found[-1]) < most and _kinds(found[-1]) == _kinds(part):
        last = found.pop()
        part = {name: torch.cat([last[name], tensor]) for name, tensor in part.items()}
    for start in range(0, sample_count(part), most):
        found.append({name: tensor[start : start + most] for name, tensor in part.items()})


def _kinds(batch: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape[1:], tensor.dtype) for name, tensor in batch.items()}


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
    draft: Draft | None = None,
) -> Progress:
    """Minimise ``loss_of(batch, learning)`` over ``batches`` by Adam; leave the parameters at their best by ``held_out``.

    The held-out loss is looked at ``CHECKS`` times. After ``RETREAT`` looks without a better one training goes on from the
    best state, more slowly. Without held-out batches the batches themselves are looked at. The start counts: nothing gets
    worse than it was.

    Args:
        groups: parameters with their learning rates, which rise for ``WARM_UP`` steps and fall to 0 as a cosine.
        loss_of: the loss of one batch, and whether it is one to learn from; it draws nothing at random if there is a draft.
        batches, held_out: indices of batches.
        steps: batches to learn from, in random order, again and again.
        seed: of the order.
        after_check: told the steps so far and the loss at every check.
        draft: takes the state at every check, and gives back that of an interrupted run: both end in the same bits. That
            of a run with another number of batches is not taken.
    """
    judges = held_out or batches

    def mean_loss(indices: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(float(loss_of(batch, False)) for batch in indices) / len(indices)

    found, kind = None if draft is None else draft.read(), [len(batches), len(held_out)]
    if found is not None and found[1]["batches"] != kind:  # they were made smaller since, and hold out other samples
        logger.info(
            "the draft of the interrupted run is of %s batches, these are %s: learning begins anew",
            found[1]["batches"],
            kind,
        )
        found = None
    # What is learned is not yet what it was when the draft was written, so its losses come from there.
    before, start = (mean_loss(batches), mean_loss(judges)) if found is None else found[1]["losses"]
    if not math.isfinite(start):
        logger.warning("nothing is learned: the loss is %s before the first step", start)
        return Progress(before, before, start if held_out else None, start if held_out else None, 0)
    run = _Run(groups, start)
    if found is not None:
        run.go_on(*found)
    order, every = _order(batches, steps, seed), max(1, steps // CHECKS)
    for step in range(run.step + 1, steps + 1):
        run.take(step, steps, partial(loss_of, order[step - 1], True))
        if step % every and step < steps:
            continue
        loss = mean_loss(judges)
        if after_check is not None:
            after_check(step, loss)
        if run.ends(step, loss):
            break
        if draft is not None and step < steps:
            draft.write(run.tensors(), run.record() | {"losses": (before, start), "batches": kind})
    best = run.best
    best.restore()
    after = mean_loss(batches)
    return Progress(before, after, start if held_out else None, best.loss if held_out else None, best.step)


class _Run:
    """Parameters on their way: the optimizer, the best state so far, and all that the next step depends on."""

    def __init__(self, groups: list[Group], loss: float) -> None:
        self.parameters = [p for group in groups for p in group["params"]]
        self.best = _Best(self.parameters, loss)
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.factor, self.step = 1.0, 0

    def take(self, step: int, steps: int, loss_of: Callable[[], Tensor]) -> None:
        """Step ``step`` of ``steps``, down the gradient of a loss."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor * _share(step, steps)
        self.optimizer.zero_grad()
        loss_of().backward()
        self.optimizer.step()

    def ends(self, step: int, loss: float) -> bool:
        """Whether this is the end, by the held-out ``loss``; goes back to the best state if it is time to."""
        self.step, best = step, self.best
        best.look(loss, step)
        if best.misses and best.misses % RETREAT == 0:
            best.restore()
            self.optimizer.state.clear()
            self.factor *= BACK_OFF
        return best.misses >= PATIENCE

    def record(self) -> dict[str, Any]:
        """Numbers of this state, JSON-clean."""
        best = self.best
        return {"step": self.step, "factor": self.factor, "best": (best.loss, best.step, best.misses)}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of this state by name: of every parameter the value now and at its best, and what Adam knows."""
        found: dict[str, Tensor] = {}
        for index, (parameter, best) in enumerate(zip(self.parameters, self.best.state, strict=True)):
            state = {"now": parameter.detach(), "best": best, **self.optimizer.state.get(parameter, {})}
            found |= {f"{index}.{name}": value for name, value in state.items()}
        return found

    def go_on(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: it is that of other parameters.
        """
        kinds = [tensors[name].shape if (name := f"{i}.now") in tensors else None for i in range(len(self.parameters))]
        if kinds != [parameter.shape for parameter in self.parameters] or f"{len(kinds)}.now" in tensors:
            raise ValueError(
                "the interrupted run learned other parameters than this model has: begin anew with --overwrite"
            )
        self.step, self.factor = record["step"], record["factor"]
        best = self.best
        best.loss, best.step, best.misses = record["best"]
        for index, parameter in enumerate(self.parameters):
            own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{index}.")}
            with torch.no_grad():
                parameter.copy_(own.pop("now"))
                best.state[index].copy_(own.pop("best"))
            if own:
                # Adam counts its steps in the memory of the CPU.
                placed = {name: value if name == "step" else value.to(parameter.device) for name, value in own.items()}
                self.optimizer.state[parameter] = placed


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
        self.state = [parameter.detach().clone() for parameter in self.parameters]

    def restore(self) -> None:
        """Put the best state back."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.state, strict=True):
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
