"""Quantizing a model: unit by unit, on the statistics of the quantized stream, with the float stream as the target.

For every unit: the float copy runs on the float stream and the live unit on the quantized stream; the layers that read
one tensor are solved together and swapped, so that the next layers of the unit already see their error; batch norms
after them are matched; a correction that sits inside the unit is fitted; both streams advance.

Corrections are fitted on batches that the solvers did not see, if there are enough: on their own calibration data quantized
layers look better than they are, and a correction would find too little to do.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import samples, solvers
from .cluster_fit import Kind
from .config import CatQuantConfig
from .fitting import Pairs, correction_dim, placed, resolve_sites, tensor_of
from .formats import get_format
from .layers import QuantizedModule, layer_for
from .log import logger
from .model import Selection, replace_module, select, share_weight, stacks
from .moments import ChannelSums, MomentSums, match_batch_norm
from .solvers import Moments
from .walk import Call, Leaf, Unit, Walk, leaf_inputs, leaf_outputs
from .weight import fit_static_range, quantize_activation

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Positions of one image say much the same: this many rows settle the moments of K columns.
MAX_ROWS, ROWS_PER_COLUMN = 1 << 16, 64
HELD_OUT = 4  # one batch of so many is kept for the corrections, if there are twice as many
RANGE_SAMPLE = 1 << 18  # values that a static activation range is fitted on


@dataclass
class Outcome:
    """What quantizing did: stored entries, per-layer errors and the fits of the corrections, all JSON-clean."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    corrections: dict[str, dict[str, Any]] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def quantize_modules(model: nn.Module, config: CatQuantConfig) -> tuple[Selection, Outcome, samples.Batches | None]:
    """Quantize ``model`` in place.

    Raises:
        ValueError: data is needed and missing or unusable, a pattern matches nothing, or nothing can be quantized.
    """
    config.check_data()
    selection = select(model, config)
    training = model.training
    model.eval()
    try:
        if config.dataset is None:
            return selection, _without_data(model, selection), None
        batches = _collect(model, config)
        return selection, Calibration(model, config, selection, batches).run(), batches
    finally:
        model.train(training)


