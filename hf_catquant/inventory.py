"""The files of a model's folder beside its weights: which go along with the model, and which never do.

A list of what goes along, and not of what does not: a folder that somebody works in holds data, keys and snapshots of other
models under any name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from transformers.dynamic_module_utils import get_relative_import_files

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
# What saving a tokenizer, a processor or the defaults of generation writes, by name: also what another model left behind.
GENERATION = "generation_config.json"
PROCESSOR = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "normalizer.json", "entity_vocab.json"),
    *("spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model"),
    *("source.spm", "target.spm", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja"),
)
# Rarer ones, which go along but may be anybody's: none is ever taken away.
_RARE = (
    *(
        "vocab-src.json",
        "vocab-tgt.json",
        "target_vocab.json",
        "vocab.bpe",
        "dict.txt",
        "emoji.json",
        "byte_maps.json",
    ),
    *("prophetnet.tokenizer", "word_shape.json", "word_pronunciation.json", "speaker_embeddings_path.json"),
    *("alphabet.json", "spm_char.model", "tokenizer.model.v?", "tiktoken.model", "*.spm", "*.tiktoken"),
)
_TEMPLATES = "additional_chat_templates"
# The modules of sentence-transformers, and their folders, which hold weights of their own.
_SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "router_config.json")
_KNOWN = (GENERATION, *PROCESSOR, *_RARE, *_SENTENCES)
_OF_SENTENCES = re.compile(r"([a-z]+_)?\d+_[A-Z][A-Za-z]*")
_INSIDE = ("config.json", "model.safetensors", "*_config.json")
# A tokenizer for each side of a model, and the like.
_FOLDERS = re.compile(r"([a-z]+_)*(tokenizer|processor|feature_extractor)(_\d)?")
_PAPERS = ("*.md", "*.png", "*.svg", "LICENSE*", "LICENCE*", "NOTICE*", "CITATION*")
# What a download may ask for to get all of these; in its patterns a star stands for folders too.
PATTERNS = [
    *(f"{place}{name}" for name in _KNOWN for place in ("", "*/")),
    *(f"{_TEMPLATES}/*.jinja", *_PAPERS, "*.py", *(f"[0-9]_*/{name}" for name in _INSIDE)),
]


def is_pickle(name: str) -> bool:
    """Whether a file of this name may hold Python objects."""
    return name.lower().endswith(PICKLES)


def is_companion(name: str) -> bool:
    """Whether a file, by its path in the folder, is one of a tokenizer, a processor or the like."""
    *folders, file = PurePosixPath(name).parts
    known = any(fnmatchcase(file, pattern) for pattern in _KNOWN)
    if not folders:
        return known
    if len(folders) > 1:
        return False
    if folders[0] == _TEMPLATES:
        return fnmatchcase(file, "*.jinja")
    if _OF_SENTENCES.fullmatch(folders[0]):
        return known or any(fnmatchcase(file, pattern) for pattern in _INSIDE)
    return known and _FOLDERS.fullmatch(folders[0]) is not None


def is_paper(name: str) -> bool:
    """Whether a file is read by people: a text, a plot, a licence."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _PAPERS)


def code_of(folder: Path) -> set[str]:
    """The Python files that a model, its tokenizer or its processor is made of: those that a config names, and what these
    import from beside them. Any other script that lies there is no part of it.
    """
    found: set[Path] = set()
    for name in ("config.json", "modules.json", *PROCESSOR):
        for reference in _references(folder / name) if name.endswith(("config.json", "modules.json")) else ():
            file = folder / f"{reference.rpartition('.')[0]}.py"
            if file.is_file() and file.parent == folder:  # else it is of another repository, or no name of a module
                found |= {file, *map(Path, get_relative_import_files(file))}
    return {path.relative_to(folder).as_posix() for path in found if path.is_file()}


def _references(file: Path) -> list[str]:
    """The classes that a config names in its ``auto_map``, or modules.json as types; none of a file that cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return []
    if isinstance(found, list):
        return [str(each.get("type")) for each in found if isinstance(each, dict)]
    named = found.get("auto_map") if isinstance(found, dict) else None
    values = named.values() if isinstance(named, dict) else [named]
    return [ref for value in values for ref in (value if isinstance(value, list) else [value]) if isinstance(ref, str)]


def names_in(folder: Path) -> Iterator[str]:
    """Paths in a folder of all files, and, ending in a slash, of links to folders; nothing hidden, and nothing cached."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        here = Path(place).relative_to(folder)
        yield from (f"{(here / name).as_posix()}/" for name in folders if (Path(place) / name).is_symlink())
        for name in sorted(files):
            if not name.startswith(".") and not name.endswith(".tmp"):
                yield (here / name).as_posix()


def digests(folder: Path, more: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of the files of tokenizers, processors and the like that a folder holds, and of ``more`` files, by path."""
    names = [name for name in names_in(folder) if is_companion(name) or name in more]
    return {name: sha256(folder / name) for name in names if (folder / name).is_file()}


def shortly(names: list[str]) -> str:
    """Names in one line: of a folder inside the folder only its own."""
    tops = dict.fromkeys(name.split("/")[0] + ("/" if "/" in name else "") for name in names)
    shown = list(tops)[:10]
    return ", ".join(shown) + (f" and {len(tops) - 10} more" if len(tops) > 10 else "")
