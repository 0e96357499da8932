"""What binary and ternary quantization does to features: discrimination, and accuracy of simple classifiers.

Shared by ``discrimination_text.py``, ``discrimination_speech.py`` and ``discrimination_vision.py``. Thresholds, means and
deviations come from training folds; discrimination and accuracies are of rows that were not in them, and accuracies are
compared row by row. A threshold that is chosen for D fits the noise of the rows that it is chosen on, one of each feature
much more than one of all: D of these rows is given beside, as what it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from hf_catquant import BinaryQuantizer, TernaryQuantizer
from hf_catquant.metrics.feature_discrimination.moments import Moments, pairwise
from hf_catquant.theory import predict

ETAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
VARIANTS: dict[str, Any] = {
    "float": StandardScaler(),
    "binary, 0": BinaryQuantizer(),
    "binary, discrimination": BinaryQuantizer("discrimination", per_feature=True),
    **{f"ternary, eta {eta:g}": TernaryQuantizer(eta=eta) for eta in ETAS},
    "ternary, discrimination, shared": TernaryQuantizer("discrimination"),
    "ternary, discrimination, per feature": TernaryQuantizer("discrimination", per_feature=True),
}
FOLDS = 5  # or as many as leave two rows of every class to each, of which D needs two
LEAST = 4  # rows of a class: two folds of two
PAIRS = 100  # of classes at most, for what the model predicts


@dataclass(frozen=True)
class Line:
    """One way to represent the features.

    Attributes:
        variant: its name.
        discrimination: mean D over pairs of classes, of rows that means, deviations and thresholds were not learned from:
            mean over the folds.
        above: folds in which it is above that of float.
        in_sample: the same D of all rows, everything learned from these rows.
        knn, svm: accuracy in percent, cross-validated.
        knn_gain, svm_gain: points over float, and half the width of the paired 95 % interval.
    """

    variant: str
    discrimination: float
    above: int
    in_sample: float
    knn: float
    svm: float
    knn_gain: tuple[float, float]
    svm_gain: tuple[float, float]


def study(name: str, x: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Discrimination and accuracy of every variant, and what the two-Gaussian model says of the features.

    Args:
        name: of the data.
        x: (n, d) features.
        y: (n,) classes of four rows or more.
        seed: of the folds.
    """
    kept, found = folds(name, x, y, seed), discriminations(name, x, y, seed)
    right = {variant: np.zeros((2, len(x)), bool) for variant in VARIANTS}
    for train, test in kept:
        for variant, quantizer in VARIANTS.items():
            seen = quantizer.fit(x[train], y[train]).transform(x[train])
            asked = quantizer.transform(x[test])
            for i, model in enumerate((KNeighborsClassifier(5), SVC(kernel="linear", C=0.1))):
                right[variant][i, test] = model.fit(seen, y[train]).predict(asked) == y[test]
    lines = []
    for variant, hits in right.items():
        gains = [_gain(hits[i], right["float"][i]) for i in (0, 1)]
        lines.append(
            Line(
                variant,
                **found[variant],
                knn=100 * hits[0].mean(),
                svm=100 * hits[1].mean(),
                knn_gain=gains[0],
                svm_gain=gains[1],
            )
        )
    shape = {"n": len(x), "features": x.shape[1], "classes": len(np.unique(y)), "folds": len(kept)}
    return {"data": name, **shape, "lines": [asdict(line) for line in lines], "model": _by_model(x, y)}


