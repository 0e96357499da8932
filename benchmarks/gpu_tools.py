"""What ``gpu.py`` and its peers share: random weights, times from CUDA graphs, and a device that only records launches."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if "hf_catquant" not in sys.modules:  # past the package's own __init__, which needs transformers
    package = types.ModuleType("hf_catquant")
    package.__path__ = [str(ROOT / "hf_catquant")]
    sys.modules["hf_catquant"] = package

from hf_catquant.formats import get_format, group_count  # noqa: E402
from hf_catquant.kernels import cuda, cuda_calls, cuda_driver, cuda_trial  # noqa: E402
from hf_catquant.kernels.cuda_compile import Variant  # noqa: E402
from hf_catquant.packing import packed_width  # noqa: E402

SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
TOKENS = (1, 4, 16, 64, 256, 512, 2048)
ROTATED_BYTES = 512 << 20  # of copies of a weight: ten times the second-level cache of an H200
Stored = tuple[Tensor, Tensor, Tensor | None]


def random_weight(name: str, rows: int, columns: int, group_size: int, device: torch.device, seed: int = 0) -> Stored:
    """Codes, scales and offsets as a layer stores them, of about unit output variance."""
    fmt = get_format(name)
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(seed)
    limit = fmt.radix**fmt.digits if fmt.nbytes == 1 else 256
    make: dict[str, Any] = {"generator": generator, "device": device}
    packed = torch.randint(limit, (rows, packed_width(fmt, columns, group_size)), dtype=torch.uint8, **make)
    shape = (rows, group_count(columns, group_size))
    scale = (0.5 + torch.rand(shape, **make)) / (max(map(abs, fmt.levels)) * columns**0.5)
    offset = torch.randn(shape, **make) * 0.1 / columns**0.5 if fmt.affine else None
    return packed, scale.half(), None if offset is None else offset.half()


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def copies(nbytes: int) -> int:
    """Copies of a weight that no cache holds."""
    return max(2, min(64, ROTATED_BYTES // nbytes))


def op(name: str, device: torch.device) -> Callable[..., Tensor]:
    """The op of this name, as a model calls it; where there is no GPU, what stands behind it on CUDA."""
    return getattr(torch.ops.catquant if device.type == "cuda" else cuda, name)


def timed(calls: list[Callable[[], Any]], device: torch.device, replays: int = 10) -> float:
    """Microseconds a call: the shortest replay of a graph of all ``calls``, after each has run three times."""
    if device.type != "cuda":
        for call in calls * 2:
            call()
        return float("nan")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
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


class Launches:
    """Every kernel that is launched while it watches."""

    def __init__(self) -> None:
        self.variants: dict[Variant, None] = {}
        self._launch = cuda_calls._launch

    @contextmanager
    def watch(self) -> Iterator[Launches]:
        """Note the kernels, and run them."""

        def launch(variant: Variant, *arguments: Any) -> None:
            self.variants[variant] = None
            self._launch(variant, *arguments)

        with mock.patch.object(cuda_calls, "_launch", launch):
            yield self

    @property
    def sources(self) -> set[str]:
        """The files that they come from."""
        return {variant.source for variant in self.variants}


@contextmanager
def no_device(processors: int, warp_groups: bool = True) -> Iterator[None]:
    """Nothing is run: for tensors on the meta device, as if it had so many multiprocessors, and products of warp groups."""
    with (
        mock.patch.object(cuda_driver, "launch", return_value=None),
        mock.patch.object(cuda_driver, "processors", return_value=processors),
        mock.patch.object(cuda_driver, "has_warp_groups", return_value=warp_groups),
        mock.patch.dict("os.environ", {cuda.SWITCH: "cuda", cuda_trial.SWITCH: "0"}),
    ):
        yield
