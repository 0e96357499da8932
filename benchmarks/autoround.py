"""AutoRound beside hf_catquant, on the very same layers and rows of the models that it takes.

    pip install auto-round
    python benchmarks/autoround.py --data FOLDER [--only stories ...] [--bits 2 ...] [--rows AutoRound ...] [--seeds 0 ...]

FOLDER as in ``realdata.py``. AutoRound leaves out layers whose width is no multiple of 32, which are the MLPs of
stories260K, and all outside the blocks, so hf_catquant leaves them in float here, too. Both calibrate on the same texts: of
stories260K AutoRound gets every run of 128 tokens in them (it drops shorter rows), of the text encoder every sentence,
padded and masked. Models without a tokenizer it refuses, which are the other four. Results go to
``benchmarks/results/autoround.json`` and ``docs/autoround.md``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from common import ROOT, Bench, chosen, made, put, read, span, table, weight_bits, write
from torch import Tensor

from hf_catquant import CatQuantConfig, generate_samples, memory, quantize, report
from hf_catquant.evaluation_table import Row

RESULTS = ROOT / "benchmarks" / "results" / "autoround.json"
PAGE = ROOT / "docs" / "autoround.md"
HEAD = ("bits", "what", "stored bits a weight", "seeds", "result", "agreement %", "KL", "s", "peak GB")


class Scheme(NamedTuple):
    """Format, group size, rotation, options of learning beside the defaults with what a row says of them, bits of a mix."""

    weights: str
    group_size: int
    rotation: str = "auto"
    learning: tuple[str, dict[str, float]] | None = None
    average_bits: float | None = None


LONGER = (", 800 steps a block", {"block_steps": 800})
WHOLE = (", 400 and 1200 steps", {"block_steps": 400, "model_steps": 1200, "model_rate": 0.6})
OWN_LENGTH = 256  # tokens of a text that the float model writes
OWN = ((200, 4), (1000, 4), (1000, 8))  # steps and texts of a batch, of AutoRound's own recipe for 2 bits


@dataclass(frozen=True)
class Subject:
    """A model that AutoRound takes.

    Attributes:
        skipped: what it leaves out.
        tokens: of a calibration row.
        padded: whether shorter texts are filled up to that, or none of them counts.
        group_size: of AutoRound.
        groups: of hf_catquant: where a group's float16 offset takes more than AutoRound's zero point, larger ones have about
            equal bits.
        ternary: of hf_catquant in ternary, with what a row says of it; with options it is learned only.
        mixed: as ``ternary``, of formats of one scale a row that are mixed with wider ones.
        own: texts that the float model writes, for one row of each that calibrates on them as well.
        about: what the page says.
    """

    skipped: tuple[str, ...]
    tokens: int
    padded: bool
    group_size: int
    groups: tuple[int, ...]
    ternary: tuple[tuple[str, Scheme], ...]
    about: str
    mixed: tuple[Scheme, ...] = ()
    own: int = 0


SUBJECTS = {
    "stories260K": Subject(
        ("mlp", "model.embed_tokens", "lm_head"),
        128,
        False,
        32,
        (32, 64),
        (("", Scheme("ternary_symmetric", -1)), ("", Scheme("ternary_symmetric", -1, learning=LONGER))),
        "Attention only (AutoRound leaves the MLPs out); perplexity, float 4.70. Own texts are those that the float model "
        "wrote, the same for both.",
        own=340,
    ),
    "minilm-l6-sst2": Subject(
        ("bert.embeddings", "bert.pooler", "classifier"),
        64,
        True,
        64,
        (128,),
        (
            ("", Scheme("ternary_symmetric", 128)),
            (", group 192, rotated", Scheme("ternary", 192, "hadamard")),
            (", group 192, rotated", Scheme("ternary", 192, "hadamard", LONGER)),
        ),
        "All linears of the encoder; accuracy in percent on 872 sentences, float 89.56. Mixed: wider formats for the "
        "layers that need them (`average_bits`), one scale a row.",
        mixed=(
            Scheme("int2", -1, average_bits=2.25),
            Scheme("ternary", -1, average_bits=1.85),
            Scheme("ternary", -1, learning=LONGER, average_bits=1.85),
        ),
    ),
}

# Rows in 2 bits that accuracy.py runs with several seeds.
SEVERAL = {
    "stories260K": (
        "AutoRound, 1000 steps of 8 texts",
        "AutoRound's for 2 bits, 1000 steps of 8 texts",
        "AutoRound's for 2 bits, 1000 steps of 8 texts, 340 own texts",
        "hf_catquant ternary, reconstruct, 800 steps a block",
        "hf_catquant ternary, reconstruct, 400 and 1200 steps, 340 own texts",
    ),
    "minilm-l6-sst2": (
        "AutoRound, 1000 steps",
        "AutoRound's for 2 bits, 1000 steps of 8 texts",
        "hf_catquant ternary, group 192, rotated, reconstruct, 800 steps a block",
        "hf_catquant ternary mixed to 1.85, reconstruct, 800 steps a block",
    ),
}


def main() -> None:
    """Run both on every model at every number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=list(SUBJECTS), help="parts of model names")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], help="of the weights")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of what a recipe draws at random")
    args = parser.parse_args()
    for case in (case for case in chosen(args.only) if case.model in SUBJECTS):
        bench, subject = Bench(case, args.data), SUBJECTS[case.model]
        for bits in args.bits:
            for name, (run, how) in plan(bits, subject).items():
                for seed in args.seeds if any(part in name for part in args.rows) else ():
                    result = one(bench, subject, bits, name, run, (*how, seed))
                    put(RESULTS, [{**result, "seed": seed}], "model", "bits", "what", "seed")
                    write_page()


