"""Products from tiles: which kernels make one, and what they are called with."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..log import logger
from . import cuda_calls, cuda_driver, cuda_table, cuda_trial
from .cuda_calls import TYPES
from .cuda_compile import Unserved, Variant
from .cuda_launch import STAGE_COLUMNS, Launch
from .cuda_layout import Layout


def multiply(x: Tensor, layout: Layout, bias: Tensor | None, activations: str | None) -> Tensor:
    """x (..., K) times the weight in tiles, plus bias (N,) in the dtype of x: (..., N).

    Args:
        x: float16 or bfloat16, or any dtype together with ``activations``.
        layout: of the weight (N, K).
        bias: added before the one rounding.
        activations: an integer format that x is quantized to, with a range for every row; None: x as it is.

    Raises:
        Unserved: the kernel cannot be compiled or loaded, or the sizes are beyond what it counts.
    """
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], layout.rows)  # as it is returned: a view could not be written to under autograd
    x = layout.align(x.reshape(-1, x.shape[-1]))
    _check_sizes(layout, x.shape[0], activations is not None)
    how = (layout, x.shape[0], TYPES[out.dtype], activations is not None, cuda_driver.processors(x.device))
    refused: tuple[str, ...] = () if cuda_driver.has_warp_groups(x.device) else cuda_table.WARP_GROUPS
    while True:
        plan = cuda_table.product(*how, refused)
        try:
            cuda_trial.require(plan, layout, x.dtype, activations, x.device, run)
            run(plan, x, layout, bias, activations, out)
            return out
        except Unserved as why:
            if plan.variant.source not in cuda_table.WARP_GROUPS:
                raise
            _say(f"{plan.variant.source} is not used: {why}")
            refused = (*refused, plan.variant.source)


def run(plan: Launch, x: Tensor, layout: Layout, bias: Tensor | None, activations: str | None, out: Tensor) -> None:
    """The product of aligned x (M, K) into ``out`` by the kernels of ``plan``."""
    dtype, device, tokens = TYPES[out.dtype], x.device, x.shape[0]
    x, scale, x_sums = _prepared(x, layout, plan, activations)
    made = out if plan.splits == 1 else out.new_empty(plan.splits, tokens, layout.rows, dtype=torch.float32)
    row_tiles = layout.tiles.shape[0]
    sizes = (tokens, layout.rows, x.shape[1], row_tiles, layout.chunks, layout.scales.shape[1], plan.splits)
    levels = (layout.level_step, layout.level_zero)
    arguments = (layout.tiles, layout.scales, x, scale, x_sums, bias, made, *sizes, *levels)
    cuda_calls._launch(plan.variant, device, plan.grid, plan.threads, arguments, plan.shared)
    if plan.splits > 1:
        adding = Variant("partials", (("TYPE", dtype),))
        grid = (-(-layout.rows // cuda_table.SUM_THREADS), tokens)
        parts = (made, scale, bias, out, tokens, layout.rows, plan.splits)
        cuda_calls._launch(adding, device, grid, (cuda_table.SUM_THREADS, 1), parts)


@cache
def _say(message: str) -> None:
    logger.warning(message)


def _prepared(
    x: Tensor, layout: Layout, plan: Launch, activations: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (M, K), or its codes, as the kernel of ``plan`` reads it, the scales of codes, and the sums of x."""
    fmt = None if activations is None else get_format(activations)
    if plan.variant.source in ("wgemm", "wdense"):
        at_once, paired = 8 * dict(plan.variant.constants)["NT"], plan.variant.source == "wdense"
        return *arrange(x, layout, fmt, at_once, paired), None
    scale = None
    if fmt is not None:
        x, scale = quantize_rows(x, fmt, layout.padded)
    return x, scale, _sum_runs(x, plan, fmt is not None) if plan.runs else None


