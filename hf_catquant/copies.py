"""Samples that are there more than once: a copy is no witness of its own.

Cross-validation would hold out a row whose copy was fitted, and the bootstrap take as many copies for as much evidence. A
correction is fitted on and judged by the first of them alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .fitting import sample_count
from .log import logger


def firsts(batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """For each batch which of its samples (count,) bool are no copy of an earlier one; what is padding does not count."""
    seen: set[bytes] = set()
    found = []
    for batch in batches:
        count = sample_count(batch)
        new = []
        for sample in range(count):
            digest = _digest(batch, sample, count)
            new.append(digest not in seen)
            seen.add(digest)
        found.append(torch.tensor(new, dtype=torch.bool))
    return found


def copies_note(found: Iterable[Tensor]) -> list[str]:
    """What a report says of the copies that :func:`firsts` found, in a list that is empty where there is none."""
    new = torch.cat([torch.ones(0, dtype=torch.bool), *found])
    if bool(new.all()):
        return []
    copies = len(new) - int(new.sum())
    note = f"{copies} of {len(new)} samples are copies of others: corrections are fitted on and judged by one of each"
    logger.info(note)
    return [note]


def without_copies(mask: Tensor | None, first: Tensor, output: Tensor, dim: int) -> Tensor | None:
    """``mask`` (rows,) bool of an output with its features at ``dim``, without the rows of copies; None: all rows.

    Rows that are not so many for each sample (packed ones) are left as they are.
    """
    rows = output.numel() // max(output.shape[dim], 1)
    if bool(first.all()) or rows % len(first):
        return mask
    kept = first.repeat_interleave(rows // len(first))
    return kept if mask is None else kept & mask.flatten().cpu()


def _digest(batch: dict[str, Tensor], sample: int, count: int) -> bytes:
    digest, mask = hashlib.blake2b(digest_size=16), batch.get("attention_mask")
    for name in sorted(batch):
        value = batch[name]
        if len(value) != count:
            continue
        row = value[sample]
        if mask is not None and mask.dim() == 2 and value.shape[:2] == mask.shape:
            row = row[mask[sample].bool()]
        digest.update(f"{name} {tuple(row.shape)} {row.dtype}".encode())
        digest.update(row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
