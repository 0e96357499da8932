"""The corrections of a model that is being quantized: where they sit, what they are fitted on, which of them stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .cluster_fit import LEAST_ROWS
from .config import CatQuantConfig
from .fitting import Pairs, correction_dim, output_of, resolve_sites, tensor_of
from .gather import Gather, Streams
from .held_out import Kind
from .log import logger
from .swap import Outcome
from .walk import Unit, Walk, leaf_outputs


class Corrections:
    """The corrections that are still to be fitted.

    Args:
        model: the model that is quantized unit by unit.
        config: says which corrections there are.
        gather: the calibration data.
        walk: the two streams; its plan knows the module that returns the logits.
        blocks: names of the repeated blocks.
        batches: indices of those that corrections are fitted on.
        outcome: takes the fits, and notes of what was left out.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CatQuantConfig,
        gather: Gather,
        walk: Walk,
        blocks: list[str],
        batches: range,
        outcome: Outcome,
    ) -> None:
        self.model, self.config, self.gather, self.walk = model, config, gather, walk
        self.batches, self.outcome = batches, outcome
        self.names = resolve_sites(model, config.correction, blocks, walk.plan.logits_site)
        if config.correction is not None and not self.names:
            self.left_out("correction: no module returns the model's logits, name one in CatConfig(at=...)")

    def left_out(self, note: str) -> None:
        """Say that something asked for was not done.

        Raises:
            ValueError: ``strict`` is set.
        """
        if self.config.strict:
            raise ValueError(f"strict=True, but {note}")
        self.outcome.notes.append(note)
        logger.warning(note)

    def inside(self, unit: str, *, waits: bool) -> list[str]:
        """Those that sit inside ``unit``, and on all of it unless that ``waits`` for the whole model."""
        return [name for name in self.names if name.startswith(f"{unit}.") or (name == unit and not waits)]

    def drop(self, names: Sequence[str]) -> None:
        """These are fitted already."""
        self.names = [name for name in self.names if name not in names]

    def fit_inside(self, unit: Unit, name: str, streams: Streams) -> None:
        """Fit the correction at ``name``, which sits in ``unit``."""
        inner = name.removeprefix(unit.name).removeprefix(".")
        pairs = Pairs(self.config.seed, len(self.batches))
        for batch in self.batches:
            float_outputs = leaf_outputs(streams.float_unit, inner, streams.float_calls[batch])
            for f, q in zip(float_outputs, leaf_outputs(streams.live, inner, streams.calls[batch]), strict=True):
                self._add(pairs, name, batch, f, q)
        self._fit(name, pairs)

    def float_outputs(self) -> dict[str, list[Any]]:
        """What the float model puts out where corrections are still to be fitted, by batch."""
        return {name: self.walk.outputs_of(name, "float") for name in self.names}

    def fit_model(self, float_outputs: dict[str, list[Any]]) -> None:
        """Fit what needs the whole quantized model."""
        for name, outputs in float_outputs.items():
            pairs = Pairs(self.config.seed, len(self.batches))
            for batch in self.batches:
                self._add(pairs, name, batch, outputs[batch], output_of(self.model, name, self.walk.batches[batch]))
            self._fit(name, pairs)

    def _add(self, pairs: Pairs, name: str, batch: int, float_output: Any, output: Any) -> None:
        f, q = tensor_of(float_output), tensor_of(output)
        dim = correction_dim(self.model.get_submodule(name), f)
        mask = self.gather.mask(batch, name, f) if dim == -1 and f.dim() == 3 else None
        pairs.add(f, q, dim, mask)

    def _fit(self, name: str, pairs: Pairs) -> None:
        self.names.remove(name)
        if pairs.count < LEAST_ROWS:
            self.left_out(f"correction at {name}: off, {pairs.count} rows of samples are fewer than {LEAST_ROWS}")
            return
        kind: Kind = "logits" if name == self.walk.plan.logits_site else "hidden"
        assert self.config.correction is not None
        entry, fit = pairs.fit_and_attach(self.model, name, self.config.correction, kind)
        self.outcome.fits[name] = fit
        if entry is not None:
            self.outcome.corrections[name] = entry
