"""What the ops compute, as functions of ONNX in its own text: a file holds one for each format and shape that it uses.

    dequantize_ternary_768_by_64 (packed, scale, offset) => (weight)      (N, bytes) uint8 -> (N, K) float32
    embedding_int8_768_by_768 (indices, packed, scale) => (rows)          (...) int64 -> (..., K) float32
    rotate_768 (x) => (y), rotate_back_768 (x) => (y)                     (..., K), in the dtype of x
    round_int8 (x) => (y), round_int8_once (x, scale, offset) => (y)      a range a row, one calibrated range
    cluster_affine (y, centroids, gamma, beta) => (z)                     in the dtype of y

They are what ``packing.py``, ``weight.py``, ``rotation.py`` and ``kernels/reference.py`` say, in operators of version 18 of
the standard set.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor

from ..formats import Format, group_count, group_width
from ..packing import packed_width
from ..rotation import block_size, signs, walsh_factors

DOMAIN = "hf_catquant"
VERSION = 1
DECODERS = ("dequantize_", "embedding_")  # their functions read packed bytes
_INT32, _FLOAT = 6, 1  # onnx.TensorProto


class Text:
    """A function under way: lines of ONNX's text form, and names for the results in between."""

    def __init__(self, name: str, inputs: Iterable[str], output: str) -> None:
        self.name, self.inputs, self.output = name, list(inputs), output
        self.lines: list[str] = []

    def add(self, operator: str, *inputs: str, out: str | None = None, **attributes: int) -> str:
        """One operator; the name of its result."""
        made = out or f"v{len(self.lines)}"
        given = ", ".join(f"{key} = {value}" for key, value in attributes.items())
        self.lines.append(f"{made} = {operator}{f' <{given}>' if given else ''} ({', '.join(inputs)})")
        return made

    def constant(self, kind: str, values: Iterable[float] | float) -> str:
        """A constant of the type ``kind``, "float", "int32" or "int64": a list, or one number."""
        number = isinstance(values, int | float)
        listed = [values] if isinstance(values, int | float) else list(values)
        said = ", ".join(repr(float(value) if kind == "float" else int(value)) for value in listed)
        made = f"v{len(self.lines)}"
        self.lines.append(f"{made} = Constant <value = {kind}{'' if number else f'[{len(listed)}]'} {{{said}}}> ()")
        return made

    def reshape(self, x: str, *shape: int) -> str:
        """x in ``shape``: 0 is the side it has, -1 what is left."""
        return self.add("Reshape", x, self.constant("int64", shape))

    def head(self, x: str, length: int, axis: int) -> str:
        """The first ``length`` along ``axis``."""
        zero, end, at = (self.constant("int64", [value]) for value in (0, length, axis))
        return self.add("Slice", x, zero, end, at)

    def written(self, opset: int) -> str:
        """The function in ONNX's text form."""
        body = "\n".join(f"  {line}" for line in self.lines)
        head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
        return f"{head}\n{self.name} ({', '.join(self.inputs)}) => ({self.output}) {{\n{body}\n}}"


def dequantize(fmt: Format, columns: int, group_size: int) -> Text:
    """Packed rows (N, bytes) uint8, scale and offset (N, G), to w_hat (N, ``columns``) float32."""
    inputs = ["packed", "scale", *(["offset"] if fmt.affine else [])]
    text = Text(f"dequantize_{_shape_name(fmt, columns, group_size)}", inputs, "weight")
    _decoded(text, fmt, columns, group_size, *inputs, out="weight")
    return text


def embedding(fmt: Format, columns: int, group_size: int) -> Text:
    """Rows of w_hat (N, ``columns``) at indices (...) int64, to (..., ``columns``) float32; only these are decoded."""
    inputs = ["packed", "scale", *(["offset"] if fmt.affine else [])]
    text = Text(f"embedding_{_shape_name(fmt, columns, group_size)}", ["indices", *inputs], "rows")
    flat = text.reshape("indices", -1)
    found = [text.add("Gather", name, flat) for name in inputs]
    rows = _decoded(text, fmt, columns, group_size, *found)
    shape = text.add("Concat", text.add("Shape", "indices"), text.constant("int64", [columns]), axis=0)
    text.add("Reshape", rows, shape, out="rows")
    return text


def _shape_name(fmt: Format, columns: int, group_size: int) -> str:
    return f"{fmt.name}_{columns}_by_{group_width(columns, group_size)}"


