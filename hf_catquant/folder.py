"""From a folder or repository with a float model to a folder with the quantized one: journaled, and in bounded memory.

The float weights stay on disk until their unit's turn comes (``streaming.py``), every finished unit is written to a journal
beside the output (``journal.py``), and the output appears whole: it is written in the journal's folder and renamed.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .alignment import align
from .checkpoint import ADAPTER, weight_files
from .config import CatQuantConfig
from .installing import WRITTEN, install, write_output
from .journal import Journal, open_journal
from .journal_place import check_own
from .kernels import native
from .log import logger
from .model import select
from .pipeline import agreed_batches
from .quantizer import quantize
from .report import library_versions
from .sizes import output_bytes
from .source_files import code_digests, other_digests, weight_digests
from .streaming import open_on_shelf
from .tasks import float_config, load_quantized, model_class
from .whole import load_whole


def quantize_folder(
    source: str | Path,
    out: str | Path,
    config: CatQuantConfig,
    *,
    dtype: torch.dtype = torch.float32,
    stream: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    made: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Quantize the float model in ``source`` and write it, its processor and its report to ``out``.

    A run that was killed is gone on with by ``resume``: finished units are taken from ``OUT.journal``, and the files are
    bit for bit those of a run that was not interrupted.

    Args:
        source: folder or Hub id of the float model.
        out: folder to write. It appears whole, at the end; a link is followed.
        config: what to do. It is not changed.
        dtype: of the float parts.
        stream: keep float weights on disk until their turn comes. The result is the same, and a run may go on either way.
        resume: go on with an interrupted run if there is one.
        overwrite: write into a folder that is not empty; without ``resume``, drop an interrupted run.
        trust_remote_code: run modelling code that comes with the model.
        made: JSON-clean, added to the report's file.

    Returns:
        The quantized model.

    Raises:
        ValueError: ``out`` or ``OUT.journal`` holds something else, the interrupted run was begun with something else (the
            number of threads counts), or ``config`` cannot be done.
        RuntimeError: another process works on the same output.
        OSError: something cannot be written; says what and why.
    """
    out, place = places(source, out, resume, overwrite)
    journal = open_journal(place, resume=resume, overwrite=overwrite)
    try:
        model = _quantized(source, config, journal, dtype, stream, trust_remote_code)
        if model is not None:
            write_output(model, config.processor, journal, made or {})
        install(journal, out, local_folder(str(source)))
        journal.drop()
        return model or load_quantized(str(out), trust_remote_code)
    except BaseException:
        if not journal.begun():
            journal.drop()  # nothing is lost, and nothing shall have to be cleared away
        raise
    finally:
        journal.close()


def _quantized(
    source: str | Path, config: CatQuantConfig, journal: Journal, dtype: torch.dtype, stream: bool, trust: bool
) -> PreTrainedModel | None:
    """The quantized model; None if an interrupted run of the same request has written it already."""
    model_config = float_config(str(source), trust)
    folder = local_folder(str(source))
    files = weight_files(folder)
    request = {k: v for k, v in config.to_dict().items() if k not in ("modules", "checksums", "provenance")}
    journal.agree(
        weights=weight_digests(folder, files),
        code=code_digests(folder, model_config, trust),
        files=other_digests(folder, config.processor),
        config={**request, "dtype": str(dtype)},
        versions={**library_versions(), "source": source_digest()},
        machine=f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, kernels {native.PATH}",
        threads=torch.get_num_threads(),
    )
    config = copy.deepcopy(config)
    config.batch_size = journal.settled("batch_size", config.batch_size)
    if journal.settled(WRITTEN, None) is not None:
        agreed_batches(open_source(source, dtype, stream, trust), config, journal)
        return None
    return _backing_off(source, config, journal, dtype, stream, trust)


def _backing_off(
    source: str | Path, config: CatQuantConfig, journal: Journal, dtype: torch.dtype, stream: bool, trust: bool
) -> PreTrainedModel:
    """Quantize at the batch size that fits: where memory runs out it is halved, and finished units stay."""
    while True:
        try:
            model = open_source(source, dtype, stream, trust)
            _check_room(model, config, journal)
            return quantize(model, config, journal)  # type: ignore[return-value]
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or not _can_shrink(config):
                raise
            logger.warning("out of memory with %d samples a batch: going on with half of them", config.batch_size)
        del model  # before it is loaded again
        config.batch_size //= 2
        journal.change("batch_size", config.batch_size)


def open_source(source: str | Path, dtype: torch.dtype, stream: bool, trust_remote_code: bool) -> PreTrainedModel:
    """The float model: on a shelf, or whole in memory if ``stream`` is not set or it has no safetensors files.

    Raises:
        ValueError: it is quantized already, or lacks tensors.
    """
    auto = model_class(float_config(str(source), trust_remote_code), trust_remote_code)
    files = weight_files(local_folder(str(source))) if stream else []
    if files:
        return open_on_shelf(auto, str(source), files, dtype=dtype, trust_remote_code=trust_remote_code)
    model = load_whole(auto, str(source), dtype=dtype, trust_remote_code=trust_remote_code)
    align(model)  # as quantizing does, so that a plan counts what that takes
    return model


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _can_shrink(config: CatQuantConfig) -> bool:
    """Whether smaller batches can be made: of data that can be read twice, and comes one by one."""
    data = config.dataset
    return config.batch_size > 1 and data is not None and not isinstance(data, (DataLoader, Iterator))


def _check_room(model: PreTrainedModel, config: CatQuantConfig, journal: Journal) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OSError: naming what is needed and what is free.
    """
    written = sum(path.stat().st_size for path in journal.folder.rglob("*") if path.is_file())
    needed = 2 * output_bytes(model, select(model, config)) - written
    free = shutil.disk_usage(journal.folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{journal.folder}: the journal and the output need {needed:,} bytes, but {free:,} are free: free some space",
        )


def local_folder(source: str) -> Path:
    """The folder of a model on this machine; one of the Hub is downloaded, its safetensors files if it has any."""
    if Path(source).is_dir():
        return Path(source)
    texts = ["*.json", "*.txt", "*.model", "*.py", "*.jinja"]
    folder = Path(snapshot_download(source, allow_patterns=[*texts, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(source, allow_patterns=[*texts, "*.bin"]))
    return folder


def source_digest() -> str:
    """A digest of this package's own code: a step of other code may be another step."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c", ".h", ".cu")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def places(source: str | Path, out: str | Path, resume: bool, overwrite: bool) -> tuple[Path, Path]:
    """The folder to write, with a link followed, and that of its journal, once both are free to be taken.

    Raises:
        ValueError: one of them is not; says why and what to do.
    """
    out = Path(out)
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    if not out.name or os.path.ismount(out):
        raise ValueError(
            f"{out} is where a file system begins, and cannot be put in place whole: choose a folder in it"
        )
    place = out.with_name(f"{out.name}.journal")
    if Path(source).exists() and Path(source).resolve() == out.resolve():
        raise ValueError(f"{out} holds the float model: choose another folder to write")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another folder to write")
    if out.exists() and any(out.iterdir()) and not overwrite and not (resume and place.exists()):
        raise ValueError(f"{out} exists and is not an empty folder: pass --overwrite, or another folder")
    if (out / ADAPTER).exists():
        raise ValueError(
            f"{out / ADAPTER}: transformers would load the model that it names, with an adapter, instead of the one that is "
            "written beside it: move the adapter into a folder of its own, or choose another folder to write"
        )
    check_own(place)
    return out, place
