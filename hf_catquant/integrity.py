"""Checksums of the stored tensors: a checkpoint that lost, gained or changed a byte does not load.

The config carries one CRC-32 for every tensor of the safetensors files, under the name it has in the file, over its dtype,
its shape and its bytes: the same bytes read as another dtype are another tensor. They guard against accidents (truncated
downloads, flipped bits, files of another model), not against an attacker, who would change the config too. Against those
every number of a header is checked before anything is read or allocated by it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
# What safetensors calls the dtypes that models are stored in.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as its checked header has it.

    Attributes:
        dtype: as in :data:`DTYPES`.
        shape: its sizes.
        begin, end: where its bytes are in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's dtype, shape and bytes as safetensors writes them: contiguous, little-endian."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().tobytes(), _crc_of_kind(DTYPES[tensor.dtype], tensor.shape))


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of every tensor, by name."""
    return {name: checksum(tensor) for name, tensor in sorted(tensors.items())}


def file_checksums(path: str | Path) -> dict[str, int]:
    """CRC-32 of every tensor in a safetensors file, read straight from its bytes.

    Raises:
        ValueError: the file is truncated or its header is not what safetensors writes; names the file.
    """
    with Path(path).open("rb") as file:
        header = _header(path, file)
        if not header:
            return {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return {name: _span(view, stored) for name, stored in header.items()}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; it is read in pieces of a megabyte."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_header(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name; none of their bytes is read.

    Raises:
        ValueError: the file is truncated, or its header is not what safetensors writes; names the file.
    """
    with Path(path).open("rb") as file:
        return _header(path, file)


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


def _header(path: str | Path, file: BinaryIO) -> dict[str, Stored]:
    size = file.seek(0, 2)
    file.seek(0)
    length_bytes = file.read(8)
    length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else MAX_HEADER + 1
    if length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"{path}: not a whole safetensors file ({size} bytes): it is truncated or damaged")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise TypeError(f"it must be an object, got {header!r:.100}")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError(f"its metadata must be texts by name, got {metadata!r:.100}")
        found = {name: _stored(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged: {error}") from error
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != end:
            raise ValueError(f"{path}: the header is damaged: {name!r} does not begin where the tensor before it ends")
        end = stored.end
    if end != size:
        raise ValueError(
            f"{path}: the header describes {end} bytes but the file has {size}: it is truncated or damaged"
        )
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that comes twice, readers take one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _stored(name: str, entry: Any, start: int) -> Stored:
    """An entry of a header whose data begins at byte ``start``, every field of it checked."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not whole or dtype not in _ITEM_BYTES or end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(
            f"{name!r} cannot be {dtype!r:.20} of shape {shape!r:.100} in bytes {begin!r:.20} to {end!r:.20}"
        )
    return Stored(dtype, tuple(shape), start + begin, start + end)


def _span(view: memoryview, stored: Stored) -> int:
    with view[stored.begin : stored.end] as span:
        return zlib.crc32(span, _crc_of_kind(stored.dtype, stored.shape))


def _crc_of_kind(dtype: str, shape: Iterable[int]) -> int:
    return zlib.crc32(f"{dtype}{list(shape)}".encode())
