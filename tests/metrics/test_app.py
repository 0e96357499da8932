"""The metric's Space: the page starts, answers a request over HTTP, and says what is wrong with a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from hf_catquant import FEATURE_DISCRIMINATION, feature_discrimination

gradio = pytest.importorskip("gradio", reason="the Space needs gradio, which the package does not")
FOLDER = Path(FEATURE_DISCRIMINATION)
pytestmark = pytest.mark.slow  # gradio alone takes ten seconds to start


@pytest.fixture(scope="module")
def app():
    """The script, loaded as a Space runs it: not as a part of the package."""
    spec = importlib.util.spec_from_file_location("space_app", FOLDER / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def client(app):
    gradio_client = pytest.importorskip("gradio_client")
    page = app.build()
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    yield gradio_client.Client(url, verbose=False)
    page.close()


def csv(folder, **columns):
    path = folder / "rows.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return str(path)


def test_a_request_is_answered(app, client):
    table, pairs, sweep = client.predict(next(iter(app.DATA)), None, "", 0.75, True, api_name="/measure")
    rows = {row[0]: dict(zip(table["headers"], row, strict=True)) for row in table["data"]}
    expected = feature_discrimination(*load_digits(return_X_y=True))
    assert rows["float"]["D"] == pytest.approx(expected["discrimination"], abs=1e-4)
    assert rows["binary"]["over float"] == pytest.approx(expected["binary_ratio"], abs=1e-4)
    assert rows["ternary"]["D"] == pytest.approx(expected["ternary"], abs=1e-4)
    assert rows["ternary"]["5-NN"] > 0.9
    assert all(len(plot["plot"]) > 1000 for plot in (pairs, sweep))


def test_a_file_is_measured(app, tmp_path):
    generator = np.random.default_rng(0)
    names = np.array(["cat", "dog"])[np.arange(40) % 2]
    x = generator.normal(size=40) + np.arange(40) % 2
    file = csv(tmp_path, kind=names, size=x, weight=generator.normal(size=40))
    table, _, _ = app.measure("", file, "kind", 0.75, False)
    features, labels = app.read(file, "kind")
    assert table["D"][0] == pytest.approx(feature_discrimination(features, labels)["discrimination"], abs=1e-4)
    assert list(table["features"]) == ["float", "binary", "ternary"]
    assert "5-NN" not in table


def test_classes_too_small_for_accuracy_are_measured_without(app, tmp_path):
    file = csv(tmp_path, a=[1.0, 2.0, 3.0, 4.0, 7.0], kind=["s", "s", "t", "t", "t"])
    table, _, _ = app.measure("", file, "", 0.75, True)
    assert len(table) == 3
    assert "5-NN" not in table


@pytest.mark.parametrize(
    ("columns", "label", "message"),
    [
        ({"a": [1.0, 2.0], "b": [0, 1]}, "c", "there is no column 'c'; the file has a, b"),
        ({"a": ["x", "y"], "b": [0, 1]}, "", "the column 'a' is not of numbers"),
        ({"a": [1.0, 2.0, 3.0], "b": ["s", None, "t"]}, "", "the column of classes 'b' is empty in row 1"),
        ({"a": [], "b": []}, "", "the file has no rows below its header"),
        ({"a": [1.0, 2.0], "b": [0, 0]}, "", "at least two classes"),
        ({"a": [1.0, None, 1.0, 3.0], "b": ["s", "s", "t", "t"]}, "", "got nan in row 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(app, tmp_path, columns, label, message):
    with pytest.raises(gradio.Error, match=message):
        app.measure("", csv(tmp_path, **columns), label, 0.75, False)


def test_requirements_and_card_are_those_of_a_space():
    wanted = {line.split(">=")[0] for line in (FOLDER / "requirements.txt").read_text().split()}
    assert {"gradio", "evaluate", "scikit-learn", "numpy", "matplotlib", "pandas", "datasets"} == wanted
    card = (FOLDER / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "sdk: gradio" in card
    assert "app_file: app.py" in card
