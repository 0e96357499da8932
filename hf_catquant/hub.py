"""Between a folder and the Hub: the upload, and the check of what is there.

The card is made here and not by ``save_pretrained``, because ``model.push_to_hub`` writes a README.md of its own. It keeps
one that the repository already has, so a repository that was pushed from here stays described whatever pushes next.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from .card import RELATIONS
from .checkpoint import ADAPTER, index_file, read_object, weight_files
from .config import CatQuantConfig
from .describing import describe, record_files
from .hub_id import check_id
from .identity import CARD, EVALUATION, PLOTS, REPORT, check_kept, fetched, files_of
from .inventory import is_companion, is_pickle, names_in, shortly
from .log import logger
from .verify import Verification, stored_config, verify

# What transformers calls the weights of a model, whole or in parts, and their index; and those of a variant.
_OF_A_MODEL = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|model\.[\w.-]+\.safetensors|model\.safetensors\.index\.[\w.-]+\.json"
)
# What this package writes beside a model: of another one it would speak for this one.
_OF_A_CHECKPOINT = (REPORT, EVALUATION, *PLOTS)


def push(
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    relation: str = RELATIONS[0],
    origin: str | None = None,
    private: bool | None = None,
    keep_card: bool = False,
    also: Collection[str] = (),
    token: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Check a folder, describe it, and upload it in one commit; returns the commit's address.

    Uploaded are the files of this checkpoint, of tokenizers, processors and the like, the card, its plots, texts, licences
    and code of the model (``inventory.py``). Everything else in the folder is left out, and named in a warning.

    What the repository has of another checkpoint is deleted by the same commit: weights and their index, which a loader
    would read in the place of the new ones, files of tokenizers and processors that this folder has not, and a report, an
    evaluation and plots. No other file is deleted.

    Args:
        folder, base_model, license, evaluation, relation, origin, trust_remote_code: as in :func:`describe`.
        repo: Hub id; it is created if it is not there.
        private: whether a new repository is; None: as the owner's default is.
        keep_card: upload the README.md of the folder as it is.
        also: names of more files that belong to the model, which a tokenizer with code of its own reads: they go along, and
            the report has their SHA-256.
        token: None: the one that ``hf auth login`` stored.

    Raises:
        ValueError: the folder is not whole, cannot be described, ``repo`` is no Hub id, or the card that is kept is of
            another checkpoint or has metadata that the Hub does not take; a file to upload is a link out of the folder; the
            repository has an adapter, which would be loaded instead.
        RuntimeError: the Hub refused, or cannot be asked (offline).
    """
    check_id("repo", repo)
    folder = Path(folder)
    found = verify(folder)
    if not found.is_whole:
        raise ValueError(f"{folder} is not pushed: {'; '.join(found.problems)}")
    if keep_card:
        check_kept(folder)
        if also:
            record_files(folder, also)
    else:
        more: dict[str, Any] = {"origin": origin, "also": also, "trust_remote_code": trust_remote_code}
        describe(folder, repo, base_model, license, evaluation, relation=relation, **more)
    names = _uploaded(folder, stored_config(read_object(folder / "config.json"), folder))
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        there = api.list_repo_files(name)
        if ADAPTER in there:
            raise ValueError(
                f"{name} has {ADAPTER}: transformers would load the model that it names, with an adapter, instead of this "
                "one; delete it there, or push to another repository"
            )
        # Not upload_folder, which may split a large one into several commits: between two of them nothing would load.
        operations = _operations(folder, names, there)
        commit = api.create_commit(name, operations, commit_message="Upload quantized model")
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise RuntimeError(f"the Hub did not take {repo}: {error}") from error
    except (httpx.TransportError, ConnectionError) as error:
        raise RuntimeError(f"the Hub at {api.endpoint} cannot be reached to take {repo}: {error}") from error
    return str(commit.commit_url)


def _uploaded(folder: Path, config: CatQuantConfig) -> list[str]:
    """Paths of the files that go to the Hub; what is left out is named.

    Raises:
        ValueError: one of them is a link out of the folder.
    """
    index = index_file(folder)
    own = {"config.json", *_OF_A_CHECKPOINT, *(path.name for path in weight_files(folder))}
    own |= set() if index is None else {index.name}
    there = list(names_in(folder))
    own |= files_of(folder, config)
    names = [name for name in there if name in own]
    root = folder.resolve()
    for name in names:
        target = (folder / name).resolve()
        if not target.is_relative_to(root) or not target.is_file():
            raise ValueError(
                f"{folder / name} is a link out of the folder, to {target}, or no file: put the file itself there, or "
                "take the link away"
            )
    left = [name for name in there if name not in names]
    if left:
        logger.warning(
            "not uploaded, as nothing says that they are part of the model (--also NAME does): %s", shortly(left)
        )
    return names


def _operations(
    folder: Path, names: list[str], there: Iterable[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes of a repository with the files ``there`` one that speaks of the model of ``folder``, and of no other."""

    def stale(name: str) -> bool:
        ours = _OF_A_MODEL.fullmatch(name) is not None or name in _OF_A_CHECKPOINT
        return (ours or is_companion(name)) and name not in names

    gone = [name for name in there if stale(name)]
    if gone:
        logger.warning(
            "deleted by the same commit, as files of another checkpoint: %s (put what should stay into %s and push again)",
            ", ".join(gone),
            folder,
        )
    return [
        *(CommitOperationDelete(name, is_folder=False) for name in gone),
        *(CommitOperationAdd(name, folder / name) for name in names),
    ]


def verify_repo(repo: str, revision: str | None = None, token: str | None = None) -> Verification:
    """Download a repository but for code and what is no part of the model, check it, and compare it with the Hub's SHA-256.

    Raises:
        ValueError: the Hub does not give such a repository.
    """
    api = HfApi(token=token)
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = [file.rfilename for file in info.siblings or []]
        wanted = [name for name in files if _is_checked(name)]
        folder = fetched(repo, wanted, revision=info.sha, token=token)
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
    for name in [name for name in files if is_pickle(name) or name.endswith(".py")]:
        found.remarks.append(f"{name} is in the repository and was not fetched: it may hold code or Python objects")
    return found


def _is_checked(name: str) -> bool:
    """Whether ``verify`` reads a file of this name."""
    flat = "/" not in name and (name.endswith((".json", ".safetensors")) or name == CARD)
    return flat or is_companion(name)
