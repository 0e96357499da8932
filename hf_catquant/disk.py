"""Files that are whole or not there, flushed to the disk, and errors of the system in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What a message says of an error of the system, and the way out.
_CAUSES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your quota of disk space is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission is denied: choose another folder, or change its permissions",
    errno.EPERM: "the operation is not permitted: choose another folder, or change its permissions",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f): raise the limit",
}


@contextmanager
def writing(path: str | Path, way_out: str = "") -> Iterator[None]:
    """Say what could not be written, why, and what to do, whichever library met the error; ``way_out`` ends the sentence.

    Raises:
        OSError: instead of what a library raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code_of(error)
        if code is None:
            raise
        where = getattr(error, "filename", None) or path
        raise OSError(code, f"cannot write {where}: {_CAUSES.get(code, os.strerror(code))}{way_out}") from error


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A file beside ``target`` that takes its place, whole, at the end; on an error nothing is left of it."""
    new = target.with_name(f".{target.name}")
    try:
        yield new
        sync(new)
        new.replace(target)
        sync(target.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush every file in ``folder``, and its table of files, to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the table of a folder's files, to the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _code_of(error: Exception) -> int | None:
    """The number of the system's error; libraries in Rust tell it in their text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    return next((code for code in errno.errorcode if f"(os error {code})" in text), None)
