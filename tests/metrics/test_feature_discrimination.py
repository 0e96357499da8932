"""The metric as ``evaluate`` loads it: from the folder, without a network, with the numbers of the plain function."""

from __future__ import annotations

import ast
import math
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from hf_catquant import FEATURE_DISCRIMINATION, feature_discrimination

FOLDER = Path(FEATURE_DISCRIMINATION)
PARTS = ("accuracy", "bootstrap", "inputs", "measure", "moments", "streaming", "thresholds")
FILES = ("feature_discrimination.py", *(f"{name}.py" for name in PARTS))


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(FEATURE_DISCRIMINATION, cache_dir=str(tmp_path))


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 50)
    return generator.normal(size=(50, 6)) + 0.7 * y[:, None], y


def test_the_path_is_that_of_the_installed_folder():
    assert FOLDER.is_absolute()
    assert {"README.md", *FILES} <= {file.name for file in FOLDER.iterdir()}


def test_same_numbers_as_the_plain_function(metric, data):
    x, y = data
    expected = feature_discrimination(x, y)
    assert metric.compute(predictions=x, references=y) == pytest.approx(expected, abs=1e-9)
    assert metric.compute(predictions=x.tolist(), references=y.tolist()) == pytest.approx(expected, abs=1e-9)
    with_eta = metric.compute(predictions=x, references=y, eta=0.3)
    assert with_eta == pytest.approx(feature_discrimination(x, y, eta=0.3), abs=1e-9)
    assert with_eta["ternary"] != expected["ternary"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype(metric, data, dtype):
    x, y = torch.tensor(data[0], dtype=dtype), torch.tensor(data[1])
    assert metric.compute(predictions=x, references=y) == pytest.approx(feature_discrimination(x, y), abs=1e-9)


def test_batches_and_single_rows(metric, data):
    x, y = data
    for part in np.array_split(np.arange(40), 3):
        metric.add_batch(predictions=x[part], references=y[part])
    for row in range(40, 50):
        metric.add(prediction=x[row], reference=y[row])
    assert metric.compute() == pytest.approx(feature_discrimination(x, y), abs=1e-9)


def test_combines_with_other_metrics(metric, data):
    both = evaluate.combine([metric, metric])
    found = both.compute(predictions=data[0], references=data[1])
    for name, value in feature_discrimination(*data).items():
        of_both = [found[key] for key in found if re.fullmatch(rf"feature_discrimination_\d_{name}", key)]
        assert of_both == pytest.approx([value, value], abs=1e-9)


def test_names_as_labels_and_every_option(metric, data):
    x, y = data
    names = [("ant", "bee", "cow")[label] for label in y]
    options = {"pairs": True, "per_feature": True, "accuracy": "knn", "bootstrap": 20, "ternary_threshold": "best"}
    found, expected = (
        metric.compute(predictions=x, references=names, **options),
        feature_discrimination(x, y, **options),
    )
    assert found["classes"] == ["ant", "bee", "cow"]
    for key in expected.keys() - {"classes"}:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-9, err_msg=key)
    metric.add(prediction=x[0], reference="1")  # a digit, but a name: not the class 1
    metric.add_batch(predictions=x[1:4], references=["1", "2", "2"])
    assert metric.compute(pairs=True)["classes"] == ["1", "2"]


def one_process(process, folder, x, y):
    part = evaluate.load(
        FEATURE_DISCRIMINATION, num_process=2, process_id=process, experiment_id="two", cache_dir=folder
    )
    part.add_batch(predictions=x[process::2], references=y[process::2])
    return part.compute(eta=0.6)


