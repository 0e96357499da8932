"""Everything that can only be known on a GPU, in one run of a few minutes: are the CUDA kernels right, and how fast.

    python benchmarks/gpu.py [--out FILE] [--minutes 8] [--only correct bandwidth products launches thresholds decode peers]

Needs torch with CUDA and a GPU of compute capability 8.0 or newer; the rest of the package's dependencies are not used.
Wrong answers are never timed: the run stops, and exits with 1. Times are the shortest of several replays of a CUDA graph
whose calls go through copies of the weight that together are far larger than the second-level cache. Results go to
``benchmarks/results/gpu.json`` part by part, so that what was measured is kept if the run is cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
if "hf_catquant" not in sys.modules:  # past the package's own __init__, which needs transformers
    package = types.ModuleType("hf_catquant")
    package.__path__ = [str(ROOT / "hf_catquant")]
    sys.modules["hf_catquant"] = package

from hf_catquant.formats import FORMATS, get_format, group_count  # noqa: E402
from hf_catquant.kernels import cuda, cuda_calls, cuda_compile, cuda_layout, cuda_table  # noqa: E402
from hf_catquant.packing import packed_width  # noqa: E402
from hf_catquant.weight import dequantize_packed, quantize_activation  # noqa: E402

SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
TOKENS = (1, 4, 16, 64, 256, 2048)
ROTATED_BYTES = 512 << 20  # of copies of a weight: ten times the second-level cache of an H200
Stored = tuple[Tensor, Tensor, Tensor | None]


def random_weight(name: str, rows: int, columns: int, group_size: int, device: torch.device, seed: int = 0) -> Stored:
    """Codes, scales and offsets as a layer stores them, of about unit output variance."""
    fmt, generator = get_format(name), torch.Generator(device=device).manual_seed(seed)
    limit = fmt.radix**fmt.digits if fmt.nbytes == 1 else 256
    make: dict[str, Any] = {"generator": generator, "device": device}
    packed = torch.randint(limit, (rows, packed_width(fmt, columns, group_size)), dtype=torch.uint8, **make)
    shape = (rows, group_count(columns, group_size))
    scale = (0.5 + torch.rand(shape, **make)) / (max(map(abs, fmt.levels)) * columns**0.5)
    offset = torch.randn(shape, **make) * 0.1 / columns**0.5 if fmt.affine else None
    return packed, scale.half(), None if offset is None else offset.half()


def check_products(device: torch.device, quick: bool) -> dict[str, float]:
    """The largest error of each format, in units of what its rounding allows; above 1 is wrong."""
    worst: dict[str, float] = {}
    shapes = ((40, 200, 64), (17, 33, 8), (70, 512, 128), (33, 520, -1))
    counts = (1, 2, 5) if quick else (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 64, 100)
    for name in FORMATS:
        for rows, columns, group_size in shapes[:1] if quick else (*shapes, (1024, 4096, 128)):
            stored = random_weight(name, rows, columns, group_size, device)
            layout = cuda_layout.build(*stored, name, group_size, columns)
            dense = dequantize_packed(*stored, get_format(name), group_size, columns).double()
            for tokens in counts:
                for dtype, activations in ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "int8")):
                    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
                    out = cuda_calls.multiply(x, layout, None, activations)
                    x_hat = quantize_activation(x.float(), FORMATS["int8"]) if activations else x
                    allowed = 2 * torch.finfo(dtype).eps * (x_hat.double().abs() @ dense.abs().T) + 1e-7
                    error = ((out.double() - x_hat.double() @ dense.T).abs() / allowed).max()
                    key = f"{name} {str(dtype).removeprefix('torch.')} {activations or 'x'}"
                    worst[key] = max(worst.get(key, 0.0), float(error))
            expected = dequantize_packed(*stored, get_format(name), group_size, columns).bfloat16()
            same = torch.equal(cuda.dequantize(*stored, name, group_size, columns, torch.bfloat16), expected)
            worst[f"{name} dequantize"] = max(worst.get(f"{name} dequantize", 0.0), 0.0 if same else float("inf"))
    return worst


def sanitize() -> str:
    """What compute-sanitizer says about the smallest cases, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    found = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--quick"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
        found.append(f"{check}: {done.returncode} {done.stdout.strip().splitlines()[-1:]}")
    return "; ".join(found)


def timed(calls: list[Callable[[], Any]], replays: int = 10) -> float:
    """Microseconds a call: the shortest replay of a graph of all ``calls``, after each has run three times."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    shortest = float("inf")
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        shortest = min(shortest, start.elapsed_time(end))
    return 1e3 * shortest / len(calls)


def copies(nbytes: int) -> int:
    return max(2, min(64, ROTATED_BYTES // nbytes))


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy (read and write), and of cuBLAS's bfloat16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timed([lambda: target.copy_(source)] * 4)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = timed([lambda: a @ a] * 4)
    return {"copy_tb_s": 2 * source.nbytes / copied / 1e6, "bf16_tflop_s": 2 * 8192**3 / product / 1e6}


def bf16_time(rows: int, columns: int, tokens: int, device: torch.device) -> float:
    """Microseconds of torch's bfloat16 linear."""
    weights = [
        torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * rows * columns))
    ]
    x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
    return timed([lambda w=w: F.linear(x, w) for w in weights])


