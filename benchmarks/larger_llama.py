"""A larger language model, built from stories260K: ten times its size, trained on what it writes, then made ternary.

    python benchmarks/larger_llama.py --data FOLDER [--model KEPT] [--ways AutoRound ...]

FOLDER as in ``realdata.py``. 2,000 texts that stories260K samples train a Llama of 2.5 M parameters (width 256, four blocks)
for three epochs, which gives a float model with the same tokenizer; half an hour on one core. Then the solvers are judged by
how much of the log-perplexity between rounding to nearest and float they win back on TinyStories' test texts, that neither
model nor solver has seen. AutoRound (``pip install auto-round``) is judged beside them on the same layers, calibrated on
every run of 128 tokens of the same texts. With ``--model`` the float model is kept in that folder, and taken from
there. Results go to ``benchmarks/results/larger_llama.json`` and ``docs/larger-llama.md``.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from autoround import autoround, runs_of, stored_bits
from common import ROOT, Bench, chosen, made, put, read, sources, span, table, weight_bits, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_catquant import CatQuantConfig, generate_samples, quantize, report
from hf_catquant.evaluation import evaluate_language_model

TOKENS = 128  # of a row that AutoRound calibrates on
RESULTS = ROOT / "benchmarks" / "results" / "larger_llama.json"
PAGE = ROOT / "docs" / "larger-llama.md"
TEXTS, LENGTH, EPOCHS, ROWS, RATE = 2000, 256, 3, 32, 2e-3
LEARNED = {"solver": "reconstruct", "batch_size": 4}
OWN = 196  # texts that the larger model writes for its calibration, beside the 60 of TinyStories
# What a way is called: fields of the configuration, or of AutoRound where it has "steps".
WAYS: dict[str, dict[str, Any]] = {
    "ternary, rounding to nearest": {"weights": "ternary_symmetric", "solver": "rtn"},
    "ternary, gptq": {"weights": "ternary_symmetric"},
    "ternary, reconstruct": {"weights": "ternary_symmetric", **LEARNED},
    "2 bits, AutoRound, 200 steps": {"bits": 2, "steps": 200},
    "2 bits, AutoRound, 1000 steps": {"bits": 2, "steps": 1000},
    "2 bits, AutoRound's for 2 bits, 1000 steps of 8 texts": {"bits": 2, "steps": 1000, "is_own": True},
    "2 bits, gptq": {"weights": "int2"},
    "2 bits, reconstruct": {"weights": "int2", **LEARNED},
    "3 bits, AutoRound, 200 steps": {"bits": 3, "steps": 200},
    "3 bits, gptq": {"weights": "int3"},
}


def main() -> None:
    """Build the model, quantize it in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--model", type=Path, help="folder where the float model is kept")
    parser.add_argument("--ways", nargs="+", default=[""], help="parts of the names of ways")
    args = parser.parse_args()
    bench = Bench(chosen(["stories260K"])[0], args.data)
    student = kept(bench.teacher, args.model)
    own = generate_samples(student, OWN, length=LENGTH, seed=1)
    samples = [*bench.collected(bench.calibration, batch_size=1), *own]
    samples = [{name: value.flatten() for name, value in sample.items()} for sample in samples]
    for name, how in WAYS.items():
        if any(part in name for part in args.ways):
            put(RESULTS, [run(student, samples, name, how, bench)], "what")
            write_page()


