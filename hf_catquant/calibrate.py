"""Quantizing a model: unit by unit, on the statistics of the quantized stream, with the float stream as the target.

For every unit: the float copy runs on the float stream and the live unit on the quantized stream; the layers that read
one tensor are solved together and swapped, so that the next layers of the unit already see their error; batch norms
after them are matched; a correction that sits inside the unit is fitted; both streams advance.

A solver that learns keeps batches back, which decide when it stops and, where they are enough, which the corrections are
fitted on; the others see all of the data, and corrections are fitted on the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from . import samples, solvers
from .cluster_fit import LEAST_ROWS
from .config import CatQuantConfig
from .correcting import Corrections
from .expert_rows import ExpertRows
from .fitting import placed, resolve_sites, sample_count
from .float_parameters import listed_parameters, parameters_of_several
from .gather import Gather, Streams
from .journal import Journal
from .kernels.layout import forget
from .layers import layer_for
from .layers.experts import ExpertLinear
from .log import logger
from .memory import trim
from .model import Selection, Site, stacks
from .modules import opened_experts
from .outputs import answers
from .packed_model import quantized_modules
from .reconstruction import Reconstruction
from .shelf import shelf_of
from .stages import joined, stages
from .steps import Draft, Steps, tensors_of
from .swap import Outcome, Range, Solved, Swap
from .training import Progress, set_apart
from .walk import Call, Leaf, Outputs, Unit, Walk

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
MAX_TARGETS = 1 << 28  # numbers, 1 GiB


def check_ranges(sites: list[Site], obstacle: str) -> None:
    """Refuse layers whose activations need a calibrated range, where ``obstacle`` says why there is none.

    Raises:
        ValueError: naming the layer and the way out.
    """
    for site in sites:
        layer = layer_for(site.module)
        if site.scheme.activations is not None and layer is not None and layer.static_activations:
            raise ValueError(
                f"{site.name}: the activations of a {type(site.module).__name__} have a calibrated range, but {obstacle}: "
                "pass dataset=samples that run through it, or activations=None for it in overrides"
            )


def own_weights(module: nn.Module) -> None:
    """Give ``module`` parameters of its own on the same numbers, which stay when those of the model are put away."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))