def op_time(
    name: str, shape: tuple[int, int], group_size: int, tokens: int, activations: str | None, device: torch.device
) -> float:
    """Microseconds of catquant::linear, whatever it is served by."""
    rows, columns = shape
    width = packed_width(get_format(name), columns, group_size)
    weights = [random_weight(name, *shape, group_size, device, seed) for seed in range(copies(rows * width))]
    x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
    arguments = (None, None, None, name, group_size, activations)
    return timed([lambda w=w: torch.ops.catquant.linear(x, *w, *arguments) for w in weights])


def products(device: torch.device) -> Iterator[dict[str, Any]]:
    """Every format, shape and number of tokens beside bfloat16, the most wanted first."""
    cases = [("ternary", 128, None), ("binary", 128, None), ("int4", 128, None), ("ternary", 128, "int8")]
    cases += [("ternary", -1, None), ("int3", 128, None), ("int8", 128, None)]
    dense: dict[tuple[tuple[int, int], int], float] = {}
    for name, group_size, activations in cases:
        for shape in SHAPES:
            for tokens in TOKENS:
                if (shape, tokens) not in dense:
                    dense[shape, tokens] = bf16_time(*shape, tokens, device)
                taken = op_time(name, shape, group_size, tokens, activations, device)
                fmt = get_format(name)
                scales = (2 if fmt.affine else 1) * 2 * shape[0] * group_count(shape[1], group_size)
                bits = cuda_layout.code_bits(fmt)
                moved = shape[0] * shape[1] * bits / 8 + scales + 2 * tokens * sum(shape)
                yield {
                    "weights": name,
                    "group_size": group_size,
                    "activations": activations,
                    "shape": shape,
                    "tokens": tokens,
                    "us": taken,
                    "bf16_us": dense[shape, tokens],
                    "speedup": dense[shape, tokens] / taken,
                    "tb_s": moved / taken / 1e6,
                }


