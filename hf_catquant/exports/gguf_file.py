"""GGUF: a Llama-like model in the blocks of llama.cpp, with its vocabulary.

Codes are moved, not rounded again (``blocks.py``). A matrix that fits no block (its columns are no multiple of 32, or
float16 does not hold its scales) stays float, as exact as before. Rows of the query and key projections are put in the
order of the rotary embedding that llama.cpp has for the ``llama`` architecture. llama.cpp rounds the inputs of every
product to 8 bits in its own way, so its logits differ from ours by that.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..packed_model import quantized_modules
from .blocks import encode
from .common import Exported, Source, fold_corrections, settle_losses, source_folder, written_beside
from .gguf_check import bytes_of, check_file
from .vocabulary import vocabulary_fields, write_fields

# Model type to llama.cpp's architecture; all of them are pre-norm decoders with a gated SiLU feed-forward and RMS norms.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TERNARY = ("TQ2_0", "TQ1_0")


def write(
    source: Source, out: Path, *, lossy: bool = False, ternary: str = "TQ2_0", vocabulary: bool = True
) -> Exported:
    """Write one file.

    Args:
        source: a causal language model of :data:`ARCHITECTURES`.
        out: the file.
        lossy: leave out corrections and the rounding of inputs.
        ternary: "TQ2_0" or "TQ1_0".
        vocabulary: write the tokenizer, its chat templates and the tokens at which an answer ends.

    Raises:
        ValueError: the model has another architecture, a rotation, a low-rank product, a setting that llama.cpp has no
            place for, or a tokenizer that it does not know; or something would be lost.
        ImportError: there is no ``gguf``.
    """
    library = _library()
    model: Any = source.model
    if ternary not in TERNARY:
        raise ValueError(f"ternary must be {' or '.join(TERNARY)}, got {ternary!r}")
    _check_architecture(model)
    _check_layers(model)
    fields = vocabulary_fields(source_folder(source), model) if vocabulary else None
    lost = [*_settings_lost(model.config), *(fields or {}).get("lost", ()), *fold_corrections(model)]
    lost = settle_losses(source, lost, lossy, "gguf")
    arch = ARCHITECTURES[model.config.model_type]
    moved, kinds, written = 0.0, Counter[str](), dict[str, tuple[str, int, int]]()
    with written_beside(out) as file:
        writer = library.GGUFWriter(file, arch)
        _write_settings(writer, library, model)
        write_fields(writer, fields)
        names = library.get_tensor_name_map(getattr(library.MODEL_ARCH, arch.upper()), model.config.num_hidden_layers)
        for name, data, kind, by in _tensors(model, arch, ternary):
            stem, _, suffix = name.rpartition(".")
            target = names.get_name(stem)
            if target is None:
                raise ValueError(f"{name}: llama.cpp's {arch} has no such tensor")
            writer.add_tensor(f"{target}.{suffix}", data, raw_dtype=library.GGMLQuantizationType[kind])
            written[f"{target}.{suffix}"] = (kind, *bytes_of(data))
            if data.ndim > 1:
                kinds[kind] += 1
            moved = max(moved, by)
        factors = _rope_factors(model)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
            written["rope_freqs.weight"] = ("F32", *bytes_of(factors))
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()
        check_file(library, file, written, writer.kv_data)
        size = file.stat().st_size
    notes = ["matrices: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))]
    if moved:
        notes.append(f"float16 minima moved a weight by at most {moved:.1e} of its step")
    return Exported(out, "gguf", size, lost, notes)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("an export to gguf needs the package gguf: pip install 'hf-catquant[gguf]'") from error
    return gguf


def _check_architecture(model: PreTrainedModel) -> None:
    config: Any = model.config
    if config.model_type not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"an export to gguf takes causal language models of {', '.join(ARCHITECTURES)}, got {type(model).__name__}: "
            "export to safetensors instead"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    plain_rope = ("default",) if ARCHITECTURES[config.model_type] != "llama" else ("default", "linear", "llama3")
    rules = (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_type", rope.get("rope_type", "default"), plain_rope),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
    )
    for field, value, known in rules:
        if value not in known:
            raise ValueError(f"{field} must be {' or '.join(map(str, known))} for an export to gguf, got {value!r}")


def _check_layers(model: PreTrainedModel) -> None:
    for name, module in quantized_modules(model).items():
        for field, value, way in (
            ("rotation", module.scheme.rotation, "none"),
            ("low_rank", module.scheme.low_rank, 0),
        ):
            if value:
                raise ValueError(
                    f"{name}: llama.cpp has no place for {field}={value!r}: quantize with {field}={way!r} "
                    "(--" + field.replace("_", "-") + f" {way}), or export to safetensors"
                )


def _settings_lost(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        return [f"attention within a window of {window} tokens: llama.cpp attends to all"]
    return []


def _write_settings(writer: Any, library: Any, model: PreTrainedModel) -> None:
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = dict(getattr(config, "rope_parameters", None) or {})
    writer.add_name(Path(str(config.name_or_path or config.model_type)).name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)


def _tensors(model: PreTrainedModel, arch: str, ternary: str) -> Any:
    """(name, data, type, steps that a weight moved) of every tensor that is not tied to another."""
    config: Any = model.config
    packed = quantized_modules(model)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, module in packed.items():
        if module.owner is not None:
            continue
        rows = _row_order(module.rows_, heads.get(name.rpartition(".")[2], 0) if arch == "llama" else 0)
        found = encode(module, rows, ternary)
        if found is not None:
            yield f"{name}.weight", found.data, found.block.name, found.moved
        else:
            yield (f"{name}.weight", *_as_float(module.matrix(torch.float32)[rows]), 0.0)
    seen = set()
    for name, value in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if id(value) in seen or (owner in packed and name.endswith(".weight")):
            continue
        seen.add(id(value))
        order = _row_order(len(value), heads.get(owner.rpartition(".")[2], 0) if arch == "llama" else 0)
        yield (name, *_as_float(value[order], least=value.dim() == 1), 0.0)


def _row_order(rows: int, heads: int) -> Tensor:
    """Order of the rows: that of the model, or for ``heads`` of a rotary projection the two halves of each interleaved."""
    order = torch.arange(rows)
    return order if not heads else order.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _as_float(value: Tensor, least: bool = False) -> tuple[np.ndarray, str]:
    """The tensor in the smallest float type that holds it exactly; float32 if ``least`` is set, as norms have to be."""
    value = value.detach().float().cpu()
    if least:
        return value.numpy(), "F32"
    if torch.equal(value.half().float(), value):
        return value.half().numpy(), "F16"
    if torch.equal(value.bfloat16().float(), value):
        return value.bfloat16().view(torch.int16).numpy().view(np.uint8), "BF16"
    return value.numpy(), "F32"


def _rope_factors(model: PreTrainedModel) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by, (head size / 2,) float32, where they are not the plain ones."""
    rotary: Any = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    config: Any = model.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") == "default":
        return None
    size = 2 * len(rotary.inv_freq)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2).double() / size)
    return (plain / rotary.inv_freq.double().cpu()).float().numpy()
