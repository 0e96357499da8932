"""The HfQuantizer: the only file that touches the internals of transformers.

Quantizing on load happens after the float weights are in (``_process_model_after_weight_loading``), because the solvers
need the whole model to calibrate. Loading a stored model replaces the layers before the weights come, so that the loader
fills our buffers by name; nothing is converted.

A checkpoint *fails closed*: beside each packed weight it stores a one-byte tensor under the original name of the weight.
Where this package is not imported, transformers finds a tensor of the wrong shape there and raises, instead of
returning a model with random weights.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from .config import QUANT_METHOD, CatQuantConfig
from .correction import attach, corrections
from .correction_file import check_values, empty_correction
from .entries import check_provenance, check_tensors, verify_entries
from .fields import check_depth, check_tables
from .integrity import verify_files
from .journal import Journal
from .load_checks import check_biases, check_given, check_loaded, check_room, stays_float32, warn_of_changes
from .log import logger
from .modules import holds, open_experts, opened_experts
from .op_checks import COMPUTE
from .packed_model import dequantize_modules, prepare, quantized_modules, remember_sites, share_weight
from .pipeline import quantize_modules
from .report import provenance, stored_bytes
from .resolve import check_complete, is_stored_class, renamed, resolve_corrections, resolve_names, tied_elsewhere
from .saving import check_merged, update_config
from .sentinels import check_files
from .ties import adopt_orphans, say_tied, tie_again, untie
from .written import (
    as_written,
    asked_of_save,
    fields_as_written,
    leave_out,
    parameters_as_written,
    say_absent,
    tensors_to_save,
)


class CatQuantizer(HfQuantizer):
    """Quantizes while loading, and loads what was quantized."""

    requires_calibration = False
    quantization_config: CatQuantConfig
    is_given: bool = False  # whether the tensors are not read from files
    fields_read: dict[str, Any] | None = None  # of the model's config before a class has changed some

    def __init__(self, quantization_config: CatQuantConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if self.pre_quantized and self.quantization_config.modules is None:
            raise ValueError(
                "the checkpoint's quantization_config has no 'modules': it is a request, not a quantized model; "
                "pass it as quantization_config to from_pretrained together with a float checkpoint"
            )
        check_provenance(self.quantization_config.provenance)
        config = self.quantization_config
        if self.pre_quantized:
            verify_entries(config.modules or {}, config.corrections, config.checksums, config.entries_checksum)
            check_tensors(config.modules or {}, config.checksums)
        else:
            config.check_data()

    def update_attn_implementation(self, config: Any) -> Any:
        """The config as it is: of all hooks this one sees it before a module is built; no endless layers or classes.

        Raises:
            ValueError: a field asks for more layers than the checkpoint has tensors, or for more classes than a head has.
        """
        if self.pre_quantized:
            entries = self.quantization_config.modules or {}
            check_tables(config, max(entry["shape"][0] for entry in entries.values()))
            self.fields_read = config.to_dict()
            check_depth(self.fields_read, len(self.quantization_config.checksums))
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype as it is, of those that a model can compute in.

        Raises:
            ValueError: it is another one (float8, int8).
        """
        if dtype not in COMPUTE:
            known = ", ".join(str(each).removeprefix("torch.") for each in COMPUTE)
            raise ValueError(
                f"dtype must be one of {known}, which the float parts of a model compute in, got {dtype}: if you did not "
                "ask for it, it is that of config.json; pass dtype=torch.float32 to from_pretrained"
            )
        return dtype

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Quantizing needs the weights in memory: refuse to do it on a model that is partly offloaded.

        Raises:
            ValueError: the device map sends modules to disk, or to more than one device.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise ValueError(
                f"quantizing on load needs the whole model on one device, got device_map over "
                f"{sorted(map(str, set(device_map.values())))}: load with device_map=None, save, and load that dispatched"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        stored = config.modules or {}
        self.is_given = checkpoint_files is None  # from_pretrained(None, config=config, state_dict=tensors)
        if checkpoint_files is not None:
            verify_files(checkpoint_files, config.checksums)
            check_files(checkpoint_files)
        if is_stored_class(model):
            leave_out(model, config.provenance, config.checksums)
        open_experts(model, lambda name: holds(name, stored))
        names = resolve_names(model, stored)
        config.modules = renamed(stored, names)
        sites = resolve_corrections(model, config.corrections, names.keys(), stored.keys() - names.keys())
        config.corrections = renamed(config.corrections, sites)
        config.modules |= tied_elsewhere(model, config.modules, config.checksums)
        prepare(model, config.modules)
        check_biases(model, names, config.checksums)
        for name, entry in config.corrections.items():
            attach(model, name, empty_correction(entry, torch.device("meta")))
        if checkpoint_files is not None:
            check_room(model, sum(Path(file).stat().st_size for file in checkpoint_files))
        warn_of_changes(model, config.provenance, self.fields_read, is_stored_class(model))
        untie(model)
        held = {sentinel for module in quantized_modules(model).values() for sentinel in ("weight", module.sentinel)}
        sentinels = {rf"^{re.escape(f'{name}.{key}')}$" for pair in names.items() for name in pair for key in held}
        sentinels |= {
            rf"(^|\.){re.escape(f'{name}.{key}')}$"
            for name, m in opened_experts(model).items()
            for key in m.sentinel()
        }
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | sentinels

    @torch.no_grad()
    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, journal: Journal | None = None, **kwargs: Any
    ) -> None:
        model.add_model_tags([QUANT_METHOD])  # what model.push_to_hub writes on a card of its own
        if not self.pre_quantized:
            self.quantization_config = quantize_model(model, self.quantization_config, journal)
            model.config.quantization_config = self.quantization_config
            return
        entries = self.quantization_config.modules or {}
        tied = {name: entry["tied_to"] for name, entry in entries.items() if entry["tied_to"] is not None}
        for name, owner in tied.items():
            share_weight(model, name, owner)
        for name, module in quantized_modules(model).items():
            check_loaded(name, module)
            module.check_values()
            if stays_float32(model, name, module.dtype):
                module.dtype = torch.float32
        for name, correction in corrections(model).items():
            check_loaded(f"{name}.correction", correction)
            check_values(name, correction)
        check_complete(model, parameters_as_written(model), self.quantization_config.checksums)
        for module in quantized_modules(model).values():
            module.keep_stored_dtypes()
        for name, owner in tied.items():
            share_weight(model, name, owner)
        if self.is_given:
            check_given(as_written(model, model.state_dict()), self.quantization_config.checksums)
        remember_sites(model, self.quantization_config)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` can write the model."""
        return self.quantization_config.modules is not None

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the packed layers; adapters, biases and norms can learn."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that ``Trainer`` accepts the model, also to evaluate only."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have fakes: ``torch.compile`` sees through the model."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save, those of ``save_pretrained(state_dict=...)`` among them; the config says what they are.

        Raises:
            ValueError: the model has adapters or is not as a load wants it, or the ``state_dict`` is of another one.
        """
        asked = asked_of_save(model)
        if asked.get("distributed_checkpoint"):  # which takes no tensors from here, and so not those of one byte
            raise ValueError(
                "distributed_checkpoint must be False for a quantized model: without the tensors of one byte, which only "
                "the other way writes, the checkpoint would load as another model; the packed weights are small"
            )
        if asked.get("save_original_format") is False:  # names of tensors are compared as the Hub has them
            raise ValueError(
                "save_original_format must be True for a quantized model: with other names of its tensors it would not load"
            )
        given = asked.get("state_dict")
        if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are saved, and no config
            return model.state_dict() if given is None else given, {}
        return self._to_save(model, given), {}

    def _to_save(self, model: PreTrainedModel, given: dict[str, Tensor] | None) -> dict[str, Tensor]:
        check_merged(model)
        adopt_orphans(model)
        state = tensors_to_save(model, given)
        say_tied(model)
        self.quantization_config.provenance = say_absent(self.quantization_config.provenance, model)
        update_config(self.quantization_config, model, as_written(model, state), fields_as_written(model))
        remember_sites(model, self.quantization_config)
        model.config.quantization_config = self.quantization_config
        return state

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if corrections(model):
            logger.warning(
                "the corrections at %s stay in memory; a copy saved without quantization would lose them",
                ", ".join(corrections(model)),
            )
        say_tied(model)
        # A config that has been saved holds its dtype as a word.
        dequantize_modules(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        tie_again(model)
        return model


def check_unquantized(model: nn.Module) -> None:
    """Refuse a model that another method has quantized, or a part of it.

    Raises:
        ValueError: naming the method: one checkpoint has one, and would lose the other's weights.
    """
    for name, module in model.named_modules():
        other = vars(module).get("hf_quantizer")
        if other is not None and not isinstance(other, CatQuantizer):
            method = getattr(other.quantization_config, "quant_method", type(other).__name__)
            raise ValueError(
                f"{name or type(model).__name__} was quantized by {getattr(method, 'value', method)}, and a checkpoint has "
                "one method of quantization: start from the float model, or save the two apart"
            )


def quantize(model: nn.Module, config: CatQuantConfig, journal: Journal | None = None) -> nn.Module:
    """Quantize a model that is already in memory, in place, and return it.

    Args:
        model: a transformers model, or any module; its layers are replaced.
        config: what to do. It is not changed.
        journal: keeps finished units and gives back those of an interrupted run; see :func:`quantize_folder`, which also
            checks that it is a run of the same model.

    Raises:
        ValueError, TypeError: the config or its data cannot be used; the model is then unchanged or, if that happens in
            the middle of the walk, still whole but partly quantized.
    """
    if quantized_modules(model):
        raise ValueError(f"{type(model).__name__} is already quantized: start from the float model")
    check_unquantized(model)
    if not isinstance(model, PreTrainedModel):
        model.quantization_config = quantize_model(model, copy.deepcopy(config), journal)  # type: ignore[assignment]
        return model
    quantizer = CatQuantizer(config, pre_quantized=False)
    quantizer.postprocess_model(model, journal=journal)
    for name, value in (("hf_quantizer", quantizer), ("is_quantized", True), ("quantization_method", QUANT_METHOD)):
        setattr(model, name, value)
    return model


def quantize_model(model: nn.Module, config: CatQuantConfig, journal: Journal | None = None) -> CatQuantConfig:
    """Quantize in place; returns the config that a checkpoint of ``model`` stores."""
    before = stored_bytes(model)
    selection, outcome, batches = quantize_modules(model, config, journal)
    config.modules, config.corrections = outcome.modules, outcome.corrections
    config.provenance = provenance(config, before, selection, outcome, batches)
    config.dataset = config.processor = None
    remember_sites(model, config)
    if isinstance(model, PreTrainedModel):
        untie(model)
    return config
