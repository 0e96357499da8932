"""The page and the plot of ``discrimination.py``, and the sizes that both speak of."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from common import ROOT
from scipy.stats import rankdata

sys.path.insert(0, str(ROOT / "examples"))
import discrimination_study

PAGE, PLOT = ROOT / "docs" / "discrimination-results.md", ROOT / "docs" / "discrimination.png"
BATCH = 10_000
EMBEDDINGS, WIDTH, REPEATS, NEIGHBORS = 1_000_000, 384, 5, 10


def write_page(results: dict[str, Any]) -> None:
    """Draw up the page and the plot of all ``results``, by part."""
    studies = [value for key, value in results.items() if key.startswith("claims: ")]
    lines = [
        "# Feature discrimination: measurements",
        "",
        "Made by `python benchmarks/discrimination.py --data FOLDER`; what they mean is in",
        "[discrimination.md](discrimination.md).",
        "",
        "D: mean over pairs of classes and 5 folds (seed 0), of the rows of each fold; means, deviations and thresholds",
        "were learned from the other folds. In brackets: folds in which it is above that of float. D in sample: of all",
        "rows, after learning from the same rows: a threshold that is chosen for D, above all one for each feature,",
        "promises too much there. -: measured in sample only; the plot has that D there. Accuracy: percent, of the same",
        "folds; in brackets points over float with the paired 95 % interval. Linear SVM: C = 0.1, one class against",
        "another. Codes have many neighbours at equal distances, of which scikit-learn takes some: 5-NN of codes moves",
        "by tenths of a point with the number of threads.",
        "",
        "![D and accuracy against the threshold, and accuracy against D](discrimination.png)",
    ]
    for study in studies:
        lines += [
            "",
            f"## {study['data']}",
            "",
            f"{study['n']} rows, {study['features']} features, {study['classes']} classes.",
        ]
        lines += ["", "| features | D | D in sample | 5-NN | linear SVM |", "|---|---|---|---|---|"]
        for line in study["lines"]:
            cells = [
                f"{line[c]:.2f} ({line[f'{c}_gain'][0]:+.2f} ± {line[f'{c}_gain'][1]:.2f})" for c in ("knn", "svm")
            ]
            d = f"- | {line['discrimination']:.4f}"  # of before D was measured on other rows
            if "above" in line:
                d = f"{line['discrimination']:.4f} ({line['above']}/{study['folds']}) | {line['in_sample']:.4f}"
            lines.append(f"| {line['variant']} | {d} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        *claims_table(studies),
        "",
        *model_table(studies),
        "",
        *search_table(results),
        "",
        *scale_table(results),
    ]
    runs = [*results.values(), *(study["discrimination"] for study in studies if "discrimination" in study)]
    made = sorted({(value["date"], value["machine"]) for value in runs})
    lines += [text for pair in made for text in ("", f"{pair[0]}: {pair[1]}.")]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    discrimination_study.draw(studies, PLOT)


def claims_table(studies: list[dict[str, Any]]) -> list[str]:
    """What quantizing does to D, with a threshold for all features and with one for each; does accuracy follow D."""
    lines = [
        "## D of the best quantizers, and whether accuracy follows it",
        "",
        "D of rows that were not learned from, in brackets folds above float, with thresholds chosen for D: one for all",
        "features (ternary), one for each (binary, ternary). Rank correlation (Spearman): of D and accuracy, over the ten",
        "quantizers.",
        "",
        "| data | float | ternary, shared | binary, per feature | ternary, per feature | with 5-NN | with SVM |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = ("ternary, discrimination, shared", "binary, discrimination", "ternary, discrimination, per feature")
    for study in studies:
        rows = {line["variant"]: line for line in study["lines"]}
        if "above" not in rows["float"]:
            lines.append(f"| {study['data']} | measured in sample only |" + " |" * 5)
            continue
        cells = [f"{rows['float']['discrimination']:.4f}"]
        cells += [f"{rows[v]['discrimination']:.4f} ({rows[v]['above']}/{study['folds']})" for v in chosen]
        codes = [line for name, line in rows.items() if name != "float"]
        ranks = [rankdata([line[key] for line in codes]) for key in ("discrimination", "knn", "svm")]
        cells += [f"{np.corrcoef(ranks[0], rank)[0, 1]:+.2f}" for rank in ranks[1:]]
        lines.append(f"| {study['data']} | {' | '.join(cells)} |")
    return lines


def model_table(studies: list[dict[str, Any]]) -> list[str]:
    """Which features gain, by the model and in fact."""
    lines = [
        "## Single features of two classes: the model and the measurement",
        "",
        "Shares of features, in percent, over pairs of classes (100 at most), whose D quantizing raises: predicted from",
        "mu alone, measured, and the share of features on which both say the same. Binary at 0, ternary at the best tau of",
        "the model.",
        "",
        "| data | median mu | binary predicted | measured | same | ternary predicted | measured | same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        model = study["model"]
        keys = [f"{kind}_{what}" for kind in ("binary", "ternary") for what in ("predicted", "measured", "right")]
        cells = [f"{100 * model[key]:.1f}" for key in keys]
        lines.append(f"| {study['data']} | {model['mu']:.3f} | " + " | ".join(cells) + " |")
    return lines


def speed_table(found: dict[str, Any]) -> list[str]:
    """Times of packed dot products beside the fastest of the float ones."""
    times = {int(key): value for key, value in found.items() if key.isdigit()}
    packed = [name for name in times[1] if name.startswith(("binary", "ternary"))]
    with_what = f"{found['threads']} threads, {found['CPU']}; bits by the kernels of `{found['kernels']}`"
    lines = [
        "## Packed dot products",
        "",
        f"{EMBEDDINGS:,} embeddings of {WIDTH} features, milliseconds a query, fastest of {REPEATS} runs taken in turns.",
        f"All with {with_what}. float32: the fastest of torch in either order and numpy ({found['BLAS']}). All",
        "write into memory that is there already. best: the search, which keeps the nearest only.",
        "",
        "| queries at once | float32 | " + " | ".join(packed) + " |",
        "|---" * (len(packed) + 2) + "|",
    ]
    for count, row in times.items():
        name = min((n for n in row if n not in packed), key=row.__getitem__)
        cells = [f"{row[key]:.3f} ({row[name] / row[key]:.1f} x)" for key in packed]
        lines.append(f"| {count} | {row[name]:.2f} ({name}) | " + " | ".join(cells) + " |")
    return lines


def search_table(results: dict[str, Any]) -> list[str]:
    """Times and recall."""
    lines = []
    if "threads" in results.get("speed", {}):
        lines += speed_table(results["speed"])
    if "recall" in results:
        found = {key: value for key, value in results["recall"].items() if key not in ("date", "machine")}
        sizes = f"{found.pop('sentences')} sentences, {found.pop('queries')} queries"
        lines += ["", f"Recall@{NEIGHBORS} among {sizes}; MiniLM, which was fine-tuned on sentiment.", ""]
        lines += ["| codes | recall |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in found.items())]
    return lines


def scale_table(results: dict[str, Any]) -> list[str]:
    """Time and memory."""
    if "scale" not in results:
        return []
    found = results["scale"]
    shape = f"{found['n']:,} x {found['num_features']} float32 features of {found['num_classes']} classes"
    time_taken = f"{found['seconds']:.1f} s, of which {found['of which making rows']:.1f} s make the rows"
    time_taken += f" ({found['CPU seconds']:.1f} s of processor time, one thread)"
    memory = f"{found['peak GB']:.2f} GB at the peak, libraries included"
    return ["## Many rows", "", f"{shape}, in batches of {BATCH:,}: {time_taken}; {memory}. {found.get('CPU', '')}."]
