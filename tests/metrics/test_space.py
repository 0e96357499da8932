"""The metric as a Space: its files are pushed to a Hub, and `evaluate` loads it from there by its id."""

from __future__ import annotations

import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from huggingface_hub import HfApi, constants

import fake_hub
from hf_catquant import FEATURE_DISCRIMINATION, feature_discrimination

SPACE = "me/feature_discrimination"


@pytest.fixture
def nothing_loaded(monkeypatch):
    """No metric that was loaded in this process: ``evaluate`` imports all of them from the first folder that it used."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "evaluate_modules").exists()])
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "evaluate_modules"}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def hub(monkeypatch, tmp_path, nothing_loaded):
    """A Hub with the Space, for this very process."""
    with fake_hub.running() as hub:
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        for name, value in (
            ("HF_ENDPOINT", hub.url),
            ("HUB_EVALUATE_URL", hub.url + "/spaces/{path}/resolve/{revision}/{name}"),
            ("HF_EVALUATE_CACHE", tmp_path / "evaluate"),
            ("DOWNLOADED_EVALUATE_PATH", tmp_path / "downloads"),
            ("HF_MODULES_CACHE", tmp_path / "modules"),
            ("HF_EVALUATE_OFFLINE", False),
            ("HF_UPDATE_DOWNLOAD_COUNTS", False),  # it would be counted elsewhere
        ):
            monkeypatch.setattr(evaluate.config, name, value)
        api = HfApi(endpoint=hub.url, token="hf_nothing")
        api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
        api.upload_folder(
            repo_id=SPACE, repo_type="space", folder_path=FEATURE_DISCRIMINATION, ignore_patterns=["__pycache__/*"]
        )
        yield hub


def test_the_space_that_was_pushed_is_loaded_by_its_id(hub, tmp_path):
    files = {path.name for path in Path(FEATURE_DISCRIMINATION).iterdir() if path.is_file()}
    assert hub.repos[f"spaces/{SPACE}"].files.keys() == files
    assert "POST /api/validate-yaml" in hub.requests
    metric = evaluate.load(SPACE, cache_dir=str(tmp_path / "cache"))
    wanted = f"GET /spaces/{SPACE}/resolve/main/"
    fetched = {request.removeprefix(wanted) for request in hub.requests if request.startswith(wanted)}
    assert "feature_discrimination.py" in fetched
    assert all(name.endswith(".py") for name in fetched)
    generator = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = generator.normal(size=(30, 5)) + y[:, None]
    result = metric.compute(predictions=x, references=y, bootstrap=20, accuracy="knn")  # every file of it is used
    assert result == pytest.approx(feature_discrimination(x, y, bootstrap=20, accuracy="knn"), abs=1e-9)


def test_a_space_without_a_part_of_the_metric_is_not_loaded(hub, tmp_path):
    del hub.repos[f"spaces/{SPACE}"].files["thresholds.py"]
    with pytest.raises(FileNotFoundError, match="feature_discrimination"):
        evaluate.load(SPACE, cache_dir=str(tmp_path / "cache"))
