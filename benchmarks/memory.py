"""Peak memory of quantizing a Llama from bf16 shards on disk, and what ``catquant plan`` said before.

    python benchmarks/memory.py FOLDER --mode rtn            data-free, unit by unit
    python benchmarks/memory.py FOLDER --mode gptq           calibrated on a few short samples
    python benchmarks/memory.py FOLDER --mode rtn --layers 4 --hidden 512 ...    another size

The model has the shape of TinyLlama 1.1B and random weights (seed 0). Every command runs in a process of its own; its peak
is the high-water mark of its resident pages (``ru_maxrss``), libraries and mapped files included. Results are added to
``benchmarks/results/memory.json``, and ``docs/memory.md`` is written from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import made, put, read, sources, table, write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

RESULTS = Path(__file__).with_name("results") / "memory.json"
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
SHARD = 400_000_000  # bytes
CATQUANT = (sys.executable, "-m", "hf_catquant.cli")


def build(folder: Path, config: LlamaConfig) -> int:
    """Write the model in shards, a tensor at a time; returns its parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weight_map, shard, size, number = {}, {}, 0, 0
    named = list(model.named_parameters())
    for index, (name, parameter) in enumerate(named):
        values = (
            torch.randn(parameter.shape, generator=generator).mul_(0.02)
            if parameter.dim() > 1
            else torch.ones_like(parameter, device="cpu")
        )
        shard[name] = values.to(torch.bfloat16)
        size += shard[name].nbytes
        if size > SHARD or index == len(named) - 1:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return sum(math.prod(p.shape) for _, p in named)


def measured(command: list[str]) -> tuple[int, float, str]:
    """Peak resident bytes and seconds of a command, and what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, time.perf_counter() - start, text


def main() -> None:
    """Plan, quantize, and compare."""
    args = parsed()
    model = args.folder / f"llama-{args.layers}x{args.hidden}x{args.vocab}"
    if not model.exists():
        build(model, shape(args))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    request = requested(args)
    _, plan_seconds, text = measured([*CATQUANT, "plan", str(model), *request, "--json"])
    plan = json.loads(text[text.index("{") :])
    result = {
        **{
            name: getattr(args, name)
            for name in ("mode", "weights", "dtype", "layers", "hidden", "vocab", "correction")
        },
        "samples": f"{args.samples} x {args.length}" if args.mode == "gptq" else None,
        "float_bytes": size,
        "limit": int(0.4 * size + 1e9),
        "planned_peak": plan["peak_ram"],
        "planned_seconds": round(plan["seconds"], 1),
        "plan_seconds": round(plan_seconds, 1),
        "plan": plan,
    }
    result |= quantized(model, args.folder / "out", request, in_memory=args.in_memory)
    result["plan_off_by"] = round(plan["peak_ram"] / result["peak"] - 1, 4)
    result["within_limit"] = result["peak"] < result["limit"]
    put(RESULTS, [result | made()], "mode", "weights", "dtype", "layers", "hidden", "vocab", "correction", "samples")
    report()
    print(json.dumps(result, indent=1))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written, or lies")
    parser.add_argument("--mode", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--weights", default="ternary")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--correction", default="none", help="'cat' or 'none'")
    parser.add_argument("--in-memory", action="store_true", help="measure the way without a shelf, too")
    for name, value in (("layers", 22), ("hidden", 2048), ("inner", 5632), ("heads", 32), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def shape(args: argparse.Namespace) -> LlamaConfig:
    """The model's config."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(1, args.heads // 8),
        max_position_embeddings=2048,
        pad_token_id=0,
    )


def requested(args: argparse.Namespace) -> list[str]:
    """The options that ``plan`` and ``quantize`` share; writes the samples, if the solver takes any."""
    request = ["--weights", args.weights, "--dtype", args.dtype, "--solver", args.mode]
    request += ["--correction", args.correction]
    if args.mode == "gptq":
        rows = args.folder / "rows.jsonl"
        draws = torch.Generator().manual_seed(1)
        ids = torch.randint(3, args.vocab, (args.samples, args.length), generator=draws).tolist()
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        request += ["--dataset", str(rows), "--num-samples", str(args.samples), "--batch-size", "4"]
    return request


def quantized(model: Path, out: Path, request: list[str], in_memory: bool) -> dict[str, float]:
    """Peaks and seconds of quantizing ``model`` to ``out``, which is removed, and the bytes of its weights."""
    result: dict[str, float] = {}
    for key, more in (("", []), *([("in_memory_", ["--in-memory"])] if in_memory else [])):
        shutil.rmtree(out, ignore_errors=True)
        most, seconds, _ = measured([*CATQUANT, "quantize", str(model), str(out), "--overwrite", *request, *more])
        result |= {f"{key}peak": most, f"{key}seconds": round(seconds, 1)}
    result["output_bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return result


def report() -> None:
    """Write the page."""
    results = read(RESULTS)
    head = [
        "solver",
        "layers",
        "tokens",
        "correction",
        "samples",
        "float, MB",
        "limit, MB",
        "peak, MB",
        "planned, MB",
        "planned / peak - 1",
        "in",
    ]
    rows = [
        [
            f"{r['mode']}, {r['weights']}",
            f"{r['layers']} of width {r['hidden']}",
            f"{r['vocab']:,}",
            r["correction"],
            r["samples"] or "none",
            *(f"{r[name] / 1e6:,.0f}" for name in ("float_bytes", "limit", "peak", "planned_peak")),
            f"{100 * r['plan_off_by']:+.1f} %",
            f"{r['seconds']:.0f} s",
        ]
        for r in results
    ]
    lines = [
        "# Memory of quantizing",
        "",
        "Made by `python benchmarks/memory.py FOLDER --mode rtn` and `--mode gptq`: Llamas of random weights, quantized",
        "from bf16 shards on disk to a folder, in float32. *peak* is all that the process had resident, libraries",
        "included; *limit* is 40 % of the float size and 1 GB, which is wanted of 1 B parameters (libraries alone hold 0.57",
        "GB); *planned* is what `catquant plan` said before. A correction is fitted at the logits.",
        "",
        *table(head, rows),
        *sources(results),
    ]
    write(PAGE, lines)


if __name__ == "__main__":
    main()
