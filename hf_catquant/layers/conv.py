"""Convolutions over time and images; activations have one calibrated range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ..kernels import direct
from .base import QuantizedModule, Scheme, Window, autocast, waves


class _QuantizedConv(QuantizedModule):
    keeps = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "output_padding",
        "transposed",
        "_reversed_padding_repeated_twice",
    )
    static_activations = True
    kernel_size: tuple[int, ...]
    groups: int

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        """As every layer; a weight norm (``torch.nn.utils.parametrizations``) is folded into the weight."""
        super().__init__(original, scheme)
        norm = _weight_norm(original)
        self.weight_norm_dim = None if norm is None else norm.dim
        if norm is not None:
            self.sentinel = "parametrizations.weight.original1"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial), or without B, to (B, N, *spatial_out)."""
        unbatched = x.dim() == len(self.kernel_size) + 1
        x = autocast(x)
        x, padding = _padded(self, x.unsqueeze(0) if unbatched else x)
        scheme = self.scheme
        out = direct.conv(
            x,
            *self._packed(),
            self.input_scale,
            self.input_offset,
            self.bias,
            scheme.weights,
            scheme.group_size,
            scheme.activations,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        product = self.product(x.dtype)
        if product is not None:
            out = out + self._low_rank(x, padding, *product)
        return out.squeeze(0) if unbatched else out

    def _low_rank(self, x: Tensor, padding: tuple[int, ...], out: Tensor, into: Tensor) -> Tensor:
        """What the product ``out`` (N, r) times ``into`` (r, K) adds: r channels a group, and all N from them."""
        rank, ones = len(into), (1,) * len(self.kernel_size)
        first = torch.cat([into.view(rank, -1, *self.kernel_size)] * int(self.groups))
        if self.groups == 1 and tuple(self.kernel_size) == ones and not any(padding):
            steps: Any = self.stride
            strided: Any = (..., *(slice(None, None, step) for step in steps))
            inside = _channels(x[strided], into)
        else:
            inside = self._conv(x, first, None, self.stride, padding, self.dilation, self.groups)
        if self.groups == 1:
            return _channels(inside, out)
        return self._conv(inside, out.view(*out.shape, *ones), None, 1, 0, 1, self.groups)

    @property
    def _conv(self) -> Any:
        return F.conv1d if len(self.kernel_size) == 1 else F.conv2d

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None, *where: Tensor) -> Tensor:
        """x (B, C, *spatial) to (B, N, *spatial_out)."""
        x, padding = _padded(self, x)
        return self._conv(x, self.from_matrix(matrix), bias, self.stride, padding, self.dilation, self.groups)

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> Tensor:
        """Patches of x (B, C, *spatial): (groups, B * positions, C / groups * prod(kernel_size)).

        ``window`` is a part of the output positions of an image, as :meth:`window` draws it.
        """
        conv: Any = module
        rank = len(conv.kernel_size)
        x, padding = _padded(module, x.unsqueeze(0) if x.dim() == rank + 1 else x)
        kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        if rank == 1:
            x = x.unsqueeze(2)
            kernel, padding, stride, dilation = (1, *kernel), (0, *padding), (1, *stride), (1, *dilation)
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        if window is not None:
            sides = zip(window, stride, dilation, kernel, strict=True)
            rows, columns = (slice(at * s, (at + n - 1) * s + d * (k - 1) + 1) for (at, n), s, d, k in sides)
            x = x[:, :, rows, columns]
        patches = F.unfold(x, kernel, dilation, 0, stride)
        batch, _, positions = patches.shape
        shape = (batch, conv.groups, -1, positions)
        return patches.view(shape).permute(1, 0, 3, 2).reshape(conv.groups, batch * positions, -1)

    @staticmethod
    def window(module: nn.Module, x: Tensor, rows: int, generator: torch.Generator) -> Window | None:
        """A random window of output positions, the same for all images of x, that gives about ``rows`` rows.

        None if all positions are no more than that. Images only: steps of time have padding, which a window would hide.
        """
        conv: Any = module
        if x.dim() != 4:
            return None
        around = conv._reversed_padding_repeated_twice  # (left, right, top, bottom)
        grown = (x.shape[2] + around[2] + around[3], x.shape[3] + around[0] + around[1])
        sides = zip(grown, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        sizes = [(size - d * (k - 1) - 1) // s + 1 for size, d, k, s in sides]
        share = (rows / (len(x) * sizes[0] * sizes[1])) ** 0.5
        if share >= 1:
            return None
        lengths = [max(1, round(size * share)) for size in sizes]
        starts = [int(torch.randint(n - w + 1, (), generator=generator)) for n, w in zip(sizes, lengths, strict=True)]
        return (starts[0], lengths[0]), (starts[1], lengths[1])

    @classmethod
    def example(cls, module: nn.Module) -> Tensor:
        """One input that is a little larger than the kernel."""
        conv: Any = module
        sides = zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)
        spatial = [d * (k - 1) + 1 + 2 * s + 1 for d, k, s in sides]
        return waves(conv.weight, (1, conv.in_channels, *spatial))

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """As everywhere; a weight norm on the weight is no difference."""
        if set(module._modules) == {"parametrizations"}:
            own = set(module._parameters) - {"bias"}
            return not own and _weight_norm(module) is not None and type(module).forward is cls.wraps.forward
        return super().stands_for(module)

    def to_float(self) -> nn.Module:
        """A convolution of the wrapped type."""
        module = self.wraps(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        self._float_state(module)
        if self.weight_norm_dim is not None:
            parametrizations.weight_norm(module, dim=self.weight_norm_dim)
            module.requires_grad_(False)
        return module


class QuantizedConv1d(_QuantizedConv):
    """``nn.Conv1d`` with a packed weight; activations have one calibrated range."""

    wraps = nn.Conv1d


class QuantizedConv2d(_QuantizedConv):
    """``nn.Conv2d`` with a packed weight; activations have one calibrated range."""

    wraps = nn.Conv2d


def _weight_norm(module: nn.Module) -> Any:
    """The weight norm that is the only parametrization of ``module``, None if there is none or another one."""
    held: Any = module._modules.get("parametrizations")
    if held is None or set(held._modules) != {"weight"} or len(held.weight) != 1:
        return None
    return held.weight[0] if type(held.weight[0]).__name__ == "_WeightNorm" else None


def _padded(module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with the padding that the op cannot do itself ("same" and the modes other than zeros), and what is left."""
    padding: Any = module.padding
    if module.padding_mode == "zeros" and not isinstance(padding, str):
        return x, tuple(padding)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around: Any = module._reversed_padding_repeated_twice
    return F.pad(x, around, mode=mode), (0,) * len(module.kernel_size)  # type: ignore[arg-type]


def _channels(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of one position: weight (N, C) on x (B, C, *spatial). Threads change how torch's own adds up."""
    return F.linear(x.movedim(1, -1), weight).movedim(-1, 1)
