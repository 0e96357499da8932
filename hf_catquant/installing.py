"""The output of a run: written whole in the journal's folder, then put in its place, from where other models' files go."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .checkpoint import read_object
from .config import CatQuantConfig
from .disk import sync, sync_folder, writing
from .identity import EVALUATION, PLOTS, REPORT, identity, is_of, recorded_files
from .integrity import sha256
from .inventory import digests, names_in
from .journal import GOES_ON, Journal
from .log import logger
from .report import report
from .source_files import left_behind, python_digests

WRITTEN = "written"  # in the manifest: the files of a finished output
CODE = "code before"  # in the manifest: SHA-256 of the Python files of the model that is replaced
# What transformers calls the weights of a model: shards of an older save must not stay beside new ones.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def write_output(model: PreTrainedModel, processor: Any, journal: Journal, made: dict[str, Any]) -> None:
    """Write the output beside its place."""
    staging = journal.output
    with writing(staging, GOES_ON):
        if staging.exists():
            shutil.rmtree(staging)
        model.save_pretrained(staging)
        before = set(names_in(staging))
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(staging)
        of_processor = {name for name in names_in(staging) if not name.endswith(".py")} - before
        said = {**report(model).to_dict(), **made, **identity(model), "files": digests(staging, of_processor)}
        if code := python_digests(staging):
            said["code"] = code
        text = json.dumps(said, indent=2)
        (staging / REPORT).write_text(text, encoding="utf-8")
        sync_folder(staging)
    files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    journal.change(WRITTEN, {path.relative_to(staging).as_posix(): sha256(path) for path in files})


def install(journal: Journal, out: Path, source: Path) -> None:
    """Put the finished output in its place: at once where there is none, else file by file, the config last.

    A model of old and new files does not load: the checksums in its config are of one save. What another model left of its
    weights, its processor, its generation and its code goes; what is the same in ``source``, the float model's folder, is
    its own.

    Raises:
        ValueError: a file is not what was written, here or by the run that was interrupted after it wrote it.
    """
    staging, wanted = journal.output, journal.settled(WRITTEN, {})
    for name, digest in wanted.items():
        path = staging / name if (staging / name).exists() else out / name
        if not path.is_file() or sha256(path) != digest:
            raise ValueError(f"{path} is not what the interrupted run wrote: begin anew with --overwrite")
    with writing(out, GOES_ON):
        # The folder that somebody works in stays: a new one of its name would be another.
        if out.is_dir() and not any(out.iterdir()) and not out.samefile(Path.cwd()):
            out.rmdir()
        if not out.exists():
            staging.rename(out)
            sync(out.parent)
            return
        code = journal.settled(CODE, _recorded_code(out))  # before its report is replaced
        for name in sorted(wanted, key=lambda name: (name == "config.json", name)):
            if (staging / name).exists():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(out / name)
        for path in sorted(out.iterdir()):
            if _WEIGHTS.fullmatch(path.name) and path.name not in wanted:
                logger.warning("%s is removed: it is of the weights of the model that was in this folder before", path)
                path.unlink()
        _drop_measured(out)
        _drop_left(out, wanted, source, code)
        sync_folder(out)


def _drop_left(out: Path, wanted: dict[str, str], source: Path, code: dict[str, str]) -> None:
    """Take away the tokenizer and the code of the model that was here before.

    The tokenizer would load with the new one, and mean other words; the code would be pushed with it.
    """
    for path in left_behind(out, wanted, source, code):
        logger.warning(
            "%s is removed: it is not of the model that is in this folder now, which was quantized without it", path
        )
        path.unlink()


def _drop_measured(out: Path) -> None:
    """Take away the evaluation of the model that was here before, and its plots: they would pass for the new one's."""
    try:
        kept = is_of(read_object(out / EVALUATION), _config_of(out))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        kept = False
    for path in [] if kept else [out / name for name in (EVALUATION, *PLOTS)]:
        if path.is_file():
            logger.warning("%s is removed: it speaks of the model that was in this folder before", path)
            path.unlink()


def _recorded_code(out: Path) -> dict[str, str]:
    """SHA-256 of the Python files that the model in ``out`` was written with, as its report says; none if it has none."""
    try:
        return recorded_files(out, _config_of(out), "code") or {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _config_of(out: Path) -> CatQuantConfig:
    config: Any = read_object(out / "config.json")["quantization_config"]
    return CatQuantConfig.from_dict(config)  # type: ignore[return-value]
