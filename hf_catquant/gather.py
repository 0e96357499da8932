"""What calibration gathers at a layer: the moments of its input in both streams, the range of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import samples
from .formats import get_format
from .layers import Scheme, layer_for
from .moments import ChannelSums, MomentSums, match_batch_norm, rotated
from .solvers import Moments
from .swap import Range
from .walk import Call, Leaf, leaf_inputs
from .weight import fit_static_range, quantize_activation

# Positions of one image say much the same: this many rows settle the moments of K columns.
MAX_ROWS, ROWS_PER_COLUMN = 1 << 16, 64
RANGE_SAMPLE = 1 << 18  # values that a static activation range is fitted on


@dataclass(frozen=True)
class Streams:
    """One unit in both streams.

    Attributes:
        float_unit: a copy of the unit, in float.
        live: the unit in the model, quantized as far as it is by now.
        float_calls, calls: what the two receive, by batch, by call.
    """

    float_unit: nn.Module
    live: nn.Module
    float_calls: Sequence[list[Call]]
    calls: Sequence[list[Call]]

    def inputs(self, leaf: Leaf, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``leaf`` reads at each of its runs on ``batch``, in the float and in the quantized stream."""
        float_inputs = leaf_inputs(self.float_unit, leaf, self.float_calls[batch])
        return zip(float_inputs, leaf_inputs(self.live, leaf, self.calls[batch]), strict=True)


class Gather:
    """Statistics of the layers of ``model`` over the batches of its calibration data that solvers see.

    Args:
        model: tells what is padding.
        data: the batches as they were collected.
        batches: indices of those that count.
        seed: of the random shares that stand for very many rows.
    """

    def __init__(self, model: nn.Module, data: Sequence[dict[str, Tensor]], batches: range, seed: int) -> None:
        self.model = model
        self.data = data
        self.batches = batches
        self.seed = seed

    def moments(
        self, name: str, leaf: Leaf, schemes: list[Scheme], streams: Streams, input_range: Range | None
    ) -> Iterator[Moments | None]:
        """Moments of the rows that meet the matrix of the layer called ``name``, as each of ``schemes`` stores it.

        None where there are no such rows. The schemes differ in nothing but their rotation. The next moments may take the
        place of the last.
        """
        plain = None
        for scheme in schemes:
            if scheme.activations is not None:  # what is rounded after it was rotated is rotated row by row
                yield self._moments(name, leaf, scheme, streams, input_range)
                continue
            if plain is None:
                plain = self._moments(name, leaf, replace(scheme, rotation=None), streams, input_range)
            if scheme.rotation is None:
                yield plain
            else:
                turned, plain = rotated(plain), None
                yield turned

    def _moments(
        self, name: str, leaf: Leaf, scheme: Scheme, streams: Streams, input_range: Range | None
    ) -> Moments | None:
        sums, generator = MomentSums(), torch.Generator().manual_seed(self.seed)
        module = streams.float_unit.get_submodule(leaf.name)
        layer = layer_for(module)
        assert layer is not None
        quota = self.quota(layer.matrix_shape(module)[1])
        for batch in self.batches:
            for x, y in streams.inputs(leaf, batch):
                if scheme.rotation is not None:
                    x, y = (torch.ops.catquant.rotate(t, False) for t in (x, y))
                if scheme.activations is not None and y.is_floating_point():
                    y = quantize_activation(y, get_format(scheme.activations), *(input_range or (None, None)))
                window = layer.window(module, x, quota, generator)
                float_rows, rows = (layer.input_rows(module, t, window) for t in (x, y))
                if float_rows is None or rows is None:
                    return None
                chosen = self._chosen_rows(batch, name, x, rows, quota, generator)
                if chosen is not None:
                    float_rows, rows = float_rows[:, chosen], rows[:, chosen]
                sums.add(float_rows, rows)
        return sums.result()

    def input_range(self, leaf: Leaf, scheme: Scheme, streams: Streams) -> Range | None:
        """The static range of what a layer reads in the quantized stream, or None where it needs none."""
        layer = layer_for(streams.live.get_submodule(leaf.name))
        if scheme.activations is None or layer is None or not layer.static_activations:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        quota = max(1, RANGE_SAMPLE // len(self.batches))
        values = []
        for batch in self.batches:
            for x in leaf_inputs(streams.live, leaf, streams.calls[batch]):
                flat = x.flatten()
                values.append(flat[torch.randint(flat.numel(), (quota,), generator=generator).to(flat.device)])
        return fit_static_range(torch.cat(values), get_format(scheme.activations))

    def match_norm(self, leaf: Leaf, streams: Streams) -> None:
        """Match the batch norm ``leaf`` to the quantized stream."""
        float_sums, sums = ChannelSums(), ChannelSums()
        for batch in self.batches:
            for x, y in streams.inputs(leaf, batch):
                float_sums.add(x)
                sums.add(y)
        match_batch_norm(streams.live.get_submodule(leaf.name), float_sums, sums)

    def mask(self, batch: int, name: str, hidden: Tensor) -> Tensor | None:
        """Which rows of ``hidden``, flattened, are not padding; None if all are real."""
        mask = samples.padding_mask(self.data[batch], self.model, name, hidden)
        return None if mask is None else mask.flatten().to(hidden.device)

    def quota(self, columns: int) -> int:
        """Rows of each batch that go into the moments of ``columns`` columns."""
        return max(1, max(MAX_ROWS, ROWS_PER_COLUMN * columns) // len(self.batches))

    def _chosen_rows(
        self, batch: int, name: str, x: Tensor, rows: Tensor, quota: int, generator: torch.Generator
    ) -> Tensor | None:
        """Indices of the rows (B, M, K) that count: no padding, and of very many an equal random share of each batch."""
        mask = self._row_mask(batch, name, x, rows)
        if mask is None and rows.shape[1] <= quota:
            return None
        indices = torch.arange(rows.shape[1]) if mask is None else mask.nonzero().flatten().cpu()
        if len(indices) > quota:
            indices = indices[torch.randperm(len(indices), generator=generator)[:quota]]
        return indices.to(rows.device)

    def _row_mask(self, batch: int, name: str, x: Tensor, rows: Tensor) -> Tensor | None:
        """Which of the rows (B, M, K) are not padding; a convolution over time has one row a step it puts out."""
        if x.dim() == 3 and rows.shape[-1] != x.shape[-1]:
            x = x.new_empty(x.shape[0], rows.shape[1] // x.shape[0], 1)
        return self.mask(batch, name, x) if x.dim() in (2, 3) else None
