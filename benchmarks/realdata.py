"""Quantize the six real models of the data folder and evaluate them on rows never used for calibration.

    python benchmarks/realdata.py --data FOLDER [--weights ternary int4] [--group-size 128] [--only resnet ...]
                                  [--solver reconstruct] [--solver-options model_steps=800] [--activations int4]
                                  [--generate 340] [--low-rank 8] [--average-bits 2.5] [--rotation none] [--first]

Memory is the peak of the whole process, so it is that of a case only where one case is run.

FOLDER holds ``models/`` and ``data/`` (CONTRIBUTING.md says what is in them). Each case goes through the command line that
users have: ``catquant quantize`` and ``catquant eval``. Results are added to ``benchmarks/results/realdata.json`` case by
case and drawn up in ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import CASES, ROOT, Case, chosen, made, put, read, sources, span, table, weight_bits, write

from hf_catquant import memory
from hf_catquant.cli import main as catquant

RESULTS = ROOT / "benchmarks" / "results" / "realdata.json"
PAGE = ROOT / "docs" / "results.md"

# What tells a case from another.
KEY = ("model", "weights", "activations", "group_size", "solver")
HEAD = (
    "model",
    "weights",
    "bits",
    "activations",
    "solver",
    "n",
    "float",
    "quantized",
    "quantized + CAT",
    "gain of CAT",
    "agreement %",
    "lost / won",
    "KL",
    "D float / quantized",
    "bits/param",
    "coverage %",
    "MB",
    "s",
    "peak GB",
)


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--weights", nargs="+", default=["ternary", "int4"], help="formats")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--activations", default="none")
    parser.add_argument(
        "--generate", type=int, default=0, help="texts that the language model adds to its calibration"
    )
    parser.add_argument("--solver-options", nargs="*", default=[])
    parser.add_argument("--low-rank", default="0")
    parser.add_argument("--average-bits")
    parser.add_argument("--rotation", default="auto")
    parser.add_argument("--first", action="store_true", help="judge by the first set of test rows only")
    args = parser.parse_args()
    how = ["--group-size", args.group_size, "--solver", args.solver, "--activations", args.activations]
    how += ["--generate", str(args.generate)] if args.generate else []
    how += ["--solver-options", *args.solver_options] if args.solver_options else []
    how += ["--low-rank", args.low_rank] if args.low_rank != "0" else []
    how += ["--average-bits", args.average_bits] if args.average_bits else []
    how += ["--rotation", args.rotation] if args.rotation != "auto" else []
    more = {"own texts": args.generate, "rank": int(args.low_rank), "bits on average": args.average_bits}
    rotation = [f"rotation {args.rotation}"] if args.rotation != "auto" else []
    texts = [f"{n} {name}" for name, n in more.items() if n]
    label = ", ".join([args.solver, *rotation, *args.solver_options, *texts])
    for case in chosen(args.only):
        for weights in args.weights:
            asked = {"solver": label, "activations": args.activations, "group_size": int(args.group_size)}
            judged = replace(case, second=None) if args.first else case
            put(RESULTS, [{**asked, **run(judged, weights, how, args.data)}], *KEY)
            write_page()


def run(case: Case, weights: str, how: list[str], data: Path) -> dict:
    """Quantize and evaluate one case, ``how`` being more options of ``catquant quantize``; what the page says about it."""
    model = str(data / "models" / case.model)
    column = () if case.column is None else ("--column", case.column)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        quantize = ["quantize", model, folder, "--weights", weights, *how]
        quantize += ["--dataset", str(data / "data" / case.calibration), "--num-samples", str(case.samples), *column]
        learns = (
            "reconstruct" in how
        )  # few samples make enough steps, and leave some to judge by, in small batches only
        quantize += ["--batch-size", str(case.batch_size if learns else 16)]
        check(catquant([*quantize, *case.options]), quantize)
        seconds = time.perf_counter() - start
        peak = memory.peak()
        report = json.loads((Path(folder) / "report.json").read_text())
        result = evaluated(case, folder, model, data / "data" / case.test)
        second = {} if case.second is None else {"second": evaluated(case, folder, model, data / "data" / case.second)}
    kept = ("coverage", "bits_per_parameter", "bytes_before", "bytes_after", "corrections")
    return {
        "model": case.model,
        "weights": weights,
        "options": how,
        "calibration": case.calibration,
        "test": case.test,
        "samples": case.samples,
        "seed": 0,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "weight_bits": weight_bits(report),
        "evaluation": result,
        **second,
        "report": {name: report[name] for name in kept},
        **made(),
    }


def evaluated(case: Case, folder: str, model: str, rows: Path) -> dict:
    """The table of the float and the quantized model on the test rows of a file."""
    table = Path(folder) / "table.json"
    command = ["eval", folder, "--float", model, "--dataset", str(rows), "--json", str(table)]
    command += [*([] if case.column is None else ["--column", case.column]), *case.options, *case.eval_options]
    check(catquant(command), command)
    return json.loads(table.read_text())


def check(status: int, command: list[str]) -> None:
    """Stop at the first command that fails."""
    if status:
        raise SystemExit(f"failed: catquant {' '.join(command)}")


def write_page() -> None:
    """Draw up ``docs/results.md``."""
    order = {case.model: i for i, case in enumerate(CASES)}
    results = sorted(read(RESULTS), key=lambda r: (order[r["model"]], *(r[name] for name in KEY[1:])))
    lines = [
        "# Results on real models and data",
        "",
        "Made by `python benchmarks/realdata.py --data FOLDER`; the numbers with everything else are in",
        "`benchmarks/results/realdata.json`. Seed 0; layers outside the repeated blocks are int8, bits are those of a",
        "weight inside them, with scales and offsets. Accuracy in percent, perplexity for stories260K, on n rows",
        "(documents); 95 % intervals. The gain of CAT is paired on the",
        "same test rows; lost / won are rows that float has right and the last model wrong, and the reverse. Seconds are",
        "those of the whole command on a machine that did other work beside it. Rows are of several days, which",
        "`realdata.json` has; measured again, with other code or threads, a row with the fewest bits has moved by up to 3",
        "points (ResNet-18, int2 weights and inputs: 56.71 here, 59.57 in `cat.md`), DeiT-Tiny in ternary by 2.6, others by",
        "a point. Until 2026-11-27 `reconstruct` kept its last batches from learning, since then a share of every batch.",
        "",
        *table(HEAD, map(cells, results)),
        *all_images(results),
        "",
        "Top-1 of ResNet-18 with 2-bit weights and inputs against the time it took, by gptq alone and with the steps that",
        "`reconstruct` then learns for each block and for the model (`python benchmarks/accuracy.py` draws it):",
        "",
        "![accuracy against time](w2a2.png)",
        *sources(results),
    ]
    write(PAGE, lines)


def all_images(results: list[dict]) -> list[str]:
    """What is lost on both sets of test images together, where the second was looked at."""
    rows = []
    for result in (r for r in results if "second" in r):
        counts = [
            (e["n"], e["rows"][-1]["lost"], e["rows"][-1]["won"]) for e in (result["evaluation"], result["second"])
        ]
        n, lost, won = (sum(column) for column in zip(*counts, strict=True))
        change = (won - lost) / n
        half = 1.96 * ((won + lost) / n - change**2) ** 0.5 / n**0.5
        interval = f"{100 * change:+.2f} [{100 * (change - half):+.2f}, {100 * (change + half):+.2f}]"
        how = [
            f"{result['weights']}, group {result['group_size']}",
            f"{result['weight_bits']:.2f}",
            result["activations"],
        ]
        tops = [
            f"{e['rows'][0]['metric']:.2f} / {e['rows'][-1]['metric']:.2f}"
            for e in (result["evaluation"], result["second"])
        ]
        gains = " / ".join(gain(e) for e in (result["evaluation"], result["second"]))
        rows.append([result["model"], *how, result["solver"], *tops, n, f"{lost} / {won}", interval, gains])
    head = ("model", "weights", "bits", "activations", "solver", "700: float / quantized", "400: float / quantized")
    head = (*head, "n", "lost / won", "change", "gain of CAT: 700 / 400")
    note = [
        "The clean images of NIPS 2017's competition as a second test set, and the paired change of top-1 on both sets:"
    ]
    return ["", "## 1,100 images", "", *note, "", *table(head, rows)] if rows else []


def gain(evaluation: dict) -> str:
    """Of the correction, with its interval."""
    if evaluation["gain"] is None:
        return "0 (off)"
    return f"{evaluation['gain']:+.2f} [{evaluation['gain_low']:+.2f}, {evaluation['gain_high']:+.2f}]"


def cells(result: dict) -> list[str]:
    """One row of the page."""
    evaluation, report = result["evaluation"], result["report"]
    rows = evaluation["rows"]
    plain, last = rows[1], rows[-1]
    spans = [span(row) for row in rows]
    if len(rows) == 2:
        spans.append("off")
    discrimination = "-"
    if plain["discrimination"] is not None:
        discrimination = f"{rows[0]['discrimination']:.3f} / {plain['discrimination']:.3f}"
    return [
        result["model"],
        f"{result['weights']}, group {result['group_size']}",
        f"{result['weight_bits']:.3f}",
        result["activations"],
        result["solver"],
        str(evaluation["n"]),
        *spans,
        gain(evaluation),
        f"{last['agreement']:.1f}",
        "-" if last["lost"] is None else f"{last['lost']} / {last['won']}",
        f"{last['kl']:.3f}",
        discrimination,
        f"{report['bits_per_parameter']:.2f}",
        f"{report['coverage']:.1f}",
        f"{report['bytes_after'] / 1e6:.2f}",
        f"{result['seconds']:.0f}",
        "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e9:.1f}",
    ]


if __name__ == "__main__":
    main()
