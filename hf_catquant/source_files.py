"""The files of a model's folder that decide what comes of it: weights, config, code that is trusted, processor.

Their digests tell whether an interrupted run goes on with what it was begun with; their names, what a model that is
replaced has left behind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from filecmp import cmp
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_cached_module_file
from transformers.utils import HF_MODULES_CACHE

from .integrity import sha256
from .inventory import GENERATION, PROCESSOR

_TEMPLATES = "additional_chat_templates/*.jinja"


def weight_digests(folder: Path, files: Collection[Path]) -> dict[str, str]:
    """SHA-256 of the weights of a float model and its config, by name; ``files`` are its safetensors files, if any."""
    weights = files or sorted(folder.glob("*.bin"))
    return {path.name: sha256(path) for path in (*weights, folder / "config.json")}


def other_digests(folder: Path, processor: Any) -> dict[str, str]:
    """Of what is saved beside the weights: defaults of generation and, if ``processor`` saves itself, its files."""
    patterns = (GENERATION, *((*PROCESSOR, _TEMPLATES) if hasattr(processor, "save_pretrained") else ()))
    return {path.relative_to(folder).as_posix(): sha256(path) for path in _matching(folder, patterns)}


def python_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all Python files in a folder, by path."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in _python(folder)}


def code_digests(folder: Path, config: Any, trust_remote_code: bool) -> dict[str, str]:
    """Of the Python files that come with a model, and of those of other repositories that its config names.

    Args:
        folder: of the model.
        config: the model's.
        trust_remote_code: nothing of it runs otherwise, so that it decides nothing.
    """
    if not trust_remote_code:
        return {}
    found = python_digests(folder)
    named = (getattr(config, "auto_map", None) or {}).values()
    references = [ref for value in named for ref in (value if isinstance(value, list | tuple) else [value]) if ref]
    for repository, _, name in (ref.partition("--") for ref in references if "--" in ref):
        module = get_cached_module_file(repository, f"{name.partition('.')[0]}.py")
        copied = (Path(HF_MODULES_CACHE) / module).parent
        label = Path(repository).name if Path(repository).is_dir() else repository
        found |= {f"{label}/{name}": digest for name, digest in python_digests(copied).items()}
    return found


def left_behind(out: Path, written: Collection[str], source: Path, code: Mapping[str, str]) -> list[Path]:
    """Files in ``out`` that belong to the processor, the generation or the code of another model than was written there now.

    Args:
        out: folder of the output.
        written: names of what was written.
        source: folder of the float model: what has the same bytes as there is its own.
        code: SHA-256 of the Python files that the other model was written with, by name. Others may be anybody's.
    """
    held = python_digests(out) if code else {}
    found = {path.relative_to(out).as_posix() for path in _matching(out, (GENERATION, *PROCESSOR, _TEMPLATES))}
    found |= {name for name, digest in held.items() if code.get(name) == digest}
    return [out / name for name in sorted(found.difference(written)) if not _same(out / name, source / name)]


def _matching(folder: Path, patterns: Collection[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _python(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and cmp(one, other, shallow=False)