def launches(device: torch.device) -> Iterator[dict[str, Any]]:
    """The launch table swept: row tiles and warps of a block, for one and for eight tokens."""
    for name in ("ternary", "binary", "int4"):
        for shape in SHAPES:
            weights = [
                random_weight(name, *shape, 128, device, seed) for seed in range(copies(shape[0] * shape[1] // 4))
            ]
            layouts = [cuda_layout.build(*w, name, 128, shape[1]) for w in weights]
            for tokens in (1, 8):
                x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
                for tiles, warps in ((1, 8), (1, 16), (2, 8), (2, 16), (4, 4), (4, 8)):
                    chosen = cuda_table.blocks
                    cuda_table.blocks = lambda *_, tiles=tiles, warps=warps: (tiles, warps)
                    cuda_table._plan.cache_clear()
                    try:
                        taken = timed([lambda at=at, x=x: cuda_calls.multiply(x, at, None, None) for at in layouts])
                    finally:
                        cuda_table.blocks = chosen
                        cuda_table._plan.cache_clear()
                    yield {
                        "weights": name,
                        "shape": shape,
                        "tokens": tokens,
                        "tiles": tiles,
                        "warps": warps,
                        "us": taken,
                    }


def thresholds(device: torch.device) -> Iterator[dict[str, Any]]:
    """Tiles against dequantization and cuBLAS over the number of tokens, and pieces of the dequantized weight."""
    shape, name = (8192, 8192), "ternary"
    weights = [random_weight(name, *shape, 128, device, seed) for seed in range(8)]
    layouts = [cuda_layout.build(*w, name, 128, shape[1]) for w in weights]
    for tokens in (4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048):
        x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"tokens": tokens, "bf16": bf16_time(*shape, tokens, device)}
        row["tiles"] = timed([lambda at=at, x=x: cuda_calls.multiply(x, at, None, None) for at in layouts])
        row["tiles int8"] = timed([lambda at=at, x=x: cuda_calls.multiply(x, at, None, "int8") for at in layouts])
        before = cuda_table.DENSE_BYTES
        for size in (8, 24, 64, 256):
            cuda_table.DENSE_BYTES = size << 20
            row[f"dense {size} MB"] = timed(
                [lambda w=w, x=x: cuda_calls.dense(x, *w, name, 128, None) for w in weights]
            )
        cuda_table.DENSE_BYTES = before
        yield row


def decode(device: torch.device, layers: int = 16, width: int = 4096, inner: int = 14336) -> dict[str, float]:
    """Microseconds a token of ``layers`` Llama-shaped blocks (8B: 32 heads, 8 of keys), batch 1, 1024 tokens of context."""
    heads, keys, size = 32, 8, width // 32
    shapes = {
        "qkv": (width + 2 * keys * size, width),
        "o": (width, width),
        "up": (2 * inner, width),
        "down": (width, inner),
    }
    cache = torch.randn(2, layers, 1, keys, 1024, size, device=device, dtype=torch.bfloat16)
    gain = torch.ones(width, device=device, dtype=torch.bfloat16)
    x = torch.randn(1, 1, width, device=device, dtype=torch.bfloat16)

    def step(linear: Callable[[Any, Tensor], Tensor], weights: dict[tuple[int, str], Any]) -> Tensor:
        h = x
        for layer in range(layers):
            q = linear(weights[layer, "qkv"], F.rms_norm(h, (width,), gain))[..., :width].view(1, heads, 1, size)
            mixed = F.scaled_dot_product_attention(q, cache[0, layer], cache[1, layer], enable_gqa=True)
            h = h + linear(weights[layer, "o"], mixed.reshape(1, 1, width))
            gate, up = linear(weights[layer, "up"], F.rms_norm(h, (width,), gain)).chunk(2, -1)
            h = h + linear(weights[layer, "down"], F.silu(gate) * up)
        return h

    def time_of(linear: Callable[[Any, Tensor], Tensor], make: Callable[[tuple[int, int]], Any]) -> float:
        weights = {(i, n): make(shape) for i in range(layers) for n, shape in shapes.items()}
        return timed([lambda: step(linear, weights)])

    def dense(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) / 64

    found = {"bfloat16": time_of(lambda weight, h: F.linear(h, weight), dense)}
    for name in ("ternary", "binary", "int4"):
        rest = (None, None, None, name, 128, None)
        found[name] = time_of(
            lambda weight, h, rest=rest: torch.ops.catquant.linear(h, *weight, *rest),
            lambda shape, name=name: random_weight(name, *shape, 128, device),
        )
    return found


def peers(device: torch.device) -> Iterator[dict[str, Any]]:
    """bitsandbytes NF4 and GemLite 2 and 4 bits, where they are installed, in the same rotation."""
    for make in (bitsandbytes_nf4, gemlite_two, gemlite_four):
        for shape in SHAPES:
            try:
                layers = [make(*shape, device) for _ in range(copies(shape[0] * shape[1] // 2))]
            except Exception as error:
                yield {"peer": make.__name__, "error": f"{type(error).__name__}: {error}"[:300]}
                break
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
                try:
                    taken = timed([lambda layer=layer, x=x: layer(x) for layer in layers])
                    yield {"peer": make.__name__, "shape": shape, "tokens": tokens, "us": taken}
                except Exception as error:
                    yield {"peer": make.__name__, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:300]}


def bitsandbytes_nf4(rows: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    return layer.to(torch.bfloat16).to(device)


def gemlite_two(rows: int, columns: int, device: torch.device, bits: int = 2) -> Callable[[Tensor], Tensor]:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(
        bits, 128, columns, rows, input_dtype=DType.BF16, output_dtype=DType.BF16, scaled_activations=False
    )
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    scales, zeros = torch.rand(2, rows, columns // 128, device=device, dtype=torch.bfloat16)
    layer.pack(codes, scales, zeros, None)
    return layer


def gemlite_four(rows: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    return gemlite_two(rows, columns, device, bits=4)


PARTS: dict[str, Callable[[torch.device], Any]] = {
    "bandwidth": bandwidth,
    "products": products,
    "thresholds": thresholds,
    "launches": launches,
    "decode": decode,
    "peers": peers,
}


def machine(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, cuda_compile.version())),
        "date": str(date.today()),
        "seed": 0,
    }


def run(names: list[str], out: Path, minutes: float) -> int:
    device, until = torch.device("cuda"), time.time() + 60 * minutes
    results: dict[str, Any] = {"machine": machine(device)}
    out.parent.mkdir(parents=True, exist_ok=True)
    results["correct"] = check_products(device, quick=False)
    results["sanitizer"] = sanitize()
    wrong = {key: value for key, value in results["correct"].items() if not value <= 1}
    print(json.dumps({k: results[k] for k in ("machine", "sanitizer")}, indent=1))
    print("largest error in units of what rounding allows:", max(results["correct"].values()))
    for name in [] if wrong else names:
        found = PARTS[name](device)
        rows = found if isinstance(found, Iterator) else [found]
        kept = results.setdefault(name, [])
        for row in rows:
            kept.append(row)
            print(name, json.dumps(row), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
            if time.time() > until:
                results["cut_off"] = name
                break
        torch.cuda.empty_cache()
    out.write_text(json.dumps(results, indent=1) + "\n")
    if wrong:
        print(f"wrong answers, nothing was timed: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=8, help="no new measurement is begun after these")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="check a few cases and time nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU: torch finds no CUDA device", file=sys.stderr)
        return 2
    os.environ[cuda.SWITCH] = "cuda"  # what has no kernel raises instead of running on the reference
    if arguments.quick:
        found = check_products(torch.device("cuda"), quick=True)
        print(found)
        return 0 if all(value <= 1 for value in found.values()) else 1
    return run(arguments.only, arguments.out, arguments.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
