"""Which modules and parameters of a quantized model a configuration of LoRA means, and which of them take no adapter."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import QuantizedModule
from .layers.experts import DOWN, UP, Experts
from .layers.linear import QuantizedLinear

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier")
# What PEFT trains whole and stores beside the adapters of a task, unasked (peft_model.py).
SAVED = {"SEQ_CLS": HEADS, "TOKEN_CLS": HEADS, "QUESTION_ANS": ("qa_outputs",)}


def check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse what PEFT would pass over in silence, or refuse without a way out, because it is packed.

    Raises:
        ValueError: naming the layers and the way out.
    """
    _check_saved(model, config)
    _check_parameters(model, config)
    _check_tokens(model, config)
    _check_kinds(model, config)


def _check_parameters(model: nn.Module, config: LoraConfig) -> None:
    """Refuse ``target_parameters`` that are packed: PEFT finds no such parameter, and trains the other targets alone.

    Raises:
        ValueError: naming the parameter and the way out.
    """
    for target in config.target_parameters or ():
        found = next((name for name in _packed_parameters(model) if _means(target, name)), None)
        if found is not None:
            holder = found.rpartition(".")[0]
            raise ValueError(
                f"target_parameters: {target!r} is {found}, which is packed and no parameter: name linear layers in "
                f"target_modules, or quantize with modules_to_not_convert=[{holder!r}]"
            )


def _packed_parameters(model: nn.Module) -> list[str]:
    """Names that the parameters in packed layers had in the float model."""
    names = []
    for name, module in model.named_modules():
        name = name.replace(".base_layer", "")  # where it has adapters already
        if isinstance(module, Experts):
            parts = ((UP, module.fused.up), (DOWN, module.fused.down))
            names += [f"{name}.{part}" for child, part in parts if isinstance(getattr(module, child), QuantizedModule)]
        elif isinstance(module, QuantizedModule):
            names.append(f"{name}.weight")
    return names


def _check_tokens(model: nn.Module, config: LoraConfig) -> None:
    """Refuse ``trainable_token_indices`` of a packed embedding: PEFT would write rows into its float weight.

    Raises:
        ValueError: naming the embedding and the way out.
    """
    asked: Any = config.trainable_token_indices
    if not asked:
        return
    embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    packed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        and (any(_means(target, name) for target in asked) if isinstance(asked, dict) else module is embedding)
    ]
    if packed:
        raise ValueError(
            f"trainable_token_indices: {packed[0]} is packed, and PEFT trains rows of a float weight: quantize with "
            f"modules_to_not_convert={packed}, or leave it out"
        )


def _check_kinds(model: nn.Module, config: LoraConfig) -> None:
    """Refuse targets that are packed and no linears.

    Raises:
        ValueError: naming the first one and the way out.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule) or isinstance(module, QuantizedLinear):
            continue
        if check_target_module_exists(config, name):
            raise ValueError(
                f"target_modules: {name} is a packed {module.wraps.__name__}, and adapters are for packed linear layers: "
                f"leave it out, or quantize with modules_to_not_convert=[{name!r}]"
            )


def _means(target: str, name: str) -> bool:
    """Whether PEFT takes ``target`` for the module or parameter ``name``."""
    return f".{name}".endswith(f".{target}")


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


def linear_names(model: nn.Module, config: LoraConfig) -> list[str]:
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