def plan(bits: int, subject: Subject) -> dict[str, Any]:
    """Who is run with what, by the name of the row."""
    runs: dict[str, Any] = {f"AutoRound, {steps} steps": (peer, (bits, steps, 4)) for steps in (200, 1000)}
    if bits == 2:
        runs["AutoRound, 1000 steps of 8 texts"] = (peer, (bits, 1000, 8))
        runs |= {
            f"AutoRound's for 2 bits, {steps} steps of {n} texts": (its_own, (bits, steps, n, 0)) for steps, n in OWN
        }
    if bits == 2 and subject.own:
        mark = f", {subject.own} own texts"
        runs[f"AutoRound's for 2 bits, 1000 steps of 8 texts{mark}"] = (its_own, (bits, 1000, 8, subject.own))
        scheme = subject.ternary[0][1]._replace(learning=WHOLE)
        runs[f"hf_catquant ternary, reconstruct{WHOLE[0]}{mark}"] = (ours, (scheme, "reconstruct", subject.own))
    for solver in ("gptq", "reconstruct"):
        for group_size in subject.groups:
            mark = "" if group_size == subject.group_size else f", group {group_size}"
            runs[f"hf_catquant{mark}, {solver}"] = (ours, (Scheme(f"int{bits}", group_size), solver, 0))
        mixed = [(f"{scheme.weights} mixed to {scheme.average_bits}", scheme) for scheme in subject.mixed]
        for what, scheme in [*((f"ternary{mark}", s) for mark, s in subject.ternary), *mixed] if bits == 2 else ():
            if solver == "reconstruct" or scheme.learning is None:
                said = "" if scheme.learning is None else scheme.learning[0]
                runs[f"hf_catquant {what}, {solver}{said}"] = (ours, (scheme, solver, 0))
    return runs


def one(bench: Bench, subject: Subject, bits: int, name: str, run: Any, how: tuple[Any, ...]) -> dict[str, Any]:
    """One row of the page."""
    memory.reset_peak()
    start = time.perf_counter()
    model = run(bench, subject, *how)
    seconds, peak = round(time.perf_counter() - start, 1), memory.peak()
    row = bench.evaluate(model.eval()).rows[1]
    stored = stored_bits(bits, subject.group_size) if run is peer else bits + 16 / subject.group_size
    if run is ours:
        stored = weight_bits(report(model).to_dict())
    print(f"{bench.case.model}, {bits} bits, {name}: {row.metric:.3f}", flush=True)
    what = {"model": bench.case.model, "bits": bits, "what": name, "stored": stored}
    cost = {"seconds": seconds, "peak_bytes": peak}
    return {**what, **cost, **kept(row), **made(), "auto-round": version("auto-round")}


def with_own(bench: Bench, own: int) -> list[dict[str, Tensor]]:
    """The calibration texts and ``own`` more, written by the float model: ``input_ids`` (length,) int64 of each."""
    samples = [
        *bench.collected(bench.calibration, batch_size=1),
        *generate_samples(bench.teacher, own, length=OWN_LENGTH),
    ]
    return [{name: value.flatten() for name, value in sample.items()} for sample in samples]


def rows_of(bench: Bench, subject: Subject, own: int = 0) -> list[dict[str, Tensor]]:
    """The calibration texts as AutoRound takes them: ``input_ids`` and ``attention_mask``, (1, tokens) int64 each."""
    if own:
        return runs_of([sample["input_ids"] for sample in with_own(bench, own)], subject.tokens)
    texts = [sample[bench.case.column] for sample in bench.calibration]
    if subject.padded:
        options = {"padding": "max_length", "truncation": True, "max_length": subject.tokens, "return_tensors": "pt"}
        found = [bench.processor(text, **options) for text in texts]
        return [{name: row[name] for name in ("input_ids", "attention_mask")} for row in found]
    return runs_of([bench.processor(text, return_tensors="pt")["input_ids"] for text in texts], subject.tokens)


def runs_of(texts: list[Tensor], tokens: int) -> list[dict[str, Tensor]]:
    """Every whole run of so many ``tokens`` of the texts' ids."""
    rows = [row[None] for ids in texts for row in ids.flatten().split(tokens) if len(row) == tokens]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def stored_bits(bits: int, group_size: int) -> float:
    """AutoRound stores a float16 scale and a zero point of as many bits as a weight with every group."""
    return bits + (16 + bits) / group_size


