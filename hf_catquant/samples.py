"""Calibration data: samples in any form to batches that are ready for ``model(**batch)``.

Dataset, IterableDataset, list, generator, DataLoader
    -> items (index, sample)        a random subset of map-style data, the first ones of a stream
    -> groups (indices, tensors)    raw samples through the processor, tensors padded and stacked
    -> Batches                      checked, with decoder inputs, and a fingerprint of their content
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .collate import LABELS, batch_size_of, batched_rows, check_values, collate, fingerprint, to_row
from .decoder_inputs import fill_decoder_inputs
from .model_inputs import ModelInputs, Row
from .padding import padding_mask
from .processors import processor_kinds
from .raw_samples import encode, is_number, is_raw

__all__ = ["Batches", "collect", "padding_mask"]

Group = tuple[list[int], Row]


@dataclass(frozen=True)
class Batches:
    """Calibration data of one model.

    Attributes:
        batches: tensors by name, on the CPU, each with a leading batch dimension.
        num_samples: rows in all batches together.
        fingerprint: 16 hex digits; the same data gives the same ones.
        source: what the data came from, e.g. ``datasets.Dataset, 256 of 1024 rows``; never the data.
    """

    batches: list[dict[str, Tensor]]
    num_samples: int
    fingerprint: str
    source: str


def collect(
    dataset: Any,
    model: nn.Module,
    *,
    processor: Any = None,
    num_samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    least: int = 2,
    otherwise: str = "",
) -> Batches:
    """Make batches of ``num_samples`` samples, or of as many as there are.

    Of data with a length a random subset is taken, of a stream the first ones: no item more than needed is pulled.
    Tensors must have the names that the model's forward takes; label columns are dropped, except for the ``labels`` of
    an encoder-decoder. Texts are cut to 512 tokens. Neither the model nor the global random generator is changed.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset``, a DataLoader of batches, a list of dicts (one sample or
            a batch each), tensors or raw samples, a generator, or any other iterable.
        model: reads the batches.
        processor: tokenizer, image processor, feature extractor or processor of the model, or any function from a
            sample to its tensor or dict of tensors; for raw samples.
        num_samples: at least 2.
        batch_size: rows in a batch; those of a DataLoader stay as they are.
        seed: of the random subset, and of a DataLoader that shuffles.
        least: samples that are needed; 1 where nothing is fitted to them.
        otherwise: what needs no samples, for messages.

    Raises:
        TypeError: ``dataset`` is not a collection of samples, or ``processor`` cannot be called.
        ValueError: a sample that the model cannot take, or fewer than ``least``.
    """
    without = otherwise and f", or {otherwise}, which needs no samples"
    _check_arguments(dataset, processor, num_samples, batch_size, without)
    inputs = ModelInputs.of(model, processor)
    with _own_rng(seed):
        if isinstance(dataset, DataLoader):
            groups = _loader_groups(dataset, inputs, num_samples)
        else:
            items = _read(dataset, num_samples, seed)
            groups = _item_groups(items, model, processor, inputs, num_samples, batch_size)
        count = sum(len(indices) for indices, _ in groups)
        _check_count(count, dataset, least, without)
        for indices, batch in groups:
            check_values(batch, indices, inputs)
        batches = fill_decoder_inputs([batch for _, batch in groups], model)
    return Batches(batches, count, fingerprint(batches), _source(dataset, count))


def _check_arguments(dataset: Any, processor: Any, num_samples: int, batch_size: int, without: str) -> None:
    wanted = "dataset must be a Dataset, a DataLoader, a list of samples or another iterable of samples"
    if dataset is None:
        raise TypeError(f"{wanted}, got None: pass samples{without}")
    if isinstance(dataset, str):
        raise TypeError(f"{wanted}, got the str {dataset!r}: load it first, with datasets.load_dataset")
    if isinstance(dataset, Mapping) and any(hasattr(split, "column_names") for split in dataset.values()):
        raise TypeError(f"{wanted}, got the splits {list(dataset)}: pass one, e.g. dataset[{next(iter(dataset))!r}]")
    if isinstance(dataset, (Mapping, Tensor, np.ndarray)):
        raise TypeError(f"{wanted}, got a single {type(dataset).__name__}: pass a list of samples, e.g. [sample, ...]")
    if hasattr(dataset, "iterrows"):
        raise TypeError(f"{wanted}, got a {type(dataset).__name__}: pass dataset.to_dict('records')")
    if not (isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__")):
        raise TypeError(f"{wanted}, got {type(dataset).__name__}")
    if processor is not None and not callable(processor):
        wanted = "processor must be a tokenizer, image processor, feature extractor or a function of one sample"
        raise TypeError(f"{wanted}, got {type(processor).__name__}")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_count(count: int, dataset: Any, least: int, without: str) -> None:
    if count == 0:
        spent = " (a generator can be read once)" if isinstance(dataset, Iterator) else ""
        raise ValueError(f"dataset is empty{spent}: pass samples{without}")
    if count < least:
        raise ValueError(f"calibration needs at least 2 samples, got 1: pass more{without}")


@contextmanager
def _own_rng(seed: int) -> Iterator[None]:
    # A DataLoader draws from torch's global generator even where it does not shuffle.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _has_rows(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _read(dataset: Any, num_samples: int, seed: int) -> Iterator[tuple[int, Any]]:
    if not _has_rows(dataset):
        yield from enumerate(islice(iter(dataset), num_samples))
        return
    order: Iterable[int] = range(len(dataset))
    if len(dataset) > num_samples:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    for index in order:
        yield index, dataset[index]


def _item_groups(
    items: Iterator[tuple[int, Any]],
    model: nn.Module,
    processor: Any,
    inputs: ModelInputs,
    num_samples: int,
    batch_size: int,
) -> list[Group]:
    unlabelled = ((index, _without_label(item)) for index, item in items)
    first = next(unlabelled, None)
    if first is None:
        return []
    items = chain([first], unlabelled)
    if processor is not None and not processor_kinds(processor):
        items = ((index, _apply(processor, item, index)) for index, item in items)
    elif not _is_ready(first[1], inputs, processor is not None):
        if processor is None:
            raise ValueError(_without_processor(first[1], inputs))
        return list(encode(items, model, processor, inputs, batch_size))
    rows: list[Row] = []
    indices: list[int] = []
    for index, item in items:
        sample = item if isinstance(item, Mapping) else {inputs.first(): item}
        new = batched_rows(to_row(sample, inputs, index), inputs, index)[: num_samples - len(rows)]
        rows += new
        indices += [index] * len(new)
        if len(rows) == num_samples:
            break
    spans = [slice(start, start + batch_size) for start in range(0, len(rows), batch_size)]
    return [(indices[span], collate(rows[span], indices[span], inputs)) for span in spans]


def _without_label(item: Any) -> Any:
    """The sample of a (sample, label) tuple, as torch datasets give it."""
    if not isinstance(item, (list, tuple)) or len(item) not in (1, 2) or is_number(item[0]):
        return item
    return item[0] if len(item) == 1 or is_number(item[1]) else item


def _is_ready(item: Any, inputs: ModelInputs, with_processor: bool) -> bool:
    """Whether a sample holds numbers for the model, and not what a processor reads."""
    if isinstance(item, Mapping):
        content = {key: value for key, value in item.items() if key not in LABELS}
        if with_processor:
            return any(key in inputs.names and not is_raw(value) for key, value in content.items())
        return not any(is_raw(value) for value in content.values()) or any(key in inputs.names for key in content)
    return not with_processor and not is_raw(item)


def _without_processor(item: Any, inputs: ModelInputs) -> str:
    row = item if isinstance(item, Mapping) else {"sample": item}
    return (
        f"processor missing: the samples are raw ({ {key: type(value).__name__ for key, value in row.items()} }), and "
        f"{inputs.model}.forward takes {list(inputs.names)}: pass processor=, the tokenizer, image processor or "
        "feature extractor of the model, or samples that it has processed"
    )


def _apply(function: Any, item: Any, index: int) -> Any:
    try:
        return function(item)
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"sample {index}: {name} cannot read a {type(item).__name__}: {error}") from error


def _loader_groups(loader: Iterable[Any], inputs: ModelInputs, num_samples: int) -> list[Group]:
    groups: list[Group] = []
    count = 0
    for item in loader:
        batch = to_row(_loader_batch(item, inputs), inputs, count, label_rank=2)
        rows = min(batch_size_of(batch, count), num_samples - count)
        groups.append((list(range(count, count + rows)), {key: tensor[:rows] for key, tensor in batch.items()}))
        count += rows
        if count == num_samples:
            break
    return groups


def _loader_batch(item: Any, inputs: ModelInputs) -> Mapping[str, Any]:
    if isinstance(item, (list, tuple)) and 1 <= len(item) <= 2:
        item = item[0]
    if isinstance(item, Mapping):
        return item
    if isinstance(item, Tensor):
        return {inputs.first(): item}
    size = f" of {len(item)}" if isinstance(item, (list, tuple)) else ""
    raise ValueError(
        "a DataLoader must yield dicts of tensors, a tensor, or (inputs, labels), got a "
        f"{type(item).__name__}{size}: name the tensors in its collate_fn, {{name: tensor}}"
    )


def _source(dataset: Any, count: int) -> str:
    kind = type(dataset)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
    if isinstance(dataset, DataLoader) or not _has_rows(dataset):
        return f"{name}, first {count} rows"
    return f"{name}, {count} of {len(dataset)} rows" if len(dataset) > count else f"{name}, {count} rows"
