"""The folder of a journal: which files are its own, whether a run was begun there, and forgetting it without taking more."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

MANIFEST, LOCK, OUTPUT = "manifest.json", "lock", "output"
# Names of the files of finished steps, and of what is learned of the last one.
_STEPS = re.compile(r"(unit-\d{4,}|formats(-\d{4,})?|model(-draft)?)\.safetensors")


def is_begun(folder: Path) -> bool:
    """Whether a step is finished."""
    return folder.is_dir() and any(_STEPS.fullmatch(path.name) for path in folder.iterdir())


def check_own(folder: Path) -> None:
    """Refuse a folder that is not a journal's alone: what others put there would be lost with it.

    Raises:
        ValueError: it is a link or a file, or something in it is none of a journal's files; names it and the way out.
    """
    what = None
    if folder.is_symlink():
        what = "is a link"
    elif folder.exists() and not folder.is_dir():
        what = "is a file"
    elif folder.is_dir():
        found = list(folder.iterdir())
        names = {path.name for path in found}
        foreign = sorted(path.name for path in found if not _is_own(path, names))
        if not foreign and LOCK not in names:
            foreign = sorted(names)
        what = f"holds {foreign[0]}, which is not a journal's" if foreign else None
    if what is not None:
        raise ValueError(
            f"{folder} {what}: the journal of a run takes this folder for itself, and deletes it at the end; move it away, "
            "or choose another folder to write"
        )


def _is_own(path: Path, names: Collection[str]) -> bool:
    """Whether ``path`` is what a journal puts into its folder, where ``names`` lie."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name == OUTPUT and MANIFEST in names
    return path.name in (LOCK, MANIFEST, f".{MANIFEST}") or _STEPS.fullmatch(path.name.removeprefix(".")) is not None


def clear(folder: Path) -> None:
    """Forget all steps; the lock, and what is not the journal's, stays.

    The manifest goes last: a process that dies here leaves no step without it.
    """
    names = {path.name for path in folder.iterdir()}
    own = [path for path in folder.iterdir() if path.name != LOCK and _is_own(path, names)]
    for path in sorted(own, key=lambda path: (path.name == MANIFEST, path.name == OUTPUT)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