class Calibration:
    """The walk over one model with everything that happens at a unit."""

    def __init__(
        self,
        model: nn.Module,
        config: CatQuantConfig,
        selection: Selection,
        data: samples.Batches,
        notes: list[str],
        journal: Journal | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.shelf = shelf_of(model)
        options = solvers.options(config.solver, config.solver_options)
        learns = options is not None
        groups, held_out = set_apart(data.batches, config.seed) if learns else (data.batches, range(0))
        batches = [placed(batch, model) for batch in groups]
        self.swap = Swap(model, config.solver, selection)
        self.swap.outcome.notes += notes
        self.steps = Steps(journal, self.swap)
        self.blocks = [block for blocks in stacks(model).values() for block in blocks]
        norms = [name for name, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        kept = [name for name in selection.skipped if name in dict(model.named_modules())]
        inside = tuple(f"{block}." for block in self.blocks)
        loose = [name for name in opened_experts(model) if not name.startswith(inside)]  # up and down go together
        # What sits on a whole unit waits if the model will learn on: by then its outputs are others.
        self.waits = options is not None and options.model_steps > 0
        corrected = resolve_sites(model, config.correction, self.blocks, None)
        late = [name for name in corrected if self.waits or name not in self.blocks]
        self.walk = Walk(model, batches, [*self.blocks, *loose], [*self.swap.sites, *norms, *kept], late)
        self.diverged = False
        count = len(batches)
        self.solve_batches = range(held_out.start if learns else count)
        # A correction is chosen on rows that were not learned from, if they are enough. What solvers merely saw will do:
        # a model that has all of the data is better than a correction that has some of it to itself.
        enough = sum(sample_count(groups[batch]) for batch in held_out) >= LEAST_ROWS
        apart = learns and enough and config.correction is not None and config.correction.chooses
        fit_batches = held_out if apart else range(count)
        self.gather = Gather(model, groups, self.solve_batches, config.seed)
        shared = {name for site in selection.sites if site.tied_to for name in (site.name, site.tied_to)}
        self.reconstruction = None
        if options is not None:
            still = (listed_parameters(model, config), parameters_of_several(model, self.blocks))
            self.reconstruction = Reconstruction(
                options, self.gather, self.solve_batches, held_out, config.seed, shared, *still
            )
        self.corrections = Corrections(
            model, config, self.gather, self.walk, self.blocks, fit_batches, self.swap.outcome
        )

    def run(self) -> Outcome:
        """Quantize every unit in the order the model runs them."""
        self._round_unreached()
        try:
            for index, unit in enumerate(self.walk.plan.units):
                self.quantize_unit(index, unit)
            self.shelf.finish()
            self.corrections.expect()
            targets = self._targets()
        finally:
            self.walk.finish()
        self._finish(targets)
        return self.swap.outcome

    def _targets(self) -> list[dict[str, Tensor]] | None:
        """What the whole model has to answer on every batch, if it will learn."""
        if self.reconstruction is None or not self.reconstruction.options.model_steps:
            return None
        outputs = self.walk.outputs_of("", "float", range(len(self.walk.batches)))
        first, count = answers(self.model, next(outputs)), len(self.walk.batches)
        if not first:
            self.corrections.left_out("the whole model did not learn: it returns no float tensor")
            return None
        numbers = sum(answer.numel() for answer in first.values()) * count
        if numbers > MAX_TARGETS:
            note = (
                f"the whole model did not learn: its answers to {count} batches like the first are "
                f"{numbers:,} numbers, more than {MAX_TARGETS:,}; shorter or fewer samples would do"
            )
            self.corrections.left_out(note)
            return None
        return [first, *(answers(self.model, output) for output in outputs)]

    def _finish(self, targets: list[dict[str, Tensor]] | None) -> None:
        """What needs the whole quantized model: learning all of it, and corrections outside its units."""
        if self.reconstruction is not None:
            if targets is not None:
                self._learn_model(self.reconstruction, targets)
            self.swap.outcome.learned.update(self.reconstruction.summary())
        self.corrections.fit_model()

    def _learn_model(self, reconstruction: Reconstruction, targets: list[dict[str, Tensor]]) -> None:
        step, whole = "model", ""
        record = self.steps.restore(step, whole)
        if record is None:
            self.steps.begin()
            draft = Draft(self.steps.journal, f"{step}-draft")
            reconstruction.model(self.model, self.walk.batches, self.walk.plan.logits_site, targets, draft)
            done = reconstruction.progress.get(whole)
            self.steps.keep(step, whole, {}, learned=done and asdict(done))
            draft.drop()
        elif record["learned"] is not None:
            reconstruction.progress[whole] = Progress(**record["learned"])

    def _round_unreached(self) -> None:
        reached = {joined(unit.name, leaf.name) for unit in self.walk.plan.units for leaf in unit.leaves}
        sites = [site for name, site in self.swap.sites.items() if name not in reached]
        check_ranges(sites, "the calibration data does not reach it")
        for site in sites:
            self.shelf.take(site.name)
            self.swap.site(site.name, None)
            self.diverged = True
            self.swap.outcome.notes.append(f"{site.name}: not reached by the calibration data, rounded to nearest")

    def quantize_unit(self, index: int, unit: Unit) -> None:
        """Solve the unit, or take it from the journal, and let both streams pass it."""
        step = f"unit-{index:04d}"
        trim()  # of what the unit before took, or the probe of the walk
        self.shelf.take(unit.name)
        too_wide = self.walk.is_too_wide(index)
        float_outputs: Outputs = []
        if too_wide:
            float_calls = self.walk.inputs(index, "float")
        else:
            float_calls, float_outputs = self.walk.inputs_and_outputs(index, "float")
        float_unit = self._float_copy(unit)
        if too_wide:
            own_weights(float_unit)
        record = self.steps.restore(step, unit.name)
        if record is None:
            self._solve(index, unit, float_unit, float_calls, float_outputs)
        else:
            self._take_over(unit, float_unit, record)
        self.shelf.done(unit.name)
        if too_wide:
            self.walk.run_again(index, float_unit)
            return
        outputs = self.walk.outputs(index, "quantized") if self.diverged else float_outputs
        for layer in quantized_modules(self.model.get_submodule(unit.name)).values():
            forget(layer.weight_packed)  # it has run, and what kernels read it from is larger than itself
        self.walk.record(index, {"float": float_outputs, "quantized": outputs})

    def _float_copy(self, unit: Unit) -> nn.Module:
        """A copy of a unit that stays as it is; weights that will be replaced, and never written to, are shared."""
        inside = [
            self.model.get_submodule(n) for n in self.swap.sites if n == unit.name or n.startswith(f"{unit.name}.")
        ]
        weights = [module._parameters.get("weight") for module in inside]
        return copy.deepcopy(self.model.get_submodule(unit.name), {id(w): w for w in weights if w is not None})

    def _solve(
        self, index: int, unit: Unit, float_unit: nn.Module, float_calls: Sequence[list[Call]], float_outputs: Outputs
    ) -> None:
        start = time.perf_counter()
        self.steps.begin()
        calls = self.walk.inputs(index, "quantized") if self.diverged else float_calls
        live = self.model.get_submodule(unit.name)
        solved = []
        parts = stages(unit, self.swap.sites)
        for stage in parts:
            solved += self._stage(unit, stage, Streams(float_unit, live, float_calls, calls), stage is parts[-1])
            live = self.model.get_submodule(unit.name)  # another one, if the unit is the layer itself
        learned = None
        if solved and self.reconstruction is not None:
            learned = self.reconstruction.unit(unit.name, live, float_unit, calls, float_outputs)
        for name in self._corrections_inside(unit):
            self.corrections.fit_inside(unit, name, Streams(float_unit, live, float_calls, calls))
        state = {"diverged": self.diverged, "learned": learned and asdict(learned)}
        self.steps.keep(f"unit-{index:04d}", unit.name, tensors_of(float_unit), **state)
        self._progress(index, unit, solved, learned, time.perf_counter() - start)

    def _take_over(self, unit: Unit, float_unit: nn.Module, record: dict[str, Any]) -> None:
        """The books of a unit that an earlier run finished."""
        self.diverged = record["diverged"]
        self.corrections.drop(self._corrections_inside(unit))
        if record["modules"] and self.reconstruction is not None:
            self.reconstruction.remember(unit.name, self.model.get_submodule(unit.name), float_unit)
            if record["learned"] is not None:
                self.reconstruction.progress[unit.name] = Progress(**record["learned"])

    def _corrections_inside(self, unit: Unit) -> list[str]:
        return self.corrections.inside(unit.name, waits=self.waits)

    def _progress(self, index: int, unit: Unit, solved: list[str], learned: Progress | None, seconds: float) -> None:
        if not solved:
            return
        errors = [self.swap.outcome.errors[name] for name in solved if name in self.swap.outcome.errors]
        formats = ", ".join(dict.fromkeys(self.swap.outcome.modules[name]["weights"] for name in solved))
        error = f"error {sum(errors) / len(errors):.4f}" if errors else "tied"
        error += "" if learned is None else f", {learned.summary()}"
        total = len(self.walk.plan.units)
        width = len(str(total))
        logger.info(
            "[%*d/%d] %s: %d layers, %s, %s, %.1f s",
            width,
            index + 1,
            total,
            unit.name,
            len(solved),
            formats,
            error,
            seconds,
        )

    def _stage(self, unit: Unit, stage: list[Leaf], streams: Streams, is_last: bool) -> list[str]:
        """Treat the leaves of one stage; returns the names of the layers that were quantized."""
        lead = stage[0]
        name = joined(unit.name, lead.name)
        if name not in self.swap.sites:
            if isinstance(streams.float_unit.get_submodule(lead.name), BATCH_NORMS) and self.diverged:
                self.gather.match_norm(lead, streams)
            return []
        schemes = self.swap.sites[name].schemes
        input_range = self.gather.input_range(lead, schemes[0], streams)
        each: Iterable[Any]
        if isinstance(streams.live.get_submodule(lead.name), ExpertLinear):
            rows = ExpertRows(self.gather, name, lead, streams)
            each = map(rows.moments, schemes)
            self.swap.outcome.notes += [rows.note] if rows.note else []
        else:
            each = self.gather.moments(name, lead, schemes, streams, input_range)
            # Learning, and corrections, look at the float unit once more.
            if is_last and self.reconstruction is None and not self._corrections_inside(unit):
                each = self._letting_go(unit, each)
        names = [joined(unit.name, leaf.name) for leaf in stage]
        self._solve_and_put(names, each, input_range)
        self.diverged = True
        return names

    def _letting_go(self, unit: Unit, each: Iterator[Any]) -> Iterator[Any]:
        """Moments of the last layers of a unit. Both streams run for the first ones only: what they ran with is free then.

        The last layers of a block often have the most inputs, and solving them takes the most memory.
        """
        for number, moments in enumerate(each):
            if not number:
                self.shelf.done(unit.name)
            yield moments

    def _solve_and_put(self, names: list[str], each: Iterable[Any], input_range: Range | None) -> None:
        """Solve layers that read one tensor in each of their schemes, with the moments of that scheme; the best stays."""
        best: dict[str, Solved] = {}
        for number, moments in enumerate(each):
            for name in names:
                solved = self.swap.solve(name, self.swap.sites[name].schemes[number], moments)
                if name not in best or solved.distance < best[name].distance:
                    best[name] = solved
        for name, solved in best.items():
            self.swap.put(name, solved, input_range)
