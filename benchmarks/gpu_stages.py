"""What ``gpu.py`` times. A stage takes the device and the names of the kernels that were found right, and yields rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
from gpu_peers import PEERS, Layer
from gpu_tools import SHAPES, TOKENS, Launches, Stored, copies, normal, op, random_weight, timed
from torch import Tensor
from torch.nn import functional as F

from hf_catquant.formats import get_format, group_count
from hf_catquant.kernels import cuda_calls, cuda_driver, cuda_layout, cuda_products, cuda_table, cuda_trial
from hf_catquant.kernels.cuda_table import Group

Row = dict[str, Any]
Right = set[str]
BLOCKS = ((1, 8), (1, 16), (2, 8), (2, 16), (4, 4), (4, 8))  # row tiles and warps of product16 that are tried
# Of split8, with chunks under way and blocks of a multiprocessor.
SPLIT_BLOCKS = (
    *((tiles, warps, 1, 1) for tiles, warps in ((1, 16), (2, 16), (4, 8), (4, 16), (7, 8), (10, 8), (14, 8), (16, 8))),
    *((tiles, 16, 2, 1) for tiles in (2, 4)),
    *((tiles, 4, 2, 2) for tiles in (7, 8)),
    (2, 8, 2, 2),
)


# Of products of warp groups, by rows of x and activations: column tiles, times 64 rows of a warp group, warps, stages of x,
# blocks of a multiprocessor. Above LOOKED_UP_TOKENS rows those of 16-bit activations are wdense's, others wgemm's.
GROUPS = {
    (16, None): (
        Group(2, 2, 4, 4, 3),
        Group(2, 2, 4, 4, 2),
        Group(2, 2, 8, 4, 1),
        Group(2, 1, 4, 4, 5),
        Group(2, 1, 8, 4, 2),
    ),
    (32, None): (Group(4, 2, 4, 3, 2), Group(4, 1, 4, 3, 3), Group(4, 1, 8, 3, 1)),
    (64, None): (Group(8, 1, 8, 3, 1), Group(8, 1, 4, 3, 2), Group(8, 2, 4, 3, 2)),
    (128, None): (Group(16, 2, 8, 3, 1), Group(16, 1, 8, 3, 1), Group(8, 2, 8, 3, 1)),
    (512, None): (Group(16, 2, 8, 3, 1), Group(16, 1, 8, 3, 1), Group(16, 1, 12, 3, 1), Group(8, 2, 8, 3, 1)),
    (16, "int8"): (Group(2, 2, 4, 4, 3), Group(2, 1, 4, 4, 5)),
    (64, "int8"): (Group(8, 1, 8, 3, 1), Group(8, 1, 4, 3, 3)),
    (512, "int8"): (Group(16, 1, 8, 4, 1), Group(8, 2, 8, 4, 1), Group(8, 1, 4, 4, 3)),
}


def measured(calls: list[Callable[[], Any]], device: torch.device, right: Right) -> Row:
    """{"us": microseconds a call}, or why it was not timed."""
    calls[0]()  # the first use of a weight dequantizes it: a layout is built at the second, and only that way is timed
    launches = Launches()
    with launches.watch():
        calls[0]()
    unsure = launches.sources - right
    if unsure:
        return {"skipped": f"not found right: {', '.join(sorted(unsure))}"}
    return {"us": timed(calls, device)}


def memory(device: torch.device, count: int = 1 << 30) -> Iterator[Row]:
    """Bytes a second of a copy (read and write), and of a sum (read only), of ``count`` float32 numbers.

    The driver's copy and one by a kernel differ, and small ones are slower than what the memory can do, which is the best.
    """
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    found = {
        "driver": timed([lambda: target.copy_(source)] * 2, device),
        "kernel": timed([lambda: torch.neg(source, out=target)] * 2, device),
    }
    rates = {way: 2 * source.nbytes / taken / 1e6 for way, taken in found.items()}
    yield {"copy_tb_s": max(rates.values()), **rates}
    reading: tuple[Callable[[], Any], ...] = (source.sum, source.amax, lambda: source.view(1 << 14, -1).sum(1))
    yield {"read_tb_s": source.nbytes / min(timed([call] * 2, device) for call in reading) / 1e6}


def bandwidth(device: torch.device, right: Right) -> Iterator[Row]:
    """Bytes a second of the memory, and cuBLAS's bfloat16 and int8 products."""
    yield from memory(device)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    yield {"bf16_tflop_s": 2 * 8192**3 / timed([lambda: a @ a] * 4, device) / 1e6}
    b = a.to(torch.int8)
    yield {"int8_top_s": 2 * 8192**3 / timed([lambda: torch._int_mm(b, b.T)] * 4, device) / 1e6}


