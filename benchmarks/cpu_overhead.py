"""What one call costs on the CPU beside its arithmetic: a weight of 64 x 64, one row.

    python benchmarks/cpu_overhead.py

Medians of 25 times 400 calls that take turns, in microseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_catquant.bench import machine, random_weight
from hf_catquant.kernels import direct

CALLS, TURNS = 400, 25


def main() -> None:
    """Measure and print."""
    ops, generator = torch.ops.catquant, torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((1, 64), (64, 64), (64,)))
    packed = random_weight("ternary", 64, 64, 64, generator)
    rivals = {
        "F.linear": partial(nn.functional.linear, x, weight, bias),
        "catquant::linear": partial(ops.linear, x, *packed, None, None, bias, "ternary", 64, None),
        "the same as layers call it": partial(direct.linear, x, *packed, None, None, bias, "ternary", 64, None),
        "catquant::rotate": partial(ops.rotate, x, False),
    }
    print(machine())
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = microseconds(rivals)
        print(mode.__name__, ", ".join(f"{name} {value:.1f} us" for name, value in found.items()))


def microseconds(rivals: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(TURNS):
        for name, call in rivals.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
