"""A page with plots: accuracy and size, error of every layer, and the logits before and after the correction."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from .correction import attach, corrections, detach
from .evaluation_table import Evaluation
from .report import Report

COLORS = ("#4c566a", "#d08770", "#2e8b57")


def write_page(
    folder: Path,
    title: str,
    teacher: nn.Module,
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    labels: Tensor,
    table: Evaluation,
    summary: Report,
) -> Path:
    """Write the plots as PNG files and ``report.html`` beside them; returns the page's path."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    draw_sizes(table, folder / "accuracy.png")
    draw_errors(summary, folder / "errors.png")
    draw_logits(teacher, model, batches, labels, folder / "logits.png")
    images = "".join(f'<p><img src="{name}.png" alt="{name}"></p>' for name in ("accuracy", "errors", "logits"))
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><meta charset='utf-8'><style>body{font-family:sans-serif;max-width:1000px;margin:2em auto}"
        "pre{background:#f4f4f4;padding:1em;overflow-x:auto;font-size:12px}img{max-width:100%}</style>"
        f"<title>{html.escape(title)}</title><h1>{html.escape(title)}</h1><pre>{html.escape(str(table))}</pre>{images}"
        f"<h2>Layers</h2><pre>{html.escape(str(summary))}</pre>",
        encoding="utf-8",
    )
    return page


def draw_sizes(table: Evaluation, path: Path) -> None:
    """Metric with its interval, and kilobytes, of every model of the table."""
    figure, (left, right) = _axes(2, (10, 4))
    for i, row in enumerate(table.rows):
        left.errorbar(
            i, row.metric, [[row.metric - row.low], [row.high - row.metric]], fmt="o", capsize=6, color=COLORS[i]
        )
        left.annotate(f"{row.metric:.2f}", (i, row.metric), xytext=(10, 0), textcoords="offset points", va="center")
        bar = right.bar(i, row.bytes / 1000, color=COLORS[i], width=0.6)
        right.bar_label(bar, [f"{row.bytes / 1000:.0f} kB\n{row.bits_per_parameter:.2f} bits/param"], padding=3)
    left.set_title(f"{table.metric} on {table.n} rows, 95 % interval")
    right.set_title("size of the checkpoint")
    right.margins(y=0.25)
    for axis in (left, right):
        axis.set_xticks(range(len(table.rows)), [row.name for row in table.rows])
        axis.set_xlim(-0.6, len(table.rows) - 0.3)
    left.set_ylabel(table.metric)
    right.set_ylabel("kB")
    _save(figure, path)


def draw_errors(summary: Report, path: Path) -> None:
    """Relative squared error of every layer's output, on a logarithmic axis."""
    layers = [layer for layer in summary.layers if layer.error]
    figure, (axis,) = _axes(1, (10, max(2.5, 0.26 * len(layers) + 1)))
    formats = list(dict.fromkeys(layer.weights for layer in layers))
    palette = mpl.colormaps["tab10"]
    for name in formats:
        chosen = [(i, layer.error) for i, layer in enumerate(layers) if layer.weights == name]
        axis.barh([i for i, _ in chosen], [e for _, e in chosen], color=palette(formats.index(name)), label=name)
    axis.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("relative squared error of the layer's output, on calibration data")
    axis.set_title("error of each layer")
    axis.legend()
    _save(figure, path)


@torch.no_grad()
def draw_logits(
    teacher: nn.Module, model: nn.Module, batches: Sequence[dict[str, Tensor]], labels: Tensor, path: Path
) -> None:
    """Logits of the test rows in the float model's two principal directions: float, quantized, corrected."""
    found = corrections(model)
    for name in found:
        detach(model, name)
    clouds = [("float", _logits(teacher, batches)), ("quantized", _logits(model, batches))]
    for name, correction in found.items():
        attach(model, name, correction)
    if found:
        clouds.append(("quantized + CAT", _logits(model, batches)))
    plane = PCA(n_components=2, random_state=0).fit(clouds[0][1])
    base = plane.transform(clouds[0][1])
    figure, axes = _axes(len(clouds), (5 * len(clouds), 4.6), share=True)
    for axis, (name, logits) in zip(axes, clouds, strict=True):
        points = plane.transform(logits)
        axis.scatter(points[:, 0], points[:, 1], c=labels.numpy(), cmap="tab10", s=10)
        distance = float(np.linalg.norm(logits - clouds[0][1], axis=1).mean())
        axis.set_title(name if name == "float" else f"{name}: mean distance to float {distance:.2f}")
        for label in np.unique(labels.numpy()):
            center = base[labels.numpy() == label].mean(0)
            axis.annotate(str(label), center, weight="bold", ha="center", va="center", fontsize=12)
        axis.set_xlabel("first principal direction of the float logits")
    axes[0].set_ylabel("second principal direction")
    _save(figure, path)


def _logits(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> np.ndarray:
    return torch.cat([model(**batch).logits for batch in batches]).float().numpy()


def _axes(columns: int, size: tuple[float, float], share: bool = False) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, sharex=share, sharey=share)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