@pytest.mark.slow  # two new processes import everything
def test_two_processes(data, tmp_path):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(one_process, (0, 1), [str(tmp_path)] * 2, *([part] * 2 for part in data)))
    assert found[0] == pytest.approx(feature_discrimination(*data, eta=0.6), rel=1e-9)
    assert found[1] is None  # only the first process computes


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "at least one row"),
        ([[1.0], [2.0, 3.0]], [0, 1], "rows of one length"),
        ([[1j], [2j], [1.0], [1.0]], [0, 0, 1, 1], "real numbers, got complex128"),
        ([["1"], ["2"], ["1"], ["3"]], [0, 0, 1, 1], "real numbers, got <U1"),
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], r"must be \(n, d\).*got shape \(4,\)"),
        (None, [0, 0, 1, 1], "got NoneType"),
        ([[1.0], [math.nan], [1.0], [1.0]], [0, 0, 1, 1], "got nan in row 1"),
        ([[1.0], [2.0], [math.inf], [1.0]], [0, 0, 1, 1], "got inf in row 2"),
        ([[1.0], [2.0], [3.0]], [4, 4, 4], "at least two classes, got only 4"),
        ([[1.0], [2.0], [3.0], [4.0]], [0, 0, 1, 1.5], r"integers or strings, got 1\.5"),
        ([[1.0], [2.0], [3.0], [4.0]], [0, 0, 1, math.nan], r"integers or strings, got nan"),
        ([[1.0], [2.0], [3.0], [4.0]], [0, 0, 1, math.inf], r"integers or strings, got inf"),
        ([[1.0], [2.0], [3.0], [4.0]], [0, 0, 1, None], r"integers or strings, got None"),
        ([[1.0], [2.0], [3.0], [4.0]], [1, 1, "a", "a"], "all integers or all strings, got both"),
        (
            [[1.0], [2.0], [3.0], [4.0]],
            [2**53, 2**53, 2**53 + 1, 2**53 + 1],
            "up to 2\\*\\*53 in size, got 9007199254740993",
        ),
        ([[1.0], [2.0], [3.0]], [0, 0], "Mismatch in the number of predictions"),
    ],
)
def test_bad_input_is_refused(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


def test_single_rows_are_checked(metric):
    with pytest.raises(ValueError, match="real numbers, got complex128"):
        metric.add(prediction=[1j], reference=0)


def test_a_table_and_a_column_of_vectors_are_features(metric, data):
    x, y = data
    column = np.empty(len(x), object)
    column[:] = list(x)
    for stored in (x.astype(object), column):
        assert metric.compute(predictions=stored, references=y) == pytest.approx(feature_discrimination(x, y))


def test_a_threshold_that_is_none_is_refused(metric, data):
    with pytest.raises(ValueError, match="eta must be a finite number of at least 0, got -1"):
        metric.compute(predictions=data[0], references=data[1], eta=-1)


def test_the_metric_stays_usable_after_bad_input(metric, data):
    with pytest.raises(ValueError, match="got nan"):
        metric.compute(predictions=[[1.0], [math.nan], [1.0], [1.0]], references=[0, 0, 1, 1])
    assert metric.compute(predictions=data[0], references=data[1]) == pytest.approx(feature_discrimination(*data))


@pytest.mark.parametrize(("first", "then"), [([0, 1], ["0", "1"]), (["0", "1"], [0, 1]), ([0, 1], ["a", "b"])])
def test_integers_and_strings_do_not_mix_over_batches(metric, first, then):
    x = [[0.0], [1.0]]
    metric.add_batch(predictions=x, references=first)
    for add in (
        lambda: metric.add_batch(predictions=x, references=then),
        lambda: metric.add(prediction=x[0], reference=then[0]),
    ):
        with pytest.raises(ValueError, match="must be all integers or all strings, got both"):
            add()
    metric.add_batch(predictions=[[2.0], [3.0]], references=first)
    assert metric.compute()["n"] == 4
    assert metric.compute(predictions=[*x, *x], references=[*then, *then])["num_classes"] == 2


@pytest.mark.parametrize("kept", [False, True])
def test_labels_of_another_length_and_form_leave_nothing_behind(data, tmp_path, kept):
    metric = evaluate.load(FEATURE_DISCRIMINATION, cache_dir=str(tmp_path), keep_in_memory=kept)
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        metric.compute(predictions=data[0], references=["a"] * 10)
    assert metric.compute(predictions=data[0], references=data[1]) == pytest.approx(feature_discrimination(*data))


def test_one_of_several_processes_goes_on_after_a_batch_that_is_refused(data, tmp_path):
    x, y = data
    several = {"num_process": 2, "experiment_id": "refused", "timeout": 20, "cache_dir": str(tmp_path)}
    metrics = [evaluate.load(FEATURE_DISCRIMINATION, process_id=process, **several) for process in (0, 1)]

    def one(process):
        if process == 0:
            with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
                metrics[0].add_batch(predictions=x, references=y[:10])
        metrics[process].add_batch(predictions=x[process::2], references=y[process::2])
        return metrics[process].compute()

    with ThreadPoolExecutor(2) as pool:  # what the others wait for is still there
        found = list(pool.map(one, (0, 1)))
    assert found[0] == pytest.approx(feature_discrimination(x, y), rel=1e-9)


def test_copied_elsewhere_it_needs_nothing_of_the_package(data, tmp_path, monkeypatch):
    folder = tmp_path / "feature_discrimination"
    folder.mkdir()
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        (folder / name).write_text(text + "\n# another copy\n", encoding="utf-8")  # so that no cached one is loaded
    for name in [name for name in sys.modules if name.split(".")[0] == "hf_catquant"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hf_catquant", None)  # importing it now fails
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    assert metric.compute(predictions=data[0], references=data[1]) == feature_discrimination(*data)


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        (FOLDER / "feature_discrimination.py", {"__future__", "typing", "datasets", "evaluate"}),
        *((FOLDER / f"{name}.py", {"__future__", "collections", "dataclasses", "typing", "numpy"}) for name in PARTS),
        # evaluate takes a second to import, which plain use of the package does not need.
        (FOLDER.parents[1] / "discrimination.py", {"__future__", "math", "pathlib", "typing", "numpy", "torch"}),
    ],
)
def test_imports_are_few_and_one_a_line(file, allowed):
    if file.stem == "accuracy":
        allowed = {*allowed, "sklearn"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert len(node.names) == 1, f"line {node.lineno}: evaluate reads one import a line"
            assert node.names[0].name.split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").split(".")[0] in allowed


def test_the_card_and_the_help_print_what_the_code_gives(metric):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        namespace: dict[str, object] = {}
        *code, last = example.strip().splitlines()
        assert last.startswith("# "), "an example ends with the line that it prints"
        exec("\n".join(code), namespace)
        assert str(namespace["shown"]) == last.removeprefix("# ")
    result = metric.compute(predictions=[[0.0], [1.0], [2.0], [3.0]], references=[0, 0, 1, 1])
    assert result["discrimination"] == pytest.approx(2.25)
    assert "2.25" in metric.inputs_description
