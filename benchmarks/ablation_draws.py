"""Whether a step of the gptq solver pays, over several draws of the calibration samples.

    python benchmarks/ablation_draws.py --data FOLDER [--only deit ...] [--draws 0 1 2 3] [--rows coordinate ...]

FOLDER as in ``realdata.py``. One draw moves the divergence of a quantized model by more than many a step is worth, so one
run with it and one without (``ablation.py``) cannot tell. Here both have the same samples, a random 256 of them (three
quarters, where a model has fewer), and the change counts as a ratio: its geometric mean over the draws, with the standard
error. Results go to ``benchmarks/results/ablation_draws.json`` and ``docs/ablation-draws.md``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ablation import SAMPLES, STEPS, ours
from common import ROOT, Bench, chosen, made, put, read, sources, table, write

from hf_catquant.solvers import gptq

RESULTS = ROOT / "benchmarks" / "results" / "ablation_draws.json"
PAGE = ROOT / "docs" / "ablation-draws.md"
KEY = ("model", "what", "draw")
WHOLE = "all steps"
DRAWS = range(4)
# Another value of a constant of the solver, beside the steps left out.
OTHERWISE: dict[str, dict[str, Any]] = {"damping 0.1 instead of 0.01": {"_DAMPING": 0.1}}


def main() -> None:
    """Run the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=["minilm", "kwt1", "stories"], help="parts of model names")
    parser.add_argument("--draws", nargs="+", default=list(DRAWS), type=int, help="seeds of the samples")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows")
    args = parser.parse_args()
    for case in chosen(args.only):
        bench = Bench(case, args.data)
        for draw in args.draws:
            for what in [WHOLE, *(name for name in changes() if any(part in name for part in args.rows))]:
                if not is_measured(case.model, what, draw):
                    put(RESULTS, [run(bench, what, draw)], *KEY)
                    write_page()


def changes() -> list[str]:
    """What a run may do otherwise than the solver does."""
    return [*(f"without {name}" for name in STEPS), *OTHERWISE]


def is_measured(model: str, what: str, draw: int) -> bool:
    """Whether there is a result already."""
    return any((r["model"], r["what"], r["draw"]) == (model, what, draw) for r in read(RESULTS))


def run(bench: Bench, what: str, draw: int) -> dict[str, Any]:
    """One run."""
    count = min(SAMPLES, len(bench.calibration) * 3 // 4)
    order = torch.randperm(len(bench.calibration), generator=torch.Generator().manual_seed(draw)).tolist()
    samples = [bench.calibration[at] for at in order[:count]]
    off = [name for name in STEPS if what == f"without {name}"]
    start = time.perf_counter()
    with ExitStack() as stack:
        for part, instead in OTHERWISE.get(what, {}).items():
            stack.enter_context(patch.object(gptq, part, instead))
        model = ours(bench, bench.case, samples, off, "ternary", 64, {})
    seconds = round(time.perf_counter() - start, 1)
    row = bench.evaluate(model).rows[1]
    print(f"{bench.case.model}, draw {draw}: {what}: {row.metric:.2f}, KL {row.kl:.4f}", flush=True)
    judged = {"metric": row.metric, "kl": row.kl, "agreement": row.agreement}
    return {
        "model": bench.case.model,
        "what": what,
        "draw": draw,
        "samples": count,
        **judged,
        "seconds": seconds,
        **made(),
    }


def gains(results: list[dict[str, Any]], what: str) -> list[float]:
    """Log of the divergence of ``what`` over that of all steps, by draw."""
    whole: Mapping[int, float] = {r["draw"]: r["kl"] for r in results if r["what"] == WHOLE}
    return [math.log(r["kl"] / whole[r["draw"]]) for r in results if r["what"] == what and r["draw"] in whole]


def percent(logs: list[float]) -> str:
    """The mean change in percent, with its standard error."""
    change = 100 * math.expm1(statistics.fmean(logs))
    if len(logs) < 2:
        return f"{change:+.1f}"
    return f"{change:+.1f} ± {100 * statistics.stdev(logs) / math.sqrt(len(logs)):.1f}"


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    models = list(dict.fromkeys(r["model"] for r in results))
    lines = [
        "# What a step of the solver is worth over several draws",
        "",
        "Made by `python benchmarks/ablation_draws.py --data FOLDER`: ternary in groups of 64 by gptq, without a",
        f"correction, on random {SAMPLES} calibration samples (45 texts for stories260K, 33 clips for the Keyword",
        "Transformer, which have no more). The change of the divergence from the float model on the test rows, in percent,",
        "where the solver does otherwise on the same samples: the geometric mean over the draws with its standard error.",
        "Above zero: what the solver does is better. The spread is what the draw alone moves the divergence by.",
        "",
    ]
    head = ["what, and how many draws", *(f"{model} ({draws(results, model)})" for model in models)]
    rows = [["spread of all steps, %", *(spread(results, model) for model in models)]]
    for what in (name for name in changes() if any(r["what"] == name for r in results)):
        logs = [gains([r for r in results if r["model"] == model], what) for model in models]
        rows.append([what, *(percent(each) if each else "-" for each in logs)])
    write(PAGE, [*lines, *table(head, rows), *sources(results)])


def draws(results: list[dict[str, Any]], model: str) -> int:
    """How many times the whole solver was run."""
    return sum(r["model"] == model and r["what"] == WHOLE for r in results)


def spread(results: list[dict[str, Any]], model: str) -> str:
    """Standard deviation of the log of the divergence over the draws, in percent."""
    logs = [math.log(r["kl"]) for r in results if r["model"] == model and r["what"] == WHOLE]
    return f"{100 * statistics.stdev(logs):.1f}" if len(logs) > 1 else "-"


if __name__ == "__main__":
    main()
