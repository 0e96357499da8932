"""The module with a packed weight (N, K) that every layer type builds on, and the registry that finds the types.

A subclass says which module type it ``wraps``, how that module's weight is seen as rows (N, K), and which rows of its
input meet that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..formats import get_format, group_count
from ..kernels import direct  # registers what the ops compute, too
from ..packing import check_bytes, pack, packed_width
from ..weight import QuantizedWeight, storage_dtype
from .state import PackedState

Window = tuple[tuple[int, int], tuple[int, int]]  # (first, count) of rows and of columns

LAYERS: dict[type[nn.Module], type[QuantizedModule]] = {}
# Layers that only hold a weight: nn.MultiheadAttention reads it and never runs them.
NEVER_RUN = (NonDynamicallyQuantizableLinear,)


@dataclass(frozen=True)
class Scheme:
    """All that is needed to build an empty quantized layer.

    Attributes:
        weights: format of the weight.
        group_size: columns that share a scale, -1 for whole rows.
        activations: format of the input, or None.
        scale_dtype: "float16" or "float32", the stored dtype of scale and offset.
        low_rank: rank of the float16 product that is added to the weight, 0 for none.
        rotation: "hadamard" where the weight is stored for a rotated input (``rotation.py``), or None.
    """

    weights: str
    group_size: int
    activations: str | None = None
    scale_dtype: str = "float16"
    low_rank: int = 0
    rotation: str | None = None


class QuantizedModule(PackedState):
    """A layer with a packed weight (N, K) in G groups a row.

    Buffers: ``weight_packed`` (N, bytes) uint8, ``weight_scale`` (N, G) and for affine formats ``weight_offset`` (N, G)
    in the scheme's ``scale_dtype``; ``low_rank_out`` (N, r) and ``low_rank_in`` (r, K) float16 where a product is added to
    the weight; ``input_scale`` and ``input_offset`` () float32 where activations have a calibrated
    static range. ``bias`` (N,) is an ordinary parameter. ``weight`` answers with the dequantized float weight.

    Buffers keep their dtype under ``.to(dtype)`` and ``.half()``: only the compute dtype, and the bias, change.

    Sharing a weight, and what state dicts hold and refuse, is :class:`PackedState`'s.
    """

    wraps: ClassVar[type[nn.Module]]
    keeps: ClassVar[tuple[str, ...]] = ()  # attributes of the original that models read
    static_activations: ClassVar[bool] = False
    rotates: ClassVar[bool] = False  # whether the layer can rotate its input
    takes_product: ClassVar[bool] = True  # whether a low-rank product can be added to the weight
    runs: int = 1  # parts of the weight that are solved one by one: experts
    # What a file holds under the name of a float parameter, so that a load without this package fails.
    sentinel: str = "weight"

    weight_packed: Tensor
    weight_scale: Tensor
    weight_offset: Tensor | None
    low_rank_out: Tensor | None
    low_rank_in: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    bias: nn.Parameter | None
    dtype: torch.dtype
    # Its name when the model was quantized, loaded or last saved, and the config that has it: layers can be moved.
    site: str | None = None
    origin: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "wraps" in cls.__dict__:
            LAYERS[cls.wraps] = cls

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        """Make the empty layer that replaces ``original``, on its device and with its attributes."""
        super().__init__()
        if scheme.rotation is not None and not self.rotates:
            raise ValueError(f"rotation must be None for a {type(original).__name__}, got {scheme.rotation!r}")
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
        for name, size in (("out", (self.rows_, scheme.low_rank)), ("in", (scheme.low_rank, self.columns))):
            product = torch.zeros(size, dtype=torch.float16, device=device) if scheme.low_rank else None
            self.register_buffer(f"low_rank_{name}", product)
        zero = torch.zeros((), dtype=torch.float32, device=device)
        self.register_buffer("input_scale", zero if static else None)
        self.register_buffer("input_offset", zero.clone() if input_affine else None)
        self.register_parameter("bias", getattr(original, "bias", None))  # itself: others may be tied to it

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """(N, K) of a float module's weight."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0], weight[0].numel()

    def reset_parameters(self) -> None:
        """Nothing: wav2vec2 asks it of layers that a checkpoint has just filled, where a float one keeps its values, too."""

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
    def example(cls, module: nn.Module) -> Tensor:
        """A small input that ``module`` takes, in the dtype and on the device of its weight."""
        raise TypeError(f"{cls.__name__} does not say what a {cls.wraps.__name__} takes")

    @classmethod
    def plain_forward(cls, module: nn.Module, x: Tensor) -> Tensor:
        """What a module of the wrapped type would return for ``x``, with the weight and the settings of ``module``."""
        return cls.wraps.forward(module, x)

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether ``module``, of a subclass of the wrapped type, does what the wrapped type does.

        It may own no other parameters and no modules (an adapter starts as zero, and would look the same), and has to
        return the same for an example. On the meta device there is nothing to compare: there a checkpoint says so.
        """
        if {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
            return False
        weight: Any = module.weight
        if any(True for _ in module.children()) or type(module) in NEVER_RUN or not weight.is_floating_point():
            return False
        if type(module).forward is cls.wraps.forward or weight.is_meta:
            return True
        if "_catquant_plain" in module.__dict__:  # found before, when its weight was in memory
            return module.__dict__["_catquant_plain"]
        x = cls.example(module)
        try:
            with torch.no_grad():
                found, plain = type(module).forward(module, x), cls.plain_forward(module, x)  # without its hooks
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        return isinstance(found, Tensor) and found.shape == plain.shape and torch.allclose(found, plain, rtol=0.01)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this particular module cannot be quantized, or None if it can."""
        return None

    @property
    def weight(self) -> Tensor:
        """The float weight this layer stands for, dequantized at every call, in the layer's compute dtype."""
        return self.from_matrix(self.matrix(self.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight as (N, K), the low-rank product included."""
        if self.scheme.rotation is None:
            return self.stored_matrix(dtype)
        return torch.ops.catquant.rotate(self.stored_matrix(torch.float32), True).to(dtype)

    def rotated(self, x: Tensor) -> Tensor:
        """The input x (..., K), or rows of a weight (N, K), in the basis of the stored matrix."""
        return x if self.scheme.rotation is None else direct.rotate(x, False)

    def target(self, weight: Tensor) -> Tensor:
        """What the stored matrix stands for: the float weight, in the module's own shape, as (N, K) float32."""
        return self.rotated(self.to_matrix(weight.detach()).float()).contiguous()

    def stored_matrix(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The dequantized weight as (N, K) in the basis it is stored in, the low-rank product included; or some rows."""
        product = self.product(torch.float32)
        exact = dtype if product is None else torch.float32
        scheme = self.scheme
        packed = (None if held is None else held[rows] for held in self._packed())
        matrix = torch.ops.catquant.dequantize(*packed, scheme.weights, scheme.group_size, self.columns, exact)
        return matrix if product is None else (matrix + product[0][rows] @ product[1]).to(dtype)

    def product(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The factors (N, r) and (r, K) of what is added to the weight, in ``dtype``; None where there are none."""
        if self.low_rank_out is None or self.low_rank_in is None:
            return None
        return self.low_rank_out.to(dtype), self.low_rank_in.to(dtype)

    @torch.no_grad()
    def fill(self, quantized: QuantizedWeight) -> None:
        """Pack what a solver found into the buffers, in place, and settle the dtype that its scales need."""
        dtype = storage_dtype(quantized.scale, quantized.offset)
        self.scheme = replace(self.scheme, scale_dtype=str(dtype).removeprefix("torch."))
        packed = pack(quantized.codes, get_format(self.scheme.weights), self.scheme.group_size)
        self.weight_packed = packed.to(self.weight_packed.device)
        # Copies: a solver may return two views of one tensor, and buffers that share memory cannot be saved.
        device = self.weight_scale.device
        self.weight_scale = quantized.scale.detach().contiguous().to(device, dtype, copy=True)
        if quantized.offset is not None:
            self.weight_offset = quantized.offset.detach().contiguous().to(device, dtype, copy=True)

    def keep_stored_dtypes(self) -> None:
        """Buffers in the dtypes that are stored: transformers widens those of layers that stay in float32."""
        scale = getattr(torch, self.scheme.scale_dtype)
        stored = {
            "weight_scale": scale,
            "weight_offset": scale,
            "low_rank_out": torch.float16,
            "low_rank_in": torch.float16,
        }
        for name, dtype in stored.items():
            buffer = getattr(self, name)
            if buffer is not None and buffer.dtype != dtype:
                setattr(self, name, buffer.to(dtype))

    def fill_low_rank(self, out: Tensor, into: Tensor) -> None:
        """Set the product (N, r) times (r, K) that is added to the weight, in place."""
        device = self.weight_scale.device
        self.low_rank_out = out.detach().contiguous().to(device, torch.float16, copy=True)
        self.low_rank_in = into.detach().contiguous().to(device, torch.float16, copy=True)

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

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None, *where: Tensor) -> Tensor:
        """What this layer would return for ``x`` (and what else its forward takes) with the float ``matrix`` (N, K) and
        ``bias``, both in its dtype.
        """
        raise TypeError(f"{type(self).__name__} does not say how it applies a matrix")

    def to_float(self) -> nn.Module:
        """A float module of the wrapped type with the dequantized weight and this layer's bias."""
        raise TypeError(f"{type(self).__name__} does not say how to build a {self.wraps.__name__}")

    def packed_tensors(self) -> list[Tensor]:
        """The tensors that hold the weight: codes, scale, and offset and low-rank product if there are any."""
        held = (*self._packed(), self.low_rank_out, self.low_rank_in)
        return [tensor for tensor in held if tensor is not None]

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
        self.reunite()  # a move makes a copy for each of them
        return self

    def extra_repr(self) -> str:
        """Shape and scheme, as printed inside ``print(model)``."""
        scheme = self.scheme
        more = "" if scheme.activations is None else f", activations={scheme.activations}"
        more += f", low_rank={scheme.low_rank}" if scheme.low_rank else ""
        more += f", rotation={scheme.rotation}" if scheme.rotation else ""
        return f"{self.rows_}x{self.columns}, {scheme.weights}, group_size={scheme.group_size}{more}"


def layer_for(module: nn.Module) -> type[QuantizedModule] | None:
    """The layer that replaces ``module``: that of its type, or of the type it is derived from if it does the same.

    None where there is none.
    """
    layer = LAYERS.get(type(module))
    if layer is None:
        base = next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)
        layer = base if base is not None and base.stands_for(module) else None
    return layer


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast, where that is on: what torch's own layers of matrices do with their input."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def waves(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Smooth values between -1 and 1, of ``shape``, in the dtype and on the device of ``weight``."""
    return torch.arange(math.prod(shape)).mul(0.7).sin().view(shape).to(weight.device, weight.dtype)
