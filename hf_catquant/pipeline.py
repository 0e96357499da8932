"""Quantizing the layers of a model in place: what is selected, then the calibrated walk or, without data, plain rounding.

Both go unit by unit. Each finished unit is a step of the journal, if there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from . import mixed, samples, solvers
from .alignment import align
from .calibrate import Calibration, check_ranges
from .config import CatQuantConfig
from .float_parameters import check_gradients
from .journal import Journal
from .log import logger
from .model import Selection, Site, select, stacks
from .modules import close_experts
from .packed_model import quantized_modules
from .shelf import is_absent, shelf_of
from .steps import Steps, tensors_of
from .swap import Outcome, Swap
from .threads import one_if_small
from .whole import left_over


@torch.no_grad()
def quantize_modules(
    model: nn.Module, config: CatQuantConfig, journal: Journal | None = None
) -> tuple[Selection, Outcome, samples.Batches | None]:
    """Quantize ``model`` in place.

    Args:
        model: whole in memory, or on a shelf.
        config: what to do.
        journal: takes the finished units, and gives back those that were finished before.

    Raises:
        ValueError: data is needed and missing or unusable, a pattern matches nothing, nothing can be quantized, or the
            journal is of other data.
        RuntimeError: the solver learns, and ``torch.inference_mode()`` rules gradients out.
        OSError: the journal cannot be written.
    """
    config.check_data()
    learning = solvers.options(config.solver, config.solver_options)
    if learning is not None and (learning.block_steps or learning.model_steps):
        check_gradients(model)
    selection = select(model, config)
    _check_float(model)
    training = model.training
    model.eval()
    try:
        with one_if_small(model):
            return selection, *_quantized(model, config, selection, journal)
    except BaseException:
        close_experts(model)
        raise
    finally:
        model.train(training)


def _quantized(
    model: nn.Module, config: CatQuantConfig, selection: Selection, journal: Journal | None
) -> tuple[Outcome, samples.Batches | None]:
    """Quantize the selected layers of a model that is in evaluation mode."""
    align(model)  # as a model on a shelf is, whose weights are read into memory
    batches = agreed_batches(model, config, journal)
    if batches is None:
        outcome = _without_data(model, selection, journal)
    else:
        notes = _mixed_formats(model, selection, config, batches, journal)
        outcome = Calibration(model, config, selection, batches, notes, journal).run()
    for name, module in quantized_modules(model).items():  # learning may have settled for another one
        outcome.modules[name]["scale_dtype"] = module.scheme.scale_dtype
    outcome.notes += [*selection.notes, *left_over(model)]
    if config.budget is not None:
        outcome.notes += _beyond_budget(model, config)
    return outcome, batches


def _check_float(model: nn.Module) -> None:
    """Refuse NaN in what the float model holds, also where nothing is quantized: it would answer NaN, quantized or not.

    Weights that wait on the shelf are not read for this; solvers refuse them.
    """
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or is_absent(tensor):
                continue
            if name not in module._non_persistent_buffers_set and bool(tensor.isnan().any()):
                raise ValueError(
                    f"{path}.{name} of the float model holds NaN: whatever reads it answers NaN; fetch the model again, or "
                    "mend it"
                )


@torch.no_grad()
def agreed_batches(model: nn.Module, config: CatQuantConfig, journal: Journal | None) -> samples.Batches | None:
    """The calibration data, None without any, once ``journal`` was told of it.

    Raises:
        ValueError: the data is unusable, or not what the journal's run was begun with.
    """
    batches = None if config.dataset is None else collect(model, config)
    if journal is not None:
        # Batches of another size are padded otherwise.
        found = None if batches is None else batches.fingerprint
        journal.agree(**{f"data, {config.batch_size} a batch": found})
    return batches


def collect(model: nn.Module, config: CatQuantConfig) -> samples.Batches:
    """The calibration data that ``config`` asks for, in batches for ``model``."""
    return samples.collect(
        config.dataset,
        model,
        processor=config.processor,
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        otherwise='solver="rtn" with correction=None',
    )


def _mixed_formats(
    model: nn.Module, selection: Selection, config: CatQuantConfig, batches: samples.Batches, journal: Journal | None
) -> list[str]:
    """Set the formats that a budget leaves free; in words what was chosen."""
    step = "formats"
    if config.budget is None:
        return []
    if journal is not None and journal.has(step):
        _, record = journal.read(step)
        chosen = record["weights"]
        selection.sites = [site.in_format(chosen[site.name]) for site in selection.sites]
        return [record["note"]]
    if journal is None:
        return [mixed.choose(model, selection, config, batches)]
    note = mixed.choose(model, selection, config, batches, partial(_journaled, journal, config.batch_size))
    journal.write(step, {}, {"weights": {s.name: s.scheme.weights for s in selection.sites}, "note": note})
    return [note]


def _journaled(
    journal: Journal, batch_size: int, number: int, site: Site, attempt: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """The losses of one layer by format: from the journal, where an earlier run tried it on batches of the same size."""
    step, tried = f"formats-{number:04d}", {"site": site.name, "batch_size": batch_size}
    if journal.has(step):
        _, record = journal.read(step)
        if {name: record[name] for name in tried} == tried:
            return record["losses"]
    losses = attempt()
    journal.write(step, {}, {**tried, "losses": losses})
    return losses


def _beyond_budget(model: nn.Module, config: CatQuantConfig) -> list[str]:
    """A note of layers that take more than formats were chosen by, as their scales had to be stored in 32 bits."""
    wide = {name: m for name, m in quantized_modules(model).items() if m.scheme.scale_dtype == "float32"}
    if not wide:
        return []
    pairs = [(module.weight_scale, module.weight_offset) for module in wide.values()]
    extra = sum(tensor.nbytes // 2 for pair in pairs for tensor in pair if tensor is not None)
    note = (
        f"{config.budget}: up to {extra} bytes more than that, as scales of {len(wide)} layers ({next(iter(wide))} ...) "
        "do not fit float16"
    )
    logger.warning(note)
    return [note]


def _without_data(model: nn.Module, selection: Selection, journal: Journal | None) -> Outcome:
    check_ranges(selection.sites, "dataset is None")
    swap, shelf = Swap(model, "rtn", selection), shelf_of(model)
    steps = Steps(journal, swap)
    units = sites_by_unit(model, selection)
    for index, (unit, names) in enumerate(units.items()):
        start = time.perf_counter()
        step = f"unit-{index:04d}"
        shelf.take(unit)
        if steps.restore(step, unit) is None:
            steps.begin()
            before = tensors_of(model.get_submodule(unit))
            for name in names:
                swap.site(name, None)
            steps.keep(step, unit, before)
            del before  # the float weights go when the shelf is done with them, not when the next unit's are read
            seconds = time.perf_counter() - start
            logger.info("[%d/%d] %s: %d layers, %.1f s", index + 1, len(units), unit, len(names), seconds)
        shelf.done(unit)
    shelf.finish()
    return swap.outcome


def sites_by_unit(model: nn.Module, selection: Selection) -> dict[str, list[str]]:
    """Names of the layers to quantize by the repeated block that holds them, or by their own name outside blocks."""
    blocks = [block for names in stacks(model).values() for block in names]
    found: dict[str, list[str]] = {}
    for site in selection.sites:
        unit = next((block for block in blocks if site.name.startswith(f"{block}.")), site.name)
        found.setdefault(unit, []).append(site.name)
    return found
