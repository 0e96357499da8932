"""A quantized layer whose codes, scales, offsets and bias can be learned: what the packed layer will compute.

    w_hat = scale * level[round(u)] + offset        u (N, K): codes as real numbers, the gradient passes the rounding

A code starts where the solver left it: u is the float weight in steps of its grid, moved into the cell of its code, so the
weights that were nearly another code are the first to change. Where the input is quantized the gradient passes that, too; a
calibrated static range is learned with it (LSQ, arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats import Format, get_format
from .layers import QuantizedModule
from .packing import unpack
from .weight import QuantizedWeight, expand_groups, quantize_activation

_MARGIN = 0.1  # of a step: how far from the border of its cell a code starts at least
MAX_RADIX = 16  # codebooks of more levels have nothing to gain from moving their codes


class LearnedLayer(nn.Module):
    """Stands in the place of ``layer`` while it is learned.

    Parameters, all float32: ``codes`` (N, K) real numbers, ``scale`` (N, G), ``offset`` (N, G) or None, ``bias`` (N,) or
    None, ``input_scale`` () or None, ``low_rank`` (N, r) and (r, K) or empty.

    Args:
        layer: the packed layer.
        weight: the float weight (N, K), in the basis it is stored in.
        generator: of the random dropping of input quantization.
    """

    def __init__(self, layer: QuantizedModule, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        # Before the layer is there: what it has already, a module refuses to register.
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        self.input_scale = None if layer.input_scale is None else nn.Parameter(layer.input_scale.clone())
        object.__setattr__(self, "layer", layer)  # not a child: its buffers are not learned
        self.generator = generator
        self.drop = 0.0
        scheme = layer.scheme
        self.format: Format = get_format(scheme.weights)
        self.first, self.step = self.format.levels[0], self.format.levels[1] - self.format.levels[0]
        self.scale = nn.Parameter(layer.weight_scale.float().clone())
        self.offset = None if layer.weight_offset is None else nn.Parameter(layer.weight_offset.float().clone())
        factors = layer.product(torch.float32) or ()
        self.low_rank = nn.ParameterList([nn.Parameter(factor.clone()) for factor in factors])
        self.start = unpack(layer.weight_packed, self.format, scheme.group_size, layer.columns)
        product = self.low_rank[0].detach() @ self.low_rank[1].detach() if self.low_rank else 0
        self.codes = nn.Parameter(self._inside_cells(weight.float() - product))

    def __getattr__(self, name: str) -> Any:
        """What is not learned is asked of the layer: models read ``weight.dtype`` or ``in_features``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    @torch.no_grad()
    def _inside_cells(self, weight: Tensor) -> Tensor:
        scale = self._columns(self.scale)
        wanted = weight if self.offset is None else weight - self._columns(self.offset)
        codes = (wanted / torch.where(scale > 0, scale, torch.ones_like(scale)) - self.first) / self.step
        start, reach = self.start.float(), 0.5 - _MARGIN
        # The outermost cells are open: a weight beyond them may be anywhere.
        low = torch.where(start > 0, start - reach, torch.full_like(start, -0.5))
        high = torch.where(
            start < self.format.radix - 1, start + reach, torch.full_like(start, self.format.radix - 0.5)
        )
        return torch.minimum(torch.maximum(codes, low), high)

    def matrix(self) -> Tensor:
        """w_hat (N, K) float32."""
        rounded = self.rounded()
        # Straight through, but no further than half a step beyond the outermost levels: there nothing would come back.
        levels = rounded + (self.codes - self.codes.detach()) * self._is_open()
        # A scale below zero stands for zero, and may come back.
        scale = self.scale + (self.scale.clamp_min(0) - self.scale).detach()
        matrix = (levels * self.step + self.first) * self._columns(scale)
        return matrix if self.offset is None else matrix + self._columns(self.offset)

    def rounded(self) -> Tensor:
        """The codes (N, K) as they would be packed, float32."""
        return self.codes.detach().round().clamp_(0, self.format.radix - 1)

    def changed(self) -> float:
        """Share of the codes that are no longer what the solver chose."""
        return float((self.rounded() != self.start).float().mean())

    def drift(self) -> Tensor:
        """Mean squared change of scales and offsets since the solver, relative to their mean sizes, ()."""
        pairs = ((self.scale, self.layer.weight_scale), (self.offset, self.layer.weight_offset))
        moves = [
            ((now - start.float()) / start.float().abs().mean().clamp_min(1e-12)).square().mean()
            for now, start in pairs
            if now is not None
        ]
        return torch.stack(moves).sum()

    def forward(self, x: Tensor, *where: Tensor) -> Tensor:
        """What the packed layer will return for ``x`` and what else it takes."""
        x = self.layer.rotated(x)
        dtype = x.dtype if x.is_floating_point() else self.layer.dtype  # an embedding is given indices
        matrix = self.matrix().to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        out = self.layer.apply_matrix(self._quantized_input(x), matrix, bias, *where)
        if not self.low_rank:
            return out
        return out + self.layer.apply_matrix(x, (self.low_rank[0] @ self.low_rank[1]).to(dtype), None)

    @torch.no_grad()
    def write_back(self) -> QuantizedModule:
        """Pack what was learned into the layer, and return it."""
        layer, offset = self.layer, self.offset
        layer.fill(QuantizedWeight(self.rounded().to(torch.uint8), self.scale.clamp_min(0), offset))
        if self.low_rank:
            layer.fill_low_rank(*self.low_rank)
        if self.bias is not None and layer.bias is not None:
            layer.bias.copy_(self.bias)
        if self.input_scale is not None:
            layer.fill_input_range(self.input_scale, self._input_offset())
        return layer

    def _columns(self, values: Tensor) -> Tensor:
        return expand_groups(values, self.layer.columns, self.layer.scheme.group_size)

    def _is_open(self) -> Tensor:
        codes = self.codes.detach()
        return ((codes > -0.501) & (codes < self.format.radix - 0.499)).float()

    def _input_offset(self) -> Tensor | None:
        """The calibrated offset in steps of the learned scale: the level of zero stays."""
        layer = self.layer
        if layer.input_offset is None or self.input_scale is None:
            return None
        return (layer.input_offset / layer.input_scale) * self.input_scale

    def _quantized_input(self, x: Tensor) -> Tensor:
        activations = self.layer.scheme.activations
        if activations is None or not x.is_floating_point():
            return x
        fmt = get_format(activations)
        if self.input_scale is None:
            x_hat = x + (quantize_activation(x.detach(), fmt) - x).detach()
        else:
            offset = self._input_offset()
            steps = ((x.float() if offset is None else x.float() - offset) / self.input_scale).clamp(*_ends(fmt))
            values = (steps + (steps.round() - steps).detach()) * self.input_scale
            x_hat = (values if offset is None else values + offset).to(x.dtype)
        if self.drop == 0:
            return x_hat
        dropped = torch.rand(x.shape, generator=self.generator) < self.drop
        return torch.where(dropped.to(x.device), x, x_hat)


def _ends(fmt: Format) -> tuple[float, float]:
    return fmt.levels[0], fmt.levels[-1]
