"""The README's Python blocks run as they stand, on tiny stand-ins; its commands exist with the options it gives them."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

import hf_catquant
import tiny_models
from hf_catquant.cli import build_parser

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines()]


def names_for(block: str, folder: Path) -> dict[str, Any]:
    """Values of the names that a block takes for granted."""
    if "from_pretrained(name" in block:
        tiny_models.build("vit").save_pretrained(folder)
        tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        rows = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), dtype=np.uint8)
        return {"name": str(folder), "images": [Image.fromarray(row) for row in rows]}
    if "fit_correction" in block:
        teacher = tiny_models.build("bert")
        model = copy.deepcopy(teacher)
        with torch.no_grad():
            model.classifier.weight *= 0.2  # far off: there has to be a correction to save
            model.classifier.bias += 3
        samples = tiny_models.samples("bert", 64)
        return {
            "hf_catquant": hf_catquant,
            "bnb_model": model,
            "float_model": teacher,
            "samples": samples,
            "tokenizer": None,
        }
    features = np.random.default_rng(0).normal(size=(20, 4)) + np.arange(20)[:, None] // 10
    return {"hf_catquant": hf_catquant, "features": features, "labels": np.arange(20) // 10}


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.strip().splitlines()[0][:40])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), names_for(block, tmp_path / "float"))


def test_there_are_blocks():
    assert len(PYTHON) >= 3
    assert any(command.startswith("catquant quantize") for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(python -m hf_catquant\.cli|catquant) ", c)])
def test_commands_parse(command: str):
    build_parser().parse_args(shlex.split(command, comments=True)[1:])
