"""Ties between packed weights beside transformers' own tying, which knows parameters only."""

from __future__ import annotations

from collections.abc import Container

from torch import nn
from transformers import PreTrainedModel

from .layers import QuantizedModule
from .packed_model import quantized_modules

_FLOAT_TIES = "_catquant_float_ties"  # of a model: the tied weights keys that it had before some were packed


def untie(model: PreTrainedModel) -> None:
    """Take packed weights out of transformers' own tying."""
    for module in model.modules():
        ties = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and ties:
            inside = quantized_modules(module)
            module.__dict__.setdefault(_FLOAT_TIES, ties)
            module._tied_weights_keys = {k: v for k, v in ties.items() if not _names_packed(k, v, inside)}
    packed = quantized_modules(model)
    model.all_tied_weights_keys = {
        k: v for k, v in model.all_tied_weights_keys.items() if not _names_packed(k, v, packed)
    }


def tie_again(model: PreTrainedModel) -> None:
    """Give transformers' tying back what :func:`untie` took, once the weights are float again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _FLOAT_TIES in module.__dict__:
            module._tied_weights_keys = module.__dict__.pop(_FLOAT_TIES)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def adopt_orphans(model: nn.Module) -> None:
    """Let layers whose weight belongs to a layer that is no longer in ``model`` hold it for themselves: it is saved then.

    Of several that shared it the first becomes the owner.
    """
    layers = list(quantized_modules(model).values())
    for layer in layers:
        owner = layer.owner
        if owner is not None and owner not in layers:
            others = [other for other in layers if other.owner is owner and other is not layer]
            layer.stop_sharing()
            for other in others:
                other.stop_sharing()
                other.share(layer)


def say_tied(model: PreTrainedModel) -> None:
    """Let the config say that the embeddings are tied, as it did, where they share a packed weight.

    After a merge PEFT compares ``weight`` of both, which a packed layer makes anew each time it is asked, and has the config
    deny the tie: a float copy that is saved then has no output layer.
    """
    try:
        layers = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # it has none, or does not say which
        return
    owners = [layer.owner or layer for layer in layers if isinstance(layer, QuantizedModule)]
    if len(owners) == len(layers) and owners[0] is owners[1]:
        model.config.tie_word_embeddings = True


def _names_packed(target: str, source: str, packed: Container[str]) -> bool:
    return any(name.removesuffix(".weight") in packed for name in (target, source))
