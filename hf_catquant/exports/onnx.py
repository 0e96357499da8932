"""ONNX: a model with its weights packed in the file, decoded there by standard operators.

torch's exporter writes the graph; every op of this package becomes a call of a function (``onnx_functions.py``) that the
file holds, with the packed bytes, scales and offsets as its initializers, bit for bit. Corrections, rotations, low-rank
products and rounded inputs are in the graph as the reference computes them: nothing is lost. What a runtime does with the
functions is its own: onnxruntime decodes constants once, when it loads the file.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import Cache

from ..layers.experts import QuantizedExpertLinear
from ..packed_model import quantized_modules
from ..replay import without_cache
from . import onnx_functions as functions
from .common import Exported, Source, free_place, written_beside
from .onnx_check import check_answers, check_bytes
from .onnx_inputs import example_inputs
from .onnx_ops import Translator

LEAST_OPSET = 18  # ReduceMax, Pad and others as the functions call them


def export_onnx(
    model: nn.Module,
    path: str | Path,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Exported:
    """Write a quantized model in memory, of any library, as an ONNX file that holds its packed weights.

    Needs ``pip install 'hf-catquant[onnx]'``. The graph is what one call computes; where onnxruntime is installed, the
    file is run on the example too and has to answer as the model does.

    Args:
        model: with quantized layers, on the CPU; it is exported in evaluation mode and not changed.
        path: the file.
        args, kwargs: an example of what its forward takes.
        options: of ``torch.onnx.export``, such as ``dynamic_shapes`` (without it every size is that of the example),
            ``input_names``, ``output_names`` (without it the keys of the output, such as "logits") and ``opset_version``, at
            least 18.

    Raises:
        ValueError: something is at ``path``, nothing in the model is quantized, it has quantized experts or would answer
            with a cache of keys and values, the opset is too old, the file would be beyond 2 GB, packed bytes would not be
            in it, or onnxruntime answers something else or does not run the file.
        ImportError: onnx or onnxscript is not installed.
        torch.onnx.OnnxExporterError: torch cannot export the model.
    """
    _check_model(model, options)
    place = free_place(path)
    with _evaluating(model), torch.no_grad():
        output = model(*args, **(kwargs or {}))
        wanted = _answers(output)
        program = _translated(model, args, kwargs, options)
        _name_outputs(program.model.graph, options.get("output_names") or _keys(output))
        notes = check_bytes(model, program.model)
        with written_beside(place) as file:
            program.save(file)
            given = _by_name(program.model.graph.inputs, args, kwargs or {})
            notes += check_answers(model, file, given, wanted)
    return Exported(place, "onnx", place.stat().st_size, [], notes)


def write(source: Source, out: Path, *, lossy: bool = False, opset: int | None = None) -> Exported:
    """Write a transformers model that reads text, images or sound, with an example that its config gives.

    The number of samples is free, and so is that of tokens.

    Args:
        source: the model and where it came from.
        out: the file.
        lossy: changes nothing, as nothing is lost.
        opset: version of the standard operators, at least 18; None: torch's choice.

    Raises:
        ValueError, ImportError: as :func:`export_onnx`; or the config does not say what an example looks like.
    """
    kwargs, shapes = example_inputs(source.model, source.name)
    options = {} if opset is None else {"opset_version": opset}
    with without_cache(source.model):
        return export_onnx(source.model, out, (), kwargs, dynamic_shapes=shapes, **options)


def _check_model(model: nn.Module, options: dict[str, Any]) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an export to ONNX needs {' and '.join(missing)}: pip install 'hf-catquant[onnx]'")
    layers = quantized_modules(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} is not quantized: call torch.onnx.export for a float model")
    experts = [name for name, module in layers.items() if isinstance(module, QuantizedExpertLinear)]
    if experts:
        raise ValueError(
            f"{experts[0]} holds fused experts, whose rows the router sorts: ONNX has no such product. Call dequantize() "
            "and torch.onnx.export for a float file, or quantize with modules_to_not_convert naming the experts"
        )
    elsewhere = {str(tensor.device) for tensor in model.state_dict().values()} - {"cpu"}
    if elsewhere:
        raise ValueError(f"the model must be on the CPU to be exported, got tensors on {', '.join(sorted(elsewhere))}")
    opset = options.get("opset_version")
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f"opset_version must be at least {LEAST_OPSET}, got {opset}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _answers(output: Any) -> list[Tensor]:
    """The tensors of an output, in its order.

    Raises:
        ValueError: there is a cache among them.
    """
    leaves, _ = _pytree.tree_flatten(output, is_leaf=lambda value: isinstance(value, Cache))
    if any(isinstance(leaf, Cache) for leaf in leaves):
        raise ValueError(
            "the model answers with a cache of keys and values, which a graph of one call has no use for: pass "
            "kwargs={..., 'use_cache': False}"
        )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _keys(output: Any) -> list[str]:
    """The keys of an output that has some, one for each of its tensors, such as "logits" or "hidden_states.0"."""
    names: list[str] = []
    if not isinstance(output, Mapping):
        return names
    for key, value in output.items():
        names += [key] if isinstance(value, Tensor) else [f"{key}.{i}" for i in range(len(_answers(value)))]
    return names


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Give the outputs their names, in place, unless another value has one of them.

    torch does so before its optimizer; a tensor that is two outputs has one value there, which gets the last of its names.
    """
    inside = {value.name for node in graph for value in node.outputs} - {value.name for value in graph.outputs}
    if inside.isdisjoint(names) and not {value.name for value in graph.inputs}.intersection(names):
        for value, name in zip(graph.outputs, names, strict=False):
            value.name = name


