"""Corrections on models: where they sit, and fitting them on paired outputs of a quantized model and its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import samples
from .cluster_fit import fit
from .correction import CatConfig, attach, detach
from .correction_file import entry_of
from .held_out import Kind
from .log import logger
from .logits import logits_site
from .model import parameter_count, stacks
from .replay import hooked, run

MAX_VALUES = 1 << 26  # floats of each stream that a fit looks at
SHARE = 32  # a correction takes at most a SHARE-th of what the weights would take in 8 bits, if clusters are "auto"


class Pairs:
    """Rows of a site's output in the quantized and in the float stream, token by token the same.

    Of very many rows (language model logits) an equal random share of every batch is kept, ``MAX_VALUES`` floats in all.
    """

    def __init__(self, seed: int, batches: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._batches = batches
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._samples = 0
        self._dim = -1

    @property
    def count(self) -> int:
        """Rows so far."""
        return sum(len(teacher) for teacher, *_ in self._rows)

    def add(self, teacher: Tensor, quantized: Tensor, dim: int, mask: Tensor | None) -> None:
        """Add one batch of outputs of equal shape; ``dim`` is the corrected dimension, ``mask`` picks rows."""
        self._dim = dim
        f, q = (t.movedim(dim, -1).reshape(-1, t.shape[dim]).float() for t in (teacher, quantized))
        count = len(teacher) if teacher.dim() > 1 else 1
        sample = torch.arange(count, device=f.device).repeat_interleave(len(f) // max(count, 1)) + self._samples
        self._samples += count
        if mask is not None:
            f, q, sample = f[mask], q[mask], sample[mask]
        quota = max(1, MAX_VALUES // (f.shape[1] * self._batches))
        if len(f) > quota:
            chosen = torch.randperm(len(f), generator=self._generator)[:quota].to(f.device)
            f, q, sample = f[chosen], q[chosen], sample[chosen]
        self._rows.append((f.cpu(), q.cpu(), sample.cpu()))

    def fit_and_attach(
        self, model: nn.Module, name: str, config: CatConfig, kind: Kind
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Fit, attach to the module called ``name`` unless "off" won; the stored entry or None, and the fit's report."""
        teacher, quantized, sample = (torch.cat(rows) for rows in zip(*self._rows, strict=True))
        result = fit(quantized, teacher, config, kind, parameter_count(model) // SHARE, sample)
        logger.info("correction at %s: %s", name, result.summary())
        if result.correction is None:
            return None, result.to_dict()
        correction = result.correction.to(_device(model))
        correction.dim = self._dim
        attach(model, name, correction)
        return entry_of(correction), result.to_dict()


def tensor_of(output: Any) -> Tensor:
    """The tensor that a correction acts on: the output itself, or the first of several.

    Raises:
        TypeError: there is no tensor at that place.
    """
    value = output
    while not isinstance(value, Tensor):
        if isinstance(value, dict) and value:
            value = next(iter(value.values()))
        elif isinstance(value, tuple | list) and value:
            value = value[0]
        else:
            raise TypeError(f"a correction needs a module that returns a tensor first, got {type(output).__name__}")
    return value


def output_of(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Any:
    """What the module called ``name``, the model itself if that is "", returns last while the model runs on ``batch``.

    Raises:
        ValueError: the model does not run it.
    """
    caught: list[Any] = []
    with hooked(model.get_submodule(name), after=lambda m, a, k, output: caught.append(output)):
        run(model, batch)
    if not caught:
        raise ValueError(f"CatConfig(at={name!r}): the model does not run this module on the calibration data")
    return caught[-1]


def correction_dim(module: nn.Module, output: Tensor) -> int:
    """The dimension of features: 1 for images and for what convolutions return, else the last one."""
    convolutions = [m for m in module.modules() if hasattr(m, "out_channels") and hasattr(m, "kernel_size")]
    channels_first = output.dim() > 2 and any(m.out_channels == output.shape[1] for m in convolutions)
    return 1 if channels_first else -1


def resolve_sites(model: nn.Module, config: CatConfig | None, blocks: list[str], logits: str | None) -> list[str]:
    """Names of the modules that ``config.at`` means, in the order the model holds them.

    Raises:
        ValueError: a name, a block or the logits' module is not in the model, or "blocks" is asked of a model without
            repeated blocks.
    """
    if config is None:
        return []
    wanted: set[str] = set()
    names = [name for name, _ in model.named_modules() if name]
    for place in [config.at] if isinstance(config.at, str) else config.at:
        if place == "logits":
            wanted |= {logits} if logits is not None else set()
        elif place == "blocks":
            if not blocks:
                raise ValueError(f'CatConfig(at="blocks"): {type(model).__name__} has no repeated blocks')
            wanted |= set(blocks)
        elif place in names:
            wanted.add(place)
        else:
            raise ValueError(
                f"CatConfig(at={place!r}): no module has this name; names look like {', '.join(names[-3:])}"
            )
    missing = sorted(wanted - set(names))
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no module {missing[0]!r}, which its float model has: both must name their "
            f"modules alike; names look like {', '.join(names[-3:])}"
        )
    return [name for name in names if name in wanted]


@torch.no_grad()
def fit_correction(
    model: nn.Module,
    teacher: nn.Module,
    dataset: Any,
    config: CatConfig | None = None,
    *,
    processor: Any = None,
    num_samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Fit corrections of any quantized model against its float teacher, and attach them to ``model`` in place.

    Sites are fitted in the order of the model, each on outputs that the earlier corrections already changed. A correction
    that sits there already is replaced; if anything goes wrong, ``model`` keeps those it had.

    Args:
        model: the quantized model, of any library; its modules are named as the teacher's.
        teacher: the float model.
        dataset, processor, num_samples, batch_size, seed: as in ``CatQuantConfig``.
        config: what to fit and where; None: the default, at the logits.

    Returns:
        The report of each fit by module name.

    Raises:
        ValueError: the data cannot be used, a site is not in the model, or no module returns the logits.
    """
    config = config or CatConfig()
    data = samples.collect(
        dataset, teacher, processor=processor, num_samples=num_samples, batch_size=batch_size, seed=seed
    )
    with evaluating(model, teacher):
        logits = logits_site(teacher, placed(data.batches[0], teacher))
        blocks = [block for names in stacks(teacher).values() for block in names]
        sites = resolve_sites(model, config, blocks, logits)
        if not sites:
            raise ValueError(
                f"no module of {type(teacher).__name__} returns its logits: name one in CatConfig(at=...)"
            )
        _check_teacher(teacher, sites)
        with _replacing(model, sites):
            return {name: _fit_site(model, teacher, data, config, name, name == logits, seed) for name in sites}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a ``with``; then every module is as it was, one by one."""
    was_training = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in was_training:
            module.training = training


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


def placed(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of ``model``, floats in its floating-point dtype."""
    device = _device(model)
    # A model whose every layer is quantized may have no parameter left; its scales are no sign of what it computes in.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return {k: v.to(device, (dtype or v.dtype) if v.is_floating_point() else v.dtype) for k, v in batch.items()}


def _device(model: nn.Module) -> torch.device:
    """Of the first tensor of ``model`` that is in memory; meta ones are offloaded to disk."""
    return next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), torch.device("cpu"))


def _fit_site(
    model: nn.Module,
    teacher: nn.Module,
    data: samples.Batches,
    config: CatConfig,
    name: str,
    is_logits: bool,
    seed: int,
) -> dict[str, Any]:
    pairs = Pairs(seed, len(data.batches))
    for batch in data.batches:
        f, q = (tensor_of(output_of(m, name, placed(batch, m))) for m in (teacher, model))
        dim = correction_dim(teacher.get_submodule(name), f)
        mask = samples.padding_mask(batch, teacher, name, f) if dim == -1 and f.dim() == 3 else None
        pairs.add(f, q, dim, None if mask is None else mask.flatten().to(f.device))
    return pairs.fit_and_attach(model, name, config, "logits" if is_logits else "hidden")[1]
