"""What quantizing a model will take, found before it begins by doing a part of it: memory, disk, time.

The part is real: the data at its batch size, every unit up to the first of the largest repeated blocks, and without data
the largest layer outside the blocks, too. Its peak is measured (``memory.py``). The rest is counted: what is packed by
then, what both streams hold, and for layers that were not tried what a solver takes for their size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import samples, solvers
from .calibrate import Calibration
from .config import CatQuantConfig
from .layers import layer_for
from .memory import peak, release, reset_peak, resident
from .model import Selection, Site, select
from .pipeline import collect, sites_by_unit
from .plan_table import Plan
from .planning_time import draft_bytes, float_seconds, search_seconds, whole_seconds
from .shelf import Shelf, shelf_of
from .sizes import float_bytes, output_bytes, packed_bytes
from .solvers import AT_ONCE
from .steps import tensors_of
from .swap import Swap
from .walk import KEPT_BYTES

# What a solver of output errors holds at once, in float32: matrices (K, K), and of the rows in work (n, K). Measured.
_SQUARES, _MATRICES = 6, 10
_WRITING = 40 << 20  # bytes that the libraries bring along that write a journal and a checkpoint, measured
_FIT = 4  # copies of the rows that a correction is fitted on
_FIT_ROWS = 1 << 28  # bytes of those rows at most, by stream


@dataclass
class _Trial:
    """What trying a unit took: its peak above what was there before, seconds, and the peak of the process."""

    name: str
    bytes: int
    seconds: float
    peak: int


@torch.no_grad()
def plan_model(model: nn.Module, config: CatQuantConfig) -> Plan:
    """Try a part of quantizing ``model``, which is on a shelf, and count the rest. The model is of no use afterwards.

    Raises:
        ValueError: as quantizing would raise it.
    """
    config.check_data()
    selection = select(model, config)
    model.eval()
    total = output_bytes(model, selection)
    if config.dataset is None:
        return _plan_without_data(model, selection, total)
    return _plan_with_data(model, config, selection, collect(model, config), total)


def _plan_without_data(model: nn.Module, selection: Selection, total: int) -> Plan:
    units = sites_by_unit(model, selection)
    sites = {site.name: site for site in selection.sites}
    weights = {
        unit: sum(float_bytes(sites[n]) for n in names if not sites[n].tied_to) for unit, names in units.items()
    }
    blocks = [unit for unit in units if units[unit] != [unit]]
    edges = [unit for unit in units if units[unit] == [unit]]
    packed = sum(map(packed_bytes, selection.sites))
    release()
    base = resident()
    swap, trials = Swap(model, "rtn", selection), {}
    for kind in (blocks, edges):
        largest = max(kind, key=lambda unit: weights[unit], default=None)
        if largest is not None and weights[largest]:
            trials[kind is blocks] = _try_rounding(model, swap, largest, units[largest])
    done, most, phase, seconds = 0, 0, "saving", 0.0
    for unit, names in units.items():
        trial = trials.get(unit in blocks) or next(iter(trials.values()))
        share = weights[unit] / max(1, weights[trial.name])
        seconds += trial.seconds * share
        if done + trial.bytes * share > most:
            most, phase = int(done + trial.bytes * share), f"rounding {unit}"
        done += sum(packed_bytes(sites[name]) for name in names)
    if total > most - packed:
        most, phase = packed + total, "saving"
    work = max(trial.bytes for trial in trials.values()) - max(weights.values())
    largest = max(weights, key=lambda unit: weights[unit])
    return Plan(
        base + most + _WRITING,
        0,
        2 * total,
        seconds,
        base,
        packed,
        largest,
        weights[largest],
        0,
        max(0, work),
        phase,
        len(units),
        {"units": seconds},
    )


def _try_rounding(model: nn.Module, swap: Swap, unit: str, names: list[str]) -> _Trial:
    shelf = shelf_of(model)
    reset_peak()
    before, start = resident(), time.perf_counter()
    shelf.take(unit)
    tensors = tensors_of(model.get_submodule(unit))
    for name in names:
        if swap.sites[name].tied_to is None:
            swap.site(name, None)
    seconds, most = time.perf_counter() - start, peak()
    del tensors
    shelf.done(unit)
    return _Trial(unit, most - before, seconds, most)


class _Highest:
    """The most bytes at once, and the phase that takes them."""

    def __init__(self, size: int, phase: str) -> None:
        self.bytes, self.phase = size, phase

    def see(self, size: int, phase: str) -> None:
        """Take in that ``phase`` has ``size`` bytes in memory."""
        if size > self.bytes:
            self.bytes, self.phase = size, phase


class _Units:
    """The units of a walk by name, in its order: their layers, bytes of their weights, and what solving them counts."""

    def __init__(self, calibration: Calibration, sites: list[Site]) -> None:
        units = [unit.name for unit in calibration.walk.plan.units]
        self.inside = {u: [s for s in sites if s.name == u or s.name.startswith(f"{u}.")] for u in units}
        self.weights = {u: sum(float_bytes(s) for s in held if not s.tied_to) for u, held in self.inside.items()}
        self.cost = {u: sum(map(_operations, held)) for u, held in self.inside.items()}
        self.packed = {u: sum(map(packed_bytes, held)) for u, held in self.inside.items()}
        self.blocks = [u for u in units if u in set(calibration.blocks)] or units
        self.largest_block = max(self.blocks, key=lambda u: self.weights[u])
        self.largest = max(units, key=lambda u: self.weights[u])

    def seconds(self, trials: dict[str, _Trial]) -> float:
        """Of quantizing all units, where some were tried; the others by the largest block."""
        most, known = self.cost[self.largest_block], {name: trial.seconds for name, trial in trials.items()}
        block = trials[self.largest_block].seconds
        return sum(known.get(u, block * cost / max(1, most) if cost else 0.0) for u, cost in self.cost.items())

    def untried(self, trials: dict[str, _Trial], alone: Callable[[list[Site]], int]) -> Iterator[tuple[str, int]]:
        """Each other unit with what is in memory at it beside both streams: all that is packed by then, and its own work.

        ``alone`` says what the layers of a unit take that is no block; a block takes what the largest did, by its weights.
        """
        block, most = trials[self.largest_block].bytes, max(1, self.weights[self.largest_block])
        done = sum(self.packed[u] for u in trials)
        for unit in (unit for unit in self.inside if unit not in trials):
            work = int(block * self.weights[unit] / most) if unit in self.blocks else alone(self.inside[unit])
            yield unit, done + work
            done += self.packed[unit]


def _plan_with_data(
    model: nn.Module, config: CatQuantConfig, selection: Selection, data: samples.Batches, total: int
) -> Plan:
    shelf, count = shelf_of(model), len(data.batches)
    phases: dict[str, float] = {}
    reset_peak()
    if config.budget is not None:
        phases["formats"] = search_seconds(model, selection, config, data)
    highest, one, start = _Highest(peak(), "trying formats"), float_seconds(model, config, data), time.perf_counter()
    calibration = Calibration(model, config, selection, data, [])
    highest.see(peak(), "finding out who reads what")
    probing = time.perf_counter() - start
    units = _Units(calibration, selection.sites)
    release()
    base = resident()
    trials = {trial.name: trial for trial in _try_units(calibration, units.largest_block)}
    for trial in trials.values():
        highest.see(trial.peak, f"calibrating {trial.name}")
    hidden = _held(calibration)
    release()  # as the next unit would begin
    streams = resident() - sum(units.packed[name] for name in trials)  # and what was there before them
    for name, size in units.untried(trials, lambda held: _alone(held, hidden, config, count)):
        highest.see(streams + size, f"calibrating {name}")
    packed = sum(map(packed_bytes, selection.sites))
    heads = _head_rows(calibration, hidden) if config.correction is not None else 0
    fitting = _kept(heads, count) * 3 + _FIT * min(heads, _FIT_ROWS)
    highest.see(streams + packed + fitting, "fitting the correction")
    highest.see(base + packed + total, "saving")
    phases["units"] = probing + units.seconds(trials)
    if whole := whole_seconds(calibration, units.largest_block, selection.sites, one):
        phases["whole model"] = whole
    work = max(0, trials[units.largest_block].bytes - units.weights[units.largest_block])
    size = shelf.largest() if isinstance(shelf, Shelf) else units.weights[units.largest]
    memory = (highest.bytes + _WRITING, 0, 2 * total, sum(phases.values()), base, packed)
    drafts = draft_bytes(calibration, selection.sites)
    return Plan(*memory, units.largest, size, 6 * hidden, work, highest.phase, len(units.inside), phases, drafts)


def _try_units(calibration: Calibration, last: str) -> Iterator[_Trial]:
    """Quantize every unit up to the one called ``last``."""
    for index, unit in enumerate(calibration.walk.plan.units):
        reset_peak()
        before, start = resident(), time.perf_counter()
        calibration.quantize_unit(index, unit)
        yield _Trial(unit.name, peak() - before, time.perf_counter() - start, peak())
        if unit.name == last:
            return


def _operations(site: Site) -> float:
    """Of a solver of output errors, up to a factor; embeddings are rounded."""
    layer = layer_for(site.module)
    assert layer is not None
    rows, columns = layer.matrix_shape(site.module)
    return 0.0 if site.tied_to else float(rows) * columns * columns


def _held(calibration: Calibration) -> int:
    """Bytes of the outputs of the last unit in the float stream."""
    recorded = calibration.walk.recorded("float")
    last = recorded[max(recorded)] if recorded else []
    return sum(t.nbytes for t in pytree.tree_leaves(last) if isinstance(t, Tensor))


def _alone(held: list[Site], hidden: int, config: CatQuantConfig, batches: int) -> int:
    """Bytes that one layer outside the blocks takes, which was not tried: weights, both streams in and out, the solver."""
    most = 0
    for site in held:
        layer = layer_for(site.module)
        assert layer is not None
        rows, columns = layer.matrix_shape(site.module)
        out = _kept(hidden * rows // columns, batches)
        weights = float_bytes(site) + rows * columns + packed_bytes(site)  # a code is a byte until it is packed
        if site.module.weight.dtype != torch.float32 or site.scheme.rotation is not None:
            weights += 4 * rows * columns  # what is solved is another matrix
        work = 0
        if solvers.get(config.solver).NEEDS_MOMENTS:
            work = 4 * (_SQUARES * columns * columns + _MATRICES * min(rows * columns, AT_ONCE))
        most = max(most, weights + 2 * hidden + 2 * out + work)
    return most


def _kept(size: int, batches: int) -> int:
    """Bytes of a head's outputs, ``size`` over all batches, that are in memory at once: the walk keeps no more."""
    return size if size <= KEPT_BYTES else size // batches


def _head_rows(calibration: Calibration, hidden: int) -> int:
    """Bytes of the logits of all batches, as far as a linear of its own makes them."""
    name = calibration.walk.plan.logits_site
    site = calibration.swap.sites.get(name or "")
    layer = None if site is None else layer_for(site.module)
    if site is None or layer is None:
        return hidden
    rows, columns = layer.matrix_shape(site.module)
    return hidden * rows // columns