def _by_name(inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an example by the names of the graph's inputs, which have the order of ``forward``'s parameters."""
    names = [value.name for value in inputs]
    named = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)}
    others = (args, {key: value for key, value in kwargs.items() if key not in named})
    rest = [leaf for leaf in _pytree.tree_leaves(others) if isinstance(leaf, Tensor)]
    return {**named, **dict(zip([name for name in names if name not in named], rest, strict=True))}


def _translated(model: nn.Module, args: tuple[Any, ...], kwargs: Any, options: dict[str, Any]) -> Any:
    """torch's ``ONNXProgram``, with the functions that it calls; packed bytes and halves as they are stored."""
    translator = Translator()
    given = {"verbose": False, **options, "optimize": False, "dynamo": True}
    with warnings.catch_warnings():  # of torch to itself, and that sizes of several inputs have one name
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="# The axis name")
        program: Any = torch.onnx.export(
            model, args, kwargs=kwargs, custom_translation_table=translator.table(), **given
        )
    graph = program.model
    # Before the functions are there: the optimizer would put them into the graph, and fold them.
    import_module("onnxscript.optimizer").optimize_ir(graph, should_fold=_may_fold)
    for value in graph.graph.initializers.values():
        value.metadata_props.clear()
    for node in graph.graph.all_nodes():  # traces of torch's calls, with places on the machine that exported
        for described in (node, *node.outputs):
            described.metadata_props.clear()
    opset = graph.opset_imports[""]
    read = import_module("onnxscript").ir.serde.deserialize_function
    for text in translator.used.values():
        function = read(functions.as_proto(text, opset))
        graph.functions[function.identifier()] = function
    graph.opset_imports[functions.DOMAIN] = functions.VERSION
    return program


def _may_fold(node: Any) -> bool | None:
    """Not a cast of float16 constants: they are low-rank products, and would take twice the bytes.

    Nor a GatherElements: onnx's evaluator, which folds, fails at one row of a batch, and the optimizer would say so.
    """
    if node.op_type == "GatherElements":
        return False
    held = node.inputs[0] if node.op_type == "Cast" else None
    return False if held is not None and held.const_value is not None and held.dtype.itemsize < 4 else None
