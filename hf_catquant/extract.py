"""Features of text, speech and vision models: what any module returns, one vector a sample, from one pass over the data.

A module returns vectors (B, D), sequences (B, T, D), or (B, D, T) as convolutions over time do, or maps (B, D, H, W).
Maps are averaged over all their places; sequences over the steps that are not padding ("mean"), or one step stands for
all: the first ("cls") or the last ("last") that is no padding, on whichever side that lies. What enters the head of a
classifier is pooled already, in the model's own way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from . import samples as data
from .fitting import correction_dim, evaluating, placed, sample_count, tensor_of
from .logits import find_logits, named_logits, observed, step_sites
from .metrics.feature_discrimination.inputs import checked_count
from .model import stacks
from .replay import hooked, run

POOLINGS = ("mean", "cls", "last")
HEAD = "head"
BLOCKS = "blocks"


@torch.no_grad()
def extract_features(
    model: nn.Module,
    samples: Any,
    processor: Any = None,
    *,
    at: str | Sequence[str] = HEAD,
    pooling: str = "mean",
    batch_size: int = 16,
) -> Tensor | dict[str, Tensor]:
    """Features of all samples, in their order, from a float or quantized model in evaluation mode.

    Args:
        model: any model that ``samples`` fit; put back into training mode afterwards if it was in it.
        samples: data in any form that ``CatQuantConfig(dataset=...)`` takes. All of them are read.
        processor: tokenizer, image processor or feature extractor, for raw samples.
        at: "head": what enters the module that returns the logits, or, of a model without logits, what it returns first
            (its last hidden state); "blocks": what every repeated block returns; a module's name, "" for the model itself;
            or several of these.
        pooling: of sequences: "mean", "cls" (the first step that is no padding) or "last".
        batch_size: samples in one forward.

    Returns:
        (n, D) float32 on the CPU; {name: features} if ``at`` is "blocks" or several places.

    Raises:
        TypeError: ``model`` is no module, or the samples are no collection of samples.
        ValueError: the samples do not fit, a place is not in the model, or what it returns cannot be pooled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}: load it first")
    batch_size = checked_count(batch_size, "batch_size", 1)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    named_places(model, at)  # a wrong name costs nothing: samples are not read yet
    read = data.collect(samples, model, processor=processor, num_samples=sys.maxsize, batch_size=batch_size, least=1)
    with evaluating(model):
        sites = places(model, at, read.batches[0])
        parts: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        for batch in read.batches:
            for name, features in catch(model, sites, batch, pooling)[1].items():
                parts[name].append(features)
    silent = [name for name, found in parts.items() if len(found) != len(read.batches)]
    if silent:
        raise ValueError(f"{type(model).__name__} does not run the module {silent[0]!r} on all samples: name another")
    for name, found in parts.items():
        widths = sorted({features.shape[1] for features in found})
        if len(widths) > 1:
            raise ValueError(
                f"{name!r} gives vectors of {widths[0]} and of {widths[-1]} numbers, as the batch is: name a module whose "
                "width is the same for every batch"
            )
    whole = {name: torch.cat(found) for name, found in parts.items()}
    return whole[sites[0].name] if isinstance(at, str) and at != BLOCKS else whole


@dataclass(frozen=True)
class Place:
    """Where features are taken: what ``module`` returns, or what enters it; ``name`` is that of the result.

    ``pooling`` is the model's own of the steps, where it pools them after the head; None: as asked for.
    """

    name: str
    module: str
    entering: bool = False
    pooling: str | None = None


def places(model: nn.Module, at: str | Sequence[str], batch: dict[str, Tensor]) -> list[Place]:
    """The places that ``at`` names, as :func:`extract_features` reads it, in the order they are named.

    Raises:
        ValueError: one is not in the model, it has no repeated blocks, or no module returns its logits.
    """
    found: list[Place] = []
    for word in named_places(model, at):
        if word == HEAD:
            found.append(head_place(model, batch))
        elif word == BLOCKS:
            found += [Place(block, block) for stack in stacks(model).values() for block in stack]
        else:
            found.append(Place(word, word))
    return list(dict.fromkeys(found))


def named_places(model: nn.Module, at: str | Sequence[str]) -> list[str]:
    """The words in ``at``, each of them "head", "blocks" or a module of the model.

    Raises:
        ValueError: one is none of these, there are none, or the model has no repeated blocks.
    """
    words = [at] if isinstance(at, str) or not isinstance(at, Sequence) else list(at)
    if not words:
        raise ValueError(f'at must name a place or several, "head", "blocks" or modules, got {at!r}')
    names = dict(model.named_modules())
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f'at must be "head", "blocks", a module\'s name or a list of these, got {word!r}')
        if word == BLOCKS and not stacks(model):
            raise ValueError(f'at="blocks": {type(model).__name__} has no repeated blocks: name modules')
        if word not in (HEAD, BLOCKS, *names):
            alike = get_close_matches(word, names, 3, 0.5) or list(names)[-3:]
            raise ValueError(
                f"at={word!r}: no module of {type(model).__name__} has this name; names look like {', '.join(alike)}"
            )
    return words