def _decoded(text: Text, fmt: Format, columns: int, group_size: int, packed: str, *numbers: str, out: str = "") -> str:
    width, groups = group_width(columns, group_size), group_count(columns, group_size)
    group_bytes = fmt.packed_len(width)
    x = text.add("Cast", packed, out="bytes", to=_INT32)
    missing = groups * group_bytes - packed_width(fmt, columns, group_size)
    if missing:  # of the last group
        x = text.add("Pad", x, text.constant("int64", [0, 0, 0, missing]))
    words = group_bytes // fmt.nbytes
    x = text.reshape(x, 0, groups, words, fmt.nbytes)
    if fmt.nbytes > 1:
        x = text.add("Mul", x, text.constant("int32", [256**i for i in range(fmt.nbytes)]))
        x = text.add("ReduceSum", x, text.constant("int64", [-1]), keepdims=1)
    if fmt.digits > 1:
        x = text.add("Div", x, text.constant("int32", [fmt.radix**i for i in range(fmt.digits)]))
        x = text.add("Mod", x, text.constant("int32", fmt.radix), out="codes")
    x = text.add("Gather", text.constant("float", fmt.levels), x, out="levels")
    x = text.reshape(x, 0, groups, words * fmt.digits)
    if words * fmt.digits > width:
        x = text.head(x, width, 2)
    for name, operator in zip(numbers, ("Mul", "Add"), strict=False):
        number = text.add("Cast", name, to=_FLOAT)
        x = text.add(operator, x, text.add("Unsqueeze", number, text.constant("int64", [-1])))
    x = text.reshape(x, 0, groups * width)
    if groups * width > columns:
        x = text.head(x, columns, 1)
    return text.add("Identity", x, out=out) if out else x


def rotate(columns: int, inverse: bool) -> Text:
    """R x of the rows of x (..., ``columns``), or R^T x."""
    text = Text(f"rotate_{'back_' if inverse else ''}{columns}", ["x"], "y")
    size = block_size(columns)
    first, second = walsh_factors(size, "cpu")
    x = text.add("Cast", "x", to=_FLOAT)
    turned = text.constant("float", signs(columns, first.device).tolist())
    if not inverse:
        x = text.add("Mul", x, turned)
    x = text.reshape(x, -1, columns // size, len(first), len(second))
    x = text.add("MatMul", _matrix(text, first), text.add("MatMul", x, _matrix(text, second)))
    x = text.add("Reshape", x, text.add("Shape", "x"))
    x = text.add("Mul", x, text.constant("float", size**-0.5))
    text.add("CastLike", text.add("Mul", x, turned) if inverse else x, "x", out="y")
    return text


def round_input(fmt: Format, static: bool) -> Text:
    """x_hat of x (..., K): each row in a range of its own, or ``static``, all in the calibrated one."""
    inputs = ["x", "scale", *(["offset"] if fmt.affine else [])] if static else ["x"]
    text = Text(f"round_{fmt.name}{'_once' if static else ''}", inputs, "y")
    low, high = (text.constant("float", level) for level in (fmt.levels[0], fmt.levels[-1]))
    x = text.add("Cast", "x", to=_FLOAT)
    scale, offset = ("scale", "offset") if static else _row_range(text, x, low, high, fmt)
    codes = text.add("Div", text.add("Sub", x, offset) if fmt.affine else x, scale)
    codes = text.add("Clip", text.add("Round", codes), low, high)
    x = text.add("Mul", codes, scale)
    text.add("CastLike", text.add("Add", x, offset) if fmt.affine else x, "x", out="y")
    return text


def cluster_affine(projected: bool) -> Text:
    """gamma[c] * y + beta[c], c the nearest of the centroids (C, P) to y (..., D) @ basis (D, P)."""
    basis = ["basis"] if projected else []
    name = "cluster_affine" + ("_projected" if projected else "")
    text = Text(name, ["y", *basis, "centroids", "gamma", "beta"], "z")
    y = text.add("Cast", "y", to=_FLOAT)
    place = text.add("MatMul", y, "basis") if projected else y
    size = text.add("ReduceSum", text.add("Mul", "centroids", "centroids"), text.constant("int64", [-1]), keepdims=0)
    place = text.add("Mul", place, text.constant("float", 2.0))
    distance = text.add("Sub", size, text.add("MatMul", place, text.add("Transpose", "centroids")))
    cluster = text.add("ArgMin", distance, axis=-1, keepdims=0)
    y = text.add("Mul", text.add("Gather", "gamma", cluster), y)
    y = text.add("Add", y, text.add("Gather", "beta", cluster))
    text.add("CastLike", y, "y", out="z")
    return text


def _row_range(text: Text, x: str, low: str, high: str, fmt: Format) -> tuple[str, str]:
    """``weight.dynamic_range``: scale, and offset of an affine format."""
    last, zero, one = text.constant("int64", [-1]), text.constant("float", 0.0), text.constant("float", 1.0)
    if fmt.affine:
        least = text.add("Min", text.add("ReduceMin", x, last), zero)
        most = text.add("Max", text.add("ReduceMax", x, last), zero)
        span = text.add("Sub", high, low)
        step = text.add("Div", text.add("Sub", most, least), span)
    else:
        step = text.add("Div", text.add("ReduceMax", text.add("Abs", x), last), high)
    scale = text.add("Where", text.add("Greater", step, zero), step, one)
    if not fmt.affine:
        return scale, ""
    level = text.add("Round", text.add("Sub", low, text.add("Div", least, scale)))
    return scale, text.add("Mul", text.add("Neg", level), scale)


def _matrix(text: Text, matrix: Tensor) -> str:
    return text.reshape(text.constant("float", matrix.flatten().tolist()), *matrix.shape)


def as_proto(text: Text, opset: int) -> Any:
    """The function as ``onnx.FunctionProto``."""
    return import_module("onnx.parser").parse_function(text.written(opset))
