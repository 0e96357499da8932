"""Processors of transformers: text, images and sound of one batch to the tensors that the model takes."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from .collate import collate, to_tensor
from .model_inputs import ModelInputs, Row, text_config

MAX_TOKENS = 512  # texts are cut here; for longer ones pass tokenized samples

_INPUT_KEYS = {"text": ("input_ids",), "image": ("pixel_values",), "audio": ("input_values", "input_features")}


def processor_kinds(processor: Any) -> dict[str, Any]:
    """What reads ``text``, ``image`` and ``audio``: the processor itself or its parts; empty for a plain function."""
    candidates = {
        "text": (getattr(processor, "tokenizer", processor), "model_max_length"),
        "image": (getattr(processor, "image_processor", processor), "preprocess"),
        "audio": (getattr(processor, "feature_extractor", processor), "sampling_rate"),
    }
    return {kind: part for kind, (part, mark) in candidates.items() if hasattr(part, mark)}


class Encoder:
    """A processor as its model uses it.

    Attributes:
        name: class name of the processor, for messages.
        kinds: what reads each kind of sample; kinds that the model takes no input of are left out.
    """

    def __init__(self, model: nn.Module, processor: Any, inputs: ModelInputs) -> None:
        self.name = type(processor).__name__
        self.kinds = processor_kinds(processor)
        self._processor = processor
        self._inputs = inputs
        self._config = getattr(model, "config", None)
        self._max_tokens = _max_tokens(model)
        if len(self.kinds) > 1:  # a captioner's processor reads text too, but its model takes images only
            taken = {kind: part for kind, part in self.kinds.items() if any(map(inputs.takes, _INPUT_KEYS[kind]))}
            self.kinds = taken or self.kinds

    def read(self, kind: str, value: Any) -> Any:
        """One value as the processor wants it: a text or a pair, a PIL image, a waveform.

        Raises:
            ValueError: a waveform of another sampling rate, or not a mono one; what PIL raises on a broken image.
        """
        if kind == "image":
            return _image(value, "L" if getattr(self._config, "num_channels", 3) == 1 else "RGB")
        return _waveform(value, self.kinds["audio"].sampling_rate) if kind == "audio" else value

    def batch(self, samples: Sequence[dict[str, Any]], indices: list[int]) -> Row:
        """Tensors of samples ``{kind: value}``, which all have the same kinds.

        Raises:
            ValueError: the processor cannot read them, or the model takes none of its outputs.
        """
        readers: dict[str, Callable[[list[dict[str, Any]], list[int]], Row]] = {
            "text": self._text,
            "image": self._image,
            "audio": self._audio,
            "image and text": self._image_text,
        }
        kinds = " and ".join(sorted(samples[0]))
        if kinds not in readers:
            raise ValueError(f"sample {indices[0]} has {kinds}: only image and text can go together")
        try:
            encoded = readers[kinds](list(samples), indices)
        except Exception as error:
            raise ValueError(
                f"samples {indices[0]} to {indices[-1]}: {self.name} cannot read them: {error}"
            ) from error
        batch = {key: tensor for key, tensor in encoded.items() if self._inputs.takes(key)}
        if all(key.endswith("_mask") for key in batch):
            raise ValueError(
                f"{self.name} gives {list(encoded)}, of which {self._inputs.model}.forward takes none; it takes "
                f"{list(self._inputs.names)}: pass ready tensors, or as processor a function that gives them"
            )
        return batch

    def _text(self, samples: list[dict[str, Any]], indices: list[int]) -> Row:
        tokenizer, texts = self.kinds["text"], [sample["text"] for sample in samples]
        if len({isinstance(text, tuple) for text in texts}) > 1:
            raise ValueError("some are one text, others a pair of texts")
        columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
        # Padding is left to collate: GPT-2 and Llama come without a pad token, which their tokenizers need for it.
        encoded = tokenizer(*columns, truncation=True, max_length=self._length(tokenizer))
        rows = [{k: to_tensor(v[r], k, index) for k, v in encoded.items()} for r, index in enumerate(indices)]
        return collate(rows, indices, self._inputs)

    def _image(self, samples: list[dict[str, Any]], indices: list[int]) -> Row:
        return _tensors(self.kinds["image"](images=[sample["image"] for sample in samples], return_tensors="pt"))

    def _audio(self, samples: list[dict[str, Any]], indices: list[int]) -> Row:
        extractor = self.kinds["audio"]
        padding = inspect.signature(extractor.__call__).parameters.get("padding")
        # The others pad by themselves, and to the length their model needs (Whisper: 30 seconds).
        options = {"padding": True} if padding is not None and padding.default is False else {}
        waveforms = [sample["audio"] for sample in samples]
        return _tensors(extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt", **options))

    def _image_text(self, samples: list[dict[str, Any]], indices: list[int]) -> Row:
        images, texts = ([sample[kind] for sample in samples] for kind in ("image", "text"))
        options: dict[str, Any] = {"padding": True}
        # Models that put image tokens into the text would lose them when it is cut.
        if not any(hasattr(self._config, name) for name in ("image_token_id", "image_token_index")):
            options |= {"truncation": True, "max_length": self._length(self.kinds["text"])}
        return _tensors(self._processor(text=texts, images=images, return_tensors="pt", **options))

    def _length(self, tokenizer: Any) -> int:
        return min(self._max_tokens, int(getattr(tokenizer, "model_max_length", MAX_TOKENS)))


def _max_tokens(model: nn.Module) -> int:
    config = text_config(getattr(model, "config", None))
    limit = min(MAX_TOKENS, getattr(config, "max_position_embeddings", None) or MAX_TOKENS)
    for name, table in model.named_modules():
        # RoBERTa counts positions from padding_idx + 1, so its table of 514 holds 512 tokens.
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit


def _image(value: Any, mode: str) -> Any:
    from PIL import Image  # costs time that text does not need

    if isinstance(value, Mapping):
        value = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    if isinstance(value, Tensor):  # torch keeps channels first
        channels_first = value.dim() == 3 and value.shape[0] in (1, 3, 4)
        value = (value.permute(1, 2, 0) if channels_first else value).cpu().numpy()
    if isinstance(value, np.ndarray):
        value = Image.fromarray(value.squeeze(-1) if value.ndim == 3 and value.shape[-1] == 1 else value)
    return value.convert(mode)


def _waveform(value: Any, sampling_rate: int) -> np.ndarray:
    """A (L,) float32 waveform; integers are taken for 16-bit samples and scaled to [-1, 1)."""
    if isinstance(value, Mapping) or hasattr(value, "get_all_samples"):
        given, value = value["sampling_rate"], value["array"]
        if int(given) != int(sampling_rate):
            raise ValueError(
                f"sampling_rate must be {sampling_rate}, which the processor was made for, got {given}: resample, "
                f"e.g. with dataset.cast_column(column, datasets.Audio(sampling_rate={sampling_rate}))"
            )
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"a waveform must be mono, a non-empty 1-D array, got shape {array.shape}")
    if np.issubdtype(array.dtype, np.signedinteger) and np.abs(array.astype(np.int64)).max() <= 32768:
        return (array / 32768).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a waveform must be float, or integers of 16 bit, got {array.dtype} up to {array.max()}")
    return array.astype(np.float32)


def _tensors(encoded: Mapping[str, Any]) -> Row:
    # Outputs without a tensor form (sizes, names) are not for the model.
    return {key: to_tensor(value, key, 0) for key, value in encoded.items() if isinstance(value, Tensor)}
