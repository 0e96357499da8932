"""What of a model is quantized, what is not, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from .config import CatQuantConfig, is_coarse
from .layers import QuantizedModule, Scheme, layer_for
from .layers.experts import DOWN, UP
from .log import logger
from .modules import (
    check_no_adapters,
    close_experts,
    open_experts,
    part_twins,
)
from .op_checks import COMPUTE
from .rotation import block_size

LISTED = "listed in modules_to_not_convert"
_SMALL = 2  # parameters of fewer dimensions (biases, norms) are not weights


@dataclass(frozen=True)
class Site:
    """A layer that will be quantized.

    Attributes:
        name: the module's name in the model.
        module: the float module.
        scheme: how it will be stored.
        tied_to: name of the site whose packed weight it shares, or None.
        is_free: whether a budget may choose its format.
        auto_rotation: whether its formats decide if it rotates, and calibration data where its inputs are not rounded.
    """

    name: str
    module: nn.Module
    scheme: Scheme
    tied_to: str | None = None
    is_free: bool = False
    auto_rotation: bool = False

    @property
    def schemes(self) -> list[Scheme]:
        """What calibration data chooses from, the plainest first."""
        plain = replace(self.scheme, rotation=None)
        chooses = self.auto_rotation and self.scheme.activations is None
        return [plain, self.scheme] if chooses and self.scheme != plain else [self.scheme]

    def in_format(self, weights: str) -> Site:
        """The same layer with weights of another format, and without a rotation that is only worth it in this one."""
        scheme = replace(self.scheme, weights=weights)
        if self.auto_rotation and not is_coarse(weights, scheme.activations):
            scheme = replace(scheme, rotation=None)
        return replace(self, scheme=scheme)


@dataclass
class Selection:
    """The sites of a model, in module order, the reason for every weight that stays in float, and notes for the report."""

    sites: list[Site] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def select(model: nn.Module, config: CatQuantConfig) -> Selection:
    """Decide for every weight of ``model`` whether and how it is quantized.

    Fused experts of which something will be quantized are opened in place (``layers/experts.py``).

    Raises:
        ValueError: the model has adapters, a pattern of ``modules_to_not_convert`` or ``overrides`` matches no module,
            nothing at all would be quantized, or ``strict`` is set and something would be skipped.
    """
    check_no_adapters(model, "quantized")
    part_twins(model)
    open_experts(model, lambda name: not all(is_listed(f"{name}.{child}", config) for child in (UP, DOWN)))
    try:
        return _select(model, config)
    except ValueError:
        close_experts(model)
        raise


def _select(model: nn.Module, config: CatQuantConfig) -> Selection:
    _check_patterns(model, config)
    selection = Selection()
    inside = block_members(model)
    layers = ((name, layer_for(module)) for name, module in model.named_modules())
    candidates = {name: layer for name, layer in layers if layer is not None}
    edges = _edges(candidates, inside)
    for name, module in model.named_modules():
        reason = _refusal(name, module, config)
        if reason is not None:
            selection.skipped[name] = reason
        elif name in candidates:
            edge = name in edges
            scheme = config.scheme_for(name, edge)
            if not candidates[name].rotates or block_size(candidates[name].matrix_shape(module)[1]) == 1:
                scheme = replace(scheme, rotation=None)
            if not candidates[name].takes_product:
                scheme = replace(scheme, low_rank=0)
            is_free, by_rule = config.leaves_free(name, edge), config.rotates_by_rule(name, edge)
            selection.sites.append(Site(name, module, scheme, is_free=is_free, auto_rotation=by_rule))
    selection.sites = _ranks_that_fit(selection.sites)
    _resolve_ties(model, selection)
    _skip_loose_parameters(model, selection, config)
    if not selection.sites:
        raise ValueError(f"nothing in {type(model).__name__} can be quantized: {_listed(selection.skipped)}")
    if config.strict and selection.skipped:
        raise ValueError(f"strict=True, but these would stay in float: {_listed(selection.skipped)}")
    selection.notes = _passed_by(selection.sites, config)
    return selection


def _passed_by(sites: list[Site], config: CatQuantConfig) -> list[str]:
    """A note for each option that was asked for and that layers go without."""
    notes = []
    for option in ("low_rank", "rotation"):
        asked = [site for site in sites if config.asked(option, site.name) not in (0, None, "auto")]
        without = [site.name for site in asked if not getattr(site.scheme, option)]
        if without:
            notes.append(
                f"{option}: {len(without)} of {len(asked)} layers go without ({without[0]} ...), as they lie outside the "
                "repeated blocks (without blocks: are the first or the last layer), where only overrides ask for it, or "
                "cannot have it"
            )
            if len(without) == len(asked):
                logger.warning(notes[-1])
    return notes


def _ranks_that_fit(sites: list[Site]) -> list[Site]:
    """The sites with ranks of at most the smaller side of their matrices: more would only be zeros.

    Raises:
        ValueError: a rank is more than any layer that it is asked for can have.
    """
    sides = {site.name: min(layer_for(site.module).matrix_shape(site.module)) for site in sites}  # type: ignore[union-attr]
    for rank in {site.scheme.low_rank for site in sites} - {0}:
        most, name = max((sides[site.name], site.name) for site in sites if site.scheme.low_rank == rank)
        if rank > most:
            raise ValueError(
                f"low_rank must be at most {most}, the smaller side of the largest layer it is for ({name}), got {rank}"
            )
    return [
        replace(site, scheme=replace(site.scheme, low_rank=min(site.scheme.low_rank, sides[site.name])))
        for site in sites
    ]


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Names of the repeated blocks of a float or quantized model, by the name of the list that holds them.

    A stack is a ``ModuleList`` or ``Sequential`` with two or more blocks of one class that each hold at least two layers;
    what else is in the list (a LeViT stage ends with a module that halves its resolution) is no block. Of stacks within
    stacks the innermost counts (a Swin stage is not a block, its layers are).
    """
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule) or layer_for(module) is not None
    ]
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        kinds = Counter(type(child) for child in module)
        repeated = {kind for kind, count in kinds.items() if count > 1 or len(kinds) == 1}
        children = [child for child, value in module.named_children() if type(value) in repeated]
        blocks = [f"{name}.{child}" if name else child for child in children]
        if blocks and all(sum(layer.startswith(f"{block}.") for layer in layers) >= 2 for block in blocks):
            found[name] = blocks
    outer = {a for a in found for b in found if b != a and b.startswith(f"{a}.")}
    inner = {name: blocks for name, blocks in found.items() if name not in outer}
    # A single block is a stack only beside a longer one of its kind (a stage of depth 1).
    longer = {type(model.get_submodule(b[0])) for b in inner.values() if len(b) > 1}
    return {n: b for n, b in inner.items() if len(b) > 1 or type(model.get_submodule(b[0])) in longer}


