"""A larger language model, built from stories260K: ten times its size, trained on what it writes, then made ternary.

    python benchmarks/larger_llama.py --data FOLDER

FOLDER as in ``realdata.py``. 2,000 texts that stories260K samples train a Llama of 2.5 M parameters (width 256, four blocks)
for three epochs, which gives a float model with the same tokenizer; half an hour on one core. Then the solvers are judged by
how much of the log-perplexity between rounding to nearest and float they win back on TinyStories' test texts, that neither
model nor solver has seen. Results go to ``benchmarks/results/larger_llama.json`` and ``docs/larger-llama.md``.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Bench, chosen, made, put, read, sources, span, table, weight_bits, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_catquant import CatQuantConfig, generate_samples, quantize, report
from hf_catquant.evaluation import evaluate_language_model

RESULTS = ROOT / "benchmarks" / "results" / "larger_llama.json"
PAGE = ROOT / "docs" / "larger-llama.md"
TEXTS, LENGTH, EPOCHS, ROWS, RATE = 2000, 256, 3, 32, 2e-3
OWN = 196  # texts that the larger model writes for its calibration, beside the 60 of TinyStories
WAYS: dict[str, dict[str, Any]] = {
    "rounding to nearest": {"solver": "rtn"},
    "gptq": {"solver": "gptq"},
    "reconstruct": {"solver": "reconstruct", "batch_size": 4},
}


def main() -> None:
    """Build the model, quantize it in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    args = parser.parse_args()
    bench = Bench(chosen(["stories260K"])[0], args.data)
    student = trained(bench.teacher)
    own = generate_samples(student, OWN, length=LENGTH, seed=1)
    samples = [*bench.collected(bench.calibration, batch_size=1), *own]
    samples = [{name: value.flatten() for name, value in sample.items()} for sample in samples]
    for name, how in WAYS.items():
        put(RESULTS, [run(student, samples, name, how, bench.batches)], "what")
        write_page()


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
    student: LlamaForCausalLM, samples: list[dict], name: str, how: dict[str, Any], batches: list[dict]
) -> dict[str, Any]:
    """One way to make the model ternary."""
    config = CatQuantConfig(
        "ternary_symmetric",
        128,
        correction=None,
        dataset=None if how["solver"] == "rtn" else samples,
        num_samples=len(samples),
        **how,
    )
    start = time.perf_counter()
    model = quantize(copy.deepcopy(student), config)
    seconds = round(time.perf_counter() - start, 1)
    floating, row = evaluate_language_model(student, model, batches).rows
    print(f"{name}: {row.metric:.2f} (float {floating.metric:.2f})", flush=True)
    bits = weight_bits([asdict(layer) for layer in report(model).layers])
    kept = {key: getattr(row, key) for key in ("metric", "low", "high", "kl", "agreement")}
    parameters = sum(p.numel() for p in student.parameters())
    what = {"what": name, "float": floating.metric, "parameters": parameters, "bits": bits, "seconds": seconds}
    return {**what, **kept, "samples": len(samples), "seed": 0, **made()}


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    first = next(r for r in results if r["what"] == next(iter(WAYS)))
    gap = math.log(first["metric"]) - math.log(first["float"])
    rows = [
        [
            r["what"],
            f"{r['bits']:.3g}",
            span(r),
            f"{r['kl']:.3f}",
            f"{100 * (math.log(first['metric']) - math.log(r['metric'])) / gap:.1f} %",
            f"{r['seconds']:.0f}",
        ]
        for r in sorted(results, key=lambda r: list(WAYS).index(r["what"]))
    ]
    lines = [
        "# A larger language model",
        "",
        "Made by `python benchmarks/larger_llama.py --data FOLDER`: a Llama of",
        f"{first['parameters'] / 1e6:.1f} M parameters, trained on {TEXTS:,} texts that stories260K wrote (seed 0),",
        "then ternary without offsets in groups of 128, with no",
        "correction. Perplexity on TinyStories' 120 test texts with its 95 % interval; float",
        f"{first['float']:.2f}. The solvers calibrate on TinyStories' 60 calibration texts and {OWN} that the model wrote.",
        "Won back: of the log-perplexity between rounding and float.",
        "",
        *table(("what", "bits a weight", "perplexity", "KL", "won back", "s"), rows),
    ]
    write(PAGE, [*lines, *sources(results)])


if __name__ == "__main__":
    main()
