"""Block reconstruction: what a solver found is the start; codes, scales, offsets, biases and norms learn from there.

    block by block    least squared difference from the float block's output, on the inputs of the quantized stream
    at the end        least KL divergence of the whole model's logits from the float model's, and least squared difference,
                      relative to their spread, of all other answers

The family of BRECQ (arXiv 2102.05426), QDrop (arXiv 2203.05740) and PD-Quant (arXiv 2212.07048); the second stage learns
what the first stage of CAT (arXiv 2509.26277) does, and the codes with it. The best state by held-out batches is kept, so a
block that learning would not help stays as the solver left it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .answers import Kind, answer_kind, divergences, problem_of
from .fitting import Widths, tensor_of
from .formats import get_format
from .gather import Gather
from .layers import QuantizedModule
from .learned import MAX_RADIX, LearnedLayer
from .log import logger
from .modules import replace_module
from .outputs import LOGITS, answers
from .packed_model import quantized_modules
from .replay import run
from .solvers.reconstruct import Options
from .steps import Draft
from .training import STEP, Group, Progress, learning, train
from .walk import Call, run_unit

_DROP = 0.5  # share of the values whose input quantization is dropped while a block is learned (QDrop)


@dataclass
class Reconstruction:
    """Learns units of one model, and at the end the model.

    Args:
        options: how much and how fast.
        gather: tells what is padding.
        batches: indices of the batches to learn from.
        held_out: those of the batches that decide.
        seed: of everything random.
        fixed: names of layers that share their packed weight with others, which do not learn.
        kept: names of float parameters that stay as they are.
        common: names of those that several units hold, which learn with the whole model only.
        pace: seconds that a forward took while a unit learned, its gradient counted as two more; by unit, "" is the model.
    """

    options: Options
    gather: Gather
    batches: Sequence[int]
    held_out: Sequence[int]
    seed: int
    fixed: set[str]
    kept: set[str] = field(default_factory=set)
    common: set[str] = field(default_factory=set)
    weights: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)

    def unit(
        self, name: str, live: nn.Module, float_unit: nn.Module, calls: Sequence[list[Call]], outputs: list[list[Any]]
    ) -> Progress | None:
        """Learn the quantized layers inside the unit called ``name``; None where there are none.

        Args:
            name: the unit's name in the model.
            live: the unit, quantized.
            float_unit: the unit, in float: its weights are where codes come from.
            calls: what ``live`` receives, by batch, by call.
            outputs: what the float unit put out, by batch, by call.
        """
        self.remember(name, live, float_unit)
        if isinstance(live, QuantizedModule) or not self.options.block_steps:
            return None
        targets = [[tensor_of(output) for output in row] for row in outputs]
        size = sum(float(t.float().var()) for row in targets for t in row) / sum(map(len, targets))

        def loss_of(batch: int, learning: bool) -> Tensor:
            found = [tensor_of(output) for output in run_unit(live, calls[batch])]
            losses = [self._square(batch, name, f, t) for f, t in zip(found, targets[batch], strict=True)]
            return torch.stack(losses).mean() / max(size, 1e-12)

        return self._learn(name, live, loss_of, self.options.block_steps, 1.0, _DROP)

    def remember(self, name: str, live: nn.Module, float_unit: nn.Module) -> None:
        """Keep the float weights of the unit called ``name``: what is learned starts there."""
        if not self.options.model_steps:
            self.weights.clear()  # those of the units before will not be asked for again
        for inner, layer in quantized_modules(live).items():
            weight: Tensor = float_unit.get_submodule(inner).weight  # type: ignore[assignment]
            self.weights[f"{name}.{inner}" if inner else name] = layer.target(weight)

    def model(
        self,
        model: nn.Module,
        data: Sequence[dict[str, Tensor]],
        site: str | None,
        targets: list[dict[str, Tensor]],
        draft: Draft | None = None,
    ) -> None:
        """Learn the whole model.

        Args:
            data: what it is called with, by batch.
            site: name of the module that returns the logits, or None.
            targets: what the float model answers, by batch; see :func:`hf_catquant.outputs.answers`.
            draft: where an interrupted run goes on from.
        """
        if not self.options.model_steps:
            return
        problem = problem_of(model)
        spreads = {name: _spread([target[name] for target in targets if name in target]) for name in targets[0]}
        # Now, while the layers of the module that returns the logits say what they are.
        widths = None if site is None else Widths.of(model.get_submodule(site))

        def loss_of(batch: int, learning: bool) -> Tensor:
            found, losses = answers(model, run(model, data[batch])), []
            for name, target in targets[batch].items():
                dim = widths.dim(target) if widths is not None and name in LOGITS else -1
                kind = answer_kind(problem, target.shape[dim]) if site is not None and name in LOGITS else "values"
                if site is not None and kind != "values":
                    # Classes of a map are no last dimension.
                    rows, wanted = found[name].movedim(dim, -1), target.movedim(dim, -1)
                    losses.append(self._divergence(batch, site, rows, wanted, kind))
                elif name in spreads and found[name].shape == target.shape:  # boxes may be as many as were found
                    losses.append(self._answer(batch, name, found[name], target) / spreads[name])
            if not losses:
                raise ValueError(
                    f"batch {batch}: nothing that {type(model).__name__} returns has the shape of what its float model "
                    'returns, so the whole cannot learn: pass solver_options={"model_steps": 0}'
                )
            return torch.stack(losses).sum()

        done = self._learn("", model, loss_of, self.options.model_steps, self.options.model_rate, 0.0, draft)
        if done is not None:
            logger.info("whole model: %s after %d steps", done.summary(), done.steps)

    def _learn(
        self,
        name: str,
        root: nn.Module,
        loss_of: Callable[[int, bool], Tensor],
        steps: int,
        rate: float,
        drop: float,
        draft: Draft | None = None,
    ) -> Progress | None:
        with torch.enable_grad(), self._learning(name, root) as learned:
            if not learned:
                return None
            pull = 0.0 if name else self.options.scale_pull
            forwards, start = 0, time.perf_counter()

            def loss_with_drop(batch: int, learning: bool) -> Tensor:
                nonlocal forwards
                forwards += STEP if learning else 1
                for layer in learned.values():
                    layer.drop = drop if learning else 0.0
                loss = loss_of(batch, learning)
                if not (learning and pull):
                    return loss
                return loss + pull * torch.stack([layer.drift() for layer in learned.values()]).mean()

            groups = self._groups(name, root, learned, rate)
            with learning([p for group in groups for p in group["params"]]):
                say = None if name else partial(_say, steps)
                done = train(groups, loss_with_drop, self.batches, self.held_out, steps, self.seed, say, draft)
            self.progress[name], self.pace[name] = done, (time.perf_counter() - start) / max(1, forwards)
        return done

    @contextmanager
    def _learning(self, name: str, root: nn.Module) -> Iterator[dict[str, LearnedLayer]]:
        """Learned layers in the places of those of ``root`` that can learn; packed and put back at the end."""
        generator = torch.Generator().manual_seed(self.seed)
        learned: dict[str, LearnedLayer] = {}
        for inner, layer in quantized_modules(root).items():
            full = f"{name}.{inner}" if name else inner
            if full in self.weights and full not in self.fixed and get_format(layer.scheme.weights).radix <= MAX_RADIX:
                learned[inner] = LearnedLayer(layer, self.weights[full].to(layer.weight_scale.device), generator)
        for inner, stand_in in learned.items():
            replace_module(root, inner, stand_in)
        try:
            yield learned
        finally:
            for inner, stand_in in learned.items():
                replace_module(root, inner, stand_in.write_back())

    def _groups(self, name: str, root: nn.Module, learned: dict[str, LearnedLayer], rate: float) -> list[Group]:
        options = self.options
        groups: list[Group] = []
        mine: set[int] = set()
        for layer in learned.values():
            mine |= {id(p) for p in layer.parameters()}
            groups.append({"params": [layer.codes], "lr": rate * options.code_rate})
            for p in (layer.scale, layer.offset, layer.input_scale, *layer.low_rank):
                if p is not None:
                    groups.append({"params": [p], "lr": rate * options.scale_rate * float(p.detach().abs().mean())})
            if layer.bias is not None:
                groups.append({"params": [layer.bias], "lr": rate * options.float_rate})
        still = self.kept | self.common if name else self.kept
        inner = ((f"{name}.{n}" if name else n, p) for n, p in root.named_parameters() if id(p) not in mine)
        # Half precision has no room for steps this small.
        others = [p for full, p in inner if full not in still and p.dtype == torch.float32]
        return [*groups, {"params": others, "lr": rate * options.float_rate}] if others else groups

    def _square(self, batch: int, name: str, found: Tensor, target: Tensor) -> Tensor:
        difference = (found.float() - target.float()).square()
        mask = self.gather.mask(batch, name, target) if target.dim() == 3 else None
        return difference.mean() if mask is None else difference.flatten(0, 1)[mask].mean()

    def _answer(self, batch: int, name: str, found: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 2 and name.endswith("_logits"):  # of the steps of a text, where an answer starts and ends
            found, target = found.unsqueeze(-1), target.unsqueeze(-1)
        return self._square(batch, name.replace("_", "."), found, target)  # padding is told by words like "encoder"

    def _divergence(self, batch: int, site: str, found: Tensor, target: Tensor, kind: Kind = "classes") -> Tensor:
        heat = self.options.temperature
        rows = divergences(target / heat, found / heat, kind).flatten() * heat**2
        mask = self.gather.mask(batch, site, target) if target.dim() == 3 else None
        return rows.mean() if mask is None else rows[mask].mean()

    def summary(self) -> dict[str, dict[str, Any]]:
        """What was learned, by unit ("" is the whole model), JSON-clean."""
        return {name: asdict(progress) for name, progress in self.progress.items()}


def _spread(targets: list[Tensor]) -> float:
    """What squared differences from an answer are measured by: its mean variance within a batch.

    Where nothing varies (masks, a single number), its mean square.
    """
    count = len(targets)
    variance = sum(float(t.float().var(correction=min(1, t.numel() - 1))) for t in targets) / count
    square = sum(float(t.float().square().mean()) for t in targets) / count
    return variance if variance > 1e-9 * square else square or 1.0


def _say(steps: int, step: int, loss: float) -> None:
    logger.info("whole model: step %d of %d, loss %.4f", step, steps, loss)
