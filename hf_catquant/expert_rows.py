"""Which rows each expert is calibrated with, and the moments of them.

The quantized stream says which tokens an expert is sent; those tokens go through it in both streams, so that row by row the
two speak of the same token although the float router may have sent it elsewhere. An expert that is sent fewer rows than it
has columns gets tokens that were sent elsewhere in addition, up to that number: what a router does not choose for 128
samples it may choose for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .formats import get_format
from .gather import Gather, Streams
from .layers import Scheme
from .layers.experts import UP, Experts
from .moments import MomentSums
from .replay import Stop, hooked
from .solvers import Moments
from .walk import Call, Leaf, run_unit
from .weight import quantize_activation

_MOMENT_BYTES = 1 << 31  # of the moments that are summed at once: more experts take another pass over the unit


class ExpertRows:
    """The rows of one projection of the experts of a layer.

    Attributes:
        note: how many experts were sent few rows, None if none was.

    Args:
        gather: the calibration data.
        name: of the projection in the model.
        leaf: the projection in its unit.
        streams: the unit in both streams; of its experts, ``up`` is quantized before ``down``.
    """

    def __init__(self, gather: Gather, name: str, leaf: Leaf, streams: Streams) -> None:
        self.gather, self.streams, self.leaf = gather, streams, leaf
        self.parent, _, self.child = leaf.name.rpartition(".")
        live = streams.live.get_submodule(self.parent)
        assert isinstance(live, Experts)
        self.count = live.experts
        projection: Any = live.get_submodule(self.child)
        self.columns = int(projection.weight.shape[-1])
        sent, real = self._routes(name)
        self.note = self._describe(name, sent)
        self.taken = self._take(sent, real)

    def moments(self, scheme: Scheme) -> Iterator[Moments | None]:
        """Moments of every expert in turn; None for one without any row."""
        at_once = max(1, _MOMENT_BYTES // (8 * self.columns**2))
        for first in range(0, self.count, at_once):
            sums = {expert: MomentSums() for expert in range(first, min(first + at_once, self.count))}
            taken = iter(self.taken)
            for batch in self.gather.batches:
                for x, y in self._hidden(batch):
                    self._add(sums, next(taken), x, y, scheme)
            yield from (each.result() for each in sums.values())

    def _add(self, sums: dict[int, MomentSums], taken: Tensor, x: Tensor, y: Tensor, scheme: Scheme) -> None:
        """Add the rows of one call: hidden states x and y (T, H) in the two streams, ``taken`` (T, E)."""
        chosen = torch.zeros_like(taken)
        chosen[:, list(sums)] = taken[:, list(sums)]
        experts, tokens = chosen.T.nonzero(as_tuple=True)
        if not len(tokens):
            return
        rows = []
        for unit, hidden in ((self.streams.float_unit, x), (self.streams.live, y)):
            module = unit.get_submodule(self.parent)
            assert isinstance(module, Experts)
            met = hidden[tokens.to(hidden.device)]
            if self.child != UP:
                met = module.between(module.up(met, module.ends(experts.to(hidden.device))))
            rows.append(torch.ops.catquant.rotate(met, False) if scheme.rotation is not None else met)
        if scheme.activations is not None:
            rows[1] = quantize_activation(rows[1], get_format(scheme.activations))
        for expert, each in sums.items():
            mine = (experts == expert).nonzero().flatten().to(rows[0].device)
            if len(mine):
                each.add(rows[0][mine].unsqueeze(0), rows[1][mine].unsqueeze(0))

    def _routes(self, name: str) -> tuple[Tensor, Tensor]:
        """Which of all tokens every expert is sent in the quantized stream (T, E), and which are no padding (T,)."""
        sent, real = [], []
        self.sizes: list[int] = []  # tokens by call
        for batch in self.gather.batches:
            for hidden, index in self._caught(self.streams.live, self.streams.calls[batch]):
                mask = self.gather.mask(batch, name, hidden)
                real.append(torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask.cpu())
                hit = torch.zeros(len(hidden), self.count + 1, dtype=torch.bool)
                hit.scatter_(1, index.cpu().clamp(max=self.count), True)  # the last column is nobody
                sent.append(hit[:, :-1] & real[-1].unsqueeze(1))
                self.sizes.append(len(hidden))
        return torch.cat(sent), torch.cat(real)

    def _take(self, sent: Tensor, real: Tensor) -> tuple[Tensor, ...]:
        """Which tokens of every call every expert is calibrated with (T, E)."""
        generator = torch.Generator().manual_seed(self.gather.seed)
        order = torch.randperm(len(sent), generator=generator)
        most = self.gather.quota(self.columns) * len(self.gather.batches)
        taken = sent.clone()
        for expert, found in enumerate(sent.sum(0).tolist()):
            if found < self.columns:
                others = order[(real & ~sent[:, expert])[order]]
                taken[others[: self.columns - found], expert] = True
            elif found > most:
                mine = order[sent[order, expert]]
                taken[mine[most:], expert] = False
        return taken.split(self.sizes)

    def _describe(self, name: str, sent: Tensor) -> str | None:
        found = sent.sum(0)
        few = int((found < self.columns).sum())
        if not few:
            return None
        return (
            f"{name}: {few} of {self.count} experts were sent fewer than {self.columns} rows (the least {int(found.min())}) "
            "and were also calibrated with tokens that the router sent elsewhere"
        )

    def _hidden(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states (T, H) that the experts read at each of their runs, in the float and in the quantized stream."""
        sides = ((self.streams.float_unit, self.streams.float_calls), (self.streams.live, self.streams.calls))
        for (x, _), (y, _) in zip(*(self._caught(unit, calls[batch]) for unit, calls in sides), strict=True):
            yield x, y

    def _caught(self, root: nn.Module, calls: list[Call]) -> list[tuple[Tensor, Tensor]]:
        """Hidden states (T, H) and experts (T, k) that the experts of ``root`` are given at each of their runs."""
        found: list[tuple[Tensor, Tensor]] = []

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            hidden, index, *_ = (*args, *kwargs.values())
            found.append((hidden.detach().clone(), index.clone()))
            if len(found) % self.leaf.calls == 0:
                raise Stop

        with hooked(root.get_submodule(self.parent), before=before):
            run_unit(root, calls)
        return found
