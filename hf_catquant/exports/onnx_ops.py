"""Ops of this package as torch's exporter of ONNX meets them: calls of functions, and products of the standard set.

The exporter folds and rewrites what it knows. It knows nothing of these functions until it is done: what they read stays as
it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from ..formats import get_format
from . import onnx_functions as functions

_FLOAT, _TYPES = 1, ["tensor(uint8)", "tensor(int32)", "tensor(int64)", "tensor(float)", "tensor(float16)"]
_TYPES += ["tensor(bfloat16)"]


class Translator:
    """What an op becomes, and which functions that takes.

    Attributes:
        used: the functions by name, in ONNX's text form.
    """

    def __init__(self) -> None:
        self.used: dict[str, functions.Text] = {}
        self._onnx, self._script = import_module("onnx"), import_module("onnxscript")
        self._op: Any = self._script.opset18  # operators that are called here are the same in later ones

    def table(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """``custom_translation_table`` of ``torch.onnx.export``."""
        ops = torch.ops.catquant
        return {
            getattr(ops, name).default: _function(getattr(self, name))
            for name in ("linear", "conv", "embedding", "dequantize", "cluster_affine", "rotate")
        }

    def _call(self, text: functions.Text, *inputs: Any) -> Any:
        """A call of a function that the file will hold; None among the inputs is left out."""
        self.used[text.name] = text
        given = [value for value in inputs if value is not None]
        defs = self._onnx.defs
        parameter = defs.OpSchema.FormalParameter
        schema = defs.OpSchema(
            text.name,
            functions.DOMAIN,
            functions.VERSION,
            inputs=[parameter(name, f"T{i}") for i, name in enumerate(text.inputs)],
            outputs=[parameter(text.output, "R")],
            type_constraints=[(name, _TYPES, "") for name in (*(f"T{i}" for i in range(len(given))), "R")],
        )
        opset = self._script.values.Opset(functions.DOMAIN, functions.VERSION)
        return self._script.values.Op(opset, text.name, schema)(*given)

    def _weight(
        self, x: Any, packed: Any, scale: Any, offset: Any, weights: str, group_size: int, columns: int
    ) -> Any:
        text = functions.dequantize(get_format(weights), columns, group_size)
        return self._as(self._call(text, packed, scale, offset), x.dtype)

    def _as(self, value: Any, dtype: Any) -> Any:
        """``value``, float32, in another dtype."""
        return value if int(dtype) == _FLOAT else self._op.Cast(value, to=int(dtype))

    def _rounded(self, x: Any, scale: Any, offset: Any, activations: str | None) -> Any:
        if activations is None:
            return x
        return self._call(functions.round_input(get_format(activations), scale is not None), x, scale, offset)

    def linear(self, x, packed, scale, offset, input_scale, input_offset, bias, weights, group_size, activations):
        """x_hat times w_hat transposed, plus bias."""
        x_hat = self._rounded(x, input_scale, input_offset, activations)
        weight = self._weight(x, packed, scale, offset, weights, group_size, int(x.shape[-1]))
        out = self._op.MatMul(x_hat, self._op.Transpose(weight, perm=[1, 0]))
        return out if bias is None else self._op.Add(out, self._cast_like(bias, x))

    def conv(
        self,
        x,
        packed,
        scale,
        offset,
        input_scale,
        input_offset,
        bias,
        weights,
        group_size,
        activations,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
    ):
        """The convolution of x_hat with w_hat in the shape of its kernel."""
        x_hat = self._rounded(x, input_scale, input_offset, activations)
        shape = [int(packed.shape[0]), int(x.shape[1]) // groups, *kernel_size]
        weight = self._weight(x, packed, scale, offset, weights, group_size, math.prod(shape[1:]))
        weight = self._op.Reshape(weight, self._op.Constant(value_ints=shape))
        given = [x_hat, weight] if bias is None else [x_hat, weight, self._cast_like(bias, x)]
        return self._op.Conv(
            *given,
            kernel_shape=list(kernel_size),
            strides=list(stride),
            pads=[*padding, *padding],
            dilations=list(dilation),
            group=groups,
        )

    def embedding(self, indices, packed, scale, offset, weights, group_size, columns, dtype):
        """Rows of w_hat at ``indices``."""
        text = functions.embedding(get_format(weights), columns, group_size)
        return self._as(self._call(text, indices, packed, scale, offset), dtype)

    def dequantize(self, packed, scale, offset, weights, group_size, columns, dtype):
        """w_hat, where a model reads the weight of a layer."""
        text = functions.dequantize(get_format(weights), columns, group_size)
        return self._as(self._call(text, packed, scale, offset), dtype)

    def cluster_affine(self, y, basis, centroids, gamma, beta):
        """The correction."""
        return self._call(functions.cluster_affine(basis is not None), y, basis, centroids, gamma, beta)

    def rotate(self, x, inverse):
        """R x, or R^T x."""
        return self._call(functions.rotate(int(x.shape[-1]), inverse), x)

    def _cast_like(self, value: Any, x: Any) -> Any:
        return value if value.dtype == x.dtype else self._as(value, x.dtype)


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a function, which torch writes an attribute of its own on."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call
