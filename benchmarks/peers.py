"""What other libraries do with the same layers of the same models, on the same test rows.

    pip install --no-deps optimum-quanto hqq bitsandbytes
    python benchmarks/peers.py --data FOLDER [--only minilm ...] [--peers NF4 ...]

FOLDER as in ``realdata.py``. Every linear and convolution inside the repeated blocks (those that hf_catquant makes ternary
by default) gets the weights that the peer would compute with, a convolution's as rows of (N, K); all other layers stay in
float, which favours the peers. None of them looks at data. Results go to ``benchmarks/results/peers.json`` and are drawn up
beside hf_catquant's own in ``docs/peers.md``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import published
import torch
from common import CASES, ROOT, Bench, chosen, made, put, read, span, table, write
from realdata import RESULTS as OURS
from torch import Tensor, nn

from hf_catquant import memory
from hf_catquant.model import block_members

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "peers.md"
HEAD = ("what", "bits a weight", "result", "agreement %", "KL", "s", "peak GB")


Requantize = Callable[
    [Tensor], tuple[Tensor, int]
]  # the weights that a peer computes with, and how many scales it stores


def hqq(bits: int, group_size: int) -> Requantize:
    """HQQ's weights with its own defaults (axis 1, optimised zeros)."""
    from hqq.core.quantize import Quantizer

    def requantize(weight: Tensor) -> tuple[Tensor, int]:
        groups = group_size if weight.numel() % group_size == 0 else None  # a row each, where groups do not fit
        options = {"nbits": bits, "group_size": groups, "axis": 1, "optimize": True, "bitpack": False}
        codes, meta = Quantizer.quantize(weight.clone(), **options, device="cpu", compute_dtype=torch.float32)
        return Quantizer.dequantize(codes, meta), meta["scale"].numel()

    return requantize


def quanto(bits: int) -> Requantize:
    """optimum-quanto's weights with its own defaults (groups of 128, the largest that divides)."""
    from optimum.quanto import freeze, qint2, qint4, quantize

    def requantize(weight: Tensor) -> tuple[Tensor, int]:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        holder = nn.Sequential(linear)
        quantize(holder, weights={2: qint2, 4: qint4}[bits])
        freeze(holder)
        return holder[0].weight.dequantize().detach(), holder[0].weight._scale.numel()

    return requantize


def normal_float() -> Requantize:
    """The weights of bitsandbytes' NF4: blocks of 64 with a float32 absmax each."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def requantize(weight: Tensor) -> tuple[Tensor, int]:
        codes, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        return dequantize_4bit(codes, state).view(weight.shape), state.absmax.numel()

    return requantize


BITS_OF_SCALE = 32  # a float16 scale and zero point for every group; NF4 has a float32 absmax
# name: (package, maker, bits of a code)
PEERS: dict[str, tuple[str, Callable[[], Requantize], int]] = {
    "HQQ 1 bit, group 64": ("hqq", lambda: hqq(1, 64), 1),
    "HQQ 2 bits, group 64": ("hqq", lambda: hqq(2, 64), 2),
    "HQQ 3 bits, group 64": ("hqq", lambda: hqq(3, 64), 3),
    "HQQ 4 bits, group 64": ("hqq", lambda: hqq(4, 64), 4),
    "optimum-quanto qint2": ("optimum-quanto", lambda: quanto(2), 2),
    "optimum-quanto qint4": ("optimum-quanto", lambda: quanto(4), 4),
    "bitsandbytes NF4": ("bitsandbytes", normal_float, 4),
}


def main() -> None:
    """Run the peers on every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    parser.add_argument("--peers", nargs="+", default=[""], help="parts of the names of peers")
    args = parser.parse_args()
    for case in chosen(args.only):
        bench = Bench(case, args.data)
        for name in (name for name in PEERS if any(part in name for part in args.peers)):
            put(RESULTS, [run(bench, name)], "model", "peer")
            write_page()


