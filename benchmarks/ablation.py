"""What each step of the gptq solver buys: one step after the other, and the whole engine without each of them.

    python benchmarks/ablation.py --data FOLDER [--only minilm ...] [--weights ternary] [--group-size 64]
                                  [--rows "all steps" ...]

FOLDER as in ``realdata.py``. The steps are switched off inside ``hf_catquant.solvers.gptq``; nothing else changes. The text
encoder is judged by the cosine between the mean-pooled embeddings of the float and the quantized model, too. No correction.
Results go to ``benchmarks/results/ablation.json`` and ``docs/ablation.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import peers
import torch
from common import ROOT, Bench, Case, chosen, made, put, read, sources, span, table, weight_bits, write
from torch import Tensor, nn

from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.formats import Format
from hf_catquant.solvers import gptq
from hf_catquant.solvers._descent import ColumnGrid

RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
PAGE = ROOT / "docs" / "ablation.md"
SAMPLES = 256
KEY = ("model", "weights", "group_size", "what")
HEAD = ("what", "bits a weight", "result", "KL", "cosine", "s", "day")


class Judge(Protocol):
    """What the rows need: a :class:`common.Bench`, or another float model with its test batches."""

    teacher: Any
    processor: Any
    batches: list[dict[str, Tensor]]

    def load(self) -> Any:
        """The float model anew."""


def natural_order(gram: Tensor) -> Tensor:
    """Columns from the last to the first one, so that feedback runs from the first to the last."""
    return torch.arange(gram.shape[-1] - 1, -1, -1, device=gram.device).expand(gram.shape[:2])


def no_feedback(target: Tensor, lower: Tensor, grid: ColumnGrid, fmt: Format) -> Tensor:
    """The nearest levels (B, K, n), whatever the errors of other columns."""
    return torch.stack([grid.nearest(k, target[:, k], fmt) for k in range(target.shape[1])], 1)


def no_refit(aim: Tensor, gram: Tensor, levels: Tensor, scale: Tensor, offset: Tensor | None, width: int) -> Any:
    """The grid as it was."""
    return scale, offset


def plain_grid(fit_grid: Callable) -> Callable:
    """A fit of the grid to which all columns count the same."""
    return lambda weight, fmt, group_size, column_weight: fit_grid(weight, fmt, group_size)


# What a step is called: what takes its place in the solver, or in the configuration (ROTATION), where it is off.
ROTATION = "rotation of the inputs where it helps"
STEPS: dict[str, dict[str, Any]] = {
    "grid weighted by the inputs": {"fit_grid": plain_grid(gptq.fit_grid)},
    "error feedback": {"feed_back": no_feedback},
    "important columns first": {"act_order": natural_order},
    "joint re-fit of scales and offsets": {"refit": no_refit},
    "coordinate descent": {"_SWEEPS": 0},
    "re-targeting to the float stream": {"trust": lambda count, columns: (0.0, 1.0)},
    ROTATION: {},
}
BEYOND: dict[str, dict[str, Any]] = {
    "all steps, low rank 1": {"low_rank": 1},
    "all steps, low rank 2": {"low_rank": 2},
    "all steps, low rank 8": {"low_rank": 8},
    "all steps, average_bits=2.3": {"average_bits": 2.3},
    "all steps, then reconstruct": {"solver": "reconstruct"},
}


OTHERS = ("HQQ 2 bits, group 64", "optimum-quanto qint2")  # rows of peers.py, for the cosine that it does not look at


def main() -> None:
    """Run the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=["minilm", "kwt1", "stories"], help="parts of model names")
    parser.add_argument("--weights", default="ternary", help="format")
    parser.add_argument("--group-size", default=64, type=int)
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows")
    args = parser.parse_args()
    for case in chosen(args.only):
        bench = Bench(case, args.data)
        for name, off, more in (row for row in plan() if any(part in row[0] for part in args.rows)):
            put(RESULTS, [run(bench, case, name, off, args.weights, args.group_size, more)], *KEY)
            write_page()


def plan() -> Iterable[tuple[str, list[str], dict[str, Any]]]:
    """Every row: its name, the steps that are off, and other fields of the configuration."""
    names = list(STEPS)
    for name in OTHERS:
        yield name, [], {"peer": name}
    yield "rounding to nearest, least-squares grid", names, {"solver": "rtn"}
    for done in range(1, len(names) + 1):
        yield f"+ {names[done - 1]}", names[done:], {}
    for name in names:
        yield f"all but {name}", [name], {}
    for name, more in BEYOND.items():
        yield name, [], more


