"""Checksums of the stored tensors: a checkpoint that lost, gained or changed a byte does not load.

The config carries one CRC-32 for every tensor of the safetensors files, under the name it has in the file. They guard
against accidents (truncated downloads, flipped bits, files of another model), not against an attacker, who would change
the config too.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes as safetensors writes them: contiguous, little-endian."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes())


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of every tensor, by name."""
    return {name: checksum(tensor) for name, tensor in sorted(tensors.items())}


def file_checksums(path: str | Path) -> dict[str, int]:
    """CRC-32 of every tensor in a safetensors file, read straight from its bytes.

    Raises:
        ValueError: the file is truncated or its header is not what safetensors writes; names the file.
    """
    with Path(path).open("rb") as file:
        start, header = _header(path, file)
        if not header:
            return {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return {name: _span(path, view, start, name, entry) for name, entry in header.items()}


def verify_files(files: Iterable[str | Path], expected: Mapping[str, int]) -> None:
    """Refuse files whose tensors are not exactly those that ``expected`` lists.

    Raises:
        ValueError: a file is broken, or a tensor is missing, extra or changed; names it.
    """
    found: dict[str, int] = {}
    for path in files:
        for name, value in file_checksums(path).items():
            if name in expected and value != expected[name]:
                raise ValueError(
                    f"{path}: the bytes of tensor {name!r} are not those that were saved "
                    f"(CRC-32 {value:08x}, expected {expected[name]:08x}): the file is damaged, "
                    "or left in this folder by an older save: fetch or save it again"
                )
            found[name] = value
    for problem, names in (
        ("missing", expected.keys() - found.keys()),
        ("unexpected", found.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"the checkpoint has {problem} tensors: {shown}; its files and its config.json are not of one save"
            )


def _header(path: str | Path, file: BinaryIO) -> tuple[int, dict[str, dict]]:
    """Where the data of an open safetensors file begins, and its header."""
    size = file.seek(0, 2)
    file.seek(0)
    length_bytes = file.read(8)
    length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else MAX_HEADER + 1
    if length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"{path}: not a whole safetensors file ({size} bytes): it is truncated or damaged")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged: {error}") from error
    if end != size:
        raise ValueError(
            f"{path}: the header describes {end} bytes but the file has {size}: it is truncated or damaged"
        )
    return 8 + length, header


def _span(path: str | Path, view: memoryview, start: int, name: str, entry: dict) -> int:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"{path}: tensor {name!r} has offsets [{begin}, {end}]: the header is damaged")
    with view[start + begin : start + end] as span:
        return zlib.crc32(span)
