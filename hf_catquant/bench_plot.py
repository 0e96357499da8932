"""The plot of ``catquant bench``: how many times as fast as torch's float32 product each contender is, by rows of x."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from .bench import Row


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel for every shape and number of threads, written to ``path``."""
    mpl.use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    panels = sorted({(row.case.rows, row.case.columns, row.case.threads) for row in rows})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 5), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        inside = [row for row in rows if (row.case.rows, row.case.columns, row.case.threads) == panel]
        for name in dict.fromkeys(row.contender for row in inside):
            line = sorted((row.case.count, row.ratio) for row in inside if row.contender == name)
            style = "--" if name.startswith(("torch", "llama.cpp")) else "-"
            axis.plot(*zip(*line, strict=True), style, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="rows of x", title="{} x {}, {} threads".format(*panel))
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("times as fast as torch float32")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
