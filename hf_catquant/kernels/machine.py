"""What this machine can do at most, measured: bytes it reads in a second, and 8-bit integers it multiplies in one."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from .native import PATHS, library

REPEATS = 7
ROUNDS = {"amx": 100_000, "avx512": 1_000_000}  # a few milliseconds each


def read_bandwidth(memory: Tensor, threads: int) -> float | None:
    """Bytes a second at which ``threads`` threads read ``memory`` (bytes,) uint8 once; None without the library."""
    native: Any = library()
    if native is None:
        return None
    return memory.numel() / _best(lambda: native.cq_measure_read(memory.data_ptr(), memory.numel(), threads))


def integer_peak(path: str, threads: int) -> float | None:
    """Operations a second of ``path``, a product and its sum being two; None where it has no instruction for that."""
    native: Any = library()
    if native is None or path not in ROUNDS:
        return None
    number, rounds = PATHS[path], ROUNDS[path]
    products = native.cq_measure_products(number, rounds, threads)
    if not products:
        return None
    return 2 * products / _best(lambda: native.cq_measure_products(number, rounds, threads))


def spare_memory(size: int) -> Tensor:
    """``size`` bytes that have been written to, so that reading them reads memory."""
    return torch.ones(size, dtype=torch.uint8)


def _best(call: Any) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
