"""How long the solver takes: gptq, ternary in groups of 64, on the text encoder and on ResNet-18, at the defaults.

    python benchmarks/solver_time.py --data FOLDER [--only resnet] [--samples 512]

FOLDER as in ``realdata.py``; 256 calibration samples, the default, correction included, loading and evaluation not. Run
it on a machine that does nothing else. Results go to ``benchmarks/results/solver_time.json`` and ``docs/solver-time.md``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import ROOT, Bench, chosen, made, put, read, sources, table, write

from hf_catquant import CatQuantConfig, memory, quantize

RESULTS = ROOT / "benchmarks" / "results" / "solver_time.json"
PAGE = ROOT / "docs" / "solver-time.md"


def main() -> None:
    """Time the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=["minilm", "resnet"], help="parts of model names")
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    args = parser.parse_args()
    for case in chosen(args.only):
        put(RESULTS, [run(Bench(case, args.data), args.samples)], "model", "samples")
        write_page()


def run(bench: Bench, samples: int) -> dict:
    """Wall-clock and processor seconds of one model."""
    case, model = bench.case, bench.load()
    config = CatQuantConfig(
        "ternary", 64, dataset=bench.calibration, processor=bench.processor, num_samples=samples, batch_size=16
    )
    memory.reset_peak()
    start, used = time.perf_counter(), time.process_time()
    quantize(model, config)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    parameters = sum(p.numel() for p in bench.teacher.parameters())
    print(f"{case.model}: {seconds:.0f} s, {used:.0f} processor seconds", flush=True)
    times = {"seconds": round(seconds, 1), "processor_seconds": round(used, 1), "peak_bytes": memory.peak()}
    return {"model": case.model, "parameters": parameters, "samples": samples, **times, "seed": 0, **made()}


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    rows = [
        [
            r["model"],
            f"{r['parameters'] / 1e6:.1f}",
            r["samples"],
            f"{r['seconds']:.0f}",
            f"{r['processor_seconds']:.0f}",
            "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f}",
        ]
        for r in results
    ]
    head = ("model", "M parameters", "samples", "s", "processor s", "peak GB")
    lines = [
        "# How long the solver takes",
        "",
        "Made by `python benchmarks/solver_time.py --data FOLDER`: ternary in groups of 64 by gptq with its defaults, the",
        "correction included, loading and evaluation not, on a machine that does nothing else.",
        "",
        *table(head, rows),
    ]
    write(PAGE, [*lines, *sources(results)])


if __name__ == "__main__":
    main()
