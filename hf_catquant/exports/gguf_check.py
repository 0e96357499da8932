"""Reading a GGUF file back: every field and every tensor of it is what was to be written."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np


def bytes_of(data: np.ndarray) -> tuple[int, int]:
    """How many bytes, and their CRC-32."""
    return data.nbytes, zlib.crc32(np.ascontiguousarray(data).tobytes())


def check_file(
    library: Any, file: Path, tensors: dict[str, tuple[str, int, int]], fields: list[dict[str, Any]]
) -> None:
    """Compare the fields of a file, and the name, the type and the bytes of every tensor.

    Args:
        library: ``gguf``.
        file: to read.
        tensors: type and :func:`bytes_of` by name.
        fields: what its writer has of them.

    Raises:
        ValueError: naming what is not as it was to be written.
    """
    reader = library.GGUFReader(file)
    found = {t.name: (t.tensor_type.name, *bytes_of(t.data)) for t in reader.tensors}
    wrong = sorted(name for name in tensors.keys() | found.keys() if tensors.get(name) != found.get(name))
    for name, held in ((name, held) for part in fields for name, held in part.items()):
        field = reader.fields.get(name)
        if field is None or not _same(held.value, _content(field, library.GGUFValueType)):
            wrong.append(name)
    if wrong:
        raise ValueError(f"the file does not give back what was written: {', '.join(wrong[:5])}: is the disk whole?")


def _content(field: Any, kinds: Any) -> Any:
    text = field.types[-1] == kinds.STRING
    held = [str(bytes(field.parts[at]), "utf-8") if text else field.parts[at][0] for at in field.data]
    return held if field.types[0] == kinds.ARRAY else held[0]


def _same(wanted: Any, found: Any) -> bool:
    """Whether two values are one; numbers that are not whole are stored in 32 bits."""
    if isinstance(wanted, list | tuple):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    return bool(np.float32(wanted) == np.float32(found) if isinstance(wanted, float) else wanted == found)
