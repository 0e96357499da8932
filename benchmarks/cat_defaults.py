"""The fields of CatConfig beside their defaults: what corrections at the logits do with each of them changed.

    python benchmarks/cards.py --data FOLDER --work WORK              # the checkpoints
    python benchmarks/cat_defaults.py --data FOLDER --work WORK [--only deit ...]

FOLDER as in ``realdata.py``, WORK as in ``cards.py``: classifiers in ternary, groups of 64. Every variant is fitted on the
logits of the first n calibration rows and judged on all test rows that there are. Results go to
``benchmarks/results/cat_defaults.json`` and ``docs/cat-defaults.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cat_curves import gain, logits, right
from common import ROOT, Bench, Case, chosen, made, put, read, sources, table, write
from torch import Tensor

from hf_catquant import CatConfig
from hf_catquant.cluster_fit import fit
from hf_catquant.correction import corrections, detach
from hf_catquant.fitting import SHARE
from hf_catquant.held_out import losses
from hf_catquant.packed_model import parameter_count
from hf_catquant.tasks import labels_of, load_quantized, read_rows

RESULTS = ROOT / "benchmarks" / "results" / "cat_defaults.json"
PAGE = ROOT / "docs" / "cat-defaults.md"
SIZES = (128, 256, 512)
DEFAULT = "default"
VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "num_clusters=1": {"num_clusters": 1},
    "num_clusters=64": {"num_clusters": 64},
    "projection=16": {"projection": 16},
    "projection=None": {"projection": None},
    "alpha=0.4": {"alpha": 0.4},
    "alpha=1.0": {"alpha": 1.0},
    'gamma="ls"': {"gamma": "ls"},
    'gamma="auto"': {"gamma": "auto"},
    "shrinkage=0": {"shrinkage": 0.0},
    "shrinkage=8": {"shrinkage": 8.0},
    "shrinkage=128": {"shrinkage": 128.0},
}


def main() -> None:
    """Run the classifiers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--work", required=True, type=Path, help="folder with the checkpoints of cards.py")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    args = parser.parse_args()
    for case in chosen(args.only):
        bench = Bench(case, args.data)
        if bench.labels is not None:
            put(RESULTS, run(bench, args.data, args.work), "model", "variant", "rows")
            write_page()


@torch.no_grad()
def run(bench: Bench, data: Path, work: Path) -> list[dict[str, Any]]:
    """All variants at all sizes, for one model."""
    case = bench.case
    model = load_quantized(str(work / f"{case.model}-ternary"), bench.trust).eval()
    for name in corrections(model):
        detach(model, name)
    batches, wanted = tests(bench, case, data)
    (f_fit, q_fit), (f_test, q_test) = (
        [logits(m, rows) for m in (bench.teacher, model)] for rows in (bench.collected(bench.calibration), batches)
    )
    before, kl = right(q_test, wanted, case), losses(q_test, f_test, "classes")
    found = []
    for size in sorted({min(size, len(q_fit)) for size in SIZES}):
        for variant, fields in VARIANTS.items():
            most = parameter_count(bench.teacher) // SHARE
            result = fit(q_fit[:size], f_fit[:size], CatConfig(**fields), "classes", most)
            after = q_test if result.correction is None else result.correction(q_test)
            divergence = {"kl": float(kl.mean()), "kl_after": float(losses(after, f_test, "classes").mean())}
            what = {"model": case.model, "variant": variant, "rows": size, "clusters": result.clusters}
            found.append({**what, **gain(before, right(after, wanted, case)), **divergence, **made()})
        print(f"{case.model}: {size} rows", flush=True)
    return found


def tests(bench: Bench, case: Case, data: Path) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Batches of all test rows, and their labels (n,) int64."""
    batches, labels = list(bench.batches), list(bench.labels or ())
    if case.second:
        rows = read_rows(str(data / "data" / case.second), case.column)
        batches += bench.collected(bench.samples(rows))
        labels += labels_of(rows, "label", bench.teacher)
    return batches, torch.tensor(labels)


def write_page() -> None:
    """Draw up the page: a line for every variant, over all models and sizes."""
    results = read(RESULTS)
    models, rows = sorted({r["model"] for r in results}), []
    for variant in VARIANTS:
        mine = [r for r in results if r["variant"] == variant]
        gains, falls = [r["gain"] for r in mine], [100 * (1 - r["kl_after"] / r["kl"]) for r in mine]
        on, worse = sum(r["clusters"] > 0 for r in mine), sum(r["high"] < 0 for r in mine)
        summary = [
            f"{fmean(gains):+.2f}",
            f"{min(gains):+.2f}",
            worse,
            f"{fmean(falls):+.1f} %",
            f"{min(falls):+.1f} %",
        ]
        rows.append([f"`{variant}`" if variant != DEFAULT else variant, f"{on} of {len(mine)}", *summary])
    head = ("CatConfig", "on", "mean gain", "least gain", "significantly worse", "KL falls by", "least")
    lines = [
        "# The defaults of the correction",
        "",
        "Made by `python benchmarks/cat_defaults.py --data FOLDER --work WORK`: one field of `CatConfig` changed at a time,",
        "corrections at the logits of ternary classifiers (gptq, groups of 64), each fitted on the first 128, 256 and 512",
        "calibration rows, where there are as many. Gains are points of accuracy on all test rows that there are (both sets",
        "of images), with the lowest of any model and size; significantly worse: whole 95 % interval below zero. Seed 0.",
        "",
        *table(head, rows),
        "",
        f"Models: {', '.join(models)}.",
    ]
    write(PAGE, [*lines, *sources(results)])


if __name__ == "__main__":
    main()
