"""ONNX: a quantized model in standard operators, its weights still packed.

    export_onnx(model, {"input_ids": ids, "attention_mask": mask}, "model.onnx")

Every op of this package is replaced by what the reference computes: bytes are looked up in a table of levels, scaled, and
multiplied. So any runtime runs the file, and the file has the size of the codes; but what a runtime folds when it loads the
file, and multiplies, is the float weight: it is smaller on the disk, not in memory, and not faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import reference
from .layers.experts import Experts

OPS = ("linear", "conv", "embedding", "dequantize", "cluster_affine", "rotate")


class _Outputs(nn.Module):
    """The tensors that a model returns, in order, and nothing else."""

    def __init__(self, model: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        output: Any = self.model(**inputs)
        if self.names is None:
            return (output,)
        return tuple(output[name] for name in self.names)


@torch.no_grad()
def export_onnx(model: nn.Module, inputs: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Write ``model`` to ``path`` as ONNX.

    Args:
        model: a quantized model; it is put into evaluation mode for the time of the export.
        inputs: an example of what its ``forward`` takes, by name; the sizes of the first two dimensions of integer inputs,
            and of the first of others, stay free in the file.
        path: of the file; large tensors go beside it.

    Returns:
        The names of the outputs.

    Raises:
        ImportError: onnx and onnxscript are not installed.
        TypeError: the model returns something else than tensors.
        ValueError: it has fused experts, whose rows depend on the data.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs onnx and onnxscript: pip install onnx onnxscript") from error
    if any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError(
            "fused experts cannot be exported: how many rows an expert has is in the data, not in the shapes"
        )
    training = model.training
    model.eval()
    try:
        names = _output_names(model(**inputs))
        wrapped = _Outputs(model, names)
        shapes = {name: _free(value) for name, value in inputs.items()}
        exported = torch.export.export(wrapped, (), dict(inputs), dynamic_shapes={"inputs": shapes}, strict=False)
        plain = exported.run_decompositions({_op(name): getattr(reference, name) for name in OPS})
        program: Any = torch.onnx.export(
            plain,
            dynamo=True,
            optimize=False,  # the optimizer would fold the packed weights into float ones
            input_names=list(inputs),
            output_names=names or ["output"],
            verbose=False,
        )
        program.save(str(path))
    finally:
        model.train(training)
    return names or ["output"]


def _op(name: str) -> Any:
    return getattr(torch.ops.catquant, name).default


def _free(value: Tensor) -> dict[int, Any]:
    """The dimensions whose sizes may differ from those of the example."""
    count = min(value.dim(), 1 if value.is_floating_point() else 2)
    return dict.fromkeys(range(count), torch.export.Dim.AUTO)


def _output_names(output: Any) -> list[str] | None:
    """Names of the tensors in what a model returned, None for a single tensor."""
    if isinstance(output, Tensor):
        return None
    names = [name for name, value in output.items() if isinstance(value, Tensor)] if hasattr(output, "items") else []
    if not names:
        raise TypeError(
            f"a model to export must return a tensor or a ModelOutput with tensors, got {type(output).__name__}"
        )
    return names
