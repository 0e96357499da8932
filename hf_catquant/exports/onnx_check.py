"""Whether a file of ONNX holds the packed bytes of a model, and answers as it does."""

from __future__ import annotations

import hashlib
import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..correction import corrections
from ..inventory import shortly
from ..packed_model import quantized_modules
from . import onnx_functions as functions

_LARGEST = 2_000_000_000  # bytes: a protobuf holds 2 GiB
# Of the largest answer: sums in another order are well within, a wrong weight is not.
_CLOSE, _CLOSE_HALF = 1e-3, 3e-2


def check_bytes(model: nn.Module, graph: Any) -> list[str]:
    """What the file will hold packed, a note, and one of layers that it does not need.

    Args:
        model: with quantized layers.
        graph: the ``onnx_ir.Model`` made of it.

    Raises:
        ValueError: a function would read other bytes than a layer has, or the file would be too large.
    """
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if size > _LARGEST:
        raise ValueError(
            f"the file would hold {size / 1e9:.2f} GB, and a file of ONNX holds 2: export parts of the model"
        )
    layers = quantized_modules(model)
    names = {_digest(layer.weight_packed.numpy()): name for name, layer in layers.items()}
    read: dict[bytes, int] = {}
    for node in graph.graph.all_nodes():
        if node.domain == functions.DOMAIN and node.op_type.startswith(functions.DECODERS):
            value = node.inputs[int(node.op_type.startswith("embedding"))]
            packed = None if value is None or value.const_value is None else value.const_value.numpy()
            if packed is None or _digest(packed) not in names:
                raise ValueError(f"{node.op_type} would read {value}, which is no layer's packed weight")
            read[_digest(packed)] = packed.nbytes
    notes = [f"{len(read)} packed weights, {sum(read.values()) / 1e6:,.2f} MB of {size / 1e6:,.2f}"]
    unread = [name for digest, name in names.items() if digest not in read]
    return notes + ([f"not in the graph, as this call does not run them: {shortly(unread)}"] if unread else [])


def _digest(packed: Any) -> bytes:
    return hashlib.sha256(f"{packed.dtype} {packed.shape}".encode() + packed.tobytes()).digest()


def check_answers(model: nn.Module, file: Path, given: dict[str, Tensor], wanted: list[Tensor]) -> list[str]:
    """How far onnxruntime's answers are from the model's, a note.

    Args:
        model: for what may jump in it: rounded inputs, clusters.
        file: the file.
        given: the example, by the names of the file.
        wanted: the model's answers.

    Raises:
        ValueError: they are too far, or onnxruntime does not run the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return ["not run: onnxruntime is not installed"]
    runtime = import_module("onnxruntime")
    if any(tensor.dtype == torch.bfloat16 for tensor in (*given.values(), *wanted)):
        return ["not run: numpy, which onnxruntime is called with, has no bfloat16"]
    feed = {name: tensor.detach().numpy() for name, tensor in given.items()}
    try:
        found = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feed)
    except Exception as error:  # its errors have no class in common
        raise ValueError(f"onnxruntime {runtime.__version__} does not run the file: {error}") from error
    worst = max((_distance(*pair) for pair in zip(wanted, found, strict=True)), default=0.0)
    said = f"onnxruntime {runtime.__version__} answers the example within {worst:.1e} of the largest answer"
    close = _CLOSE_HALF if any(tensor.dtype == torch.float16 for tensor in wanted) else _CLOSE
    if worst > close and not _jumps(model):
        raise ValueError(f"{said}: the file does not compute what the model does")
    return [said]


def _jumps(model: nn.Module) -> bool:
    """Whether a value between two codes, or a row between two clusters, may go either way."""
    rounded = any(layer.scheme.activations for layer in quantized_modules(model).values())
    return rounded or any(len(correction.gamma) > 1 for correction in corrections(model).values())


def _distance(expected: Tensor, found: Any) -> float:
    """The largest difference, as a share of the largest finite value; infinite where only one is a number."""
    first, second = expected.double(), torch.from_numpy(found).double()
    same = (first == second) | (first.isnan() & second.isnan())
    if bool(same.all()):
        return 0.0
    scale = first[first.isfinite()].abs()
    difference = (first - second)[~same].abs().nan_to_num(nan=float("inf"))
    return float(difference.max() / (scale.max().clamp_min(1e-12) if len(scale) else 1.0))
