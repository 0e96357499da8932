"""Packed integers as two quantizers of transformers itself store them: "gemma" and "metal".

    gemma    w = weight_scale[n] * q             q in 2, 4 or 8 bits, signed; one float32 scale a row
    metal    w = scales[n, g] * q + qbiases[n, g]    q in 2, 4 or 8 bits, unsigned; float32; one number of bits a model

Linears that these equations hold are moved code by code; every other layer is float, as exact as before, and so is what a
class keeps in float32 whatever its quantizer (T5's ``wo``). Of "metal" the packed product runs on Apple silicon; elsewhere
transformers dequantizes while loading, and wants ``device_map``.
(transformers: integrations/gemma_quant.py, integrations/metal_quantization.py.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GemmaQuantizationConfig, MetalConfig

from ..formats import get_format, group_width
from ..layers import QuantizedModule
from ..model import is_passed_by
from ..packed_model import quantized_modules
from ..packing import unpack
from .common import Exported, Source, copy_processor, fold_corrections, settle_losses, weight_bytes, written_beside

_BITS = (2, 4, 8)
_GROUPS = (128, 64, 32)  # that Apple's kernels have

Packed = dict[str, dict[str, Tensor]]  # tensors by name in the module, by module


def write_gemma(source: Source, out: Path, *, lossy: bool = False) -> Exported:
    """Write a folder that loads as ``quant_method="gemma"``.

    Raises:
        ValueError: something would be lost, or no layer has one scale a row and no offset.
    """
    lost = settle_losses(source, fold_corrections(source.model), lossy, "gemma")
    bits = {name: _row_bits(module) for name, module in _loadable(source.model).items()}
    kept = {name: n for name, n in bits.items() if n is not None}
    if not kept:
        raise ValueError(
            'no layer fits "gemma", which has one scale a row and no offset: quantize with group_size=-1, rotation=None '
            'and a format without offsets (int8, ternary_symmetric), or export to "metal" or "safetensors"'
        )
    packed = {name: _gemma_tensors(source.model.get_submodule(name), n) for name, n in kept.items()}
    config = GemmaQuantizationConfig(
        num_bits=8,
        module_quant_configs={f"^{re.escape(name)}$": {"num_bits": n} for name, n in kept.items()},
        modules_to_not_convert=_others(source.model, kept),
    )
    return _write(source, out, "gemma", packed, config, lost)


def write_metal(source: Source, out: Path, *, lossy: bool = False) -> Exported:
    """Write a folder that loads as ``quant_method="metal"``.

    Raises:
        ValueError: something would be lost, or no layer has groups that are whole multiples of 32 columns.
    """
    lost = settle_losses(source, fold_corrections(source.model), lossy, "metal")
    modules = _loadable(source.model)
    choices = {
        (bits, size): [name for name, module in modules.items() if _fits_metal(module, bits, size)]
        for bits in _BITS
        for size in _GROUPS
    }
    (bits, size), kept = max(choices.items(), key=lambda item: _saved(item[0][0], [modules[name] for name in item[1]]))
    if not kept:
        raise ValueError(
            'no layer fits "metal", which has groups of 32, 64 or 128 columns: quantize with group_size=32, 64, 128 or -1 '
            'and rotation=None, or export to "safetensors"'
        )
    packed = {name: _metal_tensors(modules[name], bits, size) for name in kept}
    config = MetalConfig(bits=bits, group_size=size, modules_to_not_convert=_others(source.model, kept))
    return _write(source, out, "metal", packed, config, lost)


def _write(source: Source, out: Path, target: str, packed: Packed, config: Any, lost: list[str]) -> Exported:
    model: Any = source.model
    layers = len(quantized_modules(model))
    weights = {name: model.get_submodule(name).matrix(torch.float32) for name in packed}
    model.dequantize()
    state = model.state_dict()
    for name, tensors in packed.items():
        state.update({f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()})
    model.config.quantization_config = config
    with written_beside(out) as folder:
        model.save_pretrained(folder, state_dict=state)
        _check(type(model), folder, weights)
        left_out = copy_processor(source, folder)
        size = weight_bytes(folder)
    notes = [f"{len(packed)} of {layers} quantized layers are packed, the others are float and exact", *left_out]
    if target == "metal":
        notes.append(
            "to load it away from Apple silicon pass device_map, as in from_pretrained(folder, device_map='cpu')"
        )
    return Exported(out, target, size, lost, notes)


def _check(kind: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Load what was written, and compare the packed weights."""
    loaded, info = kind.from_pretrained(folder, device_map={"": "cpu"}, output_loading_info=True)
    wrong = [str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    for name, weight in weights.items():
        module = loaded.get_submodule(name)
        found = module._dequantize_weights() if hasattr(module, "_dequantize_weights") else module.weight
        if not torch.allclose(found.float(), weight.cpu(), rtol=1e-5, atol=1e-5 * float(weight.abs().max())):
            wrong.append(f"{name}.weight")
    if wrong:
        raise ValueError(f"{kind.__name__} does not load these weights back: {', '.join(wrong[:5])}")


def _loadable(model: nn.Module) -> dict[str, QuantizedModule]:
    """Quantized layers but those that transformers makes float ones, whatever a config says."""
    return {name: module for name, module in quantized_modules(model).items() if not is_passed_by(model, name)}


def _others(model: nn.Module, kept: Any) -> list[str]:
    """Expressions for all other linears, of which transformers matches the start."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, QuantizedModule) and module.wraps is nn.Linear)
    ]
    return [f"{re.escape(name)}$" for name in linears if name not in kept]


def _is_plain(module: QuantizedModule) -> bool:
    return module.wraps is nn.Linear and module.scheme.rotation is None and not module.scheme.low_rank


def _row_bits(module: QuantizedModule) -> int | None:
    """Bits that hold a layer's levels where it has one scale a row and no offset, else None."""
    fmt, offset = get_format(module.scheme.weights), module.weight_offset
    one_scale = module.weight_scale.shape[1] == 1 and (offset is None or not bool(offset.any()))
    if not _is_plain(module) or not one_scale:
        return None
    return next(b for b in _BITS if -(1 << (b - 1)) <= fmt.levels[0] and fmt.levels[-1] < 1 << (b - 1))


def _gemma_tensors(module: Any, bits: int) -> dict[str, Tensor]:
    fmt = get_format(module.scheme.weights)
    codes = unpack(module.weight_packed, fmt, module.scheme.group_size, module.columns)
    q = torch.tensor(fmt.levels, device=codes.device)[codes.long()].to(torch.int16)
    zero = torch.zeros((), dtype=torch.float32)
    return {
        "weight": q.to(torch.int8) if bits == 8 else _bytes(q + (1 << (bits - 1)), bits),
        "weight_scale": module.weight_scale.float(),
        "input_activation_scale": zero,
        "output_activation_scale": zero.clone(),
    }


def _bytes(q: Tensor, bits: int) -> Tensor:
    """q (N, K), not negative, ``bits`` each, the first one least significant, in uint8."""
    digits = 8 // bits
    padded = nn.functional.pad(q.int(), (0, -q.shape[1] % digits)).view(len(q), -1, digits)
    return (padded << torch.arange(0, 8, bits, dtype=torch.int32)).sum(-1).to(torch.uint8)


def _fits_metal(module: QuantizedModule, bits: int, size: int) -> bool:
    width = group_width(module.columns, module.scheme.group_size)
    whole = module.columns % size == 0 and (width % size == 0 or width == module.columns)
    return _is_plain(module) and whole and get_format(module.scheme.weights).radix <= 1 << bits


def _saved(bits: int, modules: list[QuantizedModule]) -> tuple[int, int]:
    """Bits that a choice saves against float32."""
    weights = sum(module.rows_ * module.columns for module in modules)
    return weights * (32 - bits), -bits


def _metal_tensors(module: QuantizedModule, bits: int, size: int) -> dict[str, Tensor]:
    fmt, width = get_format(module.scheme.weights), group_width(module.columns, module.scheme.group_size)
    codes = unpack(module.weight_packed, fmt, module.scheme.group_size, module.columns)
    scale = module.weight_scale.double()
    offset = torch.zeros_like(scale) if module.weight_offset is None else module.weight_offset.double()
    repeats, groups = width // size, module.columns // size

    def each(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(repeats, dim=1)[:, :groups].contiguous()

    words = codes.to(torch.int64).view(len(codes), -1, 32 // bits) << torch.arange(0, 32, bits)
    return {
        "weight": words.sum(-1).to(torch.uint32),
        "scales": each(scale * (fmt.levels[1] - fmt.levels[0])),
        "qbiases": each(offset + scale * fmt.levels[0]),
    }