def block_members(model: nn.Module) -> set[str]:
    """Names of all modules inside a repeated block."""
    prefixes = tuple(f"{block}." for blocks in stacks(model).values() for block in blocks)
    return {name for name, _ in model.named_modules() if prefixes and name.startswith(prefixes)}


def _refusal(name: str, module: nn.Module, config: CatQuantConfig) -> str | None:
    layer = layer_for(module)
    weight: Any = module._parameters.get("weight") if layer is None else module.weight
    if layer is None:
        if weight is not None and weight.dim() >= _SMALL:
            return f"{type(module).__name__} is not a layer type that can be quantized"
        return None
    if is_listed(name, config):
        return LISTED
    if not isinstance(weight, Tensor) or not (
        {"weight", "parametrizations"} & {*module._parameters, *module._modules}
    ):
        return f"its weight is not a plain parameter of {type(module).__name__}"
    if weight.numel() == 0:
        return f"its weight has no elements: {tuple(weight.shape)}"
    if weight.dtype not in COMPUTE:
        return f"its weight is {weight.dtype}, not a dtype that layers compute in ({', '.join(map(str, COMPUTE))})"
    return layer.refusal(module)


def is_listed(name: str, config: CatQuantConfig) -> bool:
    """Whether ``modules_to_not_convert`` means this module.

    Of a module that holds others all are meant, which transformers' own rule does not say of a bare name.
    """
    holders = [name[: match.start()] for match in re.finditer(r"\.", name)]
    return not all(should_convert_module(part, config.modules_to_not_convert or []) for part in (*holders, name))


def is_passed_by(model: nn.Module, name: str) -> bool:
    """Whether transformers' own quantizers leave this module in float whatever their config says, as they do T5's ``wo``."""
    return not should_convert_module(name, list(getattr(model, "_keep_in_fp32_modules", None) or ()))


def _edges(candidates: Iterable[str], inside: set[str]) -> set[str]:
    names = list(candidates)
    if inside:
        return {name for name in names if name not in inside}
    return {names[0], names[-1]} if names else set()


def _resolve_ties(model: nn.Module, selection: Selection) -> None:
    """Tied modules share one packed weight, or none of them is quantized."""
    kept = {id(_weight(model, name)): name for name in selection.skipped if _weight(model, name) is not None}
    owners: dict[int, str] = {}
    sites = []
    for site in selection.sites:
        key = id(site.module._parameters.get("weight", site.module))  # a weight norm makes a new tensor each time
        owner = owners.setdefault(key, site.name)
        if key in kept:
            selection.skipped[site.name] = f"tied to {kept[key]}, which stays in float"
        else:
            sites.append(site if owner == site.name else replace(site, tied_to=owner))
    shared = {name for site in sites if site.tied_to for name in (site.name, site.tied_to)}
    # One stored matrix for all of them, and an embedding has no input to rotate.
    selection.sites = [
        replace(site, scheme=replace(site.scheme, rotation=None)) if site.name in shared else site for site in sites
    ]


def _skip_loose_parameters(model: nn.Module, selection: Selection, config: CatQuantConfig) -> None:
    """Weights held by modules without a ``weight`` of their own: experts of other kinds, position tables, class tokens."""
    folded = tuple(f"{site.name}.parametrizations." for site in selection.sites)
    for name, module in model.named_modules():
        if folded and f"{name}.".startswith(folded):
            continue
        for parameter, value in module._parameters.items():
            if parameter not in ("weight", "bias") and value is not None and value.dim() >= _SMALL:
                full = f"{name}.{parameter}" if name else parameter
                reason = f"a parameter of {type(module).__name__}, not a layer that can be quantized"
                selection.skipped[full] = LISTED if name and is_listed(name, config) else reason


def _weight(model: nn.Module, name: str) -> Tensor | None:
    return model.get_submodule(name)._parameters.get("weight")


def _check_patterns(model: nn.Module, config: CatQuantConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.modules_to_not_convert or []:
        if all(should_convert_module(name, [pattern]) for name in names):
            raise ValueError(_no_match("modules_to_not_convert", pattern, names))
    for pattern in config.overrides:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(_no_match("overrides", pattern, names))


def _no_match(field_name: str, pattern: str, names: list[str]) -> str:
    return f"{field_name}: {pattern!r} matches no module; module names look like {', '.join(names[-3:])}"


def _listed(skipped: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no layer with a weight"
