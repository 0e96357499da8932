"""What may happen with a broken checkpoint: it is refused, or is the very model that was saved. Anything else is a find."""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_catquant
from hf_catquant import CatQuantConfig
from hf_catquant.fields import field_checksums
from hf_catquant.integrity import file_checksums
from hf_catquant.verify import verify

from .mutate import SHARDS, Case, Checkpoint

# What users may see; anything else that comes out of the package itself is a check that is missing.
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass
class Base:
    """A small quantized model that cases are made of.

    Attributes:
        checkpoint: its files.
        auto: what loads it.
        batch: an input.
        logits: what it returns.
        tensors, entries: checksums of its tensors; its modules and corrections.
    """

    checkpoint: Checkpoint
    auto: Any
    batch: dict[str, torch.Tensor]
    logits: torch.Tensor
    tensors: dict[str, int] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)


@torch.no_grad()
def bases(folder: Path) -> list[Base]:
    """Three, made under ``folder``: a corrected classifier of texts, a language model with a tied head, convolutions.

    Together they store every kind of field: all formats, a low-rank product, a rotation, ranges of inputs, a correction.
    """
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    text = {**SIZES, "vocab_size": 20, "intermediate_size": 24, "max_position_embeddings": 8}
    llama = transformers.LlamaConfig(**text, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0)
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[2], layer_type="basic", num_labels=3
    )
    cat = {"num_clusters": 2, "projection": 2, "alpha": 0.5, "shrinkage": 0.0}
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": row} for row in torch.randint(3, 20, (16, 6), generator=draw)]
    images = torch.randn(6, 3, 16, 16, generator=draw)
    several = {"query": {"weights": "binary"}, "key": {"weights": "int2"}, "intermediate": {"low_rank": 1}}
    models: tuple[tuple[Any, Any, dict[str, torch.Tensor], dict[str, Any]], ...] = (
        (
            transformers.BertForSequenceClassification,
            transformers.BertConfig(**text),
            {"input_ids": ids},
            {"correction": cat, "dataset": rows, "overrides": several},
        ),
        (
            transformers.LlamaForCausalLM,
            llama,
            {"input_ids": ids},
            {"weights": "int3", "rotation": "hadamard", "activations": "int8", "group_size": -1},
        ),
        (
            transformers.ResNetForImageClassification,
            resnet,
            {"pixel_values": images[:2]},
            {"weights": "int4", "activations": "int4", "dataset": [{"pixel_values": image} for image in images]},
        ),
    )
    found = []
    for kind, config, batch, options in models:
        torch.manual_seed(0)
        usual = {"weights": "ternary", "group_size": 8, "solver": "rtn", "correction": None, "batch_size": 4}
        request = CatQuantConfig(**(usual | options))
        model = hf_catquant.quantize(kind(config).eval(), request)
        place = folder / kind.__name__
        model.save_pretrained(place)
        checkpoint = Checkpoint((place / "config.json").read_bytes(), (place / "model.safetensors").read_bytes())
        stored = json.loads(checkpoint.config)["quantization_config"]
        entries = [stored["modules"], stored["corrections"]]
        tensors = file_checksums(place / "model.safetensors")
        found.append(Base(checkpoint, kind, batch, model(**batch).logits, tensors, entries))
    return found


def write(case: Case, folder: Path) -> None:
    """Put a case where it can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    made = case.checkpoint
    single = made.shard is None
    files = {
        "config.json": made.config,
        "model.safetensors": made.weights if single else None,
        SHARDS[0]: None if single else made.weights,
        SHARDS[1]: made.shard,
        "model.safetensors.index.json": made.index,
    }
    for name, data in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
        else:
            (folder / name).unlink(missing_ok=True)


def tensors_in(folder: Path) -> dict[str, int]:
    """Checksums of the tensors that a loader reads: of the one file, or of all shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return file_checksums(single)
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {key: value for name in sorted(names) for key, value in file_checksums(folder / name).items()}


def judge_verify(base: Base, case: Case, folder: Path) -> tuple[str, str | None]:
    """(outcome, find) of ``verify``: it never raises, and what it calls whole is what was saved."""
    try:
        found = verify(folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "raised", _described(error)
    if not found.is_whole:
        return "refused", None
    if case.is_signed:
        return "whole, signed", None
    stored = json.loads(case.checkpoint.config)["quantization_config"]
    entries = [stored["modules"], stored.get("corrections") or {}]  # one without corrections need not say so
    if tensors_in(folder) != base.tensors or base.entries != entries:
        return "wrong", "verify calls whole what is not what was saved"
    other = other_field(base, json.loads(case.checkpoint.config))
    if other is not None:
        return "wrong", f"verify calls whole a config.json with another {other}"
    return "whole, unchanged", None


def other_field(base: Base, found: dict[str, Any]) -> str | None:
    """A field that a config.json has otherwise than the one that was saved, and that the class does not read as the same.

    A class fills in what is None, or in part there, of a dictionary (``rope_parameters``, ``head_dim``).
    """
    raw = json.loads(base.checkpoint.config)
    saved, held = raw["quantization_config"]["provenance"]["fields"], field_checksums(found)
    other = sorted(name for name in held.keys() & saved.keys() if held[name] != saved[name])
    if not other:
        return None
    first, second = (base.auto.config_class.from_dict(dict(fields)).to_dict() for fields in (raw, found))
    return next((name for name in other if first[name] != second[name]), None)


@torch.no_grad()
def judge_load(base: Base, case: Case, folder: Path, said: Said) -> tuple[str, str | None]:
    """(outcome, find) of ``from_pretrained``: it refuses, or computes what was saved, or says which field differs."""
    said.lines.clear()
    try:
        model = base.auto.from_pretrained(folder, dtype=torch.float32)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        bad = not isinstance(error, Exception) or isinstance(error, MemoryError)
        bad = bad or (_is_ours(error) and not isinstance(error, REFUSALS))
        return ("raised", _described(error)) if bad else ("refused", None)
    if case.is_signed:  # any numbers may come out, but the package may not fall over what it let in
        try:
            model(**base.batch)
        except Exception as error:
            return ("wrong", f"loads, then {_described(error)}") if _is_ours(error) else ("loaded, signed", None)
        return "loaded, signed", None
    if any("not what was saved" in line for line in said.lines):
        return "loaded, with a warning", None
    try:
        logits = model(**base.batch).logits
    except Exception as error:
        return "wrong", f"loads without a word, then {_described(error)}"
    if logits.shape == base.logits.shape and torch.equal(logits, base.logits):
        return "loaded, unchanged", None
    return "wrong", "loads without a word and computes something else"


class Said(logging.Handler):
    """Keeps what the package warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())


def _is_ours(error: BaseException) -> bool:
    """Whether the package itself raised it."""
    return "hf_catquant" in (traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else "")


def _described(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    place = "" if last is None else f" at {Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {str(error)[:200]}{place}"