def head_place(model: nn.Module, batch: dict[str, Tensor]) -> Place:
    """What enters the module that returns the logits; without logits, what the model returns.

    Raises:
        ValueError: there are logits, but no module that returns them, or not of classes.
    """
    batch = placed(batch, model)
    output, returned = observed(model, batch)
    site = find_logits(output, returned)
    if site is not None:
        return Place(HEAD, site, entering=True)
    logits = named_logits(output)
    if logits is None:
        first = next(iter(output), "") if isinstance(output, Mapping) else ""
        if "logits" in str(first):  # of pairs of samples (CLIP), of steps (answers in a text): no vector a sample
            raise ValueError(
                f'at="head": {type(model).__name__} returns {first} and no logits of classes: name the module whose '
                "features are wanted"
            )
        return Place(HEAD, "")
    for name, steps in step_sites(logits, returned):  # decoders that classify every step and keep one
        mask = _mask(batch, model, name, steps)
        for pooling in ("last", "cls", "first"):
            if torch.equal(_of_sequence(steps, mask, pooling).float(), logits.float()):
                return Place(HEAD, name, entering=True, pooling=pooling)
    raise ValueError(
        f'at="head": no module of {type(model).__name__} returns its logits {tuple(logits.shape)}, so that what enters '
        "its head is not known: name a module"
    )


def catch(
    model: nn.Module, sites: Sequence[Place], batch: dict[str, Tensor], pooling: str
) -> tuple[Any, dict[str, Tensor]]:
    """What the model returns, and pooled features (B, D) float32 on the CPU of every place that was run.

    Raises:
        ValueError: what is there cannot be pooled to one vector a sample.
    """
    caught: dict[str, Any] = {}
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(hooked(model.get_submodule(site.module), **_hook(caught, site)))
        output = run(model, placed(batch, model))
    reached = [site for site in sites if site.name in caught]
    return output, {site.name: _pooled(model, site, caught[site.name], batch, pooling) for site in reached}


def _hook(caught: dict[str, Any], site: Place) -> dict[str, Any]:
    if site.entering:

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught[site.name] = args or tuple(kwargs.values())

        return {"before": before}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        caught[site.name] = output

    return {"after": after}


def _pooled(model: nn.Module, site: Place, value: Any, batch: dict[str, Tensor], pooling: str) -> Tensor:
    try:
        hidden, rows = tensor_of(value), sample_count(batch)
    except TypeError as error:
        raise ValueError(f"{site.name!r} gives {type(value).__name__}, and no tensor: name another module") from error
    if hidden.dim() == 2 and len(hidden) != rows and len(hidden) % rows == 0:
        hidden = hidden.view(rows, -1, hidden.shape[1])  # a module that sees the steps of all samples in one list
    if hidden.dim() < 2 or len(hidden) != rows:
        raise ValueError(
            f"{site.name!r} gives {tuple(hidden.shape)} for {rows} samples, not a vector a sample: name another"
        )
    if hidden.dim() == 2:
        return hidden.float().cpu()
    if hidden.dim() > 3:  # a head that pools maps itself has channels first, too
        dim = 1 if site.entering else correction_dim(model.get_submodule(site.module), hidden)
        return hidden.float().movedim(dim, -1).flatten(1, -2).mean(1).cpu()
    if not site.entering and _channels_first(model, site.module, hidden):
        hidden = hidden.transpose(1, 2)
    mask = _mask(batch, model, site.module, hidden)
    return _of_sequence(hidden.float(), mask, site.pooling or pooling).cpu()


def _channels_first(model: nn.Module, name: str, hidden: Tensor) -> bool:
    """Whether ``hidden``, what the module ``name`` returns, is (B, D, T), as of a convolution over time, and not (B, T, D).

    An activation says nothing of itself: what it stands beside does. A linear layer of the last width rules it out.
    """
    module = model.get_submodule(name)
    if "." in name and not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
        module = model.get_submodule(name.rsplit(".", 1)[0])
    inside = list(module.modules())
    if any(getattr(m, "out_features", None) == hidden.shape[2] for m in inside):
        return False
    groups = any(isinstance(m, nn.GroupNorm) and m.num_channels == hidden.shape[1] for m in inside)
    return groups or correction_dim(module, hidden) == 1


def _mask(batch: dict[str, Tensor], model: nn.Module, site: str, hidden: Tensor) -> Tensor:
    """What of ``hidden`` (B, T, D) at the module ``site`` is no padding, (B, T) bool."""
    mask = data.padding_mask(batch, model, site, hidden)
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask


def _of_sequence(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector (B, D) of (B, T, D), where ``mask`` (B, T) says what is no padding; "first" is padding or not."""
    if pooling == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    if pooling == "first":
        return hidden[:, 0]
    steps = torch.arange(mask.shape[1], device=mask.device)
    step = mask.int().argmax(1) if pooling == "cls" else (steps * mask).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), step]