def folds(name: str, x: np.ndarray, y: np.ndarray, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numbers of training and test rows, fold by fold."""
    least = int(np.unique(y, return_counts=True)[1].min())
    if least < LEAST:
        raise SystemExit(f"{name}: every class needs {LEAST} rows, one has {least}: take more of them (--rows)")
    return list(StratifiedKFold(min(FOLDS, least // 2), shuffle=True, random_state=seed).split(x, y))


def discriminations(name: str, x: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, dict[str, Any]]:
    """D of every variant on rows that were not learned from and on those that were; arguments as of :func:`study`."""
    whole = np.arange(len(x))
    splits = [*folds(name, x, y, seed), (whole, whole)]
    values: dict[str, np.ndarray] = {}
    for variant, quantizer in VARIANTS.items():
        codes = ((quantizer.fit(x[train], y[train]).transform(x[test]), y[test]) for train, test in splits)
        values[variant] = np.array([_discrimination(*pair) for pair in codes])
    return {
        variant: {
            "discrimination": float(found[:-1].mean()),
            "above": int((found > values["float"])[:-1].sum()),
            "in_sample": float(found[-1]),
        }
        for variant, found in values.items()
    }


def show(result: dict[str, Any]) -> None:
    """Print the table of a study."""
    print(f"\n{result['data']}: {result['n']} rows, {result['features']} features, {result['classes']} classes")
    print("D: of rows that were not learned from (folds above float); in sample: of all rows, learned from them")
    print(f"{'':38}{'D':>14}{'in sample':>11}  {'5-NN %':>22}  {'linear SVM %':>22}")
    for line in result["lines"]:
        cells = [f"{line[c]:6.2f} ({line[f'{c}_gain'][0]:+.2f} +- {line[f'{c}_gain'][1]:.2f})" for c in ("knn", "svm")]
        d = f"{line['discrimination']:.4f} ({line['above']}/{result['folds']})"
        print(f"{line['variant']:38}{d:>14}{line['in_sample']:11.4f}  {cells[0]:>22}  {cells[1]:>22}")
    print("features that gain, predicted / measured / same answer:", end=" ")
    shares = result["model"]
    for kind in ("binary", "ternary"):
        cells = [f"{100 * shares[f'{kind}_{what}']:.1f} %" for what in ("predicted", "measured", "right")]
        print(f"{kind} {' / '.join(cells)}", end="; " if kind == "binary" else "\n")


COLORS = {"float": "#4c566a", "binary": "#d08770", "ternary": "#2e8b57"}
TITLES = {"discrimination": "D", "knn": "5-NN accuracy, %", "svm": "linear SVM accuracy, %"}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot discrimination and accuracy against the threshold, and accuracy against discrimination; a row a data set."""
    figure, axes = plt.subplots(len(results), 4, figsize=(16, 3.4 * len(results)), layout="constrained", squeeze=False)
    for row, result in zip(axes, results, strict=True):
        lines = {line["variant"]: line for line in result["lines"]}
        sweep = [lines[f"ternary, eta {eta:g}"] for eta in ETAS]
        for axis, key in zip(row, TITLES, strict=False):
            axis.axhline(lines["float"][key], color=COLORS["float"], label="float")
            axis.axhline(lines["binary, 0"][key], color=COLORS["binary"], linestyle="--", label="binary, threshold 0")
            axis.plot(
                ETAS, [line[key] for line in sweep], "o-", color=COLORS["ternary"], label="ternary, threshold eta"
            )
            axis.set(xlabel="eta, in mean magnitudes", title=f"{result['data']}\n{TITLES[key]}")
        for line in result["lines"]:
            color = COLORS[line["variant"].split(",")[0]]
            row[3].plot(line["discrimination"], line["knn"], "o", color=color, fillstyle="none")
            row[3].plot(line["discrimination"], line["svm"], "x", color=color)
        row[3].set(xlabel="D", title=f"{result['data']}\naccuracy, %, against D")
    handles, names = axes[0, 0].get_legend_handles_labels()
    handles += [Line2D([], [], color="black", linestyle="", marker=marker, fillstyle="none") for marker in "ox"]
    names += ["5-NN, against D", "linear SVM, against D"]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def arguments(doc: str | None) -> argparse.Namespace:
    """What the examples take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and data/; without it, scikit-learn's digits")
    parser.add_argument(
        "--rows", type=int, help="at most so many rows of each data set, drawn with seed 0; without it, all"
    )
    parser.add_argument("--plot", type=Path, default=Path("discrimination.png"), help="file to draw to")
    return parser.parse_args()


def drawn(classes: Any, limit: int | None) -> np.ndarray:
    """Numbers of ``limit`` rows, or of all, of as many as can be of every class: files are often sorted by class."""
    y = np.asarray(classes)
    order = np.random.default_rng(0).permutation(len(y))
    turn = np.empty(len(y), int)  # first a row of every class, then a second, ...
    for label in np.unique(y):
        members = order[y[order] == label]
        turn[members] = np.arange(len(members))
    return np.sort(np.argsort(turn, kind="stable")[:limit])


def digits(rows: int | None = None) -> tuple[str, np.ndarray, np.ndarray]:
    """Scanned digits, which come with scikit-learn."""
    x, y = load_digits(return_X_y=True)
    kept = drawn(y, rows)
    return ("digits, pixels", x[kept], y[kept])


def run(cases: Iterable[tuple[str, np.ndarray, np.ndarray]], plot: Path) -> None:
    """Study, print and draw."""
    results = [study(*case) for case in cases]
    for result in results:
        show(result)
    draw(results, plot)
    print(f"drawn to {plot}")


def _gain(hits: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    difference = 100 * (hits.astype(float) - base)
    return float(difference.mean()), float(1.96 * difference.std(ddof=1) / len(hits) ** 0.5)


def _discrimination(x: np.ndarray, y: np.ndarray) -> float:
    """Mean D over pairs of classes of rows (n, d) as they are: codes, or what was standardised before."""
    moments = [Moments() for _ in np.unique(y)]
    for part, label in zip(moments, np.unique(y), strict=True):
        part.add(x[y == label].astype(np.float64))
    return float(pairwise(moments).mean())


def _by_model(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Shares of features, over pairs of classes, that the model says will gain, and that do."""
    pairs = list(combinations(np.unique(y), 2))
    chosen = np.random.default_rng(0).permutation(len(pairs))[:PAIRS]
    found = []
    for a, b in (pairs[i] for i in chosen):
        rows = (y == a) | (y == b)
        prediction = predict(x[rows], y[rows])
        found.append({**prediction.agreement(), "mu": float(np.median(prediction.mu))})
    return {key: float(np.mean([line[key] for line in found])) for key in found[0]}
