"""Fitting corrections on paired outputs of a quantized model and its teacher, and the places on models where they sit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .answers import answer_kind, problem_of
from .cluster_fit import fit
from .correction import CatConfig, attach
from .correction_file import entry_of
from .log import logger
from .packed_model import parameter_count
from .replay import hooked, run
from .site_rows import SiteRows

SHARE = 32  # a correction takes at most a SHARE-th of what the weights would take in 8 bits, if clusters are "auto"


class Pairs:
    """Rows of a site's output in the quantized and in the float stream, token by token the same; see ``site_rows.py``.

    Args:
        seed: of the choice of rows, where there are very many.
        batches: how many there will be.
    """

    def __init__(self, seed: int, batches: int) -> None:
        self._rows = SiteRows(seed, batches)
        self._quantized: list[Tensor] = []

    @property
    def count(self) -> int:
        """Rows that are expected so far."""
        return self._rows.count

    def expect(self, teacher: Tensor, dim: int, mask: Tensor | None, count: int) -> None:
        """Add the float model's output on one batch of ``count`` samples, as :meth:`SiteRows.expect` takes it."""
        self._rows.expect(teacher, dim, mask, count)

    def add(self, quantized: Tensor) -> None:
        """Add the quantized model's output on the next of the expected batches."""
        self._quantized.append(self._rows.of(quantized, len(self._quantized)))

    def fit_and_attach(
        self, model: nn.Module, name: str, config: CatConfig, *, answers: bool
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Fit, attach to the module called ``name`` unless "off" won; the stored entry or None, and the fit's report.

        ``answers``: the module returns the model's logits. The rows are used up.
        """
        samples = self._rows.samples
        # The parts go as soon as they are joined: wide logits would be in memory twice.
        quantized, teacher = _joined(self._quantized), _joined(self._rows.teacher)
        kind = answer_kind(problem_of(model), teacher.shape[1]) if answers else "values"
        result = fit(quantized, teacher, config, kind, parameter_count(model) // SHARE, samples)
        logger.info("correction at %s: %s", name, result.summary())
        if result.correction is None:
            return None, result.to_dict()
        correction = result.correction.to(_device(model))
        correction.dim = self._rows.dim
        attach(model, name, correction)
        return entry_of(correction), result.to_dict()


def _joined(parts: list[Tensor]) -> Tensor:
    """All rows of ``parts``, which are emptied."""
    whole = torch.cat(parts)
    parts.clear()
    return whole


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
        raise ValueError(not_run(name))
    return caught[-1]


def not_run(name: str) -> str:
    """Why a module that never runs has no correction."""
    return (
        f"CatConfig(at={name!r}): the model does not run this module on the calibration data; name one that it runs, "
        "a layer of a list instead of the list"
    )


def several_runs(runs: int) -> str:
    """Why a module that runs ``runs`` times in a forward has no correction.

    One correction acts on all of its runs, and changes what the later ones are given: rows of one run say nothing of that.
    """
    return (
        f"the model runs it {runs} times in a forward, which no one correction fits: name another in CatConfig(at=...)"
    )


def check_runs(model: nn.Module, names: Sequence[str], batch: dict[str, Tensor]) -> None:
    """Refuse modules that ``model`` runs more than once on ``batch``.

    Raises:
        ValueError: naming the first.
    """
    runs: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(hooked(module, before=lambda m, a, k, name=name: runs.update([name])))
        run(model, batch)
    for name in names:
        if runs[name] > 1:
            raise ValueError(f"no correction at {name}: {several_runs(runs[name])}")


@dataclass(frozen=True)
class Widths:
    """Numbers of features that the layers in a module return: convolutions at dimension 1, linears at the last one."""

    channels: frozenset[int]
    features: frozenset[int]

    @classmethod
    def of(cls, module: nn.Module) -> Widths:
        """Those in ``module``."""
        inner: list[Any] = list(module.modules())
        channels = (m.out_channels for m in inner if hasattr(m, "out_channels") and hasattr(m, "kernel_size"))
        return cls(frozenset(channels), frozenset(m.out_features for m in inner if hasattr(m, "out_features")))

    def dim(self, output: Tensor) -> int:
        """As :func:`correction_dim`, of what the module returns.

        A text or sound of as many steps as a convolution inside has channels (Conformer) is no map: linears decide.
        """
        if output.dim() < 3 or output.shape[1] not in self.channels:
            return -1
        return -1 if output.dim() == 3 and output.shape[-1] in self.features else 1


def correction_dim(module: nn.Module, output: Tensor) -> int:
    """The dimension of features: 1 for images and for what convolutions return, else the last one."""
    return Widths.of(module).dim(output)


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


def sample_count(batch: dict[str, Tensor]) -> int:
    """Samples of a batch."""
    return len(next(iter(batch.values())))


def placed(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of ``model``, floats in its floating-point dtype."""
    device = _device(model)
    # A model whose every layer is quantized may have no parameter left; its scales are no sign of what it computes in.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return {k: v.to(device, (dtype or v.dtype) if v.is_floating_point() else v.dtype) for k, v in batch.items()}


def _device(model: nn.Module) -> torch.device:
    """Of the first tensor of ``model`` that is in memory; meta ones are offloaded to disk."""
    return next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), torch.device("cpu"))
