"""State dicts of quantized layers, and layers that hold the weight of another one.

A scheme is no tensor: two layers can have the same tensors and stand for other weights. So a state dict carries the scheme
where torch keeps versions, in its ``_metadata``, and a load compares the two. ``torch.save`` keeps it. A dict that was made
of a state dict, and a safetensors file, has lost it: there only dtypes and shapes are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels import cuda, layout

if TYPE_CHECKING:
    from .base import QuantizedModule

SHARED = ("weight_packed", "weight_scale", "weight_offset", "low_rank_out", "low_rank_in")
_KEY = "catquant_scheme"  # in the metadata of a layer
_WAY_OUT = (
    "load it into a model that was quantized in the same way, or use save_pretrained and from_pretrained, which builds the "
    "layers that were saved"
)


def describe(layer: QuantizedModule, state_dict: Any, prefix: str) -> None:
    """Write the scheme of ``layer`` into the metadata of the state dict that it is being put into."""
    metadata = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
    if metadata is not None:
        metadata[_KEY] = asdict(layer.scheme)


def differences(
    layer: QuantizedModule, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> list[str]:
    """What shows that a state dict is of a layer in another scheme, one line each; nothing if the layer is not in it."""
    name = prefix[:-1] or type(layer).__name__
    scheme, found = metadata.get(_KEY), []
    if scheme is not None:
        here = asdict(layer.scheme)
        other = [field for field in sorted({*here, *scheme}) if here.get(field) != scheme.get(field)]
        found += [
            f"{name}: {field} is {scheme.get(field)!r} in the state dict, {here.get(field)!r} here" for field in other
        ]
    for buffer, held in held_buffers(layer).items():
        given = state_dict.get(prefix + buffer)
        if not found and isinstance(given, Tensor) and given.dtype != held.dtype:
            found.append(f"{name}.{buffer} is {given.dtype} in the state dict, {held.dtype} here")
    return [f"{found[0]}: {_WAY_OUT}", *found[1:]] if found else []


def held_buffers(layer: QuantizedModule) -> dict[str, Tensor]:
    """The buffers that a state dict of ``layer`` has."""
    return {
        name: buffer
        for name, buffer in layer._buffers.items()
        if buffer is not None and name not in layer._non_persistent_buffers_set
    }


def loaded(layer: QuantizedModule) -> None:
    """After tensors were written into ``layer``: kernels read them anew, and layers that share its weight have it.

    Writing to an inference tensor is not counted by torch, so that kernels could not know.
    """
    if layer.weight_packed.is_cpu:
        layout.forget(layer.weight_packed)
    cuda.layouts.doubt(layer.weight_packed)
    for sharer in layer.sharers:
        follow(sharer, copy=True)


def follow(layer: QuantizedModule, copy: bool = False) -> None:
    """Let ``layer`` hold the very buffers of its owner, if both are on one device.

    Args:
        layer: has an owner.
        copy: on another device, take over what they hold.
    """
    assert layer.owner is not None
    for name in SHARED:
        here, there = layer._buffers[name], layer.owner._buffers[name]
        if here is None or there is None or here.device == there.device:
            layer._buffers[name] = there
        elif copy and not here.is_meta and not there.is_meta:  # meta: offloaded to disk
            layer._buffers[name] = there.to(here.device, copy=True)
