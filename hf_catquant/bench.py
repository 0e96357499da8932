"""Timing of the products: ``catquant bench``.

Every contender multiplies weights that were out of the caches: each call takes the next of many copies, together as
large as ``working_set``. Contenders take turns, so that what else the machine does falls on all of them; each turn begins
with a call that is not timed, since layers of a model follow their like and not another library. A product is checked
against float64 before it is timed. Ratios of medians within a run are worth more than times.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bench_peers import GgmlProduct, ggml_formats, torch_products
from .formats import FORMATS, get_format, group_count
from .kernels import cpu, native, reference
from .kernels.layout import held_bytes
from .kernels.machine import integer_peak, read_bandwidth, spare_memory
from .ops import SCHEMAS
from .packing import packed_width
from .weight import quantize_activation


@dataclass(frozen=True)
class Case:
    """One product: x (M, K) times a weight (N, K)."""

    count: int
    rows: int
    columns: int
    threads: int


@dataclass
class Contender:
    """One way to compute a case, and its times in seconds.

    ``calls`` take turns, one a weight; ``run`` computes without anything around it and is what is timed.
    """

    name: str
    nbytes: int
    calls: Sequence[Callable[[], Any]]
    times: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        """Call the products of the next two weights and note how long the second took."""
        at = 2 * len(self.times)
        before, call = self.calls[at % len(self.calls)], self.calls[(at + 1) % len(self.calls)]
        before()
        start = time.perf_counter()
        call()
        self.times.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Row:
    """What was measured of one contender in one case; ``ratio`` is torch float32's median over this one's."""

    contender: str
    case: Case
    median: float
    best: float
    nbytes: int
    ratio: float
    bandwidth_share: float | None
    peak_share: float | None


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Let torch, and so the kernels, have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_weight(name: str, rows: int, columns: int, group_size: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Packed codes, scale and offset of a weight of random bytes."""
    fmt = get_format(name)
    limit = fmt.radix**fmt.digits if fmt.nbytes == 1 else 256
    shape = (rows, packed_width(fmt, columns, group_size))
    packed = torch.randint(limit, shape, dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows, group_count(columns, group_size), generator=generator).add(0.5).mul(0.01).half()
    return packed, scale, scale * 0.1 if fmt.affine else None


