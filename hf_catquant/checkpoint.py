"""The files of a checkpoint's folder: its JSON, and the safetensors files that hold its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What transformers loads instead of a model that lies beside it: the one that it names, with an adapter.
ADAPTER = "adapter_config.json"
# Found by transformers where there is no safetensors file.
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_VARIANT = re.compile(
    r"model\.(?P<whole>.+?)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.(?P<index>.+)\.json"
)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is no such file, it is no regular one, or something else is in it.
    """
    _check_regular(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it must hold a JSON object, got {found!r:.100}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, none if the folder has no such files.

    Where there is nothing but a variant (``save_pretrained(variant="fp16")``), it is that; transformers is told its name.

    Raises:
        ValueError: the index is damaged, something is no regular file, the index, or ``transformers_weights`` of
            config.json, names no file of this folder, or there are several variants and nothing else.
    """
    path = _entry(folder)
    if path is None:
        return []
    return _shards(folder, path) if path.name.endswith(".json") else [path]


def index_file(folder: Path) -> Path | None:
    """The index of :func:`weight_files`, None where one file is all of them."""
    path = _entry(folder)
    return path if path is not None and path.name.endswith(".json") else None


def stored_variant(folder: Path) -> str | None:
    """The variant that is all that a folder has of weights, None where transformers finds some without a name of it.

    Raises:
        ValueError: there are several.
    """
    if _named(folder) is not None or any((folder / name).exists() for name in (WEIGHTS, INDEX, *_PICKLED)):
        return None
    matches = [_VARIANT.fullmatch(path.name) for path in folder.glob("model.*")]
    found = sorted({match["whole"] or match["index"] for match in matches if match})
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds the weights as variants {', '.join(found)} and none without a name: which is meant is not "
            "said; leave one of them there"
        )
    return found[0] if found else None


def variant_option(name: str | Path) -> dict[str, str]:
    """What ``from_pretrained`` has to be told of a model: the variant, where a folder has no other weights.

    Raises:
        ValueError: there are several.
    """
    variant = stored_variant(Path(name)) if Path(name).is_dir() else None
    return {} if variant is None else {"variant": variant}


def _entry(folder: Path) -> Path | None:
    """The file with which reading the weights begins: the only one, or the index."""
    named = _named(folder)
    if named is not None:  # which transformers reads and nothing else
        return named
    _check_regular(folder / WEIGHTS)
    # The whole file goes before an index that is there as well, as in transformers.
    for path in (folder / WEIGHTS, folder / INDEX):
        if path.exists():
            return path
    variant = stored_variant(folder)
    if variant is None:
        return None
    path = folder / f"model.{variant}.safetensors"
    _check_regular(path)
    return path if path.exists() else folder / f"{WEIGHTS}.index.{variant}.json"


def _named(folder: Path) -> Path | None:
    """The file of weights, or of their index, that config.json names by ``transformers_weights``; None if it names none."""
    path = folder / "config.json"
    value = read_object(path).get("transformers_weights") if path.exists() else None
    if value is None:
        return None
    found, name = folder / str(value), Path(str(value))
    inside = not name.is_absolute() and ".." not in name.parts
    if not str(value).endswith((".safetensors", ".safetensors.index.json")) or not inside or not found.is_file():
        raise ValueError(
            f"{path}: transformers_weights must name a .safetensors file of this folder, or a .safetensors.index.json, "
            f"got {value!r:.100}: put that file there, or take the field away"
        )
    return found


def _shards(folder: Path, path: Path) -> list[Path]:
    """The files that an index names; they lie in the folder of the model, wherever the index does."""
    index = read_object(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path} is damaged: weight_map must be an object of file names, got {names!r:.100}")
    if not isinstance(index.get("metadata"), dict):  # as transformers asks for it
        raise ValueError(f"{path} is damaged: metadata must be an object, got {index.get('metadata')!r:.100}")
    for name in sorted({str(value) for value in names.values()}):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{path}: {name!r:.100} is no safetensors file of this folder: the model is incomplete")
    return [folder / name for name in sorted(set(names.values()))]


def _check_regular(path: Path) -> None:
    """Reading a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file, it is a {'folder' if path.is_dir() else 'pipe or a device'}")
