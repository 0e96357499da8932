"""What lies beside the weights of a quantized model and speaks of them: its report, its plots and its card."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import matplotlib as mpl

from .card import RELATIONS, model_card
from .checkpoint import read_object, stored_variant
from .disk import beside, writing
from .evaluation_table import Evaluation
from .hub_id import check_id
from .identity import CARD, EVALUATION, REPORT, checked_evaluation, checked_report, identity, is_made_here
from .inventory import digests, is_pickle
from .log import logger
from .report import Report, report
from .report_page import draw_errors, draw_sizes
from .tasks import load_quantized
from .verify import stored_config


def describe(
    folder: str | Path,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    *,
    relation: str = RELATIONS[0],
    origin: str | None = None,
    also: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Path:
    """Write the plots and the card into a folder of a quantized model; returns the card's path.

    Args:
        folder: as ``catquant quantize`` or ``save_pretrained`` left it; a report that is missing is made from the model.
        repo: Hub id that it will have.
        base_model: Hub id of the float model; None: what ``report.json`` says.
        license: Hub word for the licence of the weights.
        relation, origin: as in :func:`~hf_catquant.card.model_card`.
        also: as in :func:`push`.
        evaluation: what ``catquant eval --json`` wrote; it is copied into the folder. None: what is there already.
        trust_remote_code: run the code that comes with the model where a report is made from it.

    Raises:
        ValueError: a file is missing, or is not one of this very checkpoint, or somebody wrote a README.md of their own;
            nothing is written then.
        OSError: there is no room, or no permission; files that were there are as they were.
    """
    folder = Path(folder)
    for name, value in (("repo", repo), ("base_model", base_model)):
        if value is not None:
            check_id(name, value)
    config = stored_config(read_object(folder / "config.json"), folder)
    if (folder / CARD).is_file() and not is_made_here(folder):
        raise ValueError(
            f"{folder / CARD} was not made here, and the card would take its place: pass --keep-card (keep_card=True) to "
            "upload it as it is, or move it out of the folder"
        )
    source = folder / EVALUATION if evaluation is None else Path(evaluation)
    measured = evaluation is not None or source.is_file()
    table = checked_evaluation(source, read_object(source), config) if measured else None
    if not (folder / REPORT).is_file():
        _write_report(folder, trust_remote_code)
    summary = checked_report(folder / REPORT, read_object(folder / REPORT), config)
    if measured and source.resolve() != (folder / EVALUATION).resolve():
        _write(folder / EVALUATION, source.read_text(encoding="utf-8"))
    _draw(folder, summary, table)
    record_files(folder, also)
    card = model_card(folder, repo, base_model, license, relation=relation, origin=origin)
    if "base_model" not in card.data.to_dict() and origin is None:
        logger.warning(
            "the card names no base model: pass its Hub id, so that the Hub lists this one as quantized from it, or say "
            "with --origin where the float model comes from"
        )
    if variant := stored_variant(folder):
        logger.warning(
            "the weights are the variant %s, which loads with variant=%r only, as the card has it: save the model without a "
            "variant, and its name is enough",
            variant,
            variant,
        )
    _write(folder / CARD, str(card))
    return folder / CARD


def _write(path: Path, text: str) -> None:
    """Put ``text`` in the place of what a file holds, which stays whole if there is no room for it."""
    with writing(path), beside(path) as new:
        new.write_text(text, encoding="utf-8")


def _draw(folder: Path, summary: Report, table: Evaluation | None) -> None:
    """The plots of the card; one that cannot be drawn is not left from another model."""
    mpl.use("Agg")
    errors, sizes = folder / "errors.png", folder / "accuracy.png"
    if any(layer.error for layer in summary.layers):
        draw_errors(summary, errors)
    else:
        errors.unlink(missing_ok=True)
    if table is not None:
        draw_sizes(table, sizes)
    else:
        sizes.unlink(missing_ok=True)


def record_files(folder: Path, also: Collection[str] = ()) -> None:
    """Have the report name the files of tokenizers and processors that are there: what it has of one stays as it is.

    Args:
        folder: of the model, with a report.
        also: names of more files that belong to it.

    Raises:
        ValueError: one of these is not there, or may hold Python objects.
    """
    gone = [name for name in also if not (folder / name).is_file() or is_pickle(name)]
    if gone:
        raise ValueError(f"also must name files in {folder} that hold no Python objects, got {gone[0]!r}")
    raw = read_object(folder / REPORT)
    held: Any = raw.get("files")
    held = held if isinstance(held, dict) else {}
    files = digests(folder, {*held, *also})
    files |= {name: value for name, value in held.items() if name in files}
    if files != raw.get("files"):
        _write(folder / REPORT, json.dumps({**raw, "files": files}, indent=2))


def _write_report(folder: Path, trust_remote_code: bool) -> None:
    """What ``catquant quantize`` would have left: the report of the model, which is loaded for it."""
    model = load_quantized(str(folder), trust_remote_code)
    _write(folder / REPORT, json.dumps({**report(model).to_dict(), **identity(model)}, indent=2))
