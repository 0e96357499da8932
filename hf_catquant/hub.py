"""Between a folder and the Hub: the card and the plots beside the weights, the upload, and the check of what is there.

The card is made here and not by ``save_pretrained``, because ``model.push_to_hub`` writes a README.md of its own. It keeps
one that the repository already has, so a repository that was pushed from here stays described whatever pushes next.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib as mpl
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .card import EVALUATION, REPORT, model_card
from .evaluation_table import Evaluation
from .log import logger
from .report import Report, report
from .report_page import draw_errors, draw_sizes
from .tasks import auto_class, load_config
from .verify import PICKLES, Verification, read_object, verify

CARD = "README.md"
# Files of Python objects are never uploaded, nor is what editors and caches leave behind.
_LEFT_OUT = [*(f"*{suffix}" for suffix in PICKLES), ".*", "*.tmp", "__pycache__/*"]
_CHECKED = ["*.json", "*.safetensors"]


def describe(
    folder: str | Path,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
) -> Path:
    """Write the plots and the card into a folder of a quantized model; returns the card's path.

    Args:
        folder: as ``catquant quantize`` or ``save_pretrained`` left it; a report that is missing is made from the model.
        repo: Hub id that it will have.
        base_model: Hub id of the float model; None: what ``report.json`` says.
        license: Hub word for the licence of the weights.
        evaluation: what ``catquant eval --json`` wrote; it is copied into the folder. None: what is there already.

    Raises:
        ValueError: a file is missing, or is not one of this model.
    """
    folder = Path(folder)
    if evaluation is not None and Path(evaluation).resolve() != (folder / EVALUATION).resolve():
        shutil.copyfile(evaluation, folder / EVALUATION)
    if not (folder / REPORT).is_file():
        _write_report(folder)
    summary = Report.from_dict(read_object(folder / REPORT))
    mpl.use("Agg")
    if any(layer.error for layer in summary.layers):
        draw_errors(summary, folder / "errors.png")
    if (folder / EVALUATION).is_file():
        draw_sizes(Evaluation.from_dict(read_object(folder / EVALUATION)), folder / "accuracy.png")
    card = model_card(folder, repo, base_model, license)
    if "base_model" not in card.data.to_dict():
        logger.warning(
            "the card names no base model: pass its Hub id, so that the Hub lists this one as quantized from it"
        )
    card.save(folder / CARD)
    return folder / CARD


def _write_report(folder: Path) -> None:
    """What ``catquant quantize`` would have left: the report of the model, which is loaded for it."""
    model = auto_class(load_config(str(folder))).from_pretrained(folder)
    (folder / REPORT).write_text(json.dumps(report(model).to_dict(), indent=2), encoding="utf-8")


def push(
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    private: bool | None = None,
    keep_card: bool = False,
    token: str | None = None,
) -> str:
    """Check a folder, describe it, and upload it in one commit; returns the commit's address.

    Args:
        folder, base_model, license, evaluation: as in :func:`describe`.
        repo: Hub id; it is created if it is not there.
        private: whether a new repository is; None: as the owner's default is.
        keep_card: upload the README.md of the folder as it is.
        token: None: the one that ``hf auth login`` stored.

    Raises:
        ValueError: the folder is not whole, cannot be described, or ``repo`` is no Hub id.
        RuntimeError: the Hub refused.
    """
    found = verify(folder)
    if not found.is_whole:
        raise ValueError(f"{folder} is not pushed: {'; '.join(found.problems)}")
    if not keep_card:
        describe(folder, repo, base_model, license, evaluation)
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload quantized model", ignore_patterns=_LEFT_OUT
        )
    except HFValidationError as error:
        raise ValueError(f"repo must be a Hub id like owner/name, got {repo!r}: {error}") from error
    except HfHubHTTPError as error:
        raise RuntimeError(f"the Hub did not take {repo}: {error}") from error
    return str(commit.commit_url)


def verify_repo(repo: str, revision: str | None = None, token: str | None = None) -> Verification:
    """Download the JSON and the weights of a repository, check them, and compare them with the Hub's own SHA-256.

    Raises:
        ValueError: the Hub does not give such a repository.
    """
    api = HfApi(token=token)
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        folder = snapshot_download(repo, revision=info.sha, allow_patterns=_CHECKED, token=token)
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"there is no folder {repo}, and the Hub did not give a model of this name: {error}"
        ) from error
    found = verify(folder)
    found.folder = f"{repo} at {info.sha}"
    listed = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs is not None}
    for name, digest in found.files.items():
        if listed.get(name, digest) != digest:
            found.problems.append(f"{name}: its SHA-256 is {digest}, the Hub has {listed[name]}: fetch it again")
    others = [file.rfilename for file in info.siblings or [] if Path(file.rfilename).suffix in (*PICKLES, ".py")]
    for name in others:
        found.remarks.append(f"{name} is in the repository and was not fetched: it may hold code or Python objects")
    return found
