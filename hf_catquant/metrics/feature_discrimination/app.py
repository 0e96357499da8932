"""The metric's Space: discrimination of a data set or a CSV file in the browser, float, binary and ternary.

python app.py        # needs what requirements.txt lists
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn import datasets

HERE = Path(__file__).resolve().parent
METRIC = evaluate.load(str(HERE / "feature_discrimination.py"))
DATA = {
    "digits (1,797 x 64, 10 classes)": datasets.load_digits,
    "wine (178 x 13, 3 classes)": datasets.load_wine,
    "breast cancer (569 x 30, 2 classes)": datasets.load_breast_cancer,
    "iris (150 x 4, 3 classes)": datasets.load_iris,
}
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_VALUES = 5_000_000  # rows times columns of a file
RESAMPLES = 200
LEAST = 3  # samples of a class that accuracy needs
COLORS = {"float": "#4c566a", "binary": "#d08770", "ternary": "#2e8b57"}
INTRODUCTION = """
# Feature discrimination
How far apart are the classes in these features, and what is left in 1 or 1.6 bits a feature? D is the mean squared distance
between samples of two classes over that between samples of one, of standardised features; 0.5 means that the classes are not
apart ([arXiv 2504.13792](https://arxiv.org/abs/2504.13792)). Quantizing can raise it; a higher D is not always a higher
accuracy.
"""


def measure(
    name: str, file: str | None, label: str, eta: float, accuracy: bool
) -> tuple[pd.DataFrame, Figure, Figure]:
    """What the page shows.

    Args:
        name: of a data set in ``DATA``, used where there is no file.
        file: path of a CSV file with a header, or None.
        label: its column of classes; empty: the last one.
        eta: ternary threshold in mean magnitudes.
        accuracy: whether classifiers are trained too.

    Returns:
        The table, D of every pair of classes, D against the ternary threshold.
    """
    try:
        x, y = read(file, label) if file else DATA[name](return_X_y=True)
        options: dict[str, Any] = {"accuracy": ("knn", "linear")} if accuracy and enough(y) else {}
        found = compute(x, y, eta=eta, pairs=True, bootstrap=RESAMPLES, **options)
        sweep = {value: compute(x, y, eta=value) for value in ETAS}
    except (ValueError, OSError) as error:
        raise gr.Error(str(error)) from error
    return table(found), draw_pairs(found), draw_sweep(sweep, eta, found)


def enough(y: Any) -> bool:
    """Whether every class has the samples that accuracy needs; if not, the page says so and shows the rest."""
    classes, counts = np.unique(y, return_counts=True)
    least = int(counts.argmin())
    if counts[least] < LEAST:
        gr.Warning(f"no accuracy: it needs {LEAST} samples of every class, class {classes[least]} has {counts[least]}")
    return bool(counts[least] >= LEAST)


def compute(x: Any, y: Any, **options: Any) -> dict[str, Any]:
    """The metric on features and classes."""
    return METRIC.compute(predictions=x, references=y, **options)


def read(file: str, label: str) -> tuple[np.ndarray, list[Any]]:
    """Features (n, d) and classes (n,) of a CSV file.

    Raises:
        ValueError: there is no such column, a feature is not a number, or the file is too large.
    """
    rows = pd.read_csv(file)
    if rows.empty:
        raise ValueError("the file has no rows below its header")
    label = label.strip() or str(rows.columns[-1])
    if label not in rows.columns:
        raise ValueError(f"there is no column {label!r}; the file has {', '.join(map(str, rows.columns))}")
    features = rows.drop(columns=label)
    if features.size > MOST_VALUES:
        raise ValueError(
            f"the file has {features.size:,} values, this page takes {MOST_VALUES:,}: use the metric itself"
        )
    text = [str(column) for column in features if not pd.api.types.is_numeric_dtype(features[column])]
    if text:
        raise ValueError(f"the column {text[0]!r} is not of numbers; drop it, or name it as the column of classes")
    classes = rows[label]
    if classes.isna().any():
        raise ValueError(
            f"the column of classes {label!r} is empty in row {int(classes.isna().to_numpy().argmax())}: fill it in or drop "
            "the row"
        )
    if not pd.api.types.is_integer_dtype(classes):
        classes = classes.astype(str)
    return features.to_numpy(np.float64), classes.tolist()


def table(found: dict[str, Any]) -> pd.DataFrame:
    """A row each for float, binary and ternary features."""
    rows = []
    for name, key in (("float", "discrimination"), ("binary", "binary"), ("ternary", "ternary")):
        suffix = "" if name == "float" else f"_{name}"
        row = {
            "features": name,
            "D": round(found[key], 4),
            "95 % interval": f"{found[f'{key}_low']:.4f} to {found[f'{key}_high']:.4f}",
            "over float": 1.0 if name == "float" else round(found[f"{name}_ratio"], 4),
            "threshold": "" if name == "float" else f"{found[f'{name}_threshold']:.4f}",
        }
        for classifier, title in (("knn", "5-NN"), ("linear", "linear SVM")):
            if f"{classifier}_accuracy" in found:
                row[title] = round(found[f"{classifier}_accuracy{suffix}"], 4)
        rows.append(row)
    return pd.DataFrame(rows)


def draw_pairs(found: dict[str, Any]) -> Figure:
    """D of every pair of classes, float and ternary side by side."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    classes = [str(label) for label in found["classes"]]
    matrices = [np.array(found[key]) for key in ("pairs", "ternary_pairs")]
    finite = np.concatenate([m[np.isfinite(m)] for m in matrices])
    for axis, matrix, title in zip(figure.subplots(1, 2), matrices, ("float", "ternary"), strict=True):
        image = axis.imshow(matrix, vmin=0.5, vmax=finite.max(), cmap="viridis")
        axis.set_title(f"D of pairs of classes, {title}")
        if len(classes) <= 30:
            axis.set_xticks(range(len(classes)), classes, rotation=60)
            axis.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, ax=figure.axes)
    return figure


def draw_sweep(sweep: dict[float, dict[str, Any]], eta: float, found: dict[str, Any]) -> Figure:
    """D of ternary features against eta, with float and binary for comparison."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(found["discrimination"], color=COLORS["float"], label="float")
    axis.axhline(found["binary"], color=COLORS["binary"], linestyle="--", label="binary")
    axis.plot(list(sweep), [row["ternary"] for row in sweep.values()], "o-", color=COLORS["ternary"], label="ternary")
    axis.axvline(eta, color="0.8", zorder=0)
    axis.set(xlabel="eta: ternary threshold in mean magnitudes", ylabel="discrimination D")
    axis.legend()
    return figure


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Feature discrimination") as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                name = gr.Dropdown(list(DATA), value=next(iter(DATA)), label="data set")
                file = gr.File(label="or a CSV file with a header", file_types=[".csv"], type="filepath")
                label = gr.Textbox(label="its column of classes (empty: the last)")
                eta = gr.Slider(0.0, 2.0, value=0.75, step=0.05, label="eta")
                accuracy = gr.Checkbox(value=True, label="accuracy of 5-NN and of a linear SVM (5-fold)")
                button = gr.Button("Measure", variant="primary")
            with gr.Column(scale=2):
                result = gr.Dataframe(label="discrimination", interactive=False)
                sweep = gr.Plot(label="threshold")
        pairs = gr.Plot(label="pairs of classes")
        button.click(measure, [name, file, label, eta, accuracy], [result, pairs, sweep], api_name="measure")
    return page


if __name__ == "__main__":
    build().launch()