def run(
    bench: Bench, case: Case, name: str, off: list[str], weights: str, group_size: int, more: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table."""
    samples = bench.calibration[:SAMPLES]
    start = time.perf_counter()
    if "peer" in more:
        model, bits = peer(bench, more["peer"])
    else:
        model = ours(bench, case, samples, off, weights, group_size, more)
        bits = weight_bits(report(model).to_dict())
    seconds = round(time.perf_counter() - start, 1)
    row = bench.evaluate(model).rows[1]
    cosine = float(embedding_cosines(bench, model).mean()) if case.column == "sentence" else None
    print(f"{case.model}: {name}: {row.metric:.2f}, KL {row.kl:.3f}, cosine {cosine}", flush=True)
    what = {"model": case.model, "weights": weights, "group_size": group_size, "what": name, "off": off, "bits": bits}
    judged = {"metric": row.metric, "low": row.low, "high": row.high, "kl": row.kl, "agreement": row.agreement}
    return {**what, **judged, "cosine": cosine, "samples": len(samples), "seed": 0, "seconds": seconds, **made()}


def peer(bench: Judge, name: str) -> tuple[nn.Module, float]:
    """The model with another library's weights, and their bits."""
    model = bench.load()
    _, make, width = peers.PEERS[name]
    return model, peers.replace_weights(model, make(), width)[1]


def ours(
    bench: Judge, case: Case, samples: list[Any], off: list[str], weights: str, group_size: int, more: dict[str, Any]
) -> nn.Module:
    """The quantized model, without the steps that are ``off``."""
    how = {"num_samples": len(samples), "batch_size": case.batch_size if "solver" in more else 16, **more}
    how.setdefault("rotation", None if ROTATION in off else "auto")
    config = CatQuantConfig(weights, group_size, correction=None, dataset=samples, processor=bench.processor, **how)
    with ExitStack() as stack:
        for part, instead in [pair for step in off for pair in STEPS[step].items()]:
            stack.enter_context(patch.object(gptq, part, instead))
        return quantize(bench.load(), config)


@torch.no_grad()
def embedding_cosines(bench: Judge, model: nn.Module) -> Tensor:
    """(texts,) cosines between the embeddings that the two models give the test sentences: the mean over the mask."""
    found = []
    for batch in bench.batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        inputs = {name: batch[name] for name in batch if name != "labels"}
        pooled = [(m.base_model(**inputs).last_hidden_state * mask).sum(1) for m in (bench.teacher, model)]
        found.append(nn.functional.cosine_similarity(*pooled))
    return torch.cat(found)


def write_page() -> None:
    """Draw up the page."""
    lines = [
        "# What each step of the solver buys",
        "",
        f"Made by `python benchmarks/ablation.py --data FOLDER`: {SAMPLES} calibration samples (60 texts for stories260K,",
        "which has no more), seed 0, no correction, layers outside the blocks int8. First the steps of gptq one after the",
        "other, then the whole engine without each of them, then what can follow it. Accuracy in percent on the test rows,",
        "perplexity for stories260K, 95 % intervals; KL from the float model; cosine of mean-pooled sentence embeddings",
        "of the test sentences (MiniLM is the one fine-tuned on SST-2 here). Other libraries first, for comparison. Until",
        "2026-11-21 a rotation, where it was on, was that of every layer. These are one run each, and the draw of the",
        "samples moves a divergence by as much as many a step is worth: [ablation-draws.md](ablation-draws.md) has several.",
    ]
    results = read(RESULTS)
    order = [name for name, *_ in plan()]
    for key in dict.fromkeys((r["model"], r["weights"], r["group_size"]) for r in results):
        mine = [r for r in results if (r["model"], r["weights"], r["group_size"]) == key]
        rows = [
            [r["what"], bits(r), span(r), f"{r['kl']:.3f}", cosine(r), r["seconds"], r["date"]]
            for r in sorted(mine, key=lambda r: order.index(r["what"]))
        ]
        lines += ["", "## {}, {}, group {}".format(*key), "", *table(HEAD, rows)]
    write(PAGE, [*lines, *sources(results)])


def bits(result: dict) -> str:
    """Stored bits a weight in the blocks, where they were counted."""
    return f"{result['bits']:.3g}" if "bits" in result else "-"


def cosine(result: dict) -> str:
    """That of the embeddings, for a text encoder."""
    return "-" if result["cosine"] is None else f"{result['cosine']:.3f}"


if __name__ == "__main__":
    main()
