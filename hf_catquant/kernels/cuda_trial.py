"""A product's kernel is tried on a small problem on the device before its first use there.

Kernels are compiled where they run, by the NVRTC and for the device that are there, and most devices have never been at
hand. One that fails the trial is not used: the caller gets :class:`Unserved`, as for one that does not compile. It shows
mistakes of reading, multiplying and writing; not what depends on sizes, load or luck. ``CATQUANT_CUDA_TRIAL=0`` leaves it
out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..weight import quantize_activation
from .cuda_compile import Unserved
from .cuda_launch import STAGE_COLUMNS, Launch, block_of, launch
from .cuda_layout import STEP, Layout, chunk_width

SWITCH = "CATQUANT_CUDA_TRIAL"
PARTS = 2  # along k, where a launch has several
# Of the sum of all factors' sizes, that a right kernel may lose besides the last rounding: a column of a thousand is more.
LOST = 2e-4
_Run = Callable[[Launch, Tensor, Layout, Tensor | None, str | None, Tensor], None]
_found: dict[tuple[Any, ...], str] = {}  # what has been tried -> what was wrong with it
_passed: dict[tuple[Any, ...], Launch] = {}  # by the identity of a plan, which is faster told than its values


def require(
    plan: Launch,
    layout: Layout,
    dtype: torch.dtype,
    activations: str | None,
    device: torch.device,
    run: _Run,
) -> None:
    """Nothing, if the kernel of ``plan`` is known to answer rightly on ``device``, or does now.

    Args:
        plan: of a product with a weight in ``layout`` and x of ``dtype``, of which ``activations`` are made.
        run: makes the product of a plan: (plan, x, layout, bias, activations, out).

    Raises:
        Unserved: it answers wrongly, or a CUDA graph is captured before it has been tried.
    """
    place = (id(plan), dtype, activations, device)
    if _passed.get(place) is plan or os.environ.get(SWITCH) == "0":
        return
    key = (plan.variant, plan.splits > 1, dtype, activations, device)
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise Unserved(f"{plan.variant.source} is first used while a CUDA graph is captured: run it once before")
        try:
            _found[key] = _try(plan, layout, dtype, activations, device, run)
        except torch.OutOfMemoryError:
            return  # the product itself may need less
    if _found[key]:
        raise Unserved(_found[key])
    _passed[place] = plan


@torch.no_grad()
def _try(
    plan: Launch,
    layout: Layout,
    dtype: torch.dtype,
    activations: str | None,
    device: torch.device,
    run: _Run,
) -> str:
    """What is wrong with the kernel; empty if nothing is. What is right is found on the CPU, where it takes no library."""
    generator = torch.Generator("cpu").manual_seed(0)
    small, tokens = _problem(plan, layout, generator)
    x = torch.randn(tokens, small.columns, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
    there = replace(small, tiles=small.tiles.to(device), scales=small.scales.to(device))
    out = torch.full((tokens, small.rows), float("nan"), dtype=dtype, device=device)
    splits = PARTS if plan.splits > 1 else 1
    again = launch(plan.variant, small.tiles.shape[0], small.chunks, tokens, splits)
    run(again, x.to(device), there, None, activations, out)
    error = _error(out.cpu(), x, weight_of(small), activations, plan.variant.source == "wdense")
    if error <= 1:
        return ""
    options = " ".join(plan.variant.options)
    return (
        f"{plan.variant.source} {options} answers wrongly on {device}, {error:.3g} times what rounding allows: please report"
        f" it with the output of nvidia-smi ({SWITCH}=0 uses it all the same)"
    )


def _error(out: Tensor, x: Tensor, weight: Tensor, activations: str | None, rounded: bool) -> float:
    """The largest error of out (M, N) in units of what is allowed; ``rounded``: of products with rounded weights."""
    if rounded:
        weight = weight.to(x.dtype).double()
    x_hat = x.double() if activations is None else quantize_activation(x.float(), get_format(activations)).double()
    with torch.autocast("cpu", enabled=False):
        exact, sizes = x_hat @ weight.T, x_hat.abs() @ weight.abs().T
    allowed = torch.finfo(out.dtype).eps * exact.abs() + LOST * sizes
    return float(((out.double() - exact).abs() / allowed).nan_to_num(float("inf")).max())


def _problem(plan: Launch, layout: Layout, generator: torch.Generator) -> tuple[Layout, int]:
    """A random weight on the CPU, and a number of rows of x: two blocks each way, the second with an end, turns and a rest
    along k, so many that rings of stages go round twice.
    """
    held, block = dict(plan.variant.constants), block_of(plan.variant)
    tiles, tokens = block.tiles + 1, block.tokens + (0 if block.turns else 3)
    width = chunk_width(held["BITS"])
    stages = PARTS * (2 * held["STAGES"] + 1) if "STAGES" in held else 10
    chunks = 2 * held["WARPS"] + 1 if block.turns else stages * STAGE_COLUMNS // width - 1
    columns = chunks * width
    groups = -(-columns // (STEP * held["GROUP_STEPS"])) if held["GROUP_STEPS"] else 1
    packed = torch.randint(256, (tiles, columns // (256 // held["BITS"]), 512), generator=generator, device="cpu")
    scales = 0.02 * torch.rand(tiles, groups, 8, 2, 2, generator=generator, device="cpu", dtype=torch.float32)
    if held["BITS"] == 8:
        scales[..., 1] = 0  # no format of 8 bits has an offset
    scales = scales.to(layout.scales.dtype)
    sizes = {"rows": 16 * tiles - 5, "columns": columns, "chunks": chunks}
    return replace(layout, tiles=packed.to(torch.uint8), scales=scales, spread=None, **sizes), tokens


def weight_of(layout: Layout) -> Tensor:
    """w_hat (N, padded K) of a weight in tiles, float64, not rounded: csrc/product.cuh says where each code lies."""
    bits, device = layout.bits, layout.tiles.device
    row_tiles, column_tiles, _ = layout.tiles.shape
    shifts = torch.arange(0, 8, bits, device=device)
    codes = layout.tiles.long()[..., None] >> shifts & (1 << bits) - 1
    # Lane 4 r + q, word 2 kp + rh, byte 2 high + low, field s: row r + 8 rh, column 32 s + 8 q + 4 low + 2 kp + high.
    codes = codes.view(row_tiles, column_tiles, 8, 4, 2, 2, 2, 2, len(shifts))
    codes = codes.permute(0, 5, 2, 1, 8, 3, 7, 4, 6).reshape(16 * row_tiles, -1)
    levels = layout.level_step * (codes - (128 if bits == 8 else 0)).double() + layout.level_zero
    pairs = layout.scales.double().permute(0, 3, 2, 1, 4).reshape(16 * row_tiles, -1, 2)
    width = STEP * layout.group_steps if layout.group_steps else codes.shape[1]
    pairs = pairs.repeat_interleave(width, 1)[:, : codes.shape[1]]
    return (levels * pairs[..., 0] + pairs[..., 1])[: layout.rows]
