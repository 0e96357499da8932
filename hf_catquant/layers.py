"""Layers: modules whose weight is a matrix (N, K), held packed.

A subclass of :class:`QuantizedModule` says which module type it ``wraps``, how that module's weight is seen as rows
(N, K), and which rows of its input meet that matrix. Adding a layer type is adding a subclass; :func:`layer_for` finds
it by the exact type of the module, so that a subclass with a forward of its own is never replaced by mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D as TransposedLinear

from . import kernels  # noqa: F401  registers what the ops compute
from .formats import get_format, group_count
from .packing import check_bytes, pack, packed_width
from .weight import QuantizedWeight, storage_dtype

Window = tuple[tuple[int, int], tuple[int, int]]  # (first, count) of rows and of columns

LAYERS: dict[type[nn.Module], type[QuantizedModule]] = {}


@dataclass(frozen=True)
class Scheme:
    """All that is needed to build an empty quantized layer.

    Attributes:
        weights: format of the weight.
        group_size: columns that share a scale, -1 for whole rows.
        activations: format of the input, or None.
        scale_dtype: "float16" or "float32", the stored dtype of scale and offset.
    """

    weights: str
    group_size: int
    activations: str | None = None
    scale_dtype: str = "float16"


class QuantizedModule(nn.Module):
    """A layer with a packed weight (N, K) in G groups a row.

    Buffers: ``weight_packed`` (N, bytes) uint8, ``weight_scale`` (N, G) and for affine formats ``weight_offset`` (N, G)
    in the scheme's ``scale_dtype``; ``input_scale`` and ``input_offset`` () float32 where activations have a calibrated
    static range. ``bias`` (N,) is an ordinary parameter. ``weight`` answers with the dequantized float weight.

    Buffers keep their dtype under ``.to(dtype)`` and ``.half()``: only the compute dtype, and the bias, change.
    """

    wraps: ClassVar[type[nn.Module]]
    keeps: ClassVar[tuple[str, ...]] = ()  # attributes of the original that models read
    static_activations: ClassVar[bool] = False

    weight_packed: Tensor
    weight_scale: Tensor
    weight_offset: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    bias: nn.Parameter | None
    dtype: torch.dtype

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "wraps" in cls.__dict__:
            LAYERS[cls.wraps] = cls

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        """Make the empty layer that replaces ``original``, on its device and with its attributes."""
        super().__init__()
        fmt = get_format(scheme.weights)
        weight: Tensor = original.weight  # type: ignore[assignment]
        for name in self.keeps:
            setattr(self, name, getattr(original, name))
        self.scheme = scheme
        self.rows_, self.columns = self.matrix_shape(original)
        self.weight_shape = tuple(weight.shape)
        self.dtype = weight.dtype
        self.training = original.training
        device = weight.device
        shape = (self.rows_, group_count(self.columns, scheme.group_size))
        width = packed_width(fmt, self.columns, scheme.group_size)
        scale_dtype = getattr(torch, scheme.scale_dtype)
        static = scheme.activations is not None and self.static_activations
        input_affine = static and get_format(scheme.activations or "").affine
        self.register_buffer("weight_packed", torch.zeros(self.rows_, width, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=scale_dtype, device=device))
        self.register_buffer(
            "weight_offset", torch.zeros(shape, dtype=scale_dtype, device=device) if fmt.affine else None
        )
        zero = torch.zeros((), dtype=torch.float32, device=device)
        self.register_buffer("input_scale", zero if static else None)
        self.register_buffer("input_offset", zero.clone() if input_affine else None)
        bias = getattr(original, "bias", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad))

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """(N, K) of a float module's weight."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0], weight[0].numel()

    @classmethod
    def to_matrix(cls, weight: Tensor) -> Tensor:
        """A weight in the module's own shape as (N, K)."""
        return weight.reshape(weight.shape[0], -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(N, K) in the module's own weight shape."""
        return matrix.reshape(self.weight_shape)

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> Tensor | None:
        """Rows (B, M, K) of the input ``x`` that meet the matrix of ``module`` (float or quantized).

        B is the number of convolution groups: run b of N / B consecutive matrix rows meets rows ``[b]``. None where the
        input selects rows of the matrix instead of multiplying it.
        """
        raise TypeError(f"{type(module).__name__} has no input rows")

    @staticmethod
    def window(module: nn.Module, x: Tensor, rows: int, generator: torch.Generator) -> Window | None:
        """A part of the input that gives about ``rows`` rows where there are many more, or None for all of them."""
        return None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this particular module cannot be quantized, or None if it can."""
        return None

    @property
    def weight(self) -> Tensor:
        """The float weight this layer stands for, dequantized at every call, in the layer's compute dtype."""
        matrix = torch.ops.catquant.dequantize(
            *self._packed(), self.scheme.weights, self.scheme.group_size, self.columns, self.dtype
        )
        return self.from_matrix(matrix)

    @torch.no_grad()
    def fill(self, quantized: QuantizedWeight) -> None:
        """Pack what a solver found into the buffers, in place, and settle the dtype that its scales need."""
        dtype = storage_dtype(quantized.scale, quantized.offset)
        self.scheme = replace(self.scheme, scale_dtype=str(dtype).removeprefix("torch."))
        packed = pack(quantized.codes, get_format(self.scheme.weights), self.scheme.group_size)
        self.weight_packed = packed.to(self.weight_packed.device)
        self.weight_scale = quantized.scale.to(self.weight_scale.device, dtype)
        if quantized.offset is not None:
            self.weight_offset = quantized.offset.to(self.weight_scale.device, dtype)

    @torch.no_grad()
    def fill_input_range(self, scale: Tensor, offset: Tensor | None) -> None:
        """Set the calibrated static range of the input, () each."""
        self.input_scale = scale.detach().float().to(self.weight_scale.device)
        if offset is not None:
            self.input_offset = offset.detach().float().to(self.weight_scale.device)

    def check_values(self) -> None:
        """Refuse loaded buffers that cannot have been written by :meth:`fill`.

        Raises:
            ValueError: a scale, offset or range is not finite, or a byte stands for no code.
        """
        if self.weight_packed.is_meta:  # offloaded to disk: the checksums of the files have been verified
            return
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
                raise ValueError(f"{name} has values that are not finite")
        check_bytes(self.weight_packed, get_format(self.scheme.weights))

    def to_float(self) -> nn.Module:
        """A float module of the wrapped type with the dequantized weight and this layer's bias."""
        raise TypeError(f"{type(self).__name__} does not say how to build a {self.wraps.__name__}")

    def packed_tensors(self) -> list[Tensor]:
        """The tensors that hold the weight: codes, scale, and offset if there is one."""
        return [tensor for tensor in self._packed() if tensor is not None]

    def _packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight_packed, self.weight_scale, self.weight_offset

    def _float_state(self, module: nn.Module) -> nn.Module:
        module.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return module.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        kept = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        exact = {name: getattr(self, name) for name in kept}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_packed.device)).dtype
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:  # undo the cast, not the move
                setattr(self, name, exact[name].to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Shape and scheme, as printed inside ``print(model)``."""
        activations = "" if self.scheme.activations is None else f", activations={self.scheme.activations}"
        return f"{self.rows_}x{self.columns}, {self.scheme.weights}, group_size={self.scheme.group_size}{activations}"


class QuantizedLinear(QuantizedModule):
    """``nn.Linear`` with a packed weight; activations get a range for every token."""

    wraps: ClassVar[type[nn.Module]] = nn.Linear
    keeps = ("in_features", "out_features")
    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        scheme = self.scheme
        return torch.ops.catquant.linear(
            x, *self._packed(), None, None, self.bias, scheme.weights, scheme.group_size, scheme.activations
        )

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> Tensor:
        """x (..., K) as (1, M, K)."""
        return x.reshape(1, -1, x.shape[-1])

    def to_float(self) -> nn.Module:
        """An ``nn.Linear``."""
        module = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return self._float_state(module)


class QuantizedTransposedLinear(QuantizedLinear):
    """GPT-2's ``Conv1D``: a linear whose float weight is stored (K, N)."""

    wraps = TransposedLinear
    keeps = ("nf", "nx")
    nf: int
    nx: int

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """(N, K)."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[1], weight.shape[0]

    @classmethod
    def to_matrix(cls, weight: Tensor) -> Tensor:
        """(K, N) to (N, K)."""
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(N, K) to (K, N)."""
        return matrix.T

    def to_float(self) -> nn.Module:
        """A ``Conv1D``."""
        with torch.device("meta"):
            module = TransposedLinear(self.nf, self.nx)
        return self._float_state(module)


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

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *spatial), or without B, to (B, N, *spatial_out)."""
        unbatched = x.dim() == len(self.kernel_size) + 1
        x, padding = _padded(self, x.unsqueeze(0) if unbatched else x)
        scheme = self.scheme
        out = torch.ops.catquant.conv(
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
        return out.squeeze(0) if unbatched else out

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
        return self._float_state(module)


class QuantizedConv1d(_QuantizedConv):
    """``nn.Conv1d`` with a packed weight; activations have one calibrated range."""

    wraps = nn.Conv1d


class QuantizedConv2d(_QuantizedConv):
    """``nn.Conv2d`` with a packed weight; activations have one calibrated range."""

    wraps = nn.Conv2d


class QuantizedEmbedding(QuantizedModule):
    """``nn.Embedding`` with packed rows; only the rows that are looked up are unpacked."""

    wraps = nn.Embedding
    keeps = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, indices: Tensor) -> Tensor:
        """indices (...) to (..., K) in the layer's compute dtype."""
        scheme = self.scheme
        return torch.ops.catquant.embedding(
            indices, *self._packed(), scheme.weights, scheme.group_size, self.columns, self.dtype
        )

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> None:
        """None: indices select rows, they do not multiply."""
        return None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """``max_norm`` rewrites the float weight at every look-up, which packed rows cannot follow."""
        return None if module.max_norm is None else "nn.Embedding with max_norm changes its weight in forward"

    def to_float(self) -> nn.Module:
        """An ``nn.Embedding``."""
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return self._float_state(module)


def layer_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The layer that replaces a module of exactly this type, or None."""
    return LAYERS.get(type(module))


def _padded(module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with the padding that the op cannot do itself ("same" and the modes other than zeros), and what is left."""
    padding: Any = module.padding
    if module.padding_mode == "zeros" and not isinstance(padding, str):
        return x, tuple(padding)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around: Any = module._reversed_padding_repeated_twice
    return F.pad(x, around, mode=mode), (0,) * len(module.kernel_size)  # type: ignore[arg-type]
