"""The journal of a quantization: what is finished is on disk, so that a killed run loses the step in work and no more.

A folder beside the output holds

    lock                    taken by the process that works here; the system frees it when that process dies
    manifest.json           what the run was begun with: fingerprints of weights, config, data, versions and machine
    NAME.safetensors        one finished step: its tensors, and in the header a record of everything else about it
    output/                 the checkpoint while it is written; then it is renamed

Every file is written beside, flushed to the disk and renamed: it is whole or not there. A step is read back by its
checksums. Whoever goes on must have begun with the same fingerprints. A folder that holds anything else is no journal: it is
refused, and what lies in it is never deleted.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .disk import beside, writing
from .integrity import checksums, verify_files
from .journal_place import LOCK, MANIFEST, OUTPUT, check_own, clear, is_begun
from .log import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

GOES_ON = "; what is finished is kept, --resume goes on"  # what a message of a disk that is full ends with
_STEP = "catquant"  # the one key of a step's header
# What is named with a fact that differs, beside the journal.
_WAYS = {
    "threads": "set OMP_NUM_THREADS={old} (in a program: torch.set_num_threads({old})), as sums are split by their number",
}


class Journal:
    """The finished steps of one quantization. Made by :func:`open_journal`; close it, or drop it when all is done."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock
        self._manifest: dict[str, Any] = _read_manifest(folder)

    @property
    def output(self) -> Path:
        """Where the checkpoint is written before it is renamed."""
        return self.folder / OUTPUT

    def agree(self, **facts: Any) -> None:
        """Write down what this run is begun with, or refuse if it was begun with something else.

        Args:
            facts: JSON-clean values by name.

        Raises:
            ValueError: one of them is another one than in the manifest, or there are steps and the manifest does not say;
                names it, and both values.
        """
        kinds = {name.partition(",")[0] for name in self._manifest}
        for name, value in facts.items():
            value = json.loads(json.dumps(value))
            if name in self._manifest and self._manifest[name] != value:
                path, old, new = _difference(name, self._manifest[name], value)
                way = _WAYS.get(name, "go on with what it was begun with").format(old=old)
                raise ValueError(
                    f"{self.folder}: the interrupted run was begun with {path} = {old}, this one has {new}: a result of "
                    f"both would be of neither; {way}, or begin anew with --overwrite"
                )
            if name.partition(",")[0] not in kinds and self.begun():
                raise ValueError(
                    f"{self.folder / MANIFEST} does not say with which {name} the finished steps beside it were made: "
                    "put it back as it was, or begin anew with --overwrite"
                )
        self._note(facts)

    def settled(self, name: str, value: Any) -> Any:
        """What the run was begun with under ``name``; ``value``, which is written down, if this is the beginning."""
        if name not in self._manifest:
            self._note({name: value})
        return self._manifest[name]

    def change(self, name: str, value: Any) -> None:
        """From here on the run has another ``value`` under ``name``."""
        self._note({name: value})

    def has(self, step: str) -> bool:
        """Whether the step is finished."""
        return self._file(step).exists()

    def write(self, step: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished step.

        Raises:
            OSError: it cannot be written; says why and what to do. Steps before it are safe.
        """
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(record)
        head = json.dumps({"record": text, "crc": zlib.crc32(text.encode()), "checksums": checksums(own)})
        target = self._file(step)
        with writing(target, GOES_ON), beside(target) as new:
            save_file(own, new, metadata={_STEP: head})

    def forget(self, step: str) -> None:
        """Delete a step, if it is there."""
        self._file(step).unlink(missing_ok=True)

    def read(self, step: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and record of a finished step.

        Raises:
            ValueError: the file is damaged; the way out is to delete it, which costs this step.
        """
        path = self._file(step)
        try:
            with safe_open(path, framework="pt") as file:
                head = json.loads((file.metadata() or {})[_STEP])
                # Copies: a tensor that is mapped into memory is aligned as the file happens to be.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            verify_files([path], head["checksums"])
            if zlib.crc32(head["record"].encode()) != head["crc"]:
                raise ValueError("its record is not what was written")
            return tensors, json.loads(head["record"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: this step of the interrupted run is damaged: delete the file, its unit is solved again ({error})"
            ) from error

    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return is_begun(self.folder)

    def close(self) -> None:
        """Let another process go on from here."""
        self._lock.close()

    def drop(self) -> None:
        """Delete the journal: the output is in its place."""
        if not self.folder.exists():
            return
        clear(self.folder)
        (self.folder / LOCK).unlink()  # last: whoever waits for it finds another file, and looks again
        if left := sorted(path.name for path in self.folder.iterdir()):
            logger.warning("%s stays: %s came into it during the run, and is not the journal's", self.folder, left[0])
        else:
            self.folder.rmdir()
        self._lock.close()

    def _file(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"

    def _note(self, facts: Mapping[str, Any]) -> None:
        if all(name in self._manifest and self._manifest[name] == value for name, value in facts.items()):
            return
        self._manifest.update(json.loads(json.dumps(facts)))
        target = self.folder / MANIFEST
        with writing(target, GOES_ON), beside(target) as new:
            new.write_text(json.dumps(self._manifest, indent=1), encoding="utf-8")


def open_journal(folder: str | Path, *, resume: bool, overwrite: bool = False) -> Journal:
    """The journal in ``folder``, locked for this process.

    Args:
        folder: made if it is not there.
        resume: go on with an interrupted run, if there is one.
        overwrite: begin anew although there is one.

    Raises:
        ValueError: there is an interrupted run, and neither was asked for; or the folder is no journal, or one that lost
            its manifest.
        RuntimeError: another process works there.
        OSError: the folder cannot be made or written; says why and what to do.
    """
    folder = Path(folder)
    check_own(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / LOCK)
    try:
        if not resume or not is_begun(folder):
            if is_begun(folder) and not overwrite:
                raise ValueError(
                    f"{folder} holds an interrupted run: --resume goes on with it, --overwrite begins anew and drops it"
                )
            clear(folder)
        elif not (folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} holds finished steps, but no {MANIFEST} that says what they are of: put it back, or begin anew "
                "with --overwrite"
            )
        for path in folder.glob(".*"):  # what was being written when the process was killed
            path.unlink()
        return Journal(folder, lock)
    except BaseException:
        lock.close()
        raise


def _locked(path: Path) -> IO[str]:
    """The lock file, held until it is closed or the process ends, however it ends.

    Raises:
        RuntimeError: another process holds it.
    """
    while True:
        lock = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise RuntimeError(
                f"{path.parent}: another process (pid {holder}) quantizes into this folder: wait for it, or choose another "
                "output"
            ) from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s): start no second process here", path, error)
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return lock
        lock.close()  # its holder finished and deleted it meanwhile


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it must be an object, got {found!r:.100}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): begin anew with --overwrite") from error
    return found


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first place where two JSON values differ, and what is there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, json.dumps(old), json.dumps(new)