def bf16_times(shape: tuple[int, int], counts: tuple[int, ...], device: torch.device) -> dict[int, float]:
    """Microseconds of torch's bfloat16 linear by tokens."""
    rows, columns = shape
    weights = [
        torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * rows * columns))
    ]
    found = {}
    for tokens in counts:
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        found[tokens] = timed([lambda w=w, x=x: F.linear(x, w) for w in weights], device)
    return found


def rotated(name: str, shape: tuple[int, int], group_size: int, device: torch.device) -> list[Stored]:
    """Copies of a weight that together no cache holds, counted by their tiles."""
    nbytes = shape[0] * shape[1] * cuda_layout.code_bits(get_format(name)) // 8
    return [random_weight(name, *shape, group_size, device, seed) for seed in range(copies(nbytes))]


def products(device: torch.device, right: Right) -> Iterator[Row]:
    """Every format, shape and number of tokens beside bfloat16, the most wanted first."""
    cases = [("ternary", 128, None), ("binary", 128, None), ("ternary", 128, "int8"), ("int4", 128, None)]
    cases += [
        ("ternary", -1, None),
        ("binary", 128, "int8"),
        ("int4", 128, "int8"),
        ("int3", 128, None),
        ("int8", 128, None),
    ]
    dense = {shape: bf16_times(shape, TOKENS, device) for shape in SHAPES}
    linear = op("linear", device)
    for name, group_size, activations in cases:
        fmt = get_format(name)
        for shape in SHAPES:
            weights = rotated(name, shape, group_size, device)
            scales = (2 if fmt.affine else 1) * 2 * shape[0] * group_count(shape[1], group_size)
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
                settings = (None, None, None, name, group_size, activations)
                row = measured([lambda w=w, x=x, s=settings: linear(x, *w, *s) for w in weights], device, right)
                if "us" in row:
                    moved = shape[0] * shape[1] * cuda_layout.code_bits(fmt) / 8 + scales + 2 * tokens * sum(shape)
                    row |= {"bf16_us": dense[shape][tokens], "speedup": dense[shape][tokens] / row["us"]}
                    row["tb_s"] = moved / row["us"] / 1e6
                case = {"weights": name, "group_size": group_size, "activations": activations, "shape": shape}
                yield {**case, "tokens": tokens, **row}


