"""Collation: samples as tensors to padded batches, and the checks that every batch must pass.

A *row* is one sample, ``{key: tensor without a batch dimension}``. Sequences are padded on the right to the longest of
their batch, and what was padded is told by ``attention_mask`` (1 real, 0 padding).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model_inputs import ModelInputs, Row

LABELS = frozenset({"label", "labels", "label_ids", "idx"})

_FLOATS = frozenset({"pixel_values", "input_values", "input_features", "inputs_embeds"})


def to_row(sample: Mapping[str, Any], inputs: ModelInputs, index: int, label_rank: int = 1) -> Row:
    """Tensors of a dict sample without its label columns; ``labels`` of an encoder-decoder stay if they are sequences.

    Raises:
        ValueError: a key that the model does not take, a value that is no regular array, or nothing is left.
    """
    row = {}
    for key, value in sample.items():
        if key in LABELS and not (key == "labels" and inputs.keeps_labels and np.ndim(value) >= label_rank):
            continue
        if not inputs.takes(key):
            raise ValueError(
                f"sample {index} has the key {key!r}, which {inputs.model}.forward does not take; it takes "
                f"{list(inputs.names)}: drop it, e.g. with dataset.remove_columns([{key!r}])"
            )
        row[key] = to_tensor(value, key, index)
        if key in _FLOATS and not row[key].is_floating_point():
            raise ValueError(
                f"sample {index}: {key!r} must be floats as the processor gives them, got {row[key].dtype}"
            )
    if not row:
        raise ValueError(f"sample {index} has no input for {inputs.model}.forward, which takes {list(inputs.names)}")
    return row


def to_tensor(value: Any, key: str, index: int) -> Tensor:
    """``value`` on the CPU: floats as float32, integers as int64 (uint8 and bool stay).

    Raises:
        ValueError: not numbers, or a ragged list.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sample {index}: {key!r} must be a regular array of numbers: {error}") from error
    value = value.detach().cpu()
    if value.is_floating_point():
        return value.float()
    return value.long() if value.dtype in (torch.int8, torch.int16, torch.int32) else value


def batched_rows(row: Row, inputs: ModelInputs, index: int) -> list[Row]:
    """The rows of a sample that may already have a batch dimension, as ``tokenizer(text, return_tensors="pt")`` gives.

    Raises:
        ValueError: batched, but not all tensors have the same number of rows.
    """
    if not _is_batched(row, inputs):
        return [row]
    count = batch_size_of(row, index)
    return [{key: tensor[r] for key, tensor in row.items()} for r in range(count)]


def batch_size_of(batch: Row, index: int) -> int:
    """Leading dimension of a batch.

    Raises:
        ValueError: the tensors disagree, or one has no dimension.
    """
    sizes = {key: tensor.shape[0] if tensor.dim() else None for key, tensor in batch.items()}
    first = next(iter(sizes.values()))
    if first is None or len(set(sizes.values())) > 1:
        raise ValueError(f"sample {index} is a batch: its tensors must have one leading dimension, got {sizes}")
    return first


