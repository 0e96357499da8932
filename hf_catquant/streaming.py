"""A model whose float weights stay in its safetensors files: built by transformers' own loader, put on a shelf.

The loader is given a state dict in which large tensors are absent (``shelf.py``) and in the dtype they will have. So
whatever it does to names, ties and buffers is done as always; afterwards every parameter that is still absent is known by
its address. Tensors that the loader would put together from several (fused experts) are read at once, as it always does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .integrity import read_header
from .layers import LAYERS, layer_for
from .layers.experts import Fused
from .log import logger
from .model import stacks
from .shelf import Shelf, Source, absent
from .whole import check_whole

LEAST = 1 << 16  # values: smaller tensors are read at once


def open_on_shelf(
    auto: Any, name: str, files: list[Path], *, dtype: torch.dtype, trust_remote_code: bool = False, least: int = LEAST
) -> PreTrainedModel:
    """The float model called ``name``, on a shelf that reads from ``files``; the same values as ``from_pretrained`` gives.

    Args:
        auto: the class that loads it, or an Auto class.
        name: folder or Hub id.
        files: its safetensors files.
        dtype: of the float parameters.
        trust_remote_code: run modelling code that comes with it.
        least: values from which on a tensor stays on disk.

    Raises:
        ValueError: a file is damaged, the files lack tensors of the model, or have some for another class.
    """
    sources = {key: Source(path, stored) for path in files for key, stored in read_header(path).items()}
    empty = _empty(auto, name, trust_remote_code)
    fused = _fused(empty, set(sources))
    state: dict[str, Tensor] = {}
    away: dict[int, Source] = {}
    for key, source in sources.items():
        shape = source.stored.shape
        if (
            key not in fused
            and len(shape) > 1
            and torch.Size(shape).numel() >= least
            and source.dtype.is_floating_point
        ):
            state[key] = absent(shape, dtype)
            away[state[key].data_ptr()] = source
        else:
            state[key] = source.read()
    model = _load(auto, type(empty), name, state, dtype, trust_remote_code)
    held = {n: away.pop(p.data_ptr()) for n, p in model.named_parameters() if p.data_ptr() in away}
    _read_rest(model, state, away)
    for name, module in model.named_modules():  # experts are opened, which looks at all of them at once
        for key in [f"{name}.{own}" for own in module._parameters if f"{name}.{own}" in held and Fused.of(module)]:
            module.get_parameter(key.rpartition(".")[2]).data = held.pop(key).read(dtype)
    by_parameter = {id(p): held[n] for n, p in model.named_parameters() if n in held}
    derived: list[nn.Module] = [m for m in model.modules() if type(m) not in LAYERS and isinstance(m, tuple(LAYERS))]
    for module in derived:
        _settle_kind(module, by_parameter)
    Shelf(model, held, units_of(model))
    return model


def units_of(model: nn.Module) -> list[str]:
    """Names of the repeated blocks and of the layers outside of them."""
    blocks = [block for names in stacks(model).values() for block in names]
    inside = tuple(f"{block}." for block in blocks)
    return blocks + [
        name for name, module in model.named_modules() if not name.startswith(inside or ("\0",)) and layer_for(module)
    ]


def _empty(auto: Any, name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model without values."""
    with torch.device("meta"):
        if _is_class(auto):
            return auto._from_config(auto.config_class.from_pretrained(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return auto.from_config(config, trust_remote_code=trust_remote_code)


def _is_class(auto: Any) -> bool:
    return isinstance(auto, type) and issubclass(auto, PreTrainedModel)


def _load(
    auto: Any,
    kind: type[PreTrainedModel],
    name: str,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """What ``from_pretrained`` does, which takes a name or a state dict but not both."""
    if _is_class(auto):
        config = auto.config_class.from_pretrained(name)  # of a model of two towers, the part that is this one's
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if kind.config_class is not None and not isinstance(config, kind.config_class):
            config = config.get_text_config()
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    model, found = loaded
    check_whole(model, name, found, auto)
    model.config.name_or_path = name
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        where = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        more = {"force_download": False, "local_files_only": False, "subfolder": "", **where}
        model.adjust_generation_fn(None, True, None, name, trust_remote_code=trust_remote_code, **more)
    return model


def _fused(model: PreTrainedModel, keys: set[str]) -> set[str]:
    """The keys whose tensors the loader puts together or takes apart."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    if not converters:
        return set()
    found = {key for key in keys if rename_source_key(key, renamings, converters)[1] is not None}
    if found:
        logger.info("%d tensors are put together while loading and stay in memory, e.g. %s", len(found), min(found))
    return found


def _read_rest(model: nn.Module, state: dict[str, Tensor], away: dict[int, Source]) -> None:
    """Fill what the loader cast or moved: buffers, and parameters that stay in float32."""
    by_key = {key: away[tensor.data_ptr()] for key, tensor in state.items() if tensor.data_ptr() in away}
    if not by_key:
        return
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        if not (tensor.is_floating_point() and tensor.dim() > 1 and bool(tensor.reshape(-1)[0].isnan())):
            continue
        found = [k for k in by_key if k == name or k.endswith(f".{name}") or name.endswith(f".{k}")]
        if len(found) != 1:
            raise ValueError(f"{name}: none of the tensors in the files is clearly its own: load the model whole")
        tensor.data = by_key[found[0]].read(tensor.dtype)


def _settle_kind(module: nn.Module, sources: dict[int, Source]) -> None:
    """Whether a derived layer does what its base does is found by running it once, which takes its weight."""
    own = [p for p in module.parameters(recurse=False) if id(p) in sources]
    for parameter in own:
        parameter.data = sources[id(parameter)].read(parameter.dtype)
    module.__dict__["_catquant_plain"] = layer_for(module) is not None
    for parameter in own:
        parameter.data = absent(parameter.shape, parameter.dtype)
