"""The examples run as they stand, on the data that come with scikit-learn; and what figures are of."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from itertools import pairwise
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


class Watched:
    """A quantizer that keeps which rows it learned from, and which it was asked for then."""

    def __init__(self):
        self.looks = []

    def fit(self, x, y):
        self.learned = set(x[:, 0])
        return self

    def transform(self, x):
        self.looks.append((self.learned, set(x[:, 0])))
        return x


def test_d_of_a_study_is_of_rows_that_were_not_learned_from(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    study = importlib.import_module("discrimination_study")
    watched, x, y = Watched(), np.arange(90.0)[:, None], np.arange(90) % 3
    monkeypatch.setattr(study, "VARIANTS", {"float": watched})
    found = study.discriminations("numbers", x, y)["float"]
    *folds, whole = watched.looks
    assert len(folds) == 5
    assert all(not learned & asked and len(learned | asked) == 90 for learned, asked in folds)
    assert set.union(*(asked for _, asked in folds)) == whole[0] == whole[1] == set(x[:, 0])
    assert found["discrimination"] != found["in_sample"]
    assert found["above"] == 0
    assert len(study.folds("few", x, np.repeat([0, 1], [86, 4]))) == 2
    with pytest.raises(SystemExit, match="few: every class needs 4 rows, one has 3"):
        study.folds("few", x, np.repeat([0, 1], [87, 3]))


def test_groups_of_animals_are_those_of_imagenet(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    vision = importlib.import_module("discrimination_vision")
    named = {2: "fish", 22: "birds", 100: "birds", 146: "birds", 151: "dogs", 268: "dogs", 281: "other carnivores"}
    named |= {25: "amphibians and reptiles", 326: "insects", 340: "ungulates", 366: "primates", 393: "fish"}
    named |= {
        69: "",
        101: "",
        147: "",
        327: "",
        386: "",
        398: "",
        999: "",
    }  # trilobite, tusker, whale, ...
    assert {label: vision.group_of(label) for label in named} == named
    places = sorted(place for ranges in vision.GROUPS.values() for place in ranges)
    assert all(one[1] < other[0] for one, other in pairwise(places))


def test_choices_of_formats_are_compared_row_by_row(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    formats = importlib.import_module("discrimination_formats")
    one = {"kept": ["a"], "accuracy": 75.0, "right": "1110"}
    other = {"kept": ["b"], "accuracy": 50.0, "right": "1100"}
    assert formats.paired(one, other) == "+25.00 ± 49.00"
    assert formats.paired(one, {**other, "kept": ["a"]}) == "the same blocks"
    assert formats.paired({key: one[key] for key in ("kept", "accuracy")}, other) == "+25.00 (rows not kept)"
