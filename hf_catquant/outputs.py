"""What a model answers: every float tensor of its output that a caller uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

LOGITS = ("", "logits")  # names of the answer that the module which returns the logits gives
# Ends of names: a loss, caches, and what shows how an answer came about.
_NO_ANSWERS = ("loss", "past_key_values", "mems", "hidden_states", "attentions", "router_logits")
_LAST = "last_hidden_state"


def answers(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """The float tensors in what ``model`` returned, by their names or places in it; "" if it is a tensor itself.

    Losses, caches, hidden states, attentions and outputs of inner models, which ``transformers`` returns inside those of
    the outer one (CLIP), are none; the last hidden state is one where there are no logits.
    """
    ignored = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", None) or ()
    found = dict(_tensors(output, "", set(ignored)))
    with_logits = any("logits" in name for name in found)
    return {name: tensor for name, tensor in found.items() if not (with_logits and name.endswith(_LAST))}


def _tensors(value: Any, name: str, ignored: set[str]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value
        return
    for key, inner in _items(value):
        if key in ignored or key.endswith(_NO_ANSWERS):
            continue
        if not (isinstance(value, ModelOutput) and isinstance(inner, ModelOutput)):
            yield from _tensors(inner, f"{name}.{key}" if name else key, ignored)


def _items(value: Any) -> list[tuple[str, Any]]:
    """Names and values in an output: a mapping's, a sequence's, or the tensors that any other object holds."""
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        return list(zip(names, value, strict=True))
    return [(key, inner) for key, inner in getattr(value, "__dict__", {}).items() if isinstance(inner, Tensor)]
