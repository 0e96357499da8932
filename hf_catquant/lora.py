"""LoRA adapters of PEFT on quantized linear layers: to train, to save and load, and to merge.

    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    model = load_peft_model(quantized, "adapter")
    model.load_adapter("another", "two")
    merged = model.merge_and_unload()

PEFT knows the layers of no library but those in its own list, and takes others by a configuration that it does not store:
hence the two functions, and a tuner that gives the configuration to every adapter that comes later. A merged
adapter becomes a float16 product beside the codes: the layer stays packed, and its checkpoint holds the adapter. Whether all
layers can be merged is found out before the first one is (``lora_merge.py``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from .layers.linear import QuantizedLinear

try:
    from peft import LoraConfig, LoraModel, PeftConfig, PeftModel
    from peft import get_peft_model as _get_peft_model
except ImportError as error:
    raise ImportError("adapters need PEFT: pip install 'hf-catquant[peft]'") from error

from .lora_layer import LoraOnQuantized
from .lora_merge import FIRST, check_merge
from .lora_targets import ALL_LINEAR, check_targets, linear_names
from .offloaded import read


class LoraModelOnQuantized(LoraModel):
    """PEFT's tuner, that knows packed layers however an adapter comes: ``load_adapter`` reads a configuration by itself."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with the configuration that :func:`lora_config` makes."""
        self.peft_config[adapter_name] = lora_config(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As PEFT's, after a look at all layers: it merges into every one, or raises and changes nothing.

        Raises:
            ValueError: as :func:`hf_catquant.lora_merge.check_merge`.
        """
        check_merge(self.model, adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, after a look at all layers: it merges into every one, or raises and changes nothing.

        Raises:
            ValueError: as :func:`hf_catquant.lora_merge.check_merge`.
        """
        check_merge(self.model, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)


def lora_config(config: PeftConfig, model: nn.Module) -> LoraConfig:
    """A copy of ``config`` that PEFT can apply to the quantized ``model``; "all-linear" is spelled out.

    Args:
        config: of the adapter.
        model: the quantized model, without adapters or with some; or the ``PeftModel`` around it.

    Raises:
        TypeError: it is no ``LoraConfig``.
        ValueError: what PEFT would train whole or in part (``modules_to_save``, the head of a classifier,
            ``trainable_token_indices``, ``target_parameters``) is packed, a target is a packed layer that is no linear, or
            "all-linear" finds no linear layer.
    """
    if type(config) is not LoraConfig:  # AdaLoRA's is derived from it
        raise TypeError(f"only LoRA works on quantized layers, got a {type(config).__name__}: pass a LoraConfig")
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    check_targets(model, config)
    config = copy.deepcopy(config)
    config._register_custom_module({QuantizedLinear: LoraOnQuantized})
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config.target_modules = sorted(linear_names(model, config))
    return config


def get_peft_model(model: nn.Module, config: LoraConfig, **kwargs: Any) -> PeftModel:
    """``peft.get_peft_model`` for a quantized model; ``model.add_adapter(lora_config(config, model))`` works as well.

    More adapters come with PEFT's own ``add_adapter(name, config)`` and ``load_adapter(folder, name)`` of what is returned.

    Raises:
        TypeError: the configuration is no ``LoraConfig``.
        ValueError: as :func:`lora_config`, ``mixed`` is set, or ``model`` is a ``PeftModel``.
    """
    _check_bare(model)
    if kwargs.get("mixed"):
        raise ValueError(
            "mixed=True is for adapters of several methods, and only LoRA works on quantized layers: leave it out, and add "
            "more adapters of LoRA with add_adapter(name, config)"
        )
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
    _check_values(adapted)
    return adapted


def _check_values(adapted: PeftModel) -> None:
    """Refuse adapters without values, which PEFT makes where a layer is offloaded: each call would draw others.

    Raises:
        ValueError: naming the first one and the way out; the model is as it was before.
    """
    for name, value in adapted.named_parameters():
        if value.is_meta and ".lora_" in name:
            try:
                read(adapted, name)
            except ValueError:
                adapted.unload()
                raise ValueError(f"{name} has no values: the layer is offloaded. {FIRST}") from None