def thresholds(device: torch.device, right: Right) -> Iterator[Row]:
    """Each way to make a product over the number of tokens, and pieces of the dequantized weight."""
    shape, name = (8192, 8192), "ternary"
    weights = rotated(name, shape, 128, device)[:16]
    layouts = [cuda_layout.build(*w, name, 128, shape[1]) for w in weights]
    dense = bf16_times(shape, (2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), device)
    for tokens, bf16 in dense.items():
        x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
        row: Row = {"tokens": tokens, "bf16": bf16}

        def tiles(x: Tensor = x, activations: str | None = None) -> Row:
            calls = [lambda at=at: cuda_products.multiply(x, at, None, activations) for at in layouts]
            return measured(calls, device, right)

        for split in (0, 4) if tokens <= 4 else ():
            with mock.patch.object(cuda_table, "SPLIT_TOKENS", split):
                row["8-bit pairs" if split else "16-bit"] = tiles()
        for limit in (8, 64) if 8 < tokens <= 64 else (8,):
            with mock.patch.object(cuda_table, "FEW_TOKENS", limit):
                row["shared" if tokens > limit else "each warp"] = tiles()
        for limit in (0, tokens) if tokens > 8 else ():
            with mock.patch.object(cuda_table, "LOOKED_UP_TOKENS", limit):
                row["codes as they are" if limit else "looked up"] = tiles()
        if 8 < tokens <= 16:
            with mock.patch.object(cuda_table, "TALL_TOKENS", 0):
                cuda_table._shared.cache_clear()
                row["shared, 32 rows a warp"] = tiles()
            cuda_table._shared.cache_clear()
        row["int8"] = tiles(activations="int8")
        for size in (24, 64, 256) if tokens >= 64 else ():
            with mock.patch.object(cuda_table, "DENSE_BYTES", size << 20):
                pairs = zip(weights, layouts, strict=True)
                calls = [lambda w=w, at=at, x=x: cuda_calls.dense(x, *w, name, 128, None, at) for w, at in pairs]
                row[f"dense {size} MB"] = measured(calls, device, right)
        yield row


def candidates(tokens: int, activations: str | None, grouped: bool) -> list[dict[str, Any]]:
    """What is tried for so many rows of x: functions of the launch table, and what each is to answer."""
    if tokens == 1:
        return [{"split_shape": chosen} for chosen in SPLIT_BLOCKS]
    if tokens <= 8:
        return [{"blocks": chosen} for chosen in BLOCKS]
    if not grouped:
        return [{"cuts": parts} for parts in (1, 2, 4, 8, 16)]
    return [
        {"group_shape": shape, "group_cuts": parts} for shape in GROUPS[tokens, activations] for parts in (1, 2, 4, 8)
    ]


def launches(device: torch.device, right: Right) -> Iterator[Row]:
    """The launch table swept: shapes of blocks, and parts along k for many tokens."""
    grouped = cuda_driver.has_warp_groups(device)
    remembered = (cuda_table._few, cuda_table._shared, cuda_table._grouped)
    for name, shape in product(("ternary", "binary", "int4"), SHAPES):
        layouts = [cuda_layout.build(*w, name, 128, shape[1]) for w in rotated(name, shape, 128, device)]
        for tokens, activations in ((1, None), (8, None), *GROUPS):
            x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
            calls = [lambda at=at, x=x, how=activations: cuda_products.multiply(x, at, None, how) for at in layouts]
            for chosen in candidates(tokens, activations, grouped):
                answers = {table: lambda *_, answer=answer: answer for table, answer in chosen.items()}
                with mock.patch.multiple(cuda_table, **answers):
                    for function in remembered:
                        function.cache_clear()
                    row = measured(calls, device, right)
                case = {"weights": name, "shape": shape, "tokens": tokens, "activations": activations}
                yield {**case, "chosen": chosen, **row}
    for function in remembered:
        function.cache_clear()


def decode(
    device: torch.device, right: Right, layers: int = 16, width: int = 4096, inner: int = 14336
) -> Iterator[Row]:
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

    def row_of(linear: Callable[[Any, Tensor], Tensor], make: Callable[[tuple[int, int]], Any]) -> Row:
        weights = {(i, n): make(shape) for i in range(layers) for n, shape in shapes.items()}
        return measured([lambda: step(linear, weights)], device, right)

    def dense(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) / 64

    yield {"weights": "bfloat16", **row_of(lambda weight, h: F.linear(h, weight), dense)}
    product, rotate = op("linear", device), op("rotate", device)
    for name, turned in (("ternary", False), ("ternary", True), ("binary", False), ("int4", False)):
        rest = (None, None, None, name, 128, None)
        row = row_of(
            lambda weight, h, rest=rest, turned=turned: product(rotate(h, False) if turned else h, *weight, *rest),
            lambda shape, name=name: random_weight(name, *shape, 128, device),
        )
        yield {"weights": name, "rotated": turned, **row}


