"""Which checkpoint the files beside it speak of: report and evaluation carry the checksum that is in its config.json.

``entries_checksum`` covers every entry and the checksums of all tensors, so it is that of these very weights, however they
are split into files. Two models of one architecture and format have the same bytes and names; nothing else tells their
reports apart.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn

from .checkpoint import read_object
from .config import CatQuantConfig
from .evaluation_table import Evaluation
from .integrity import sha256
from .inventory import code_of, is_companion, is_paper, is_pickle, names_in
from .report import Report, config_of

CARD, REPORT, EVALUATION, PLOTS = "README.md", "report.json", "evaluation.json", ("accuracy.png", "errors.png")
_KEY = "entries_checksum"


def identity(model: nn.Module) -> dict[str, int]:
    """What a file about ``model`` says of its checkpoint: nothing if it was never saved, or by another library."""
    config = config_of(model)
    return {_KEY: config.entries_checksum} if config is not None and config.entries_checksum else {}


def is_of(raw: dict[str, Any], config: CatQuantConfig) -> bool:
    """Whether the content of a file names the checkpoint that ``config`` is stored in."""
    return raw.get(_KEY) == config.entries_checksum


def checked_report(path: Path, raw: dict[str, Any], config: CatQuantConfig) -> Report:
    """The report in ``raw``, which speaks of the checkpoint of ``config``.

    One that was written before reports named their checkpoint is taken if every layer and its error are those that
    config.json has.

    Raises:
        ValueError: it is of another checkpoint, or no report.
    """
    report = Report.from_dict(raw)
    if not (is_of(raw, config) if _KEY in raw else _agrees(report, config)):
        raise ValueError(
            f"{path} is the report of another checkpoint ({_said(raw)}, config.json has {config.entries_checksum}): "
            "delete it, and it is made again from the model"
        )
    return report


def checked_evaluation(path: Path, raw: dict[str, Any], config: CatQuantConfig) -> Evaluation:
    """The evaluation in ``raw``, which was made of the checkpoint of ``config``.

    Raises:
        ValueError: it was made of another checkpoint, or does not say of which, or is no evaluation of a quantized model.
    """
    table = Evaluation.from_dict(raw)
    if not is_of(raw, config) or len(table.rows) < 2:
        raise ValueError(
            f"{path} is not known to be of this checkpoint ({_said(raw)}, config.json has {config.entries_checksum}): "
            f"evaluate again, catquant eval {path.parent} --float MODEL --dataset FILE --json {path}, or delete it"
        )
    return table


def check_kept(folder: Path) -> None:
    """Refuse a card that was made here, of another checkpoint: it has the SHA-256 of a config.json that is not there.

    Raises:
        ValueError: naming the way out.
    """
    if _is_another_card(folder):
        raise ValueError(
            f"{folder / CARD} is the card of another checkpoint: the SHA-256 that it has of config.json is not that of the "
            "file; push without --keep-card, or correct it by hand"
        )


def strangers(folder: Path, config: CatQuantConfig) -> list[str]:
    """What in a folder speaks of another checkpoint than the one of ``config`` that lies there, a remark each."""
    found = []
    for name in (REPORT, EVALUATION):
        try:
            raw = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else None
        except (ValueError, RecursionError):
            found.append(f"{name} is no JSON")
            continue
        if raw is not None and not (isinstance(raw, dict) and is_of(raw, config)):
            known = isinstance(raw, dict) and _KEY in raw
            found.append(
                f"{name} {'speaks of another checkpoint' if known else 'does not say of which checkpoint it is'}"
            )
    return found + ([f"{CARD} is the card of another checkpoint"] if _is_another_card(folder) else [])


def recorded_files(folder: Path, config: CatQuantConfig, kind: str = "files") -> dict[str, str] | None:
    """SHA-256 of the files beside the weights, by name, as the report of this checkpoint has them; None: it has none.

    Args:
        folder: of the checkpoint.
        config: what its config.json has.
        kind: "files" of tokenizers, processors and the like, which are checked, or "code", which is not.
    """
    try:
        raw = read_object(folder / REPORT)
    except (OSError, ValueError):
        return None
    files = raw.get(kind) if is_of(raw, config) else None
    return {str(name): str(digest) for name, digest in files.items()} if isinstance(files, dict) else None


def files_of(folder: Path, config: CatQuantConfig) -> set[str]:
    """The files of a model's folder that go along with its weights and its config, by their paths in it.

    Those of tokenizers, processors and the like, by their names or by the SHA-256 in the report; texts, plots and licences;
    and the code that the model is made of.
    """
    there = set(names_in(folder))
    known = recorded_files(folder, config) or {}
    recorded = {name for name, digest in known.items() if name in there and sha256(folder / name) == digest}
    return recorded | {name for name in there if is_companion(name) or is_paper(name)} | code_of(folder)


def fetched(repo: str, patterns: list[str], **options: Any) -> Path:
    """A snapshot of a repository with the files of ``patterns`` and those that its report names besides.

    Args:
        repo: Hub id.
        patterns: of names.
        options: of ``snapshot_download``.
    """
    folder = Path(snapshot_download(repo, allow_patterns=[*patterns, REPORT], **options))
    try:
        named = read_object(folder / REPORT).get("files")
    except (OSError, ValueError):
        named = None
    # Names without wildcards only: a report may say anything.
    names = [name for name in named if re.fullmatch(r"[\w./-]+", name)] if isinstance(named, dict) else []
    names = [
        name for name in names if not (folder / name).is_file() and not is_pickle(name) and not name.endswith(".py")
    ]
    return Path(snapshot_download(repo, allow_patterns=names, **options)) if names else folder


def is_made_here(folder: Path) -> bool:
    """Whether the card in a folder is one that this package wrote: those have a table with the SHA-256 of config.json."""
    return _digest_on_card(folder) is not None


def _is_another_card(folder: Path) -> bool:
    digest = _digest_on_card(folder)
    return digest is not None and digest != sha256(folder / "config.json")


def _digest_on_card(folder: Path) -> str | None:
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
    found = re.search(r"^\| `config\.json` \| [\d,]+ \| `([0-9a-f]{64})` \|$", text, re.M)
    return None if found is None else found[1]


def _said(raw: dict[str, Any]) -> str:
    return f"its {_KEY} is {raw[_KEY]!r:.40}" if _KEY in raw else f"it has no {_KEY}"


def _agrees(report: Report, config: CatQuantConfig) -> bool:
    """Whether the layers, the errors and the sizes of a report are those that quantizing left in the config."""
    errors = config.provenance.get("errors") or {}
    fields = ("weights", "group_size", "activations", "rotation", "tied_to")
    said = {la.name: (list(la.shape), la.error, *(getattr(la, field) for field in fields)) for la in report.layers}
    held = {
        name: (entry["shape"], errors.get(name), *(entry[field] for field in fields))
        for name, entry in (config.modules or {}).items()
    }
    return said == held and report.bytes_before == config.provenance.get("bytes_before", 0)