def _check_sizes(layout: Layout, tokens: int, integer: bool) -> None:
    """Refuse what products count in 32 bits and cannot: the sum of a row in integers, pieces of 16 bytes of x."""
    most = (
        128 if layout.bits == 8 else ((1 << layout.bits) - 1) << layout.bits
    )  # product8.cu leaves odd fields in place
    if integer and layout.group_steps == 0 and layout.padded * 128 * most >= 2**31:
        raise Unserved(f"integer sums of {layout.columns} columns with one scale do not fit 32 bits: use groups")
    if tokens * layout.padded >= 2**35:
        raise Unserved(f"products count x in 32 bits, ({tokens}, {layout.columns}) is too much: use fewer rows")


def _sum_runs(x: Tensor, plan: Launch, integer: bool) -> Tensor:
    """Sums of x (M, K) over runs of columns, as gemm reads them: (runs, M rounded up to 128) float32."""
    tokens, columns = x.shape
    made = torch.empty(plan.runs, tokens + -tokens % 128, dtype=torch.float32, device=x.device)
    shared = dict(plan.variant.constants)
    constants = tuple((name, shared[name]) for name in (*cuda_table.NAMES, "INTEGER"))
    grid = (tokens, -(-plan.runs * 32 // cuda_table.SUM_THREADS))
    arguments = (x, made, tokens, columns, plan.runs)
    cuda_calls._launch(Variant("sums", constants), x.device, grid, (cuda_table.SUM_THREADS, 1), arguments)
    return made


def quantize_rows(x: Tensor, fmt: Format, padded: int) -> tuple[Tensor, Tensor]:
    """int8 codes (M, ``padded``) of x (M, K) in the order of an 8-bit product, and their scales (M,) float32."""
    tokens, columns = x.shape
    codes = torch.empty(tokens, padded, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    threads, holds = cuda_table.row_threads(padded // 8, tokens)
    values = (TYPES[x.dtype], int(fmt.affine), threads, holds)
    variant = Variant("rows", tuple(zip(("TYPE", "AFFINE", "THREADS", "HOLDS"), values, strict=True)))
    arguments = (x, codes, scale, columns, padded, fmt.levels[0], fmt.levels[-1])
    cuda_calls._launch(variant, x.device, (tokens, 1), (threads, 1), arguments)
    return codes, scale


def arrange(
    x: Tensor, layout: Layout, fmt: Format | None, at_once: int, paired: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x (M, K) in the order of a product of warp groups.

    Args:
        x: float16 or bfloat16, or any dtype together with ``fmt``.
        layout: of the weight, whose padded columns, rounded up to 256, the result has.
        fmt: of the int8 codes that x becomes, None for x as it is.
        at_once: rows of x of a block of the product.
        paired: in the order of columns that wdense.cu looks up.

    Returns:
        For each block of rows and 256 columns x or its codes, and its sums over each 128 of them in float32, as
        arrange.cu writes them, (blocks, bytes) uint8; the scales of codes (M,) float32.
    """
    tokens, columns = x.shape
    stages = -(-layout.padded // STAGE_COLUMNS)
    nbytes = at_once * (STAGE_COLUMNS * (2 if fmt is None else 1) + 2 * 4)
    made = torch.empty(-(-tokens // at_once), stages * nbytes, dtype=torch.uint8, device=x.device)
    scale = None if fmt is None else torch.empty(tokens, dtype=torch.float32, device=x.device)
    runs = stages * STAGE_COLUMNS // 8
    threads, holds = (cuda_table.ROW_THREADS, 0) if fmt is None else cuda_table.row_threads(runs, tokens)
    affine = fmt is not None and fmt.affine
    names = ("TYPE", "INTEGER", "AFFINE", "PAIRED", "TOKENS", "THREADS", "HOLDS")
    values = (TYPES[x.dtype], int(fmt is not None), int(affine), int(paired), at_once, threads, holds)
    levels = (0.0, 0.0) if fmt is None else (fmt.levels[0], fmt.levels[-1])
    grid = (tokens, 1 if fmt is not None else -(-runs // threads))
    variant = Variant("arrange", tuple(zip(names, values, strict=True)))
    cuda_calls._launch(variant, x.device, grid, (threads, 1), (x, made, scale, columns, stages, *levels))
    return made, scale