def collate(rows: Sequence[Row], indices: Sequence[int], inputs: ModelInputs) -> Row:
    """Stack rows to a batch, padding sequences.

    Raises:
        ValueError: keys differ between samples, shapes differ where padding cannot help, or a sequence is empty.
    """
    for index, row in zip(indices, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise ValueError(f"sample {index} has the keys {sorted(row)}, sample {indices[0]} has {sorted(rows[0])}")
    batch: Row = {}
    lengths: list[int] | None = None
    for key in rows[0]:
        values = [row[key] for row in rows]
        if len({value.shape for value in values}) == 1 and values[0].numel():
            batch[key] = torch.stack(values)
            continue
        batch[key] = _pad(values, key, indices, inputs)
        if lengths is None and key != "labels" and not key.startswith("decoder_"):
            lengths = [len(value) for value in values]
        if key == "decoder_input_ids" and "decoder_attention_mask" in inputs.names:
            batch.setdefault("decoder_attention_mask", _mask([len(value) for value in values]))
    if lengths is not None and "attention_mask" not in batch and _masks(batch, inputs):
        batch["attention_mask"] = _mask(lengths)
    return batch


def check_values(batch: Row, indices: Sequence[int], inputs: ModelInputs) -> None:
    """Refuse what no model can calibrate on.

    Raises:
        ValueError: NaN, infinity, a sample of padding alone or a token outside the vocabulary, naming the sample.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and bool((mask == 0).all(1).any()):
        position = int((mask == 0).all(1).int().argmax())
        raise ValueError(f"sample {indices[position]}: its attention_mask is 0 everywhere: it is padding alone")
    for key, tensor in batch.items():
        if tensor.is_floating_point() and not key.endswith("mask"):
            bad = ~torch.isfinite(tensor).unsqueeze(-1).flatten(1).all(1)
            if bool(bad.any()):
                raise ValueError(f"sample {indices[int(bad.int().argmax())]}: {key!r} has NaN or infinite values")
    ids = batch.get("input_ids")
    if ids is None or inputs.vocab_size is None or ids.is_floating_point():
        return
    outside = ((ids < 0) | (ids >= inputs.vocab_size)).unsqueeze(-1).flatten(1)
    if bool(outside.any()):
        position = int(outside.any(1).int().argmax())
        token = int(ids[position].flatten()[outside[position]][0])
        raise ValueError(
            f"sample {indices[position]}: input_ids must be in [0, {inputs.vocab_size}), the vocab_size of "
            f"{inputs.model}, got {token}: is this the tokenizer of this model?"
        )


def fingerprint(batches: Iterable[Row]) -> str:
    """First 16 hex digits of the sha256 over keys, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_batched(row: Row, inputs: ModelInputs) -> bool:
    if "input_values" in row:
        values = row["input_values"]  # (L,) or (frames, mel) a sample
        spectrogram = values.dim() == 2 and values.shape[1] == inputs.mel_bins
        return values.dim() >= 2 and not spectrogram
    return next((row[key].dim() >= rank for key, rank in inputs.ranks.items() if key in row), False)


def _pad(values: Sequence[Tensor], key: str, indices: Sequence[int], inputs: ModelInputs) -> Tensor:
    for index, value in zip(indices, values, strict=True):
        if not value.numel():
            raise ValueError(f"sample {index}: {key!r} is empty: filter empty samples out of the dataset")
    first = values[0]
    other = next(r for r, value in enumerate(values) if value.shape != first.shape)
    shapes = f"sample {indices[0]} has {key!r} of shape {tuple(first.shape)}, sample {indices[other]}"
    shapes += f" of {tuple(values[other].shape)}"
    same_rank = all(value.dim() == first.dim() for value in values)
    if first.dim() not in (1, 2) or not same_rank or any(value.shape[1:] != first.shape[1:] for value in values):
        raise ValueError(f"{shapes}: bring them to one shape, e.g. with the processor of the model")
    follows = key == "labels" or key.startswith("decoder_") or key.endswith("_mask")
    if not follows and not inputs.takes("attention_mask"):
        raise ValueError(
            f"{shapes}, and {inputs.model}.forward takes no attention_mask to tell padding: cut them to one length, "
            "or use batch_size=1"
        )
    fill = -100 if key == "labels" else inputs.pad_id if key.endswith("input_ids") else 0
    padded = first.new_full((len(values), max(len(value) for value in values), *first.shape[1:]), fill)
    for target, value in zip(padded, values, strict=True):
        target[: len(value)] = value
    return padded


def _masks(batch: Row, inputs: ModelInputs) -> bool:
    return inputs.takes("attention_mask") and (inputs.masks_waveforms or "input_values" not in batch)


def _mask(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