def _collect(model: nn.Module, config: CatQuantConfig) -> samples.Batches:
    return samples.collect(
        config.dataset,
        model,
        processor=config.processor,
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _without_data(model: nn.Module, selection: Selection) -> Outcome:
    for site in selection.sites:
        layer = layer_for(site.module)
        if site.scheme.activations is not None and layer is not None and layer.static_activations:
            raise ValueError(
                f"{site.name}: the activations of a {type(site.module).__name__} have a calibrated range, but dataset is "
                "None: pass dataset=samples, or activations=None for it in overrides"
            )
    swap = Swap(model, "rtn", selection)
    for site in selection.sites:
        swap.site(site.name, None)
    return swap.outcome


class Swap:
    """Puts quantized layers in the place of float ones and keeps the books."""

    def __init__(self, model: nn.Module, solver: str, selection: Selection) -> None:
        self.model = model
        self.solver = solver
        self.sites = {site.name: site for site in selection.sites}
        self.outcome = Outcome()
        self._owner: dict[str, str] = {}  # first quantized member of a tied group, by the group's name

    def site(
        self, name: str, moments: Moments | None, input_range: tuple[Tensor, Tensor | None] | None = None
    ) -> None:
        """Quantize the layer called ``name``; without moments by rounding to nearest."""
        site = self.sites[name]
        group = site.tied_to or name
        scheme = self.sites[group].scheme
        module = self.model.get_submodule(name)
        layer = layer_for(module)
        assert layer is not None
        new = layer(module, scheme)
        replace_module(self.model, name, new)
        owner = self._owner.setdefault(group, name)
        if owner == name:
            self._solve(name, module, new, moments)
        else:
            share_weight(self.model, name, owner)
        if input_range is not None:
            new.fill_input_range(*input_range)
        entry = {**asdict(new.scheme), "shape": [new.rows_, new.columns]}
        self.outcome.modules[name] = {**entry, "tied_to": None if owner == name else owner}

    def _solve(self, name: str, module: nn.Module, new: QuantizedModule, moments: Moments | None) -> None:
        scheme = new.scheme
        weight: Tensor = module.weight  # type: ignore[assignment]
        matrix = type(new).to_matrix(weight.detach()).float()
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{name}.weight has values that are not finite: the model itself is broken there")
        solver = solvers.get(self.solver if moments is not None else "rtn")
        new.fill(solver.solve(matrix, get_format(scheme.weights), scheme.group_size, moments))
        w_hat = torch.ops.catquant.dequantize(
            *new._packed(), scheme.weights, scheme.group_size, new.columns, torch.float32
        )
        self.outcome.errors[name] = solvers.output_error(matrix, w_hat, moments)
        if moments is not None and new.bias is not None:
            shift = _mean_output(matrix, moments.float_mean) - _mean_output(w_hat, moments.mean)
            new.bias = nn.Parameter(new.bias + shift.to(new.bias.dtype), new.bias.requires_grad)


def _mean_output(matrix: Tensor, mean: Tensor) -> Tensor:
    runs = matrix.view(mean.shape[0], -1, mean.shape[1])  # (B, N / B, K)
    return (runs @ mean.unsqueeze(-1)).flatten()


class Calibration:
    """The walk over one model with everything that happens at a unit."""

    def __init__(self, model: nn.Module, config: CatQuantConfig, selection: Selection, data: samples.Batches) -> None:
        self.model = model
        self.config = config
        self.host_batches = data.batches
        batches = [placed(batch, model) for batch in data.batches]
        self.swap = Swap(model, config.solver, selection)
        self.blocks = [block for blocks in stacks(model).values() for block in blocks]
        norms = [name for name, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        kept = [name for name in selection.skipped if name in dict(model.named_modules())]
        self.walk = Walk(model, batches, self.blocks, [*self.swap.sites, *norms, *kept])
        self.diverged = False
        count = len(batches)
        held_out = count // HELD_OUT if config.correction is not None and count >= 2 * HELD_OUT else 0
        self.solve_batches = range(count - held_out)
        self.fit_batches = range(count - held_out, count) if held_out else range(count)
        self.corrections = resolve_sites(model, config.correction, self.blocks, self.walk.plan.logits_site)

    def run(self) -> Outcome:
        """Quantize every unit in the order the model runs them."""
        outcome = self.swap.outcome
        reached = {_join(unit.name, leaf.name) for unit in self.walk.plan.units for leaf in unit.leaves}
        for name in [name for name in self.swap.sites if name not in reached]:
            self.swap.site(name, None)
            self.diverged = True
            outcome.notes.append(f"{name}: not reached by the calibration data, rounded to nearest")
        if self.config.correction is not None and not self.corrections:
            outcome.notes.append("correction: no module returns the model's logits, name one in CatConfig(at=...)")
            if self.config.strict:
                raise ValueError(f"strict=True, but {outcome.notes[-1]}")
            logger.warning(outcome.notes[-1])
        try:
            for index, unit in enumerate(self.walk.plan.units):
                self._unit(index, unit)
            for name in list(self.corrections):
                pairs = Pairs(self.config.seed, len(self.fit_batches))
                float_outputs, outputs = (self.walk.outputs_of(name, stream) for stream in STREAMS)
                for batch in self.fit_batches:
                    self._add_pair(pairs, name, batch, float_outputs[batch], outputs[batch])
                self._fit(name, pairs)
        finally:
            self.walk.finish()
        return outcome

    def _unit(self, index: int, unit: Unit) -> None:
        start = time.perf_counter()
        float_calls, float_outputs = self.walk.inputs_and_outputs(index, "float")
        calls = self.walk.inputs(index, "quantized") if self.diverged else float_calls
        float_unit = copy.deepcopy(self.model.get_submodule(unit.name))
        solved = [
            name
            for stage in self._stages(unit, float_unit)
            for name in self._stage(unit, float_unit, stage, float_calls, calls)
        ]
        for name in [n for n in self.corrections if n == unit.name or n.startswith(f"{unit.name}.")]:
            self._fit_inside(unit, float_unit, name, float_calls, calls)
        outputs = self.walk.inputs_and_outputs(index, "quantized")[1] if self.diverged else float_outputs
        self.walk.record(index, {"float": float_outputs, "quantized": outputs})
        self._progress(index, unit, solved, time.perf_counter() - start)

    def _progress(self, index: int, unit: Unit, solved: list[str], seconds: float) -> None:
        if not solved:
            return
        errors = [self.swap.outcome.errors[name] for name in solved if name in self.swap.outcome.errors]
        formats = ", ".join(dict.fromkeys(self.swap.outcome.modules[name]["weights"] for name in solved))
        error = f"error {sum(errors) / len(errors):.4f}" if errors else "tied"
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

    def _stages(self, unit: Unit, float_unit: nn.Module) -> list[list[Leaf]]:
        """Leaves that are solved together: neighbours that read the same tensor in the same way."""
        stages: list[list[Leaf]] = []
        last: Any = None
        for leaf in unit.leaves:
            module = float_unit.get_submodule(leaf.name)
            key = (leaf.source, _geometry(module)) if _join(unit.name, leaf.name) in self.swap.sites else None
            if stages and key is not None and key == last:
                stages[-1].append(leaf)
            else:
                stages.append([leaf])
            last = key
        return stages

    def _stage(
        self,
        unit: Unit,
        float_unit: nn.Module,
        stage: list[Leaf],
        float_calls: list[list[Call]],
        calls: list[list[Call]],
    ) -> list[str]:
        """Treat the leaves of one stage; returns the names of the layers that were quantized."""
        live = self.model.get_submodule(unit.name)
        lead = stage[0]
        name = _join(unit.name, lead.name)
        module = float_unit.get_submodule(lead.name)
        if name not in self.swap.sites:
            if isinstance(module, BATCH_NORMS) and self.diverged:
                self._match_norm(live, float_unit, lead, float_calls, calls)
            return []
        input_range = self._input_range(name, live, lead, calls)
        moments = self._moments(name, live, float_unit, lead, float_calls, calls, input_range)
        names = [_join(unit.name, leaf.name) for leaf in stage]
        for site in names:
            self.swap.site(site, moments, input_range)
        self.diverged = True
        return names

    def _moments(
        self,
        name: str,
        live: nn.Module,
        float_unit: nn.Module,
        leaf: Leaf,
        float_calls: list[list[Call]],
        calls: list[list[Call]],
        input_range: tuple[Tensor, Tensor | None] | None,
    ) -> Moments | None:
        sums, generator = MomentSums(), torch.Generator().manual_seed(self.config.seed)
        module = float_unit.get_submodule(leaf.name)
        layer = layer_for(module)
        assert layer is not None
        activations = self.swap.sites[name].scheme.activations
        for batch in self.solve_batches:
            pairs = zip(
                leaf_inputs(float_unit, leaf, float_calls[batch]), leaf_inputs(live, leaf, calls[batch]), strict=True
            )
            for x, y in pairs:
                if activations is not None and y.is_floating_point():
                    y = quantize_activation(y, get_format(activations), *(input_range or (None, None)))
                window = layer.window(module, x, self._quota(layer.matrix_shape(module)[1]), generator)
                float_rows, rows = (layer.input_rows(module, t, window) for t in (x, y))
                if float_rows is None or rows is None:
                    return None
                chosen = self._chosen_rows(batch, name, x, rows, generator)
                if chosen is not None:
                    float_rows, rows = float_rows[:, chosen], rows[:, chosen]
                sums.add(float_rows, rows)
        return sums.result()

    def _chosen_rows(
        self, batch: int, name: str, x: Tensor, rows: Tensor, generator: torch.Generator
    ) -> Tensor | None:
        """Indices of the rows (B, M, K) that count: no padding, and of very many an equal random share of each batch."""
        mask = self._row_mask(batch, name, x, rows)
        quota = self._quota(rows.shape[-1])
        if mask is None and rows.shape[1] <= quota:
            return None
        indices = torch.arange(rows.shape[1]) if mask is None else mask.nonzero().flatten().cpu()
        if len(indices) > quota:
            indices = indices[torch.randperm(len(indices), generator=generator)[:quota]]
        return indices.to(rows.device)

    def _quota(self, columns: int) -> int:
        """Rows of each batch that go into the moments of ``columns`` columns."""
        return max(1, max(MAX_ROWS, ROWS_PER_COLUMN * columns) // len(self.solve_batches))

    def _row_mask(self, batch: int, name: str, x: Tensor, rows: Tensor) -> Tensor | None:
        """Which of the rows (B, M, K) are not padding; a convolution over time has one row a step it puts out."""
        if x.dim() == 3 and rows.shape[-1] != x.shape[-1]:
            x = x.new_empty(x.shape[0], rows.shape[1] // x.shape[0], 1)
        return self._mask(batch, name, x) if x.dim() in (2, 3) else None

    def _mask(self, batch: int, name: str, hidden: Tensor) -> Tensor | None:
        mask = samples.padding_mask(self.host_batches[batch], self.model, name, hidden)
        return None if mask is None else mask.flatten().to(hidden.device)

    def _input_range(
        self, name: str, live: nn.Module, leaf: Leaf, calls: list[list[Call]]
    ) -> tuple[Tensor, Tensor | None] | None:
        scheme = self.swap.sites[name].scheme
        layer = layer_for(live.get_submodule(leaf.name))
        if scheme.activations is None or layer is None or not layer.static_activations:
            return None
        generator = torch.Generator().manual_seed(self.config.seed)
        quota = max(1, RANGE_SAMPLE // len(self.solve_batches))
        values = []
        for batch in self.solve_batches:
            for x in leaf_inputs(live, leaf, calls[batch]):
                flat = x.flatten()
                values.append(flat[torch.randint(flat.numel(), (quota,), generator=generator).to(flat.device)])
        return fit_static_range(torch.cat(values), get_format(scheme.activations))

    def _match_norm(
        self,
        live: nn.Module,
        float_unit: nn.Module,
        leaf: Leaf,
        float_calls: list[list[Call]],
        calls: list[list[Call]],
    ) -> None:
        sums = {"float": ChannelSums(), "quantized": ChannelSums()}
        for batch in self.solve_batches:
            for x in leaf_inputs(float_unit, leaf, float_calls[batch]):
                sums["float"].add(x)
            for x in leaf_inputs(live, leaf, calls[batch]):
                sums["quantized"].add(x)
        match_batch_norm(live.get_submodule(leaf.name), sums["float"], sums["quantized"])

    def _fit_inside(
        self, unit: Unit, float_unit: nn.Module, name: str, float_calls: list[list[Call]], calls: list[list[Call]]
    ) -> None:
        live = self.model.get_submodule(unit.name)
        inner = name.removeprefix(unit.name).removeprefix(".")
        pairs = Pairs(self.config.seed, len(self.fit_batches))
        for batch in self.fit_batches:
            outputs = (leaf_outputs(float_unit, inner, float_calls[batch]), leaf_outputs(live, inner, calls[batch]))
            for f, q in zip(*outputs, strict=True):
                self._add_pair(pairs, name, batch, f, q)
        self._fit(name, pairs)

    def _add_pair(self, pairs: Pairs, name: str, batch: int, float_output: Any, output: Any) -> None:
        f, q = tensor_of(float_output), tensor_of(output)
        dim = correction_dim(self.model.get_submodule(name), f)
        mask = self._mask(batch, name, f) if dim == -1 and f.dim() == 3 else None
        pairs.add(f, q, dim, mask)

    def _fit(self, name: str, pairs: Pairs) -> None:
        kind: Kind = "logits" if name == self.walk.plan.logits_site else "hidden"
        del self.corrections[self.corrections.index(name)]
        assert self.config.correction is not None
        entry, fit = pairs.fit_and_attach(self.model, name, self.config.correction, kind)
        self.swap.outcome.fits[name] = fit
        if entry is not None:
            self.swap.outcome.corrections[name] = entry


STREAMS = ("float", "quantized")


def _join(unit: str, leaf: str) -> str:
    return f"{unit}.{leaf}" if leaf else unit


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    layer = layer_for(module)
    return (layer and layer.static_activations, *(getattr(module, name, None) for name in names))
