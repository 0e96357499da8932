"""Are the CUDA kernels right? Checks compare with the reference or float64; an ``error`` above 1 is wrong.

A check yields rows, one a case: what it was, and its error in units of what rounding allows (0 or infinite where results
have to be equal).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from gpu_tools import normal, op, random_weight
from torch import Tensor

from hf_catquant.formats import FORMATS, get_format
from hf_catquant.kernels import cuda_calls, cuda_driver, cuda_layout, cuda_products, cuda_table, reference
from hf_catquant.rotation import rotate
from hf_catquant.weight import dequantize_packed, quantize_activation

Row = dict[str, Any]
SMALL = ((40, 200, 64), (17, 33, 8), (70, 512, 128), (33, 520, -1))
LARGE = (1024, 4096, 128)


def compare(out: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """The largest error in units of what the rounding of each factor, and of the result, allows."""
    if out.is_meta:
        return 0.0
    allowed = 2 * torch.finfo(out.dtype).eps * magnitude + 1e-7
    return float(((out.double() - exact).abs() / allowed).nan_to_num(float("inf")).max())


def same(out: Tensor, expected: Tensor) -> float:
    """0 if they are equal, else infinite."""
    return 0.0 if out.is_meta or torch.equal(out, expected) else float("inf")


def product_cases(
    device: torch.device, counts: tuple[int, ...], shapes: tuple[tuple[int, int, int], ...]
) -> Iterator[Row]:
    """Products from tiles, of every format."""
    for name in FORMATS:
        for rows, columns, group_size in shapes:
            stored = random_weight(name, rows, columns, group_size, device)
            layout = cuda_layout.build(*stored, name, group_size, columns)
            dense = dequantize_packed(*stored, get_format(name), group_size, columns).double()
            bias = normal(rows, device=device, seed=1)
            for tokens in counts:
                for dtype, activations in ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "int8")):
                    x = normal(tokens, columns, device=device, dtype=dtype, seed=tokens)
                    out = cuda_products.multiply(x, layout, bias.to(dtype), activations)
                    x_hat = quantize_activation(x.float(), FORMATS["int8"]) if activations else x
                    exact = x_hat.double() @ dense.T + bias.double()
                    error = compare(out, exact, x_hat.double().abs() @ dense.abs().T + bias.double().abs())
                    row = {"check": name, "shape": (rows, columns, group_size), "tokens": tokens, "error": error}
                    row["of"] = activations or str(dtype).removeprefix("torch.")
                    if not out.is_meta and (rows, columns, group_size) == LARGE:
                        # How much is lost beyond what writing the exact result down costs.
                        rounding = (exact.to(out.dtype).double() - exact).norm()
                        row["times_rounding"] = float((out.double() - exact).norm() / rounding)
                    yield row


def few(device: torch.device, quick: bool) -> Iterator[Row]:
    """split8.cu, product8.cu and product16.cu."""
    shapes, counts = (SMALL[:1], (1, 5)) if quick else ((*SMALL, LARGE), (1, 2, 3, 4, 5, 6, 7, 8))
    yield from product_cases(device, counts, shapes)


def many(device: torch.device, quick: bool) -> Iterator[Row]:
    """wgemm.cu and arrange.cu where the device has warp groups, gemm.cu and sums.cu; partials.cu."""
    shapes, counts = (SMALL[2:3], (9, 70)) if quick else ((*SMALL, LARGE), (9, 17, 40, 65, 200))
    yield from many_cases(device, counts, shapes, quick)
    with mock.patch.object(cuda_driver, "has_warp_groups", return_value=False):
        yield from many_cases(device, counts, shapes, quick)


def many_cases(
    device: torch.device, counts: tuple[int, ...], shapes: tuple[tuple[int, int, int], ...], quick: bool
) -> Iterator[Row]:
    """Products of many tokens on one kernel."""
    yield from product_cases(device, counts, shapes)
    if quick:
        return
    yield from product_cases(device, (9, 16), ((4096, 640, 128), (4096, 520, 32)))  # tall blocks
    with (
        mock.patch.object(cuda_table, "cuts", return_value=3),
        mock.patch.object(cuda_table, "group_cuts", return_value=3),
    ):
        cuda_table._shared.cache_clear()
        cuda_table._grouped.cache_clear()
        for row in product_cases(device, (9, 40, 100), ((280, 640, 128), (70, 1300, -1))):
            yield {**row, "parts": 3}
    cuda_table._shared.cache_clear()
    cuda_table._grouped.cache_clear()


def weights(device: torch.device, quick: bool) -> Iterator[Row]:
    """weight.cu, untile.cu and what is multiplied with their results."""
    for name in FORMATS:
        for rows, columns, group_size in SMALL[:1] if quick else (*SMALL, LARGE):
            stored = random_weight(name, rows, columns, group_size, device)
            settings = (name, group_size, columns)
            label = {"check": name, "shape": (rows, columns, group_size)}
            for dtype in cuda_calls.TYPES:
                expected = reference.dequantize(*stored, *settings, dtype)
                found = op("dequantize", device)(*stored, *settings, dtype)
                yield {**label, "of": f"dequantize {dtype}", "error": same(found, expected)}
            layout = cuda_layout.build(*stored, *settings)
            expected = reference.dequantize(*stored, *settings, torch.bfloat16)
            if layout.spread is None:  # others have padding between their groups, and `dense` reads their stored bytes
                for dtype in cuda_calls.TYPES:
                    wanted = reference.dequantize(*stored, *settings, dtype)
                    found = cuda_calls.untile(layout, 0, -(-rows // 16), dtype)[:, :columns]
                    yield {**label, "of": f"untile {dtype}", "error": same(found, wanted)}
            index = torch.arange(rows - 1, -1, -2, device=device).view(1, -1)
            found = op("embedding", device)(index, *stored, *settings, torch.bfloat16)
            yield {**label, "of": "embedding", "error": same(found, expected[index])}
            x, dense = normal(300, columns, device=device), expected.double()
            with mock.patch.object(cuda_table, "DENSE_BYTES", 1):
                found = cuda_calls.dense(x, *stored, name, group_size, None, layout)
            error = compare(found, x.double() @ dense.T, x.double().abs() @ dense.abs().T)
            yield {**label, "of": "dense", "error": error}


def rest(device: torch.device, quick: bool) -> Iterator[Row]:
    """rotate.cu, cluster.cu, and convolution."""
    for columns in (96, 4096) if quick else (1, 7, 12, 64, 96, 768, 2080, 4096, 8192, 14336):
        for inverse in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                x = normal(5, columns, device=device, dtype=dtype)
                found, exact = op("rotate", device)(x, inverse), rotate(x.double(), inverse)
                spread = x.double().norm(dim=-1, keepdim=True).expand_as(exact) + exact.abs()
                error = compare(found, exact.double(), spread / 2)
                yield {"check": "rotate", "columns": columns, "of": str(dtype), "inverse": inverse, "error": error}
    for dtype in cuda_calls.TYPES:
        for tokens, width, rank in ((3, 70, 0), (5, 70, 40), (100, 512, 50)):
            y = normal(tokens, width, device=device, dtype=dtype)
            basis = normal(width, rank, device=device, dtype=torch.float32, seed=2) if rank else None
            centroids = normal(11, rank or width, device=device, dtype=torch.float32, seed=3)
            gamma, beta = (normal(11, width, device=device, dtype=torch.float32, seed=s) for s in (4, 5))
            found = op("cluster_affine", device)(y, basis, centroids, gamma, beta)
            expected = reference.cluster_affine(y, basis, centroids, gamma, beta).double()
            error = compare(found, expected, expected.abs() + 1)
            yield {"check": "cluster_affine", "of": str(dtype), "shape": (tokens, width, rank), "error": error}
    for side in (6, 30):
        stored = random_weight("ternary", 24, 16 * 9, 48, device)
        x, bias = normal(2, 16, side, side, device=device), normal(24, device=device)
        arguments = (x, *stored, None, None, bias, "ternary", 48, None, [3, 3], [1, 1], [1, 1], [1, 1], 1)
        for turn in ("first", "second"):
            found = op("conv", device)(*arguments)
            expected = reference.conv(*arguments).double()
            error = compare(found, expected, 4 * expected.abs() + 4)
            yield {"check": "conv", "of": f"{side} x {side}, {turn}", "error": error}


def running(device: torch.device, quick: bool) -> Iterator[Row]:
    """The same twice, on another stream, replayed from a graph, with autograd, and compiled."""
    stored, rest = random_weight("ternary", 512, 1024, 128, device), (None, None, None, "ternary", 128, None)
    linear = op("linear", device)
    for tokens in (1, 6, 40, 300):
        x = normal(tokens, 1024, device=device)
        linear(x, *stored, *rest)
        expected = linear(x, *stored, *rest)
        for _ in range(1 if quick else 20):
            yield {"check": "again", "tokens": tokens, "error": same(linear(x, *stored, *rest), expected)}
        if device.type != "cuda":
            continue
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = linear(x, *stored, *rest)
        stream.synchronize()
        yield {"check": "another stream", "tokens": tokens, "error": same(found, expected)}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = linear(x, *stored, *rest)
        x.copy_(x.flip(0))
        graph.replay()
        yield {"check": "graph", "tokens": tokens, "error": same(found, linear(x, *stored, *rest))}
        compiled = torch.compile(lambda x: linear(x, *stored, *rest), fullgraph=True, backend="aot_eager")
        yield {"check": "compiled", "tokens": tokens, "error": same(compiled(x), linear(x, *stored, *rest))}
        y = x.clone().requires_grad_()
        out = linear(y, *stored, *rest)
        out += 1
        out.sum().backward()
        dense = reference.dequantize(*stored, "ternary", 128, 1024, torch.bfloat16).double()
        error = compare(y.grad, dense.sum(0).expand(tokens, -1), dense.abs().sum(0).expand(tokens, -1))
        yield {"check": "gradient", "tokens": tokens, "error": error}


CHECKS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "check few": few,
    "check many": many,
    "check weights": weights,
    "check rest": rest,
    "check running": running,
}
