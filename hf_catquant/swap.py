"""Swapping one layer: solve its weight, in one way or several, put the best in its place, set its bias, keep the books."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from . import solvers
from .entries import Entries, entry_scheme, module_entry
from .formats import get_format
from .layers import QuantizedModule, Scheme, layer_for
from .model import Selection
from .modules import replace_module
from .replay import Replay
from .solvers import Moments
from .weight import QuantizedWeight, dequantize

ByRun = Iterable[Moments | None]
Range = tuple[Tensor, Tensor | None]  # scale and offset () of a calibrated activation range


@dataclass
class Outcome:
    """What quantizing did: stored entries, per-layer errors, the fits of the corrections, what was learned: JSON-clean."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    corrections: dict[str, dict[str, Any]] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)


class _StoredRows:
    """The matrix (N, K) float32 of a filled layer, of which only the rows that are asked for take memory."""

    def __init__(self, layer: QuantizedModule) -> None:
        self.layer = layer

    def __getitem__(self, rows: slice) -> Tensor:
        return self.layer.stored_matrix(torch.float32, rows)


@dataclass(frozen=True)
class Solved:
    """A layer in its quantized form, not yet in the model.

    Attributes:
        layer: what will take its place; its bias is still that of the float layer.
        error: relative squared error of its output, or of its weight; None if it shares another layer's weight.
        distance: squared distance of its outputs from the float model's, less a constant; lower is better; 0 without data.
        shift: what its bias gains (N,), or None.
    """

    layer: QuantizedModule
    error: float | None = None
    distance: float = 0.0
    shift: Tensor | None = None


