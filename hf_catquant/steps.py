"""Finished units on their way into the journal and back: what quantizing a unit changed in the model and in the books."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .correction import attach
from .correction_file import empty_correction
from .journal import Journal
from .layers import QuantizedModule
from .log import logger
from .swap import Swap

_BOOKS = ("modules", "errors", "corrections", "fits")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of ``module`` by name, except packed weights that are another layer's."""
    shared = {
        f"{name}.{buffer}" if name else buffer
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedModule) and layer.owner is not None
        for buffer in layer._non_persistent_buffers_set
    }
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if name not in shared}


class Steps:
    """The steps of one quantization, kept in ``journal``; without one, nothing is kept."""

    def __init__(self, journal: Journal | None, swap: Swap) -> None:
        self.journal = journal
        self.swap = swap
        self._restored = 0
        self.begin()

    def begin(self) -> None:
        """What the books gain from here on belongs to the next step."""
        outcome = self.swap.outcome
        self._known = {book: set(getattr(outcome, book)) for book in _BOOKS}
        self._notes = len(outcome.notes)

    def restore(self, step: str, unit: str) -> dict[str, Any] | None:
        """Do again what a finished step did to the unit called ``unit``; its record, or None if it is not finished.

        Raises:
            ValueError: the step is damaged, or is of another unit.
        """
        if self.journal is None or not self.journal.has(step):
            if self._restored:
                logger.info(
                    "%d finished steps were taken from %s", self._restored, self.journal and self.journal.folder
                )
                self._restored = 0
            return None
        tensors, record = self.journal.read(step)
        if record["unit"] != unit:
            raise ValueError(
                f"{self.journal.folder}: step {step} is of {record['unit']!r}, where this model has {unit!r}: it was begun "
                "with another model; begin anew with --overwrite"
            )
        self.swap.restore(record["modules"])
        model, outcome = self.swap.model, self.swap.outcome
        for name, entry in record["corrections"].items():
            attach(model, name, empty_correction(entry))
        fill(model.get_submodule(unit), tensors)
        self.swap.share(record["modules"])
        for book in _BOOKS:
            getattr(outcome, book).update(record[book])
        outcome.notes += record["notes"]
        self._restored += 1
        return record

    def keep(self, step: str, unit: str, before: Mapping[str, Tensor], **more: Any) -> None:
        """Write what has happened since :meth:`begin`.

        Args:
            step: its name, that of a file.
            unit: name of the module that changed.
            before: its tensors as they were; those that are still the same are not written.
            more: JSON-clean, given back by :meth:`restore`.

        Raises:
            OSError: it cannot be written.
        """
        if self.journal is None:
            return
        outcome = self.swap.outcome
        books = {
            book: {name: value for name, value in getattr(outcome, book).items() if name not in self._known[book]}
            for book in _BOOKS
        }
        now = tensors_of(self.swap.model.get_submodule(unit))
        changed = {name: tensor for name, tensor in now.items() if not _same(tensor, before.get(name))}
        self.journal.write(step, changed, {"unit": unit, **books, "notes": outcome.notes[self._notes :], **more})


class Draft:
    """How far the work of one step is, for one that takes long: written again and again, read by the run that goes on.

    A draft saves time after a kill and is worth no more than that: where the disk has no room for it the work goes on
    without. Without a journal nothing is kept.
    """

    def __init__(self, journal: Journal | None, name: str) -> None:
        self.journal = journal
        self.name = name
        self._warned = False

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and record as they were written last, None if they never were.

        Raises:
            ValueError: the file is damaged.
        """
        return self.journal.read(self.name) if self.journal is not None and self.journal.has(self.name) else None

    def write(self, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Take the place of what was written before, if there is room, and as much again for what is to come.

        Args:
            tensors: by name.
            record: JSON-clean.

        Raises:
            OSError: it cannot be written, though there is room.
        """
        if self.journal is None:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if shutil.disk_usage(self.journal.folder).free < 2 * size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.journal.write(self.name, tensors, record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            if not self._warned:
                logger.warning(
                    "%s: there is no room for a draft of %s bytes, which is written while the whole model learns: the run "
                    "goes on without, and if it is interrupted now this learning begins anew",
                    self.journal.folder,
                    f"{size:,}",
                )
            self._warned = True

    def drop(self) -> None:
        """Delete what was written: the step is finished."""
        if self.journal is not None:
            self.journal.forget(self.name)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` in the places of those of ``module`` with their names; parameters stay the objects they are.

    Raises:
        ValueError: there is no such place, or it is of another shape.
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if old is None or old.shape != tensor.shape:
            raise ValueError(f"a finished step holds {name} of shape {tuple(tensor.shape)}, which the model has not")
        if leaf in owner._parameters:
            old.data = tensor.to(old.device)
        else:
            owner._buffers[leaf] = tensor.to(old.device)
    for layer in module.modules():
        if isinstance(layer, QuantizedModule):  # learning may have settled for another dtype than the entry says
            scale_dtype = str(layer.weight_scale.dtype).removeprefix("torch.")
            layer.scheme = replace(layer.scheme, scale_dtype=scale_dtype)


def _same(tensor: Tensor, before: Tensor | None) -> bool:
    same_kind = before is not None and before.dtype == tensor.dtype and before.shape == tensor.shape
    return same_kind and torch.equal(tensor, before)  # type: ignore[arg-type]
