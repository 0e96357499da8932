"""The corrections of a model that is being quantized: where they sit, what they are fitted on, which of them stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .answers import problem_of
from .cluster_fit import LEAST_ROWS, UnusableTeacher
from .config import CatQuantConfig
from .copies import copies_note, firsts, without_copies
from .correction import ClusterAffine, attach, detach
from .fitting import Pairs, Widths, not_run, output_of, resolve_sites, sample_count, several_runs, tensor_of
from .gather import Gather, Streams
from .judge import NOT_JUDGED, Judge
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
        self.logits = walk.plan.logits_site
        self._pairs: dict[str, Pairs] = {}
        self._judge: Judge | None = None
        self.names = resolve_sites(model, config.correction, blocks, self.logits)
        if config.correction is not None and not self.names:
            self.left_out("correction: no module returns the model's logits, name one in CatConfig(at=...)")
        self._leave_out_several_runs()
        self._leave_out_what_does_not_run()
        self._firsts: dict[int, Tensor] = {}
        if self.names and config.correction is not None and config.correction.may_be_off:
            self._firsts = dict(zip(batches, firsts(walk.batches[batch] for batch in batches), strict=True))
            outcome.notes += copies_note(self._firsts.values())
        # Now, while all modules are where they are: units that are finished hide what is in them.
        sites = [*self.names, self.logits]
        self._widths = {name: Widths.of(model.get_submodule(name)) for name in sites if name is not None}

    def left_out(self, note: str) -> None:
        """Say that something asked for was not done.

        Raises:
            ValueError: ``strict`` is set.
        """
        if self.config.strict:
            raise ValueError(f"strict=True, but {note}")
        self.outcome.notes.append(note)
        logger.warning(note)

    def _leave_out_several_runs(self) -> None:
        """Of "blocks" and "logits"; what was asked for by name is refused."""
        asked = self.config.correction.at if self.config.correction is not None else ()
        for name in [name for name in self.names if self.walk.plan.runs.get(name, 0) > 1]:
            note = several_runs(self.walk.plan.runs[name])
            if name in ([asked] if isinstance(asked, str) else asked):
                raise ValueError(f"no correction at {name}: {note}")
            self.names.remove(name)
            self.left_out(f"correction at {name}: off, {note}")

    def _leave_out_what_does_not_run(self) -> None:
        """A list of layers, or a block that this data does not need, returns nothing to correct; refused by name, too."""
        asked = self.config.correction.at if self.config.correction is not None else ()
        for name in [name for name in self.names if not self.walk.plan.runs.get(name)]:
            if name in ([asked] if isinstance(asked, str) else asked):
                raise ValueError(not_run(name))
            self.names.remove(name)
            self.left_out(f"correction at {name}: off, the model does not run it on the calibration data")

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
                pairs.expect(*self._rows(name, batch, f))
                pairs.add(tensor_of(q))
        self._fit(name, pairs)

    def expect(self) -> None:
        """Take what the float model puts out where corrections are still to be fitted, and where they are judged."""
        if self._judges():
            self._judge = Judge(self.config.seed, len(self.batches), problem_of(self.model))
        for name in self.names:
            self._pairs[name] = Pairs(self.config.seed, len(self.batches))
        judged = [] if self._judge is None or self.logits is None else [self.logits]
        for name in dict.fromkeys([*self.names, *judged]):
            for batch, output in zip(self.batches, self.walk.outputs_of(name, "float", self.batches), strict=True):
                rows = self._rows(name, batch, output)
                if name in self._pairs:
                    self._pairs[name].expect(*rows)
                if self._judge is not None and name == self.logits:
                    self._judge.expect(*rows)

    def fit_model(self) -> None:
        """Fit what needs the whole quantized model, and take off what does not help its answers."""
        losses = None if self._judge is None else self._judge.losses(self._answers())
        for name in [name for name in self.outcome.corrections if name != self.logits][::-1]:
            losses = self._keep_if_it_helps(name, losses, detach(self.model, name))
        for name in sorted(self.names, key=lambda name: name == self.logits):  # what judges comes last
            pairs = self._pairs.pop(name)
            for batch in self.batches:
                pairs.add(self._output(name, batch))
            self._fit(name, pairs)
            if name != self.logits:
                losses = self._keep_if_it_helps(name, losses, None)

    def _judges(self) -> bool:
        """Whether there are logits that corrections inside the model are judged by."""
        config = self.config.correction
        inner = [name for name in (*self.names, *self.outcome.corrections) if name != self.logits]
        return config is not None and config.may_be_off and self.logits is not None and bool(inner)

    def _keep_if_it_helps(self, name: str, losses: Tensor | None, taken: ClusterAffine | None) -> Tensor | None:
        """Judge the correction at ``name``: on trial and ``losses`` without it, or ``taken`` off and ``losses`` with it."""
        entry = self.outcome.corrections.get(name)
        if self._judge is None or losses is None or entry is None:
            if taken is not None:
                attach(self.model, name, taken)
            return losses
        other = self._judge.losses(self._answers())
        before, after = (losses, other) if taken is None else (other, losses)
        if self._judge.helps(name, before, after, self.outcome.fits[name]):
            if taken is not None:
                attach(self.model, name, taken)
            return after
        detach(self.model, name)
        del self.outcome.corrections[name]
        return before

    def _answers(self) -> Iterator[Tensor]:
        assert self.logits is not None
        for batch in self.batches:
            yield self._output(self.logits, batch)

    def _output(self, name: str, batch: int) -> Tensor:
        return tensor_of(output_of(self.model, name, self.walk.batches[batch]))

    def _rows(self, name: str, batch: int, output: Any) -> tuple[Tensor, int, Tensor | None, int]:
        """An output as rows are taken of it: the tensor, its dimension of features, what is neither padding nor a copy, its
        samples."""
        value = tensor_of(output)
        dim = self._widths[name].dim(value)
        mask = self.gather.mask(batch, name, value) if dim == -1 and value.dim() == 3 else None
        if batch in self._firsts:
            mask = without_copies(mask, self._firsts[batch], value, dim)
        return value, dim, mask, sample_count(self.walk.batches[batch])

    def _fit(self, name: str, pairs: Pairs) -> None:
        self.names.remove(name)
        if pairs.count < LEAST_ROWS:
            self.left_out(f"correction at {name}: off, {pairs.count} rows of samples are fewer than {LEAST_ROWS}")
            return
        assert self.config.correction is not None
        try:
            entry, fit = pairs.fit_and_attach(self.model, name, self.config.correction, answers=name == self.logits)
        except UnusableTeacher as error:
            self.left_out(f"correction at {name}: off, {error}")
            return
        self.outcome.fits[name] = fit
        if entry is not None:
            self.outcome.corrections[name] = entry
            fit["notes"] += [NOT_JUDGED] if self.logits is None else []
