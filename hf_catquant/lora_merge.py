"""Whether adapters can be merged, of a whole model and before anything is touched: PEFT merges layer by layer.

A merge that is refused at the last layer has unloaded the adapters of all others. So everything that a layer would refuse,
and everything that would give another model without a word, is looked for in all layers first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from .correction import ClusterAffine
from .layers.linear import QuantizedLinear

FIRST = "Add adapters to the model while it is in memory, and offload it with them then"
APART = "keep the adapters apart (save and load them beside the model)"


def check_merge(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Refuse a merge that one layer would refuse or do wrongly; nothing is changed.

    Args:
        model: the base model, its layers in the wrappers of PEFT.
        adapter_names: adapters to merge; None: those that are active.

    Raises:
        ValueError: naming the first such layer, the rule and the way out.
    """
    holders = _holders(model)
    known = {
        name
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for kind in layer.adapter_layer_names
        for name in getattr(layer, kind, ())
    }
    if adapter_names is not None and (not adapter_names or set(adapter_names) - known):
        raise ValueError(
            f"adapter_names must be some of {', '.join(sorted(known))}, got {adapter_names!r}: nothing was merged"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            with onload_layer(layer):  # an exception inside would leave it on the device
                reason = merge_refusal(layer, adapter_names) or _tied(layer, adapter_names, holders)
            if reason is not None:
                raise ValueError(f"nothing was merged, because of {name}: {reason}")


@torch.no_grad()
def merge_refusal(layer: BaseTunerLayer, adapter_names: list[str] | None = None) -> str | None:
    """Why these adapters cannot be merged into this layer, and the way out; None if they can."""
    names = list(_to_merge(layer, adapter_names))
    base: Any = layer.get_base_layer()
    if any(isinstance(module._modules.get("correction"), ClusterAffine) for module in {layer, base} if names):
        return (
            "a correction sits on it, which would correct what the adapter adds as well: quantize with correction=None, "
            "take it off with hf_catquant.correction.detach(model, name) before the adapter is trained, or " + APART
        )
    for name in names:
        if any(tensor.is_meta for tensor in _tensors(layer, name)):
            return f"adapter {name!r} has no values: it was made on a layer that was offloaded already. {FIRST}"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(layer, name)):
            return (
                f"adapter {name!r} has values that are not finite: its training diverged, or its file is damaged. Take it "
                f"off with model.delete_adapter({name!r})"
            )
        lora: Any = layer
        if name in getattr(layer, "lora_A", ()) and isinstance(base, QuantizedLinear):
            if lora.lora_bias[name]:
                return f"adapter {name!r} has a bias (lora_bias=True), which a packed layer does not take: {APART}"
            reason = base.product_refusal(*product_of(layer, name))
            if reason is not None:
                return f"adapter {name!r}: {reason}: {APART}"
    return None if isinstance(base, QuantizedLinear) else _float_refusal(layer, base, names)


def product_of(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """What the adapter ``name`` adds to the weight, as factors (N, r) and (r, K)."""
    return layer.lora_B[name].weight * layer.scaling[name], layer.lora_A[name].weight


def _to_merge(layer: BaseTunerLayer, adapter_names: list[str] | None) -> Iterator[str]:
    """The adapters of this layer that a merge would add to it."""
    for name in layer.active_adapters if adapter_names is None else adapter_names:
        if name not in layer.merged_adapters and any(True for _ in _tensors(layer, name)):
            yield name


def _tensors(layer: BaseTunerLayer, name: str) -> Iterator[Tensor]:
    """What the adapter ``name`` learns in this layer."""
    for kind in layer.adapter_layer_names:
        held: Any = getattr(layer, kind, ())
        if name in held:
            yield from held[name].parameters() if isinstance(held[name], nn.Module) else (held[name],)


def _float_refusal(layer: Any, base: Any, names: list[str]) -> str | None:
    """Why PEFT could not merge into a float layer, or would make values that are not finite."""
    weight = _weight(layer, base)
    if weight is None:
        return None
    merged = weight.detach().clone()
    for name in names:
        if layer.lora_bias.get(name) and getattr(base, "bias", None) is None:
            return f"adapter {name!r} has a bias (lora_bias=True), and this layer has none to add it to: {APART}"
        variant = layer.lora_variant.get(name)
        try:
            if variant is None:
                merged += layer.get_delta_weight(name).to(merged.dtype)
            else:
                merged = variant.merge_safe(layer, name, merged)
        except (NotImplementedError, RuntimeError) as error:
            return f"adapter {name!r}: {error} ({type(variant or layer).__name__} of PEFT): {APART}"
        if not bool(torch.isfinite(merged).all()):
            return f"with adapter {name!r} its weight would not be finite in {merged.dtype}: {APART}"
    return None


def _weight(layer: Any, base: Any) -> Tensor | None:
    """The float parameter that adapters of LoRA are merged into; None for other adapters, and for packed layers."""
    if not isinstance(layer, LoraLayer):
        return None
    return base._parameters.get(getattr(layer, "parameter_name", None) or "weight")


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter themselves, by its id."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {id(held) for held in module._parameters.values() if held is not None}:
            found.setdefault(parameter, []).append(name)
    return found


def _tied(layer: BaseTunerLayer, adapter_names: list[str] | None, holders: Mapping[int, list[str]]) -> str | None:
    """Why a float layer takes nothing: another module would have what is added to its weight as well."""
    names = holders.get(id(_weight(layer, layer.get_base_layer())), [])
    if len(names) < 2 or not list(_to_merge(layer, adapter_names)):
        return None
    return f"its weight is one tensor with that of {', '.join(names)}, which would have the adapter as well: {APART}"
