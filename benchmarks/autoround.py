"""AutoRound on the language model, beside hf_catquant on the very same layers, rows and bits.

    pip install auto-round
    python benchmarks/autoround.py --data FOLDER

FOLDER as in ``realdata.py``. AutoRound leaves out layers whose width is no multiple of 32, which are the MLPs of
stories260K, so hf_catquant leaves them and the embedding in float here, too. Both calibrate on the same 60 texts, AutoRound
on every run of 128 tokens in them (it drops shorter rows). Results go to ``benchmarks/results/autoround.json`` and
``docs/autoround.md``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from common import CASES, ROOT, made, put, read, span, table, weight_bits, write
from torch import Tensor

from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.evaluation import evaluate_language_model
from hf_catquant.evaluation_table import Row
from hf_catquant.samples import collect
from hf_catquant.tasks import read_rows

RESULTS = ROOT / "benchmarks" / "results" / "autoround.json"
PAGE = ROOT / "docs" / "autoround.md"
GROUP_SIZE = 32
TOKENS = 128
SKIPPED = ["mlp", "model.embed_tokens", "lm_head"]


def main() -> None:
    """Run both on stories260K at every number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], help="of the weights")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows")
    args = parser.parse_args()
    case = next(case for case in CASES if case.model == "stories260K")
    folder = str(args.data / "models" / case.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts, test = (read_rows(str(args.data / "data" / file))["text"] for file in (case.calibration, case.test))
    teacher = fresh(folder)
    batches = collect(list(test), teacher, processor=tokenizer, num_samples=len(test), batch_size=32).batches
    for bits in args.bits:
        runs: dict[str, Any] = {f"AutoRound, {steps} steps": (peer, (bits, steps)) for steps in (200, 1000)}
        for solver in ("gptq", "reconstruct"):
            runs[f"hf_catquant, {solver}"] = (ours, (f"int{bits}", GROUP_SIZE, solver))
            # A group's float16 offset takes more than AutoRound's zero point: in groups of 64 the bits are about equal.
            runs[f"hf_catquant, group 64, {solver}"] = (ours, (f"int{bits}", 64, solver))
            if bits == 2:
                runs[f"hf_catquant ternary, {solver}"] = (ours, ("ternary_symmetric", -1, solver))
        for name, (run, how) in runs.items():
            if not any(part in name for part in args.rows):
                continue
            start = time.perf_counter()
            model = run(fresh(folder), tokenizer, list(texts), how)
            seconds = time.perf_counter() - start
            row = evaluate_language_model(teacher, model.eval(), batches).rows[1]
            stored = stored_bits(bits, GROUP_SIZE)
            if run is ours:
                stored = weight_bits([asdict(layer) for layer in report(model).layers])
            result = {
                "bits": bits,
                "what": name,
                "stored": stored,
                "seconds": round(seconds, 1),
                **kept(row),
                **made(),
            }
            put(RESULTS, [{**result, "auto-round": version("auto-round")}], "bits", "what")
            write_page()
            print(f"{bits} bits, {name}: {row.metric:.3f}", flush=True)


def fresh(folder: str) -> Any:
    """The float model."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def runs_of(texts: list[Tensor]) -> list[Tensor]:
    """Every whole run of ``TOKENS`` of the texts' ids, each (1, TOKENS) int64."""
    return [row[None] for ids in texts for row in ids.flatten().split(TOKENS) if len(row) == TOKENS]


def stored_bits(bits: int, group_size: int) -> float:
    """AutoRound stores a float16 scale and a zero point of as many bits as a weight with every group."""
    return bits + (16 + bits) / group_size


def autoround(model: Any, tokenizer: Any, rows: list[Tensor], bits: int, steps: int, group_size: int) -> Any:
    """AutoRound with its defaults but for the group size, the rows and the steps."""
    from auto_round import AutoRound

    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    options = {"bits": bits, "group_size": group_size, "sym": False, "iters": steps, "seqlen": TOKENS}
    options |= {"nsamples": len(rows), "batch_size": 4, "device_map": "cpu"}
    options |= {"enable_torch_compile": False, "amp": False}
    return AutoRound(model, tokenizer, dataset=data, **options).quantize()[0].float()


def peer(model: Any, tokenizer: Any, texts: list[str], how: tuple[int, int]) -> Any:
    """AutoRound on the layers of stories260K that it takes."""
    rows = runs_of([tokenizer(text, return_tensors="pt")["input_ids"] for text in texts])
    return autoround(model, tokenizer, rows, *how, group_size=GROUP_SIZE)


def ours(model: Any, tokenizer: Any, texts: list[str], how: tuple[str, int, str]) -> Any:
    """hf_catquant on the layers that AutoRound quantizes, without a correction."""
    weights, group_size, solver = how
    config = CatQuantConfig(
        weights=weights,
        group_size=group_size,
        solver=solver,
        correction=None,
        dataset=texts,
        processor=tokenizer,
        num_samples=len(texts),
        batch_size=4,
        modules_to_not_convert=SKIPPED,
    )
    return quantize(model, config)


def kept(row: Row) -> dict[str, float]:
    """What the page says of a row."""
    return {"metric": row.metric, "low": row.low, "high": row.high, "kl": row.kl}


def write_page() -> None:
    """Draw up ``docs/autoround.md``."""
    stored = sorted(read(RESULTS), key=lambda r: (r["bits"], r["what"]))
    rows = [
        [r["bits"], r["what"], f"{r['stored']:.3g}", span(r), f"{r['kl']:.4f}", f"{r['seconds']:.0f}"] for r in stored
    ]
    lines = [
        "# Beside AutoRound",
        "",
        "Made by `python benchmarks/autoround.py --data FOLDER`: the attention layers of stories260K (AutoRound leaves its",
        f"MLPs out), groups of {GROUP_SIZE} unless said, asymmetric, everything else in float; perplexity on the test texts",
        "with its 95 % interval, float 4.70. Both calibrate on the same 60 texts, AutoRound on every run of 128 tokens",
        "in them; hf_catquant without a correction.",
        "",
        *table(("bits", "what", "stored bits a weight", "perplexity", "KL", "s"), rows),
    ]
    for day, machine, used in sorted({(r["date"], r["machine"], r["auto-round"]) for r in stored}):
        lines += ["", f"{day}: {machine}, auto-round {used}."]
    write(PAGE, lines)


if __name__ == "__main__":
    main()
