"""What quantizing a model will take, found before it begins by doing a part of it: memory, disk, time.

The part is real: the data at its batch size, every unit up to the first of the largest repeated blocks, and without data
the largest layer outside the blocks, too. Its peak is measured (``memory.py``). The rest is counted: what is packed by
then, what both streams hold, and for layers that were not tried what a solver takes for their size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from .planning_time import float_seconds, search_seconds, whole_seconds
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


def _plan_with_data(
    model: nn.Module, config: CatQuantConfig, selection: Selection, data: samples.Batches, total: int
) -> Plan:
    sites = {site.name: site for site in selection.sites}
    packed = sum(map(packed_bytes, selection.sites))
    shelf = shelf_of(model)
    reset_peak()
    phases: dict[str, float] = {}
    if config.budget is not None:
        phases["formats"] = search_seconds(model, selection, config, data)
    searched, one, start = peak(), float_seconds(model, config, data), time.perf_counter()
    calibration = Calibration(model, config, selection, data, [])
    probed, seconds = peak(), time.perf_counter() - start
    units = calibration.walk.plan.units
    inside = {u.name: [s for n, s in sites.items() if n == u.name or n.startswith(f"{u.name}.")] for u in units}
    weights = {name: sum(float_bytes(s) for s in held if not s.tied_to) for name, held in inside.items()}
    cost = {name: sum(map(_operations, held)) for name, held in inside.items()}
    blocks = [unit.name for unit in units if unit.name in set(calibration.blocks)] or [u.name for u in units]
    largest_block = max(blocks, key=lambda name: weights[name])
    release()
    base = resident()
    most, phase = probed, "finding out who reads what" if probed > searched else "trying formats"
    trials = {trial.name: trial for trial in _try_units(calibration, largest_block)}
    for trial in trials.values():
        if trial.peak > most:
            most, phase = trial.peak, f"calibrating {trial.name}"
    done = sum(packed_bytes(site) for name in trials for site in inside[name])
    tried = trials[largest_block]
    hidden = _held(calibration)
    after = resident() - done  # base and streams
    for unit in units:
        if unit.name in trials:
            seconds += trials[unit.name].seconds
            continue
        done_then = done
        done += sum(map(packed_bytes, inside[unit.name]))
        share = cost[unit.name] / max(1, cost[largest_block])
        seconds += tried.seconds * share if cost[unit.name] else 0.0
        if unit.name in blocks:
            guess, words = (
                after + done_then + int(tried.bytes * weights[unit.name] / max(1, weights[largest_block])),
                "",
            )
        else:
            guess, words = after + done_then + _alone(inside[unit.name], hidden, config, len(data.batches)), ""
        if guess > most:
            most, phase = guess, f"calibrating {unit.name}{words}"
    heads = _head_rows(calibration, hidden) if config.correction is not None else 0
    kept = _kept(heads, len(data.batches))
    for guess, words in (
        (after + packed + kept * 3 + _FIT * min(heads, _FIT_ROWS), "fitting the correction"),
        (base + packed + total, "saving"),
    ):
        if guess > most:
            most, phase = guess, words
    phases["units"] = seconds
    if whole := whole_seconds(calibration, largest_block, selection.sites, one):
        phases["whole model"] = whole
    seconds = sum(phases.values())
    largest = max(weights, key=lambda name: weights[name])
    work = max(0, tried.bytes - weights[largest_block])
    size = shelf.largest() if isinstance(shelf, Shelf) else weights[largest]
    most += _WRITING
    memory = (most, 0, 2 * total, seconds, base, packed, largest, size, 6 * hidden, work)
    return Plan(*memory, phase, len(units), phases)


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