def autoround(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Tensor]],
    bits: int,
    steps: int,
    group_size: int,
    batch_size: int = 4,
    seed: int = 42,
    is_own: bool = False,
) -> Any:
    """AutoRound with its defaults (of which the seed is one) but for the group size, the rows, the steps and the batches.

    ``is_own`` is what its makers recommend for 2 bits: scales without zero points, and ``enable_alg_ext``.
    """
    from auto_round import AutoRound

    options = {"bits": bits, "group_size": group_size, "sym": False, "iters": steps, "seed": seed}
    options |= {"seqlen": rows[0]["input_ids"].shape[1], "nsamples": len(rows), "device_map": "cpu"}
    options |= {"batch_size": batch_size}
    options |= {"sym": True, "enable_alg_ext": True} if is_own else {}
    options |= {"enable_torch_compile": False, "amp": False}
    return AutoRound(model, tokenizer, dataset=rows, **options).quantize()[0].float()


def peer(bench: Bench, subject: Subject, bits: int, steps: int, batch_size: int, seed: int) -> Any:
    """AutoRound on the layers that it takes; its seed is 42 plus ``seed``, so that the first is its default."""
    rows = rows_of(bench, subject)
    return autoround(bench.load(), bench.processor, rows, bits, steps, subject.group_size, batch_size, 42 + seed)


def its_own(bench: Bench, subject: Subject, bits: int, steps: int, batch_size: int, own: int, seed: int) -> Any:
    """As :func:`peer`, by what AutoRound's makers recommend for 2 bits."""
    rows, sizes = rows_of(bench, subject, own), (subject.group_size, batch_size, 42 + seed)
    return autoround(bench.load(), bench.processor, rows, bits, steps, *sizes, is_own=True)


def ours(bench: Bench, subject: Subject, scheme: Scheme, solver: str, own: int, seed: int) -> Any:
    """hf_catquant on the layers that AutoRound quantizes, without a correction."""
    samples = with_own(bench, own) if own else bench.calibration
    config = CatQuantConfig(
        weights=scheme.weights,
        group_size=scheme.group_size,
        rotation=scheme.rotation,
        average_bits=scheme.average_bits,
        solver=solver,
        solver_options={} if scheme.learning is None else dict(scheme.learning[1]),
        seed=seed,
        correction=None,
        dataset=samples,
        processor=None if own else bench.processor,
        num_samples=len(samples),
        batch_size=bench.case.batch_size,
        modules_to_not_convert=list(subject.skipped),
    )
    return quantize(bench.load(), config)


def kept(row: Row) -> dict[str, float]:
    """What the page says of a row."""
    return {name: getattr(row, name) for name in ("metric", "low", "high", "agreement", "kl")}


def write_page() -> None:
    """Draw up ``docs/autoround.md``."""
    results = read(RESULTS)
    lines = [
        "# Beside AutoRound",
        "",
        "Made by `python benchmarks/autoround.py --data FOLDER`: the linears that AutoRound takes, asymmetric, everything",
        "else in float. Both calibrate on the same texts; hf_catquant without a correction. A result has its 95 % interval,",
        "that of several seeds (`--seeds`) is their mean, with the least and the greatest; agreement is that of the first",
        "choice with the float model's, memory the peak of the process. AutoRound's recipe for 2 bits has scales without",
        "zero points and `enable_alg_ext`, as its makers recommend. AutoRound learns from",
        "batches of 4 texts unless said (its default is 8) and needs a tokenizer: it",
        "refuses the image and speech models (`tokenizer should not be None`).",
    ]
    for model, subject in SUBJECTS.items():
        mine = [r for r in results if r["model"] == model]
        rows = [
            line([r for r in mine if (r["bits"], r["what"]) == key])
            for key in sorted({(r["bits"], r["what"]) for r in mine})
        ]
        lines += ["", f"## {model}", "", f"{subject.about} Groups of {subject.group_size} unless said.", ""]
        lines += table(HEAD, rows)
    for day, machine, used in sorted({(r["date"], r["machine"], r["auto-round"]) for r in results}):
        lines += ["", f"{day}: {machine}, auto-round {used}."]
    write(PAGE, lines)


def line(found: list[dict[str, Any]]) -> list[Any]:
    """One line of the page: a row's results with one seed each."""
    first, metrics = found[0], [r["metric"] for r in found]
    result = span(first) if len(found) == 1 else f"{fmean(metrics):.2f} ({min(metrics):.2f} to {max(metrics):.2f})"
    kl, seconds = (fmean(r[name] for r in found) for name in ("kl", "seconds"))
    agreement = average([r.get("agreement") for r in found], 1)
    peak = average([r["peak_bytes"] / 1e9 if "peak_bytes" in r else None for r in found], 1)
    what = [first["bits"], first["what"], f"{first['stored']:.3g}", len(found)]
    return [*what, result, agreement, f"{kl:.4f}", f"{seconds:.0f}", peak]


def average(values: list[float | None], digits: int) -> str:
    """The mean of the seeds with which it was measured: rows of before 2026-11-27 have neither agreement nor memory."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else "-"


if __name__ == "__main__":
    main()
