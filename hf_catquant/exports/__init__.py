"""Exports: a quantized model in a form that runs without this package.

| target | what is written | loads in |
|---|---|---|
| ``safetensors`` | a float model, the weights dequantized | transformers |
| ``gguf`` | blocks of GGML's own types, of Llama-like models | llama.cpp and what is built on it |
| ``gemma``, ``metal`` | packed integers as transformers' quantizers of these names store them | transformers |
| ``onnx`` | a graph of one call with the packed weights, corrections and rounded inputs | onnxruntime |

Only ``onnx`` knows a correction of several clusters, and rounds inputs. What the others would lose is refused or, with
``lossy=True``, left out and said.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import builtin, gguf_file, onnx, plain
from .common import Exported, free_place, open_model
from .onnx import export_onnx

__all__ = ["TARGETS", "Exported", "export", "export_onnx"]

TARGETS: dict[str, Callable[..., Exported]] = {
    "safetensors": plain.write,
    "gguf": gguf_file.write,
    "gemma": builtin.write_gemma,
    "metal": builtin.write_metal,
    "onnx": onnx.write,
}


def export(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    to: str = "safetensors",
    *,
    lossy: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Exported:
    """Write a quantized model in a form that needs no hf_catquant; says what was written and what was left out.

    Args:
        model: folder or Hub id of a quantized model, or one in memory, which is not changed.
        out: folder to make, for "gguf" and "onnx" the file; it must not be there.
        to: a key of :data:`TARGETS`.
        lossy: leave out what the target has no place for, instead of refusing.
        trust_remote_code: run the code that comes with the model.
        options: of the target. "safetensors": ``dtype``, of the float weights. "gguf": ``ternary``, "TQ2_0" (the default,
            faster) or "TQ1_0" (smaller); ``vocabulary=False`` leaves the tokenizer and its chat templates out.
            "onnx": ``opset``, the version of the standard operators.

    Raises:
        ValueError: there is no such target or option, ``out`` exists, the model is not quantized, or the export would lose
            something and ``lossy`` is not set.
        ImportError: "gguf" or "onnx" without the packages that write such files.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    taken = [name for name in signature(TARGETS[to]).parameters if name not in ("source", "out", "lossy")]
    unknown = [name for name in options if name not in taken]
    if unknown:
        raise ValueError(f"an export to {to} has no option {unknown[0]!r}; it has {', '.join(taken) or 'none'}")
    place = free_place(out)
    return TARGETS[to](open_model(model, trust_remote_code), place, lossy=lossy, **options)
