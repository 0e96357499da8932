"""Mixed formats: which layers get more bits, so that all of them together take no more than was asked for.

Every layer is rounded alone to every format, and the model's answers are compared with those of the float model. The losses
are taken to add up; then the choice is a knapsack, and the convex hulls of its items are climbed by gain a bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .answers import answer_kind, divergences, problem_of
from .config import CatQuantConfig
from .fitting import SHARE, correction_dim, output_of, placed, resolve_sites, sample_count, tensor_of
from .formats import FORMATS, Format, get_format
from .layers import QuantizedModule, layer_for
from .log import logger
from .logits import logits_site
from .model import Selection, Site, stacks
from .modules import replace_module
from .outputs import answers
from .packed_model import parameter_count
from .replay import run
from .samples import Batches, padding_mask
from .shelf import resident
from .sizes import correction_bytes, output_bytes
from .solvers import rtn

JUDGES = 32  # samples that every format of every layer is tried on


@dataclass(frozen=True)
class _Step:
    """From one format of the layer called ``site`` to the next one worth having: the bits it takes, the loss it saves."""

    site: str
    weights: str
    bits: int
    gain: float


Trial = Callable[[int, Site, Callable[[], dict[str, float]]], dict[str, float]]


@torch.no_grad()
def choose(
    model: nn.Module, selection: Selection, config: CatQuantConfig, data: Batches, trial: Trial | None = None
) -> str:
    """Set the formats of the sites that ``config`` leaves free, in ``selection``; returns in words what was chosen.

    Args:
        trial: given the number of a site, the site, and what finds its losses by format; returns them, perhaps from where
            it has kept them. None: they are found.

    Raises:
        ValueError: the budget is less than ``config.weights`` takes everywhere, or no layer is free.
    """
    free, names = free_sites(selection), formats_to_try(config)
    bits = {site.name: {name: _bits(site, name) for name in names} for site in free}
    count = sum(layer.rows_ * layer.columns for layer in (_empty(site, config.weights) for site in free))
    if not count:
        raise ValueError(f"{config.budget}: no layer inside the blocks is left to choose a format for; drop it")
    logger.info("mixed formats: %d layers are tried in %s each", len(free), ", ".join(names))
    losses = Losses(model, data)
    least = sum(sizes[config.weights] for sizes in bits.values())
    budget = (
        _bits_left(config, least, count)
        if config.target_bytes is None
        else _bytes_left(model, selection, config, losses)
    )
    steps: list[_Step] = []
    for number, site in enumerate(free):
        start = time.perf_counter()
        attempt = partial(losses.of, site, names)
        steps += _hull(site.name, bits[site.name], attempt() if trial is None else trial(number, site, attempt))
        seconds = time.perf_counter() - start
        logger.info("[%d/%d] %s: tried in %d formats, %.1f s", number + 1, len(free), site.name, len(names), seconds)
    chosen, left = dict.fromkeys(bits, config.weights), budget
    stopped: set[str] = set()
    for step in sorted(steps, key=lambda step: -step.gain / step.bits):
        if step.bits > left:
            stopped.add(step.site)  # the steps after this one start from it
        if step.site not in stopped:
            chosen[step.site], left = step.weights, left - step.bits
    selection.sites = [_in_format(site, chosen.get(site.tied_to or site.name)) for site in selection.sites]
    counts = Counter(chosen.values())
    words = ", ".join(f"{counts[name]} in {name}" for name in names if counts[name])
    took = sum(bits[name][weights] for name, weights in chosen.items())
    return f"mixed formats: {words}; {took / count:.3f} bits a weight"


def free_sites(selection: Selection) -> list[Site]:
    """The sites whose format a budget chooses; those that share a weight follow its owner."""
    return [site for site in selection.sites if site.is_free and site.tied_to is None]


def formats_to_try(config: CatQuantConfig) -> list[str]:
    """Names of the formats that a layer may get: that of ``config`` and all that take more."""
    return [name for name, fmt in FORMATS.items() if _size(fmt) >= _size(get_format(config.weights))]


def _size(fmt: Format) -> tuple[float, bool]:
    """What orders formats by the bits that a weight takes, whatever the group size."""
    return fmt.storage_bits, fmt.affine


def _bits_left(config: CatQuantConfig, least: int, count: int) -> int:
    """Bits to spend beyond the ``least`` of ``count`` weights."""
    assert config.average_bits is not None
    if config.average_bits * count < least:
        raise ValueError(
            f"average_bits must be at least {least / count:.3f}, what weights={config.weights!r}, group_size="
            f"{config.group_size} and low_rank={config.low_rank} take, got {config.average_bits}: raise it, or choose fewer "
            "bits, larger groups or a smaller low_rank"
        )
    return int(config.average_bits * count) - least


def _bytes_left(model: nn.Module, selection: Selection, config: CatQuantConfig, losses: Losses) -> int:
    """Bits to spend beyond what the whole model takes in the formats of ``selection``, and corrections at most."""
    assert config.target_bytes is not None
    blocks = [block for names in stacks(model).values() for block in names]
    places = resolve_sites(model, config.correction, blocks, losses.site)
    share = parameter_count(model) // SHARE
    least = output_bytes(model, selection)
    if config.correction is not None:
        least += sum(correction_bytes(config.correction, losses.width(place), share) for place in places)
    if config.target_bytes < least:
        raise ValueError(
            f"target_bytes must be at least {least}, what weights={config.weights!r}, edge_weights={config.edge_weights!r}, "
            f"group_size={config.group_size}, low_rank={config.low_rank} and {len(places)} corrections take, got "
            f"{config.target_bytes}: raise it, or choose fewer bits, larger groups, a smaller low_rank or correction=None"
        )
    return 8 * (config.target_bytes - least)


class Losses:
    """How far the model's answers go from its own when one layer is rounded."""

    def __init__(self, model: nn.Module, data: Batches) -> None:
        self.model = model
        count = 0
        self.batches = []
        for batch in data.batches:
            if count < JUDGES:
                self.batches.append(batch)
                count += sample_count(batch)
        self.site = logits_site(model, placed(self.batches[0], model))
        self.wanted = [self._answers(batch) for batch in self.batches]
        whole = [torch.cat([rows.flatten() for rows in parts]).detach() for parts in zip(*self.wanted, strict=True)]
        self.spreads = [float(values.var().clamp_min(1e-12)) if len(values) > 1 else 1.0 for values in whole]

    def of(self, site: Site, names: Sequence[str]) -> dict[str, float]:
        """What :meth:`alone` finds, by format."""
        return {name: self.alone(site, name) for name in names}

    def alone(self, site: Site, weights: str) -> float:
        """Mean divergence of the logits (where there are none, of all answers), over what is no padding."""
        layer = _empty(site, weights)
        with resident(self.model, site.name):
            weight: Tensor = site.module.weight  # type: ignore[assignment]
            layer.fill(rtn.solve(layer.target(weight), get_format(weights), site.scheme.group_size))
        replace_module(self.model, site.name, layer)
        try:
            found = [self._answers(batch) for batch in self.batches]
        finally:
            replace_module(self.model, site.name, site.module)
        return sum(map(self._loss, self.wanted, found)) / len(found)

    def width(self, name: str) -> int:
        """How many features the module called ``name`` returns."""
        output = tensor_of(output_of(self.model, name, placed(self.batches[0], self.model)))
        return output.shape[correction_dim(self.model.get_submodule(name), output)]

    def _answers(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Rows (M, C) of the logits, or of every answer where there are none."""
        batch = placed(batch, self.model)
        if self.site is None:
            found = answers(self.model, run(self.model, batch))
            # Which stream an answer belongs to, and so its padding, is told by words like "encoder".
            return [self._rows(batch, name.replace("_", "."), value.float(), -1) for name, value in found.items()]
        value = tensor_of(output_of(self.model, self.site, batch)).float()
        # Classes of a map are no last dimension.
        return [self._rows(batch, self.site, value, correction_dim(self.model.get_submodule(self.site), value))]

    def _rows(self, batch: dict[str, Tensor], name: str, value: Tensor, dim: int) -> Tensor:
        mask = padding_mask(batch, self.model, name, value) if value.dim() == 3 else None
        rows = value.unsqueeze(-1) if value.dim() < 2 else value.movedim(dim, -1).flatten(0, -2)
        return rows if mask is None else rows[mask.flatten().to(rows.device)]

    def _loss(self, wanted: list[Tensor], found: list[Tensor]) -> float:
        problem = problem_of(self.model)
        losses = []
        for f, q, spread in zip(wanted, found, self.spreads, strict=True):
            kind = "values" if self.site is None else answer_kind(problem, f.shape[1])
            losses.append(float(divergences(f, q, kind).mean()) / (spread if kind == "values" else 1.0))
        return sum(losses)


def _hull(site: str, bits: dict[str, int], losses: dict[str, float]) -> list[_Step]:
    """The steps along the lower convex hull of (bits, loss), from the fewest bits on; each gains less a bit."""
    at = min(bits, key=lambda name: bits[name])
    steps: list[_Step] = []
    while True:
        further = [name for name in bits if bits[name] > bits[at] and losses[name] < losses[at]]
        if not further:
            return steps
        best = max(further, key=lambda name: (losses[at] - losses[name]) / (bits[name] - bits[at]))
        steps.append(_Step(site, best, bits[best] - bits[at], losses[at] - losses[best]))
        at = best


def _empty(site: Site, weights: str) -> QuantizedModule:
    layer = layer_for(site.module)
    assert layer is not None
    return layer(site.module, replace(site.in_format(weights).scheme, activations=None))


def _bits(site: Site, weights: str) -> int:
    return 8 * sum(tensor.nbytes for tensor in _empty(site, weights).packed_tensors())


def _in_format(site: Site, weights: str | None) -> Site:
    return site if weights is None else site.in_format(weights)
