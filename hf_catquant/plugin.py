"""Corrections of models that any library quantized, fitted against their float teachers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import samples
from .answers import problem_of
from .copies import copies_note, firsts, without_copies
from .correction import CatConfig, attach, detach
from .fitting import (
    Pairs,
    check_runs,
    correction_dim,
    evaluating,
    output_of,
    placed,
    resolve_sites,
    sample_count,
    tensor_of,
)
from .judge import NOT_JUDGED, Judge
from .logits import logits_site
from .model import stacks
from .request_checks import check_count, check_seed


@torch.no_grad()
def fit_correction(
    model: nn.Module,
    teacher: nn.Module,
    dataset: Any,
    config: CatConfig | dict[str, Any] | str = "cat",
    *,
    processor: Any = None,
    num_samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Fit corrections of any quantized model against its float teacher, and attach them to ``model`` in place.

    Sites are fitted in the order of the model, the logits last, each on outputs that the earlier corrections already
    changed; one that is chosen by cross-validation inside the model stays only if the divergence of the logits falls. A
    correction that sits there already is replaced; if anything goes wrong, ``model`` keeps those it had.

    Args:
        model: the quantized model, of any library; its modules are named as the teacher's.
        teacher: the float model.
        dataset, processor, num_samples, batch_size, seed: as in ``CatQuantConfig``.
        config: what to fit and where, as ``CatQuantConfig`` takes a ``correction``; "cat": the default, at the logits.

    Returns:
        The report of each fit by module name.

    Raises:
        ValueError, TypeError: ``config``, ``num_samples``, ``batch_size`` or ``seed`` breaks a rule, the data cannot be
            used, a site is not in the model or runs more than once in a forward, or no module returns the logits.
    """
    wanted = CatConfig.of(config)
    if wanted is None:
        raise ValueError("config must say which correction to fit, got None: leave it out for the default one")
    check_count("num_samples", num_samples, 2)
    check_count("batch_size", batch_size, 1)
    check_seed("seed", seed)
    data = samples.collect(
        dataset, teacher, processor=processor, num_samples=num_samples, batch_size=batch_size, seed=seed
    )
    with evaluating(model, teacher):
        logits = logits_site(teacher, placed(data.batches[0], teacher))
        blocks = [block for names in stacks(teacher).values() for block in names]
        sites = resolve_sites(model, wanted, blocks, logits)
        if not sites:
            raise ValueError(
                f"no module of {type(teacher).__name__} returns its logits: name one in CatConfig(at=...)"
            )
        _check_teacher(teacher, sites)
        check_runs(model, sites, placed(data.batches[0], model))
        judged = logits is not None and wanted.may_be_off and sites != [logits]
        if judged and logits not in {name for name, _ in model.named_modules()}:
            raise ValueError(
                f"{type(model).__name__} has no module {logits!r}, which returns the teacher's logits and judges "
                "corrections inside the model: name modules alike, or give num_clusters, alpha and gamma (not judged)"
            )
        with _replacing(model, sites):
            return _fit_sites(model, teacher, data, wanted, sites, logits, judged, seed)


@contextmanager
def _replacing(model: nn.Module, sites: list[str]) -> Iterator[None]:
    """No correction at ``sites``, so that a fit does not see what it replaces; the old ones come back on an error."""
    old = {name: detach(model, name) for name in sites}
    try:
        yield
    except BaseException:
        for name, correction in old.items():
            detach(model, name)
            if correction is not None:
                attach(model, name, correction)
        raise


def _check_teacher(teacher: nn.Module, sites: list[str]) -> None:
    names = {name for name, _ in teacher.named_modules()}
    for name in sites:
        if name not in names:
            raise ValueError(
                f"the teacher {type(teacher).__name__} has no module {name!r}: it must name its modules as the model does"
            )


def _fit_sites(
    model: nn.Module,
    teacher: nn.Module,
    data: samples.Batches,
    config: CatConfig,
    sites: list[str],
    logits: str | None,
    judged: bool,
    seed: int,
) -> dict[str, dict[str, Any]]:
    fits: dict[str, dict[str, Any]] = {}
    judge, losses = None, None
    new = firsts(data.batches) if config.may_be_off else [None] * len(data.batches)
    notes = copies_note([first for first in new if first is not None])
    if judged and logits is not None:
        judge = Judge(seed, len(data.batches), problem_of(teacher))
        for batch, first in zip(data.batches, new, strict=True):
            judge.expect(*_outputs(teacher, logits, batch, first), sample_count(batch))
        losses = judge.losses(_answers(model, logits, data))
    for name in sorted(sites, key=lambda name: name == logits):  # what judges comes last
        pairs = Pairs(seed, len(data.batches))
        for batch, first in zip(data.batches, new, strict=True):
            pairs.expect(*_outputs(teacher, name, batch, first), sample_count(batch))
            pairs.add(tensor_of(output_of(model, name, placed(batch, model))))
        entry, fits[name] = pairs.fit_and_attach(model, name, config, answers=name == logits)
        fits[name]["notes"] += notes
        if logits is None and entry is not None:
            fits[name]["notes"].append(NOT_JUDGED)
        if judge is not None and losses is not None and logits is not None and entry is not None and name != logits:
            after = judge.losses(_answers(model, logits, data))
            if judge.helps(name, losses, after, fits[name]):
                losses = after
            else:
                detach(model, name)
    return fits


def _outputs(
    teacher: nn.Module, name: str, batch: dict[str, Tensor], first: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """What the module called ``name`` returns, the dimension of its features, and what is no padding nor of samples that are
    not a ``first``."""
    output = tensor_of(output_of(teacher, name, placed(batch, teacher)))
    dim = correction_dim(teacher.get_submodule(name), output)
    mask = samples.padding_mask(batch, teacher, name, output) if dim == -1 and output.dim() == 3 else None
    mask = mask if first is None else without_copies(mask, first, output, dim)
    return output, dim, None if mask is None else mask.flatten().to(output.device)


def _answers(model: nn.Module, logits: str, data: samples.Batches) -> Iterator[Tensor]:
    return (tensor_of(output_of(model, logits, placed(batch, model))) for batch in data.batches)
