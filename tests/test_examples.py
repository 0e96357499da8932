"""The examples run as they stand, on the data that come with scikit-learn; and what figures are of."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow  # each is a new process that trains 110 classifiers
@pytest.mark.parametrize("kind", ["text", "speech", "vision"])
def test_discrimination(kind, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"discrimination_{kind}.py"), "--plot", str(tmp_path / "plot.png")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits, pixels: 1797 rows, 64 features, 10 classes" in done.stdout
    assert f"{'ternary, eta 0.75':38}{'0.8390 (5/5)':>14}{0.8335:11.4f}" in done.stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_d_of_a_study_is_of_rows_that_were_not_learned_from(monkeypatch):
    """Of noise, thresholds that are chosen for D find some on the rows that they are chosen on, and none on others."""
    monkeypatch.syspath_prepend(EXAMPLES)
    study = importlib.import_module("discrimination_study")
    x, y = np.random.default_rng(0).normal(size=(90, 12)), np.arange(90) % 3
    found = study.discriminations("noise", x, y)
    assert found["float"]["above"] == 0
    for variant in ("binary, discrimination", "ternary, discrimination, per feature"):
        assert found[variant]["in_sample"] > 0.53
        assert abs(found[variant]["discrimination"] - 0.5) < 0.015
    assert len(study.folds("few", x, np.repeat([0, 1], [86, 4]))) == 2
    with pytest.raises(SystemExit, match="few: every class needs 4 rows, one has 3"):
        study.folds("few", x, np.repeat([0, 1], [87, 3]))


def test_choices_of_formats_are_compared_row_by_row(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    formats = importlib.import_module("discrimination_formats")
    one = {"kept": ["a"], "accuracy": 75.0, "right": "1110"}
    other = {"kept": ["b"], "accuracy": 50.0, "right": "1100"}
    assert formats.paired(one, other) == "+25.00 ± 49.00"
    assert formats.paired(one, {**other, "kept": ["a"]}) == "the same blocks"
    assert formats.paired({key: one[key] for key in ("kept", "accuracy")}, other) == "+25.00 (rows not kept)"
