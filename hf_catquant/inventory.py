"""The files of a model's folder beside its weights: which go along with the model, and which never do.

A list of what goes along, and not of what does not: a folder that somebody works in holds data, keys and snapshots of other
models under any name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from .integrity import sha256

# What may hold Python objects, or code that Keras stored, which run when they are loaded; in any case of letters.
PICKLES = (
    ".bin",
    ".ckpt",
    ".dill",
    ".h5",
    ".hdf5",
    ".joblib",
    ".keras",
    ".npy",
    ".npz",
    ".pickle",
    ".pkl",
    ".pt",
    ".pth",
    ".tar",
)
# Tokenizers, processors, how to generate, and the modules of sentence-transformers.
_COMPANIONS = (
    "*config*.json",
    "*label*.json",
    "*map*.json",
    "*processor*.json",
    "*speaker*.json",
    "*token*.json",
    "*vocab*.json",
    "emoji.json",
    "modules.json",
    "normalizer.json",
    "*.jinja",
    "*.bpe",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.vocab",
    "bpe.codes",
    "dict.txt",
    "merges*.txt",
    "*vocab*.txt",
)
_PAPERS = ("*.md", "*.png", "*.svg", "LICENSE*", "LICENCE*", "NOTICE*", "CITATION*", "*.py")
# What a download may ask for to get all of these; in its patterns a star stands for folders too.
PATTERNS = [*_COMPANIONS, *_PAPERS, "[0-9]_*/model.safetensors"]
_FOLDERS = re.compile(r"additional_chat_templates|\d+_[A-Za-z]\w*|\w*tokenizer\w*|\w*processor\w*")
_OF_SENTENCES = re.compile(r"\d+_[A-Za-z]\w*")  # whose folders hold weights of their own
_NEVER = ("config.json", "adapter_config.json", "report.json", "evaluation.json")


def is_pickle(name: str) -> bool:
    """Whether a file of this name may hold Python objects."""
    return name.lower().endswith(PICKLES)


def is_companion(name: str) -> bool:
    """Whether a file, by its path in the folder, is one of a tokenizer, a processor or the like."""
    *folders, file = PurePosixPath(name).parts
    if len(folders) > 1 or is_pickle(file) or (folders and not _FOLDERS.fullmatch(folders[0])):
        return False
    if folders and _OF_SENTENCES.fullmatch(folders[0]) and fnmatchcase(file, "*.safetensors"):
        return True
    return (bool(folders) or file not in _NEVER) and any(fnmatchcase(file, pattern) for pattern in _COMPANIONS)


def is_paper(name: str) -> bool:
    """Whether a file is read by people: a text, a plot, a licence, or the code of the model, which nothing runs unasked."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _PAPERS)


def names_in(folder: Path) -> Iterator[str]:
    """Paths in a folder of all files, and, ending in a slash, of links to folders; nothing hidden, and nothing cached."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        here = Path(place).relative_to(folder)
        yield from (f"{(here / name).as_posix()}/" for name in folders if (Path(place) / name).is_symlink())
        for name in sorted(files):
            if not name.startswith(".") and not name.endswith(".tmp"):
                yield (here / name).as_posix()


def companions(folder: Path) -> list[str]:
    """Files of tokenizers, processors and the like that a folder holds, by their paths in it."""
    return [name for name in names_in(folder) if is_companion(name) and (folder / name).is_file()]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of :func:`companions`, by path."""
    return {name: sha256(folder / name) for name in companions(folder)}


def shortly(names: list[str]) -> str:
    """Names in one line: of a folder inside the folder only its own."""
    tops = dict.fromkeys(name.split("/")[0] + ("/" if "/" in name else "") for name in names)
    shown = list(tops)[:10]
    return ", ".join(shown) + (f" and {len(tops) - 10} more" if len(tops) > 10 else "")
