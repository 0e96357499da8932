"""What transformers is told of this package: its config, its quantizer, who saves models around packed layers, and what is
looked at before a config of ours is read.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .config import QUANT_METHOD, CatQuantConfig
from .fields import check_labels
from .layers import QuantizedModule
from .parts import adopted, origins, part_config
from .quantizer import CatQuantizer, check_unquantized
from .ties import say_tied, untie
from .written import as_written, asked_of_save, fields_as_written, tensors_to_save

_MANY_LABELS, _NAMED = 1 << 17, 1 << 20  # classes that any checkpoint may have, and of which names fit into memory


class PartQuantizer(CatQuantizer):
    """Of a model that was not quantized as a whole: a part of one that was, or a model that has one inside.

    What it saves loads by itself. The model that was quantized stays as it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        known = origins(model)
        HfQuantizer.__init__(self, known[0] if known else CatQuantConfig(solver="rtn", correction=None))

    def is_serializable(self) -> bool:
        """True: what cannot be saved is refused by name."""
        return True

    def _to_save(self, model: PreTrainedModel, given: dict[str, Tensor] | None) -> dict[str, Tensor]:
        check_unquantized(model)
        untie(model)
        with adopted(model):
            state = tensors_to_save(model, given)
            say_tied(model)
            fields = fields_as_written(model, _without_parts(model.config))
            self._lend(model, part_config(model, as_written(model, state), fields))
        return state

    def _lend(self, model: PreTrainedModel, entries: CatQuantConfig | None) -> None:
        """Give ``model`` a config with ``entries``, or with none, until it is written, or as long as this quantizer lasts,
        which is no longer than one ``save_pretrained``: not every rank writes it.

        A part shares its config with the whole, and configs of parts are those of the parts: none of them may change by a
        save.
        """
        own, lent = model.config, _without_parts(model.config)
        kind = type(lent)

        def give_back() -> None:
            if model.config is lent:
                model.config = own

        def save_pretrained(config: PretrainedConfig, *args: Any, **kwargs: Any) -> Any:
            config.__class__ = kind
            give_back()
            return kind.save_pretrained(config, *args, **kwargs)

        vars(lent).pop("quantization_config", None)
        if entries is not None:
            lent.quantization_config = entries
        members = {"save_pretrained": save_pretrained, "__module__": kind.__module__}
        lent.__class__ = type(kind.__name__, (kind,), members)
        model.config = lent
        weakref.finalize(self, give_back).atexit = False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        super()._dequantize(model, dtype)
        for module in model.modules():
            if isinstance(
                vars(module).get("hf_quantizer"), CatQuantizer
            ):  # a model inside that was quantized by itself
                for name in ("hf_quantizer", "is_quantized", "quantization_method"):
                    vars(module).pop(name, None)
                vars(module.config).pop("quantization_config", None)
        return model


class FloatQuantizer(PartQuantizer):
    """Of a float model with the config of a quantized one, as a float part of it has, or what ``from_config`` makes of it.

    It is written without the entries, with which no load would take it.
    """

    def __init__(self) -> None:
        HfQuantizer.__init__(self, CatQuantConfig(solver="rtn", correction=None))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of the model, or those that ``save_pretrained`` was given."""
        given = asked_of_save(model).get("state_dict")
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are saved, and no config
            self._lend(model, None)
        return model.state_dict() if given is None else given, {}


def _is_of_another(model: PreTrainedModel) -> bool:
    """Whether the config of a float model says what a quantized one holds."""
    found = vars(model.config).get("quantization_config")
    # As it is read from a file it is a dict until a model is loaded.
    return isinstance(found, CatQuantConfig) or (isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD)


class _HeldInside:
    """The quantizer of a model that has none of its own but packed layers inside.

    ``save_pretrained`` asks a model for its ``hf_quantizer`` and for nothing else. Without one it would write packed weights
    into a checkpoint that says nothing of them, and that loads as a float model with random weights.
    """

    def __get__(self, model: PreTrainedModel | None, kind: type | None = None) -> PartQuantizer:
        if model is not None and any(isinstance(module, QuantizedModule) for module in model.modules()):
            return PartQuantizer(model)
        if model is not None and _is_of_another(model) and asked_of_save(model):
            return FloatQuantizer()
        raise AttributeError("hf_quantizer")  # as if this class were not


def check_raw(config: Mapping[str, Any]) -> None:
    """Refuse the config.json of a quantized checkpoint that asks for more classes than a head has.

    transformers writes a table of their names while it reads a config, and asks nobody before.

    Args:
        config: as it is in the file; those of other checkpoints are not looked at.

    Raises:
        ValueError: naming the number.
    """
    request = config.get("quantization_config")
    if not isinstance(request, Mapping) or request.get("quant_method") != QUANT_METHOD:
        return
    modules = request.get("modules")
    entries = modules.values() if isinstance(modules, Mapping) else ()
    shapes = [entry.get("shape") for entry in entries if isinstance(entry, Mapping)]
    rows = [shape[0] for shape in shapes if isinstance(shape, list) and shape and isinstance(shape[0], int)]
    check_labels(config, min(max([_MANY_LABELS, *rows]), _NAMED))


def _checked(read: Any) -> Any:
    """``PretrainedConfig.get_config_dict`` that looks at what it has read."""

    @wraps(read)
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = read(cls, *args, **kwargs)
        check_raw(found[0])
        return found

    get_config_dict.catquant = True  # type: ignore[attr-defined]
    return classmethod(get_config_dict)


def register() -> None:
    """Make transformers know ``quant_method="catquant"``, and the quantizer of a model that holds packed layers; a second
    call changes nothing.
    """
    # What hf_catquant_autoload put there stands in for these two until now.
    for table, name, add, entry in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, "LateConfig", register_quantization_config, CatQuantConfig),
        (AUTO_QUANTIZER_MAPPING, "late_quantizer", register_quantizer, CatQuantizer),
    ):
        if getattr(table.get(QUANT_METHOD), "__name__", None) == name:
            del table[QUANT_METHOD]
        if QUANT_METHOD not in table:
            add(QUANT_METHOD)(entry)
    if "hf_quantizer" not in vars(PreTrainedModel):  # what a model has of its own goes before it
        PreTrainedModel.hf_quantizer = _HeldInside()  # type: ignore[attr-defined]
    read = vars(PretrainedConfig)["get_config_dict"].__func__
    if not hasattr(read, "catquant"):
        PretrainedConfig.get_config_dict = _checked(read)  # type: ignore[method-assign]


def _without_parts(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` without the entries of parts, which are in those of the whole."""
    config = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            vars(config)[name] = _without_parts(value)
            vars(vars(config)[name]).pop("quantization_config", None)
    return config
