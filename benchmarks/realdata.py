"""Quantize the six real models of the data folder and evaluate them on rows never used for calibration.

    python benchmarks/realdata.py --data FOLDER [--weights ternary int4] [--group-size 128] [--only resnet ...]
                                  [--solver reconstruct] [--solver-options model_steps=800] [--activations int4]
                                  [--generate 340] [--low-rank 8] [--average-bits 2.5]

Memory is the peak of the whole process, so it is that of a case only where one case is run.

FOLDER holds ``models/`` and ``data/`` (CONTRIBUTING.md says what is in them). Each case goes through the command line that
users have: ``catquant quantize`` and ``catquant eval``. Results are added to ``benchmarks/results/realdata.json`` case by
case and drawn up in ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers

from hf_catquant import __version__
from hf_catquant.cli import main as catquant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "realdata.json"
PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Case:
    """A model, its calibration and test files, and what they need on the command line."""

    model: str
    calibration: str
    test: str
    samples: int
    column: str | None = None
    options: tuple[str, ...] = ()
    eval_options: tuple[str, ...] = ()
    batch_size: int = 16


IMAGES = ("imagenet/calibration_train.parquet", "imagenet/val_acuity.parquet")
CASES = (
    Case("minilm-l6-sst2", "sst2/calibration_train.parquet", "sst2/validation.parquet", 512, "sentence"),
    Case("resnet-18-pq", *IMAGES, 512, "image"),
    Case("mobilenet_v2_1.0_224", *IMAGES, 512, "image", eval_options=("--label-offset", "1")),
    Case("deit-tiny-patch16-224", *IMAGES, 512, "image"),
    Case(
        "kwt1-speech-commands-12",
        "speech_commands/calibration.parquet",
        "speech_commands/test.parquet",
        44,
        "audio",
        options=("--trust-remote-code",),
        batch_size=4,
    ),
    Case("stories260K", "tinystories/calibration.parquet", "tinystories/test.parquet", 60, "text", batch_size=4),
)


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
    args = parser.parse_args()
    how = ["--group-size", args.group_size, "--solver", args.solver, "--activations", args.activations]
    how += ["--generate", str(args.generate)] if args.generate else []
    how += ["--solver-options", *args.solver_options] if args.solver_options else []
    how += ["--low-rank", args.low_rank] if args.low_rank != "0" else []
    how += ["--average-bits", args.average_bits] if args.average_bits else []
    more = {"own texts": args.generate, "rank": int(args.low_rank), "bits on average": args.average_bits}
    label = ", ".join([args.solver, *args.solver_options, *(f"{n} {name}" for name, n in more.items() if n)])
    for case in CASES:
        for weights in args.weights:
            if any(part in case.model for part in args.only):
                asked = {"solver": label, "activations": args.activations, "group_size": int(args.group_size)}
                add({**asked, **run(case, weights, how, args.data)})
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        table = Path(folder) / "table.json"
        evaluate = [
            "eval",
            folder,
            "--float",
            model,
            "--dataset",
            str(data / "data" / case.test),
            "--json",
            str(table),
        ]
        check(catquant([*evaluate, *column, *case.options, *case.eval_options]), evaluate)
        report = json.loads((Path(folder) / "report.json").read_text())
        result = json.loads(table.read_text())
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
        "weight_bits": weight_bits(report["layers"]),
        "evaluation": result,
        "report": {name: report[name] for name in kept},
        "date": date.today().isoformat(),
        "machine": machine(),
    }


def weight_bits(layers: list[dict]) -> float:
    """Stored bits a weight, scales and offsets included, of the layers that are not int8 as those outside the blocks are."""
    chosen = [layer for layer in layers if layer["weights"] != "int8"]
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in chosen]
    return sum(layer["bits"] * size for layer, size in zip(chosen, sizes, strict=True)) / sum(sizes)


def check(status: int, command: list[str]) -> None:
    """Stop at the first command that fails."""
    if status:
        raise SystemExit(f"failed: catquant {' '.join(command)}")


def machine() -> str:
    """What the numbers were made on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, hf-catquant {__version__}"
    )


def add(result: dict) -> None:
    """Put a case into the results, in the place of an older one."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = [r for r in results if key(r) != key(result)]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps([*same, result], indent=1) + "\n", encoding="utf-8")


def key(result: dict) -> tuple[str, ...]:
    """What tells a case from another."""
    return tuple(result[name] for name in ("model", "weights", "activations", "group_size", "solver"))


def write_page() -> None:
    """Draw up ``docs/results.md``."""
    order = {case.model: i for i, case in enumerate(CASES)}
    results = sorted(json.loads(RESULTS.read_text()), key=lambda r: (order[r["model"]], *key(r)[1:]))
    lines = [
        "# Results on real models and data",
        "",
        "Made by `python benchmarks/realdata.py --data FOLDER`; the numbers with everything else are in",
        "`benchmarks/results/realdata.json`. Seed 0; layers outside the repeated blocks are int8, bits are those of a",
        "weight inside them, with scales and offsets. Accuracy in percent, perplexity for stories260K, on n rows",
        "(documents); 95 % intervals. The gain of CAT is paired on the",
        "same test rows; lost / won are rows that float has right and the last model wrong, and the reverse. Seconds are",
        "those of the whole command on a machine that did other work beside it.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
    ]
    lines += [line(result) for result in results]
    for made in sorted({(r["date"], r["machine"]) for r in results}):
        lines += ["", f"{made[0]}: {made[1]}."]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(result: dict) -> str:
    """One row of the page."""
    evaluation, report = result["evaluation"], result["report"]
    rows = evaluation["rows"]
    plain, last = rows[1], rows[-1]
    spans = [f"{row['metric']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in rows]
    if len(rows) == 2:
        spans.append("off")
    gain = (
        "0 (off)"
        if evaluation["gain"] is None
        else (f"{evaluation['gain']:+.2f} [{evaluation['gain_low']:+.2f}, {evaluation['gain_high']:+.2f}]")
    )
    discrimination = "-"
    if plain["discrimination"] is not None:
        discrimination = f"{rows[0]['discrimination']:.3f} / {plain['discrimination']:.3f}"
    cells = [
        result["model"],
        f"{result['weights']}, group {result['group_size']}",
        f"{result['weight_bits']:.3f}",
        result["activations"],
        result["solver"],
        str(evaluation["n"]),
        *spans,
        gain,
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
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
