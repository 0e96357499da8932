"""The correction at the logits, behind every block, and at both: what each place gains, and in how many blocks it stays off.

    python benchmarks/cat_places.py --data FOLDER [--only stories ...]

FOLDER as in ``realdata.py``. Each model is made ternary by gptq in groups of 64, without a correction; then
``fit_correction`` fits one at each of the places, on the calibration samples, and the test rows judge. Results go to
``benchmarks/results/cat_places.json`` and ``docs/cat-places.md``.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

from common import ROOT, Bench, chosen, made, put, read, sources, span, table, write
from torch import nn

from hf_catquant import CatConfig, CatQuantConfig, fit_correction, quantize

RESULTS = ROOT / "benchmarks" / "results" / "cat_places.json"
PAGE = ROOT / "docs" / "cat-places.md"
PLACES = {"logits": ("logits",), "blocks": ("blocks",), "blocks and logits": ("blocks", "logits")}


def main() -> None:
    """Run the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument(
        "--only", nargs="+", default=["minilm", "deit", "kwt1", "stories"], help="parts of model names"
    )
    args = parser.parse_args()
    for case in chosen(args.only):
        bench = Bench(case, args.data)
        data = {"dataset": bench.calibration, "processor": bench.processor, "num_samples": len(bench.calibration)}
        model = quantize(bench.load(), CatQuantConfig("ternary", 64, correction=None, **data))
        for place, at in PLACES.items():
            put(RESULTS, [run(bench, model, place, at, data)], "model", "place")
            write_page()


def run(bench: Bench, model: nn.Module, place: str, at: tuple[str, ...], data: dict[str, Any]) -> dict[str, Any]:
    """One place of one model."""
    corrected, start = copy.deepcopy(model), time.perf_counter()
    samples = data["dataset"]
    fits = fit_correction(
        corrected, bench.teacher, samples, CatConfig(at=at), **{k: data[k] for k in data if k != "dataset"}
    )
    seconds = round(time.perf_counter() - start, 1)
    plain, last = bench.evaluate(model).rows[1], bench.evaluate(corrected)
    kept = ("metric", "low", "high", "kl", "agreement")
    row = {name: getattr(last.rows[-1], name) for name in kept}
    before = {name: getattr(plain, name) for name in kept}
    on = sum(fit["clusters"] > 0 for fit in fits.values())
    print(
        f"{bench.case.model}: {place}: {before['metric']:.2f} -> {row['metric']:.2f}, on at {on} of {len(fits)}",
        flush=True,
    )
    gain = {"gain": last.gain, "gain_low": last.gain_low, "gain_high": last.gain_high}
    what = {"model": bench.case.model, "place": place, "sites": len(fits), "on": on, "before": before}
    return {**what, **row, **gain, "seconds": seconds, "seed": 0, **made()}


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    rows = []
    for r in results:
        gain = "0 (off)" if r["gain"] is None else f"{r['gain']:+.2f} [{r['gain_low']:+.2f}, {r['gain_high']:+.2f}]"
        change = f"{r['before']['kl']:.4f} / {r['kl']:.4f}"
        on = f"{r['on']} of {r['sites']}"
        rows.append(
            [r["model"], r["place"], on, f"{r['before']['metric']:.2f}", span(r), gain, change, f"{r['seconds']:.0f}"]
        )
    head = ("model", "corrections", "on", "before", "after", "gain", "KL before / after", "s")
    lines = [
        "# Where the correction sits",
        "",
        "Made by `python benchmarks/cat_places.py --data FOLDER`: ternary by gptq in groups of 64, then `fit_correction` at",
        "the logits, behind every block, and at both. On: where neither cross-validation nor the answers said off.",
        "Accuracy in percent, perplexity for stories260K; gains are paired, with 95 % intervals. Seed 0.",
        "",
        *table(head, rows),
    ]
    write(PAGE, [*lines, *sources(results)])


if __name__ == "__main__":
    main()
