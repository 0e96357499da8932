"""What the phases take that a plan does not go through: seconds, counted from a piece of each that is done and timed, and
bytes of what the longest of them writes.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from . import samples, solvers
from .calibrate import Calibration
from .config import CatQuantConfig
from .fitting import placed
from .formats import get_format
from .layers import layer_for
from .learned import MAX_RADIX
from .mixed import Losses, formats_to_try, free_sites
from .model import Selection, Site
from .replay import run
from .training import forwards

_LEARNED = 2  # a forward of layers that learn their codes beside one of float layers


def size(site: Site) -> int:
    """Weights of a layer."""
    layer = layer_for(site.module)
    assert layer is not None
    rows, columns = layer.matrix_shape(site.module)
    return rows * columns


def search_seconds(model: nn.Module, selection: Selection, config: CatQuantConfig, data: samples.Batches) -> float:
    """Of trying every layer that a budget leaves free in every format: a layer of about the mean size is tried."""
    free = free_sites(selection)
    if config.budget is None or not free:
        return 0.0
    mean = sum(map(size, free)) / len(free)
    start = time.perf_counter()
    losses = Losses(model, data)
    ready = time.perf_counter()
    losses.of(min(free, key=lambda site: abs(size(site) - mean)), formats_to_try(config))
    return ready - start + len(free) * (time.perf_counter() - ready)


def float_seconds(model: nn.Module, config: CatQuantConfig, data: samples.Batches) -> float:
    """Of a forward of the float model on one batch; 0 where nothing is counted by it, as blocks show how long they learn."""
    options = solvers.options(config.solver, config.solver_options)
    if options is None or options.block_steps or not options.model_steps:
        return 0.0
    batch = placed(data.batches[0], model)
    start = time.perf_counter()
    with torch.no_grad():
        run(model, batch)
    return time.perf_counter() - start


def whole_seconds(calibration: Calibration, block: str, sites: list[Site], one: float) -> float:
    """Of the steps at the end, in which the whole model learns: as long for a weight as the block took that has learned.

    Args:
        calibration: has quantized ``block``.
        block: name of a unit.
        sites: every layer that is quantized.
        one: seconds of a forward of the float model, which count where blocks do not learn.
    """
    learner, multiplied = calibration.reconstruction, _multiplied(sites)
    if learner is None or not draft_bytes(calibration, sites):
        return 0.0
    inside = sum(size(site) for site in multiplied if site.name == block or site.name.startswith(f"{block}."))
    if block in learner.pace and inside:
        pace = learner.pace[block] * sum(map(size, multiplied)) / inside
    else:
        pace = _LEARNED * one
    return pace * forwards(learner.options.model_steps, len(learner.batches), len(learner.held_out))


def draft_bytes(calibration: Calibration, sites: list[Site]) -> int:
    """Of the drafts while the whole model learns, the old beside the new: values, the best ones, and Adam's two averages."""
    learner, multiplied = calibration.reconstruction, _multiplied(sites)
    learns = any(get_format(site.scheme.weights).radix <= MAX_RADIX for site in sites)
    if learner is None or not learner.options.model_steps or not learns:
        return 0
    return 2 * 4 * torch.float32.itemsize * sum(map(size, multiplied))


def _multiplied(sites: list[Site]) -> list[Site]:
    return [site for site in sites if not isinstance(site.module, nn.Embedding)]
