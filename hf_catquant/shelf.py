"""The shelf: float weights that stay on disk until their unit runs, so that a model is never whole in memory in float.

A model on a shelf is built as usual, but its large parameters hold nothing: one NaN, seen in their shape. A *unit* (a
repeated block, or a layer outside the blocks) gets its weights, read from the safetensors files and cast, when it is about
to run, and gives them back when another one runs. A weight that is read by mistake while it is away makes NaN, which every
solver refuses.

Calibration *takes* a unit for good before it quantizes it, and says when it is *done*: then the float weights that packed
ones have replaced are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .integrity import DTYPES, Stored

_PIECE = 1 << 22  # values that are read and cast at once
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_PLACE = "_catquant_shelf"  # of a model


@dataclass(frozen=True)
class Source:
    """Where a tensor is on disk: a safetensors file, and its entry in the header."""

    path: Path
    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return _TORCH[self.stored.dtype]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in memory of its own, in ``dtype`` (its own one if that is None).

        Raises:
            ValueError: the file has become shorter.
        """
        stored, own = self.stored, self.dtype
        out = torch.empty(stored.shape, dtype=dtype or own)
        flat, count = out.view(-1), math.prod(stored.shape)
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            for start in range(0, count, _PIECE):
                end = min(start + _PIECE, count)
                piece = torch.empty(end - start, dtype=own)
                _fill(file, piece.view(torch.uint8), self.path)
                flat[start:end] = piece
        return out


def _fill(file: Any, data: Tensor, path: Path) -> None:
    array: Any = data.numpy()
    view = memoryview(array)
    while len(view):
        got = file.readinto(view)
        if not got:
            raise ValueError(f"{path} has become shorter while it was read")
        view = view[got:]


def absent(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """What stands for a weight that is not in memory: one NaN in its shape."""
    return torch.full((), math.nan, dtype=dtype).expand(tuple(shape))


def is_absent(tensor: Tensor) -> bool:
    """Whether the values are not in memory: on the shelf, or on no device at all."""
    return tensor.is_meta or (tensor.numel() > 1 and not any(tensor.stride()))


class Shelf:
    """Keeps the large parameters of ``model`` away until their units run. Found by :func:`shelf_of`.

    Args:
        model: its parameters that have a source are absent.
        sources: of the absent parameters, by name; parameters that are tied are one object and need one name.
        units: names of the modules that get their weights when they run. Absent parameters of no unit are read now.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Source], units: Iterable[str]) -> None:
        named = dict(model.named_parameters())
        self._sources = {id(named[name]): source for name, source in sources.items()}
        self._parameters = {id(named[name]): named[name] for name in sources}  # kept alive: an id must stay its own
        self._model = model
        self._loaded: set[int] = set()
        self._kept: set[int] = set()  # in memory for good
        self._units: dict[str, list[int]] = {}
        self._handles: dict[str, Any] = {}
        for name in units:
            module = model.get_submodule(name)
            keys = [key for key in map(id, module.parameters()) if key in self._sources]
            if keys:
                self._units[name] = keys
                self._handles[name] = module.register_forward_pre_hook(self._hook(name))
        for key in self._sources.keys() - {key for keys in self._units.values() for key in keys}:
            self._keep(key)
        model.__dict__[_PLACE] = self

    def enter(self, name: str) -> None:
        """Put the weights of the unit called ``name`` in memory, and those of others away."""
        wanted = set(self._units.get(name, ()))
        for key in self._loaded - wanted - self._kept:
            self._put_away(key)
        for key in wanted - self._loaded:
            self._load(key)

    def take(self, name: str) -> None:
        """Keep the unit in memory until it is :meth:`done`."""
        unit = self._unit_of(name)
        if unit in self._handles:
            self.enter(unit)
            self._kept |= set(self._units[unit])
            self._handles.pop(unit).remove()

    def done(self, name: str) -> None:
        """Free the float weights that are no longer part of the unit; what is left of it stays in memory."""
        unit = self._unit_of(name)
        held = {id(p) for p in self._model.get_submodule(unit).parameters()} if unit else set()
        for key in self._units.get(unit, ()):
            if key not in held:
                self._kept.discard(key)
                self._put_away(key)

    def finish(self) -> None:
        """Read what is still away and still part of the model; the model is then whole, and off the shelf."""
        held = {id(p) for p in self._model.parameters()}
        for key in self._sources.keys() & held - self._loaded:
            self._load(key)
        for handle in self._handles.values():
            handle.remove()
        del self._model.__dict__[_PLACE]

    def largest(self) -> int:
        """Bytes of the largest unit, as it is in memory."""
        return max((sum(self._parameters[key].nbytes for key in keys) for keys in self._units.values()), default=0)

    def _hook(self, name: str) -> Callable[..., None]:
        # A function, not a method: a deep copy of the unit shall not copy the shelf.
        def hook(module: nn.Module, args: Any) -> None:
            self.enter(name)

        return hook

    def _unit_of(self, name: str) -> str:
        return next((unit for unit in self._units if name == unit or name.startswith(f"{unit}.")), "")

    def _keep(self, key: int) -> None:
        self._load(key)
        self._kept.add(key)

    def _load(self, key: int) -> None:
        parameter = self._parameters[key]
        parameter.data = self._sources[key].read(parameter.dtype)
        self._loaded.add(key)

    def _put_away(self, key: int) -> None:
        parameter = self._parameters[key]
        parameter.data = absent(parameter.shape, parameter.dtype)
        self._loaded.discard(key)


class NoShelf:
    """Stands for the shelf of a model that is whole in memory."""

    def take(self, name: str) -> None:
        """Nothing."""

    def done(self, name: str) -> None:
        """Nothing."""

    def enter(self, name: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def shelf_of(model: nn.Module) -> Shelf | NoShelf:
    """The shelf that ``model`` is on, or one that does nothing."""
    return model.__dict__.get(_PLACE) or NoShelf()


@contextmanager
def resident(model: nn.Module, name: str) -> Iterator[None]:
    """The weights of the module called ``name`` are in memory for the time of a ``with`` in which nothing runs."""
    shelf = shelf_of(model)
    if isinstance(shelf, Shelf):
        shelf.enter(shelf._unit_of(name))
    yield
