"""Whether the class of a model builds from its config what the model is: a load knows the class and the config alone."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from .layers import QuantizedModule, layer_for
from .modules import holds, open_experts
from .packed_model import quantized_modules

_OF_LAYERS = ("weight", "bias")  # parameters that no forward goes without; others may be for training only


def as_built(model: nn.Module) -> PreTrainedModel | None:
    """What the class of ``model`` builds from its config, on the meta device; None if it wants more, or is none of them."""
    if not isinstance(model, PreTrainedModel):
        return None
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # some classes draw numbers all the same
            return type(model)(config)
    except Exception:  # of the model's own class: loading it will tell
        return None


def check_as_built(model: nn.Module, usual: PreTrainedModel) -> None:
    """Refuse a model whose modules have other weights and biases than its class builds: nothing would load, or less.

    A class that is built with more than a config is not judged: what it is given at a load is not known here.

    Args:
        model: to save, with packed layers.
        usual: what :func:`as_built` made; its fused experts are opened.

    Raises:
        ValueError: naming the module, what it has and what the class builds.
    """
    if _takes_more(type(usual)):
        return
    packed = quantized_modules(model)
    open_experts(usual, lambda name: holds(name, packed))
    present = dict(model.named_modules(remove_duplicate=False))
    built = dict(usual.named_modules(remove_duplicate=False))
    for name in packed:
        if name not in built:
            raise _refused(model, name, _shown(present[name]), "nothing")
    for name, part in built.items():
        own = present.get(name)
        if own is None:
            continue
        if isinstance(own, QuantizedModule):
            differs = layer_for(part) is None or _packed_shapes(own) != _float_shapes(part)
        else:
            differs = _differ(own, part)
        if differs:
            raise _refused(model, name, _shown(own), f"a {_shown(part)}")


def _takes_more(kind: type[nn.Module]) -> bool:
    """Whether a class is built with words beside a config."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[2:]
    return any(each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters)


def _differ(own: nn.Module, part: nn.Module) -> bool:
    """Whether a float module lacks a parameter of ``part``, or has one of another shape, or one more that is read.

    A module of the same class may have more: what is learned in training only, and built or not by fields of the config.
    """
    found, wanted = _shapes(own), _shapes(part)
    more = found.keys() - wanted.keys()
    is_read = type(own) is not type(part) or any(name in _OF_LAYERS for name in more)
    return any(found.get(name) != shape for name, shape in wanted.items()) or bool(more and is_read)


def _packed_shapes(layer: QuantizedModule) -> tuple[list[int], list[int] | None]:
    return [layer.rows_, layer.columns], None if layer.bias is None else list(layer.bias.shape)


def _float_shapes(module: nn.Module) -> tuple[list[int], list[int] | None]:
    kind = layer_for(module)
    bias = getattr(module, "bias", None)
    return [] if kind is None else list(kind.matrix_shape(module)), None if bias is None else list(bias.shape)


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.named_parameters(recurse=False)}


def _shown(module: nn.Module) -> str:
    """The kind of a module and its parameters, in words."""
    shapes = _shapes(module)
    if isinstance(module, QuantizedModule):
        shapes = {"packed weight": [module.rows_, module.columns], **shapes}
    held = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no parameters"
    return f"{type(module).__name__} with {held}"


def _refused(model: nn.Module, name: str, found: str, wanted: str) -> ValueError:
    kind = type(model).__name__
    return ValueError(
        f"{name or kind} is a {found}, and {kind} builds {wanted} there from model.config, so that a checkpoint would not "
        "load, or load as another model: set model.config to what the model has, or save with "
        "hf_catquant.plain.save_quantized, which takes the model as it is and fills one that you build"
    )
