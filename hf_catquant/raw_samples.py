"""Raw samples: text, images and audio, alone or in the columns of a row, through the model's own processor.

A sample is first read into its *parts*, ``{"text" | "image" | "audio": value}``. Which columns of a row hold them is
decided on the first row and then kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

from .collate import LABELS
from .model_inputs import ModelInputs, Row
from .processors import Encoder

_TEXT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
)
_USUAL_NAMES = ("text", "sentence", "content", "image", "img", "audio")
_NOT_CONTENT = LABELS | {"id", "guid", "path", "file", "file_name", "filename", "url"}


def is_raw(value: Any) -> bool:
    """Whether only a processor can read ``value``: text, an image or a sound, not a bare array of numbers."""
    if isinstance(value, (list, tuple)):
        return any(is_raw(part) for part in value[:2])
    return kind_of(value) is not None and not (isinstance(value, (Tensor, np.ndarray)) and value.ndim != 3)


def kind_of(value: Any) -> str | None:
    """``text``, ``image``, ``audio``, ``encoded`` (bytes of an image or sound file), or None."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        if {"array", "sampling_rate"} <= value.keys():
            return "audio"
        return "encoded" if value and value.keys() <= {"bytes", "path"} else None
    if hasattr(value, "getbands"):  # PIL, without importing it
        return "image"
    if hasattr(value, "get_all_samples"):  # the audio decoder of datasets
        return "audio"
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim in (2, 3):
        return "image" if str(value.dtype).endswith("uint8") else None
    if isinstance(value, (Tensor, np.ndarray)):
        return "audio" if value.ndim == 1 else None
    return "audio" if _is_numbers(value) else None


def encode(
    items: Iterator[tuple[int, Any]], model: nn.Module, processor: Any, inputs: ModelInputs, batch_size: int
) -> Iterator[tuple[list[int], Row]]:
    """Batches of (index, raw sample) through the processor, each with the indices of its samples.

    Raises:
        ValueError: a sample that the processor cannot read, or an output that the model does not take.
    """
    encoder = Encoder(model, processor, inputs)
    columns: dict[str, tuple[str, ...]] = {}
    while chunk := list(islice(items, batch_size)):
        parts = []
        for index, item in chunk:
            if isinstance(item, Mapping) and kind_of(item) is None:
                columns = columns or _choose_columns(item, encoder.kinds, index)
                item = {kind: _columns_value(item, names, index) for kind, names in columns.items()}
            else:
                item = _bare_parts(item)
            parts.append(_checked(item, encoder, index))
        indices = [index for index, _ in chunk]
        if any(part.keys() != parts[0].keys() for part in parts):
            span = f"samples {indices[0]} to {indices[-1]}"
            raise ValueError(f"{span} mix text, images and audio: give all of them the same parts")
        yield indices, encoder.batch(parts, indices)


def _bare_parts(item: Any) -> dict[str, Any]:
    if isinstance(item, (list, tuple)) and not _is_numbers(item):
        if len(item) == 2 and all(isinstance(text, str) for text in item):
            return {"text": tuple(item)}
        kinds = ["image" if kind_of(value) == "encoded" else kind_of(value) or "" for value in item]
        if len(set(kinds)) == len(kinds):
            return dict(zip(kinds, item, strict=True))
    return {kind_of(item) or "": item}


def _checked(parts: dict[str, Any], encoder: Encoder, index: int) -> dict[str, Any]:
    checked = {}
    for kind, value in parts.items():
        found = "text" if isinstance(value, tuple) and all(isinstance(text, str) for text in value) else kind_of(value)
        if found == "encoded" and "image" not in encoder.kinds and "audio" in encoder.kinds:
            raise ValueError(
                f"sample {index} is an undecoded sound file: decode it with dataset.cast_column(column, "
                f"datasets.Audio(sampling_rate={encoder.kinds['audio'].sampling_rate}))"
            )
        found = "image" if found == "encoded" else found
        if found not in encoder.kinds or kind not in ("", "encoded", found):
            raise ValueError(
                f"sample {index}: {encoder.name} reads {' and '.join(encoder.kinds)}, got "
                f"{_describe(value)}: text is a str or a pair of them, an image PIL or a uint8 array, audio a dict of "
                "array and sampling_rate or a 1-D array"
            )
        try:
            checked[found] = encoder.read(found, value)
        except Exception as error:
            raise ValueError(f"sample {index}: {error}") from error
    return checked


def _choose_columns(row: Mapping[str, Any], kinds: Mapping[str, Any], index: int) -> dict[str, tuple[str, ...]]:
    """The columns of each kind that the processor reads."""
    columns = {}
    for kind in kinds:
        content = {name: value for name, value in row.items() if name not in _NOT_CONTENT}
        found = [name for name, value in content.items() if _column_kind(value, kinds) == kind]
        names = _text_columns(found, index) if kind == "text" else tuple(_usual_first(found)[:1])
        if names:
            columns[kind] = names
    if "audio" in columns:  # then a text is its transcript
        columns = {"audio": columns["audio"]}
    if not columns:
        wanted = " or ".join(kinds)
        raise ValueError(
            f"sample {index} has no {wanted} for the processor; it has "
            f"{ {name: _describe(value) for name, value in row.items()} }: rename or cast the column that holds it"
        )
    return columns


def _text_columns(found: list[str], index: int) -> tuple[str, ...]:
    pair = next((pair for pair in _TEXT_PAIRS if set(pair) <= set(found)), None)
    usual = [name for name in _usual_first(found) if name in _USUAL_NAMES]
    if pair is None and not usual and len(found) > 1:
        raise ValueError(
            f"sample {index} has the text columns {found}: keep the one to read, with dataset.select_columns, or rename "
            "the two of a pair to sentence1 and sentence2"
        )
    return pair or tuple(usual[:1]) or tuple(found)


def _usual_first(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: _USUAL_NAMES.index(name) if name in _USUAL_NAMES else len(_USUAL_NAMES))


def _column_kind(value: Any, kinds: Mapping[str, Any]) -> str | None:
    kind = kind_of(value)
    if kind == "encoded":  # which of the two is not to be seen from the bytes
        return "image" if "image" in kinds else "audio"
    return kind


def _columns_value(row: Mapping[str, Any], names: tuple[str, ...], index: int) -> Any:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise ValueError(f"sample {index} has no value in column {missing[0]!r}: filter such rows out of the dataset")
    value = row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)
    if "sampling_rate" in row and kind_of(value) == "audio" and not isinstance(value, Mapping):
        return {"array": value, "sampling_rate": row["sampling_rate"]}
    return value


def is_number(value: Any) -> bool:
    """Whether ``value`` is one number, as labels are."""
    return isinstance(value, (int, float, np.number)) or (isinstance(value, Tensor) and value.dim() == 0)


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(is_number(number) for number in value)


def _describe(value: Any) -> str:
    shape = f" {tuple(value.shape)} {value.dtype}" if isinstance(value, (Tensor, np.ndarray)) else ""
    return f"{type(value).__name__}{shape}"
