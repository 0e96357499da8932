"""The documentation holds: its code runs, its commands parse, its links lead somewhere, its generated pages are current."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_catquant
import tiny_models
from hf_catquant import CatQuantConfig
from hf_catquant.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = ROOT / "README.md"  # tests/test_readme.py runs its blocks
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
COMMAND = re.compile(r"^(?:    )?(catquant [a-z]+ .*)$", re.M)
NOTEBOOKS = ("text", "speech", "vision")


def blocks() -> list[Any]:
    """Python blocks of all pages but the README."""
    return [
        pytest.param(text, id=f"{page.stem}-{at}")
        for page in PAGES
        if page != README
        for at, (language, text) in enumerate(FENCED.findall(page.read_text(encoding="utf-8")))
        if language == "python"
    ]


def commands() -> list[Any]:
    """Command lines of all pages but the README: in blocks without a language, and indented ones."""
    return [
        pytest.param(line, id=f"{page.stem}: {line[:40]}")
        for page in PAGES
        if page != README
        for line in COMMAND.findall(page.read_text(encoding="utf-8"))
    ]


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the blocks take for granted."""
    config = CatQuantConfig(group_size=16, solver="rtn", correction=None)
    model = hf_catquant.quantize(tiny_models.build("bert"), config)
    model.save_pretrained(tmp_path / "quantized")
    rows = np.random.default_rng(0).normal(size=(30, 8))
    return {
        "hf_catquant": hf_catquant,
        "model": model,
        "folder": tmp_path / "quantized",
        "out": tmp_path / "out",
        "samples": tiny_models.samples("bert"),
        "processor": None,
        "labels": [i % 2 for i in range(12)],
        "features": rows[:12],
        "embeddings": rows,
        "queries": rows[:3],
    }


@pytest.mark.parametrize("block", blocks())
def test_python_blocks_run(block, names):
    exec(compile(block, "docs", "exec"), names)


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    build_parser().parse_args(shlex.split(re.sub(r"\[[^]]*\]", "", command), comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            place = page if not path else page.parent / path
            assert place.exists(), target
            assert not anchor or anchor in headings(place), target


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("folder", "module", "page"), [("docs", "build_api", "api.md"), ("benchmarks", "choose", "how-to-choose.md")]
)
def test_generated_pages_are_current(folder, module, page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / folder))
    made = importlib.import_module(module).page()
    text = made if isinstance(made, str) else "\n".join(made) + "\n"
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text, f"run python {folder}/{module}.py"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_plain_python(name):
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in code:
        compile("".join(cell["source"]), name, "exec")
        assert all(out["output_type"] == "stream" and out["name"] == "stdout" for out in cell["outputs"])
    ran = [cell["execution_count"] is not None for cell in code]
    assert all(ran) or not any(ran)  # stored as a whole by examples/notebooks.py, or not at all
    assert "/tmp" not in json.dumps(cells)


@pytest.mark.slow  # each trains a model
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name, monkeypatch):
    monkeypatch.delenv("CATQUANT_DATA", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    notebooks = importlib.import_module("notebooks")
    with torch.random.fork_rng():
        printed = notebooks.execute(ROOT / "examples" / f"{name}.ipynb")
    assert any("quantized" in text for text in printed)


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "speech"])
def test_notebooks_run_on_real_models(name, realdata, monkeypatch):
    monkeypatch.setenv("CATQUANT_DATA", str(realdata))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    importlib.import_module("notebooks").execute(ROOT / "examples" / f"{name}.ipynb")