def our_contender(
    case: Case,
    x: Tensor,
    name: str,
    group_size: int,
    activations: str | None,
    working_set: int,
    generator: torch.Generator,
) -> Contender:
    """The op on weights in a format, checked.

    Raises:
        RuntimeError: the product is wrong, and would not be worth timing.
    """
    first = random_weight(name, case.rows, case.columns, group_size, generator)
    options = (None, None, None, name, group_size, activations)
    label = f"{name}/{group_size} {activations or str(x.dtype).removeprefix('torch.')}"
    _check(label, x, first, options, case)
    nbytes = held_bytes(first[0]) or sum(t.nbytes for t in first if t is not None)
    copies = max(1, working_set // nbytes)
    # The same codes in memory of their own: what they are does not change how long they take.
    weights = [first, *(tuple(None if t is None else t.clone() for t in first) for _ in range(copies - 1))]
    calls = [partial(torch.ops.catquant.linear, x, *weight, *options) for weight in weights]
    for call in calls:  # builds the layouts
        call()
    return Contender(label, nbytes, calls)


def _check(label: str, x: Tensor, weight: tuple[Any, ...], options: tuple[Any, ...], case: Case) -> None:
    name, group_size, activations = options[3:]
    packed, scale, offset = weight
    found = torch.ops.catquant.linear(x, *weight, *options)
    dense = reference.dequantize(packed, scale, offset, name, group_size, case.columns, torch.float32).double()
    x_hat = x.float() if activations is None else quantize_activation(x.float(), get_format(activations))
    expected, size = x_hat.double() @ dense.T, x_hat.double().abs() @ dense.abs().T
    # Each factor and the result round by half an eps; sums are kept in float32.
    bound = 2 * torch.finfo(x.dtype).eps * size + 1e-7
    if not bool(((found.double() - expected).abs() <= bound).all()):
        raise RuntimeError(f"{label} gives a wrong product for {case}: it is not timed")


def peer_contenders(
    case: Case, x: Tensor, working_set: int, generator: torch.Generator, names: tuple[str, ...]
) -> Iterator[Contender]:
    """torch in float32 and bfloat16, and llama.cpp if it is installed, those of them that are asked for."""
    weight = torch.randint(0, 2, (case.rows, case.columns), generator=generator).mul_(2).sub_(1).float().mul_(0.02)
    for dtype in (torch.float32, torch.bfloat16):
        label = f"torch {str(dtype).removeprefix('torch.')}"
        if label in names:
            copies = max(1, working_set // (weight.numel() * dtype.itemsize))
            products, nbytes = torch_products(dtype, weight, copies)
            moved = x.to(dtype)
            yield Contender(label, nbytes, [partial(product, moved) for product in products])
    for name, number in ggml_formats():
        if f"llama.cpp {name}" in names:
            yield _ggml_contender(case, x, f"llama.cpp {name}", number, weight, working_set)


def _ggml_contender(case: Case, x: Tensor, label: str, number: int, weight: Tensor, working_set: int) -> Contender:
    first = GgmlProduct(number, weight, case.count, case.threads)
    copies = max(1, working_set // first.nbytes)
    packed = first.packed
    products = [first, *(GgmlProduct(number, weight, case.count, case.threads, packed) for _ in range(copies - 1))]
    for product in products:
        product.load(x)
    first.compute()
    expected = x.float() @ weight.T
    if float((first.result() - expected).norm() / expected.norm()) > 0.15:  # its activations, and q4_0, are rounded
        raise RuntimeError(f"{label} gives a wrong product for {case}: it is not timed")
    return Contender(label, first.nbytes, [product.compute for product in products])


def measure(contenders: list[Contender], seconds: float, least: int = 7) -> None:
    """Let contenders take turns until ``seconds`` have passed, and each had ``least`` turns that count."""
    for contender in contenders:
        contender.take_turn()
        contender.times.clear()
    end, turns = time.perf_counter() + seconds, 0
    while turns < least or time.perf_counter() < end:
        for contender in contenders:
            contender.take_turn()
        turns += 1


class Limits:
    """What the machine can do at most, measured once for every number of threads."""

    def __init__(self, working_set: int) -> None:
        self._memory = spare_memory(working_set)
        self._bandwidth: dict[int, float | None] = {}
        self._peak: dict[int, float | None] = {}

    def bandwidth(self, threads: int) -> float | None:
        """Bytes a second of reading the working set once."""
        if threads not in self._bandwidth:
            self._bandwidth[threads] = read_bandwidth(self._memory, threads)
        return self._bandwidth[threads]

    def peak(self, threads: int) -> float | None:
        """Integer operations a second of the path that is taken."""
        if threads not in self._peak:
            self._peak[threads] = integer_peak(native.PATH, threads)
        return self._peak[threads]


def rows_of(case: Case, contenders: list[Contender], limits: Limits) -> list[Row]:
    """The results of contenders that were measured."""
    medians = {contender.name: statistics.median(contender.times) for contender in contenders}
    base = medians.get("torch float32", float("nan"))
    rows = []
    for contender in contenders:
        median, best = medians[contender.name], min(contender.times)
        bandwidth, peak = limits.bandwidth(case.threads), limits.peak(case.threads)
        operations = 2 * case.count * case.rows * case.columns / median
        rows.append(
            Row(
                contender.name,
                case,
                median,
                best,
                contender.nbytes,
                base / median,
                None if bandwidth is None else contender.nbytes / median / bandwidth,
                None if peak is None else operations / peak,
            )
        )
    return rows


def machine() -> dict[str, Any]:
    """Processor, threads, versions and the path that is taken, as results have them beside them."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "path": native.PATH,
        "paths": list(native.available_paths()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def paths_table() -> list[tuple[str, str, str]]:
    """(op, formats, what computes it on the CPU) for every op."""
    compiled = {kernel.__name__: native.PATH for kernel in cpu.KERNELS} if native.PATH != "reference" else {}
    return [(op, ", ".join(FORMATS), compiled.get(op, "plain torch")) for op in SCHEMAS]


def to_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as JSON has them."""
    return [{**asdict(row), "case": asdict(row.case)} for row in rows]
