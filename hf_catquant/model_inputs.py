"""What the forward of a model takes, read from its signature and configuration: names, ranks and bounds."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_BATCHED_RANK = {"input_ids": 2, "pixel_values": 4, "input_features": 3, "inputs_embeds": 3, "attention_mask": 2}
_CONV_RANK: dict[type[nn.Module], int] = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}

Row = dict[str, Tensor]


@dataclass(frozen=True)
class ModelInputs:
    """What the forward of a model takes, read once.

    Attributes:
        model: class name, for messages.
        names: named parameters of ``forward``; empty if it has none and takes any key.
        pad_id: fills ``input_ids``.
        vocab_size: bound of ``input_ids``, or None.
        keeps_labels: the model is an encoder-decoder, which derives its decoder inputs from ``labels``.
        masks_waveforms: False for speech models trained on zero-padded waveforms without a mask.
        ranks: rank of ``key`` with its batch dimension, where the rank tells.
        mel_bins: width of spectrogram ``input_values``, or None where these are waveforms.
    """

    model: str
    names: tuple[str, ...]
    pad_id: int
    vocab_size: int | None
    keeps_labels: bool
    masks_waveforms: bool
    ranks: dict[str, int]
    mel_bins: int | None

    @classmethod
    def of(cls, model: nn.Module, processor: object = None) -> ModelInputs:
        """Read the signature and configuration of ``model``."""
        config = getattr(model, "config", None)
        names = forward_names(model)
        tokenizer = getattr(processor, "tokenizer", processor)
        pads = (getattr(tokenizer, "pad_token_id", None), getattr(text_config(config), "pad_token_id", None))
        ranks = dict(_BATCHED_RANK)
        if hasattr(config, "num_frames"):  # video models take (B, frames, C, H, W)
            ranks["pixel_values"] = 5
        if config is None and names:
            first_conv = next((_CONV_RANK[type(m)] for m in model.modules() if type(m) in _CONV_RANK), None)
            ranks |= {} if first_conv is None else {names[0]: first_conv}
        return cls(
            model=type(model).__name__,
            names=names,
            pad_id=next((pad for pad in pads if isinstance(pad, int) and pad >= 0), 0),
            vocab_size=getattr(text_config(config), "vocab_size", None),
            keeps_labels=bool(getattr(config, "is_encoder_decoder", False)) and (not names or "labels" in names),
            # The feature extractors of these models return no mask, and a given one degrades what the model computes.
            masks_waveforms=getattr(config, "feat_extract_norm", None) != "group",
            ranks=ranks,
            mel_bins=getattr(config, "num_mel_bins", None),
        )

    def takes(self, key: str) -> bool:
        """Whether ``forward`` takes ``key``."""
        return not self.names or key in self.names

    def first(self) -> str:
        """The key of a bare tensor.

        Raises:
            ValueError: ``forward`` names no parameter.
        """
        if not self.names:
            raise ValueError(f"{self.model}.forward names no parameter to pass a tensor to: pass dicts of tensors")
        return self.names[0]


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Named parameters of ``forward``; empty if it only passes on ``*args`` and ``**kwargs``."""
    # **kwargs says nothing: in transformers 5 every forward has it, and passes what it does not know on to attention.
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def text_config(config: Any) -> Any:
    """The part of a configuration that knows vocabulary and positions."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