class Swap:
    """Puts quantized layers in the place of float ones and keeps the books."""

    def __init__(self, model: nn.Module, solver: str, selection: Selection) -> None:
        self.model = model
        self.solver = solver
        self.sites = {site.name: site for site in selection.sites}
        self.outcome = Outcome()
        self._owner: dict[str, str] = {}  # first quantized member of a tied group, by the group's name

    def site(self, name: str, moments: Moments | ByRun | None, input_range: Range | None = None) -> None:
        """:meth:`solve` the layer called ``name`` in its own scheme, and :meth:`put` it."""
        self.put(name, self.solve(name, self.sites[name].scheme, moments), input_range)

    def solve(self, name: str, scheme: Scheme, moments: Moments | ByRun | None) -> Solved:
        """The layer called ``name`` stored as ``scheme`` says; without moments by rounding to nearest.

        A layer of several runs (experts) is given the moments of each in turn, None for one that has none. One that
        shares a weight stays empty, and takes the scheme of the weight's owner.

        Raises:
            ValueError: the weight or the moments are not finite.
        """
        group = self.sites[name].tied_to or name
        shares = group in self._owner
        module = self.model.get_submodule(name)
        layer = layer_for(module)
        assert layer is not None
        new = layer(module, self.sites[group].scheme if shares else scheme)
        if shares:
            return Solved(new)
        matrix = self._target(name, module, new)
        try:
            if isinstance(moments, Moments) or (moments is None and new.runs == 1):
                return self._solve(new, matrix, moments)
            # One expert is given its moments in turn, too.
            return self._solve_runs(new, matrix, repeat(None) if moments is None else moments)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def put(self, name: str, solved: Solved, input_range: Range | None = None) -> None:
        """Replace the float layer called ``name``."""
        group = self.sites[name].tied_to or name
        new, owner = solved.layer, self._owner.get(group)
        if owner is None and solved.shift is not None and new.bias is not None:
            # The same parameter as before: others may be tied to it.
            new.bias.data = new.bias.data + solved.shift.view_as(new.bias).to(new.bias.dtype)
        replace_module(self.model, name, new)
        if owner is None:
            self._owner[group] = name
            assert solved.error is not None
            self.outcome.errors[name] = solved.error
        else:
            self._share(name, owner)
        if input_range is not None:
            new.fill_input_range(*input_range)
        self.outcome.modules[name] = module_entry(new.scheme, (new.rows_, new.columns), owner)

    def restore(self, entries: Entries) -> None:
        """Put empty layers in the places that ``entries`` describe, as :meth:`site` did when it solved them."""
        for name, entry in entries.items():
            module = self.model.get_submodule(name)
            layer = layer_for(module)
            assert layer is not None
            replace_module(self.model, name, layer(module, entry_scheme(entry)))
            if entry["tied_to"] is None:
                self._owner[self.sites[name].tied_to or name] = name

    def share(self, entries: Entries) -> None:
        """After :meth:`restore`, and after the owners have been filled: let those that share a weight hold it."""
        for name, entry in entries.items():
            if entry["tied_to"] is not None:
                self._share(name, entry["tied_to"])

    def _share(self, name: str, owner: str) -> None:
        """Let the layer called ``name`` hold the weight of ``owner``, which may have a stand-in until the walk ends."""
        layer, source = (original_at(self.model, place) for place in (name, owner))
        assert isinstance(layer, QuantizedModule)
        layer.share(source)

    def _target(self, name: str, module: nn.Module, new: QuantizedModule) -> Tensor:
        """What the new layer's matrix stands for, (N, K) float32."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        matrix = new.target(weight)
        if not all(bool(torch.isfinite(matrix[rows]).all()) for rows in solvers.row_slices(matrix)):
            raise ValueError(f"{name}.weight has values that are not finite: the model itself is broken there")
        return matrix

    def _solver(self, scheme: Scheme) -> Callable[[Tensor, Moments | None], QuantizedWeight]:
        """From a matrix (N, K) and the statistics of its inputs to what the solver finds for it."""

        def solve(target: Tensor, moments: Moments | None) -> QuantizedWeight:
            solver = solvers.get(self.solver if moments is not None else "rtn")
            return solver.solve(target, get_format(scheme.weights), scheme.group_size, moments)

        return solve

    def _solve(self, new: QuantizedModule, matrix: Tensor, moments: Moments | None) -> Solved:
        solve = self._solver(new.scheme)

        def stored(quantized: QuantizedWeight) -> Tensor:
            new.fill(quantized)
            return new.stored_matrix(torch.float32)

        if new.scheme.low_rank:
            quantized, *product = solvers.solve_with_product(matrix, new.scheme.low_rank, moments, solve, stored)
            new.fill_low_rank(*product)
        else:
            quantized = solve(matrix, moments)
        new.fill(quantized)
        del quantized
        w_hat = _StoredRows(new)
        error = solvers.output_error(matrix, w_hat, moments)
        if moments is None:
            return Solved(new, error)
        shift = None
        if new.bias is not None:
            shift = _mean_output(matrix, moments.float_mean) - _mean_output(w_hat[:], moments.mean)
        return Solved(new, error, solvers.output_distance(matrix, w_hat, moments), shift)

    def _solve_runs(self, new: QuantizedModule, matrix: Tensor, each: ByRun) -> Solved:
        """As :meth:`_solve`, every run with moments of its own; the error is that of all rows that were seen."""
        parts: list[QuantizedWeight] = []
        shifts: list[Tensor] = []
        noise = signal = distance = 0.0
        solve = self._solver(new.scheme)
        for rows, moments in zip(matrix.chunk(new.runs), each, strict=False):
            part = solve(rows, moments)
            parts.append(part)
            w_hat = dequantize(part, get_format(new.scheme.weights), new.scheme.group_size)
            lost, whole = solvers.output_energies(rows, w_hat, moments)
            noise, signal = noise + lost, signal + whole
            if moments is None:
                shifts.append(torch.zeros_like(rows[:, 0]))
            else:
                distance += solvers.output_distance(rows, w_hat, moments)
                shifts.append(_mean_output(rows, moments.float_mean) - _mean_output(w_hat, moments.mean))
        codes, scales, offsets = zip(*parts, strict=True)
        offset = None if offsets[0] is None else torch.cat(offsets)
        new.fill(QuantizedWeight(torch.cat(codes), torch.cat(scales), offset))
        error = noise / signal if signal > 0 else 0.0
        return Solved(new, error, distance, None if new.bias is None else torch.cat(shifts))


def original_at(model: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` itself, also while a :class:`Replay` of it, or of a module around it, is in its place."""
    module = model.get_submodule(name)
    while isinstance(module, Replay):
        module = module.original
    return module


def _mean_output(matrix: Tensor, mean: Tensor) -> Tensor:
    runs = matrix.view(mean.shape[0], -1, mean.shape[1])  # (B, N / B, K)
    return (runs @ mean.unsqueeze(-1)).flatten()