def kept(teacher: Any, folder: Path | None) -> LlamaForCausalLM:
    """The larger model, from ``folder`` if it is there."""
    if folder is not None and (folder / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = trained(teacher)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def trained(teacher: Any) -> LlamaForCausalLM:
    """The larger model, trained on texts of ``teacher``."""
    texts = generate_samples(teacher, TEXTS, length=LENGTH, batch_size=250)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    like = teacher.config
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=like.bos_token_id,
        eos_token_id=like.eos_token_id,
        max_position_embeddings=like.max_position_embeddings,
        **sizes,
    )
    model = LlamaForCausalLM(config).train()
    steps = EPOCHS * len(texts) // ROWS
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(texts), generator=generator) for _ in range(EPOCHS)])
    for step in range(steps):
        loss = step_loss(model, [texts[i]["input_ids"] for i in order[step * ROWS : (step + 1) * ROWS].tolist()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def step_loss(model: LlamaForCausalLM, rows: list[Tensor]) -> Tensor:
    """Cross entropy of the next token of texts of different lengths."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def run(
    student: LlamaForCausalLM, samples: list[dict], name: str, how: dict[str, Any], bench: Bench
) -> dict[str, Any]:
    """One way to quantize the model."""
    start = time.perf_counter()
    model, bits = (peer if "steps" in how else ours)(copy.deepcopy(student), samples, bench, **how)
    seconds = round(time.perf_counter() - start, 1)
    floating, row = evaluate_language_model(student, model, bench.batches).rows
    print(f"{name}: {row.metric:.2f} (float {floating.metric:.2f})", flush=True)
    judged = {key: getattr(row, key) for key in ("metric", "low", "high", "kl", "agreement")}
    parameters = sum(p.numel() for p in student.parameters())
    what = {"what": name, "float": floating.metric, "parameters": parameters, "bits": bits, "seconds": seconds}
    return {**what, **judged, "samples": len(samples), "seed": 0, **made()}


def ours(model: nn.Module, samples: list[dict], bench: Bench, weights: str, **how: Any) -> tuple[nn.Module, float]:
    """hf_catquant: the model, and the stored bits of a weight inside the blocks."""
    data = {} if how.get("solver") == "rtn" else {"dataset": samples}
    model = quantize(model, CatQuantConfig(weights, 128, correction=None, num_samples=len(samples), **data, **how))
    return model, weight_bits(report(model).to_dict())


def peer(
    model: nn.Module, samples: list[dict], bench: Bench, bits: int, steps: int, is_own: bool = False
) -> tuple[nn.Module, float]:
    """AutoRound in groups of 64: the same; ``is_own`` is its makers' recipe for 2 bits, without zero points."""
    rows = runs_of([sample["input_ids"] for sample in samples], TOKENS)
    stored = bits + 16 / 64 if is_own else stored_bits(bits, 64)
    return autoround(model, bench.processor, rows, bits, steps, 64, 8 if is_own else 4, is_own=is_own), stored


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    first = next(r for r in results if r["what"] == next(iter(WAYS)))
    gap = math.log(first["metric"]) - math.log(first["float"])
    order = list(WAYS)
    rows = [
        [
            r["what"],
            f"{r['bits']:.3g}",
            span(r),
            f"{r['kl']:.3f}",
            f"{100 * (math.log(first['metric']) - math.log(r['metric'])) / gap:.1f} %",
            f"{r['seconds']:.0f}",
        ]
        for r in sorted(results, key=lambda r: order.index(r["what"]))
    ]
    lines = [
        "# A larger language model",
        "",
        "Made by `python benchmarks/larger_llama.py --data FOLDER`: a Llama of",
        f"{first['parameters'] / 1e6:.1f} M parameters, trained on {TEXTS:,} texts that stories260K wrote (seed 0),",
        "then ternary without offsets, 2 or 3 bits with offsets, in groups of 128 (AutoRound: 64), with no",
        "correction. Perplexity on TinyStories' 120 test texts with its 95 % interval; float",
        f"{first['float']:.2f}. The solvers calibrate on TinyStories' 60 calibration texts and {OWN} that the model wrote,",
        "AutoRound on every run of 128 tokens of the same texts; it leaves the embedding in float, which is int8 here.",
        "Won back: of the log-perplexity between rounding to ternary and float.",
        "",
        *table(("what", "bits a weight", "perplexity", "KL", "won back", "s"), rows),
    ]
    write(PAGE, [*lines, *sources(results)])


if __name__ == "__main__":
    main()