def run(bench: Bench, name: str) -> dict:
    """One peer on one model."""
    package, make, width = PEERS[name]
    model = copy.deepcopy(bench.teacher)
    requantize = make()
    memory.reset_peak()
    start = time.perf_counter()
    count, bits = replace_weights(model, requantize, width)
    peak = memory.peak()
    seconds = round(time.perf_counter() - start, 1)
    row = asdict(bench.evaluate(model).rows[1])
    print(f"{bench.case.model}: {name}: {row['metric']:.2f}, KL {row['kl']:.3f}", flush=True)
    kept = {key: row[key] for key in ("metric", "low", "high", "agreement", "kl")}
    what = {"model": bench.case.model, "peer": name, "bits": bits, "layers": count, "seconds": seconds}
    return {**what, "peak_bytes": peak, **kept, **made(), "version": f"{package} {version(package)}"}


@torch.no_grad()
def replace_weights(model: nn.Module, requantize: Requantize, width: int) -> tuple[int, float]:
    """Give every linear and convolution inside the blocks the peer's weights; how many there were, and bits a weight."""
    inside = block_members(model)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layers = [m for name, m in model.named_modules() if isinstance(m, kinds) and name in inside]
    scales = 0
    for layer in layers:
        weight, count = requantize(layer.weight.detach().flatten(1))
        layer.weight.copy_(weight.view(layer.weight.shape))
        scales += count
    return len(layers), width + BITS_OF_SCALE * scales / sum(layer.weight.numel() for layer in layers)


def write_page() -> None:
    """Draw up ``docs/peers.md``: peers and, from ``realdata.json``, hf_catquant on the same rows."""
    lines = [
        "# Beside other libraries",
        "",
        "Made by `python benchmarks/peers.py --data FOLDER`, with the rows of hf_catquant from `benchmarks/realdata.py`.",
        "In each row the same matrices are quantized, on the same test rows; outside them the peers stay in float and",
        "hf_catquant is int8. Bits a weight count scales and offsets, in float16 for the peers, in the groups that they",
        "fall back to where theirs do not divide a matrix. Accuracy in percent, perplexity for stories260K, 95 % intervals.",
        "The peers look at no data, `gptq` and `reconstruct` calibrate; that is part of what is compared. Seconds are those",
        "to quantize (for hf_catquant of the whole command), memory the peak of the process by then, beside other work.",
    ]
    peers = read(RESULTS)
    ours = [r for r in read(OURS) if r["activations"] == "none"]
    for case in CASES:
        mine = [r for r in peers if r["model"] == case.model]
        if not mine:
            continue
        own = [r for r in ours if r["model"] == case.model]
        entries = [(r["bits"], r["peer"], cells(r, r["seconds"], r["peak_bytes"])) for r in mine]
        entries += [(r["weight_bits"], name_of(r), cells(last(r), r["seconds"], r["peak_bytes"])) for r in own]
        rows = [["float", 32, span(own[0]["evaluation"]["rows"][0]), 100, 0, "-", "-"]]
        rows += [[name, f"{bits:.3g}", *cells] for bits, name, cells in sorted(entries, key=lambda entry: entry[:2])]
        lines += ["", f"## {case.model}", "", *table(HEAD, rows)]
    lines += published.lines(read(OURS))
    versions = ", ".join(sorted({r["version"] for r in peers}))
    for day, machine in sorted({(r["date"], r["machine"]) for r in peers}):
        lines += ["", f"Peers: {day}: {machine}."]
    write(PAGE, [*lines, "", f"{versions}."])


def cells(row: dict, seconds: float, peak: int | None) -> list[str]:
    """One row of the page, from the metric on."""
    held = "-" if peak is None else f"{peak / 1e9:.1f}"
    return [span(row), f"{row['agreement']:.1f}", f"{row['kl']:.3f}", f"{seconds:.0f}", held]


def last(result: dict) -> dict:
    """The row of the model as it is saved: with its correction, if it has one."""
    return result["evaluation"]["rows"][-1]


def name_of(result: dict) -> str:
    """One of hf_catquant's own results in words."""
    return f"hf_catquant {result['weights']}, group {result['group_size']}, {result['solver']}"


if __name__ == "__main__":
    main()
