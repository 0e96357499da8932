"""LoRA adapters of PEFT on quantized linear layers: to train, to save and load, and to merge.

    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    model = load_peft_model(quantized, "adapter")
    model.load_adapter("another", "two")
    merged = model.merge_and_unload()

PEFT knows the layers of no library but those in its own list, and takes others by a configuration that it does not store:
hence the two functions, and a tuner that gives the configuration to every adapter that comes later. A merged
adapter becomes the float16 product that a packed layer can add to its weight (``low_rank_out`` times ``low_rank_in``): the
layer stays packed, and its checkpoint holds the adapter. Nothing is rounded to codes again.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import QuantizedModule
from .layers.linear import QuantizedLinear

try:
    from peft import LoraConfig, LoraModel, PeftConfig, PeftModel
    from peft import get_peft_model as _get_peft_model
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
except ImportError as error:
    raise ImportError("adapters need PEFT: pip install 'hf-catquant[peft]'") from error

INITS = (True, False, "gaussian", "orthogonal")  # those that leave the weight of the layer alone
ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier")
# What PEFT trains whole and stores beside the adapters of a task, unasked (peft_model.py).
SAVED = {"SEQ_CLS": HEADS, "TOKEN_CLS": HEADS, "QUESTION_ANS": ("qa_outputs",)}


class LoraOnQuantized(Linear):
    """A LoRA adapter beside a packed linear layer, as PEFT's own beside a float one.

    Raises:
        ValueError: the adapter is of a kind that reads or changes the float weight (DoRA, PiSSA, LoftQ and others).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config.fan_in_fan_out = False  # the matrix of a packed layer is (N, K), that of a Conv1D too
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._before_merge: Any = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.columns, layer.rows_

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add one more adapter, the first one, too."""
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of the layer, which is packed: use "
                f"one of {', '.join(map(repr, INITS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """None: only plain LoRA does without the float weight."""
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise ValueError(
                f"{type(variant).__name__} reads the float weight of the layer, which is packed: use plain LoRA"
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the float16 product of the packed layer.

        Raises:
            ValueError: ``safe_merge`` is set and an adapter is not finite, or an adapter has a bias, or the layer shares
                its weight with another.
        """
        layer: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if self.lora_bias[name]:
                raise ValueError(
                    f"adapter {name!r} has a bias (lora_bias=True), which cannot be merged: keep it apart"
                )
            first: Any = self.lora_A[name]
            out, into = self.lora_B[name].weight * self.scaling[name], first.weight
            if safe_merge and not bool(torch.isfinite(out).all() & torch.isfinite(into).all()):
                raise ValueError(f"adapter {name!r} has values that are not finite: it cannot be merged")
            if self._before_merge is None:
                self._before_merge = (layer.scheme, layer.low_rank_out, layer.low_rank_in)
            layer.add_product(out, into)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the product of the layer back as it was."""
        layer: Any = self.get_base_layer()
        if self._before_merge is not None:
            layer.scheme, layer.low_rank_out, layer.low_rank_in = self._before_merge
        self._before_merge = None
        self.merged_adapters.clear()


class LoraModelOnQuantized(LoraModel):
    """PEFT's tuner, that knows packed layers however an adapter comes: ``load_adapter`` reads a configuration by itself."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with the configuration that :func:`lora_config` makes."""
        self.peft_config[adapter_name] = lora_config(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)


def lora_config(config: PeftConfig, model: nn.Module) -> LoraConfig:
    """A copy of ``config`` that PEFT can apply to the quantized ``model``; "all-linear" is spelled out.

    Args:
        config: of the adapter.
        model: the quantized model, without adapters or with some; or the ``PeftModel`` around it.

    Raises:
        TypeError: it is no ``LoraConfig``.
        ValueError: a module that PEFT would train whole (``modules_to_save``, the head of a classifier) is packed, or
            "all-linear" finds no linear layer.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"only LoRA works on quantized layers, got a {type(config).__name__}: pass a LoraConfig")
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_saved(model, config)
    config = copy.deepcopy(config)
    config._register_custom_module({QuantizedLinear: LoraOnQuantized})
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config.target_modules = sorted(_linear_names(model, config))
    return config


def get_peft_model(model: nn.Module, config: LoraConfig, **kwargs: Any) -> PeftModel:
    """``peft.get_peft_model`` for a quantized model; ``model.add_adapter(lora_config(config, model))`` works as well.

    More adapters come with PEFT's own ``add_adapter(name, config)`` and ``load_adapter(folder, name)`` of what is returned.

    Raises:
        TypeError: the configuration is no ``LoraConfig``.
        ValueError: as :func:`lora_config`, or ``model`` is a ``PeftModel``.
    """
    _check_bare(model)
    return _taught(_get_peft_model(model, lora_config(config, model), **kwargs))


def load_peft_model(model: nn.Module, folder: str | Path, **kwargs: Any) -> PeftModel:
    """``peft.PeftModel.from_pretrained`` for a quantized model: the adapter in ``folder``, or in a repository of the Hub.

    Args:
        model: quantized.
        folder: or id on the Hub.
        kwargs: of ``from_pretrained``. Those that say where the adapter is (``subfolder``, ``revision``, ``token`` and the
            like) say where its configuration is, too.

    Raises:
        TypeError: the adapter is no LoRA.
        ValueError: as :func:`lora_config`, there is no adapter, or ``model`` is a ``PeftModel``.
    """
    _check_bare(model)
    config = kwargs.pop("config", None) or PeftConfig.from_pretrained(str(folder), **kwargs)
    return _taught(PeftModel.from_pretrained(model, str(folder), config=lora_config(config, model), **kwargs))


def _check_bare(model: nn.Module) -> None:
    """Refuse a model that has adapters around it: another one around those could not be saved.

    Raises:
        ValueError: naming the way out.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} has adapters ({', '.join(model.peft_config)}) already: add another one to it with "
            "its add_adapter(name, config) or load_adapter(folder, name)"
        )


def _taught(adapted: PeftModel) -> PeftModel:
    """``adapted`` with a tuner that knows packed layers; PEFT has no place to say which class that is to be."""
    if type(adapted.base_model) is LoraModel:
        adapted.base_model.__class__ = LoraModelOnQuantized
    return adapted


def _check_saved(model: nn.Module, config: LoraConfig) -> None:
    """Refuse to train a copy of a packed layer: nothing of it but the bias would learn, and no float model would take it.

    Raises:
        ValueError: naming the layers and the way out.
    """
    names = {*(config.modules_to_save or ()), *SAVED.get(str(config.task_type).removeprefix("TaskType."), ())}
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    found = sorted({name for name in names if any(f".{name}." in f".{layer}." for layer in packed)})
    if found:
        raise ValueError(
            f"{', '.join(found)}: its weight is packed, and PEFT would train it whole (task_type={config.task_type!s}, "
            f"modules_to_save={config.modules_to_save}): quantize with modules_to_not_convert={found}, as float layers "
            "learn, or pass task_type=None and no modules_to_save to train adapters alone"
        )


def _linear_names(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of all linear layers, with adapters or without, but the output layer and, of a classifier, its head.

    Raises:
        ValueError: there is none.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    heads = HEADS if config.task_type == "SEQ_CLS" else ()
    linear = (QuantizedLinear, nn.Linear, Conv1D)
    tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in tuned)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(tuned[name].get_base_layer() if name in tuned else module, linear)
        and module is not output
        and name not in heads
        and not name.startswith(inside)
    ]
    if not names:
        raise ValueError(
            f"target_modules={ALL_LINEAR!r}: {type(model).__name__} has no linear layer but its output layer: name the "
            "modules"
        )
    return names