def trials(device: torch.device, right: Right) -> Iterator[Row]:
    """What it takes to try a kernel before its first use, and what the trial says."""
    for name, tokens, activations in (
        *(("ternary", tokens, None) for tokens in (1, 6, 16, 100)),
        *(("ternary", tokens, "int8") for tokens in (1, 16, 100)),
        ("int4", 16, None),
    ):
        layout = cuda_layout.build(*random_weight(name, 1024, 1024, 128, device), name, 128, 1024)
        x = torch.randn(tokens, 1024, device=device, dtype=torch.bfloat16)
        cuda_products.multiply(x, layout, None, activations)  # compiled and loaded
        found: dict[Any, str] = {}
        with (
            mock.patch.dict("os.environ", {cuda_trial.SWITCH: "0" if device.type == "meta" else "1"}),
            mock.patch.multiple(cuda_trial, _found=found, _passed={}),
        ):
            start = time.perf_counter()
            cuda_products.multiply(x, layout, None, activations)
            taken = 1e3 * (time.perf_counter() - start)
        said = {key[0].source: wrong or "right" for key, wrong in found.items()}
        yield {"weights": name, "tokens": tokens, "activations": activations, "ms": round(taken, 1), "said": said}


def other_ops(device: torch.device, right: Right) -> Iterator[Row]:
    """Rotation, look-up, correction and convolution."""
    stored = random_weight("ternary", 32000, 4096, 128, device)
    small = random_weight("ternary", 512, 512 * 9, 128, device)
    basis, centroids, gamma, beta = (
        normal(*shape, device=device, dtype=torch.float32) for shape in ((4096, 50), (16, 50), (16, 4096), (16, 4096))
    )
    for tokens in (1, 16, 2048):
        x = torch.randn(tokens, 4096, device=device, dtype=torch.bfloat16)
        index = torch.zeros(tokens, dtype=torch.int64, device=device)
        image = torch.randn(1, 512, 7 if tokens < 2048 else 56, 7, device=device, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            "copy": lambda x=x: x.clone(),
            "rotate": lambda x=x: op("rotate", device)(x, False),
            "embedding": lambda i=index: op("embedding", device)(i, *stored, "ternary", 128, 4096, torch.bfloat16),
            "cluster_affine": lambda x=x: op("cluster_affine", device)(x, basis, centroids, gamma, beta),
            "conv": lambda x=image: op("conv", device)(
                x, *small, None, None, None, "ternary", 128, None, [3, 3], [1, 1], [1, 1], [1, 1], 1
            ),
        }
        for name, call in calls.items():
            yield {"op": name, "tokens": tokens, **measured([call] * 10, device, right)}


def peers(device: torch.device, right: Right) -> Iterator[Row]:
    """Other libraries, where they are installed, in the same rotation."""
    for make, counts in PEERS.items():
        for shape in SHAPES:
            try:
                layers: list[Layer] = [make(*shape, device) for _ in range(copies(shape[0] * shape[1] // 2))]
            except Exception as error:
                yield {"peer": make.__name__, "error": f"{type(error).__name__}: {error}"[:300]}
                break
            for tokens in counts or TOKENS:
                x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
                try:
                    taken = timed([lambda layer=layer, x=x: layer(x) for layer in layers], device)
                    yield {"peer": make.__name__, "shape": shape, "tokens": tokens, "us": taken}
                except Exception as error:
                    yield {"peer": make.__name__, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:300]}


STAGES: dict[str, Callable[[torch.device, Right], Iterator[Row]]] = {
    "bandwidth": bandwidth,
    "products": products,
    "thresholds": thresholds,
    "decode": decode,
    "peers": peers,
    "other ops": other_ops,
    "trials": trials,
    "launches": launches,
}
