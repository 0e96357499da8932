"""Time products of packed weights, read from memory, beside torch's own, and say what share of the machine they use.

Every product is checked before it is timed. Contenders take turns in one run; compare ratios, not times of different runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..bench import (
    Case,
    Limits,
    Row,
    machine,
    measure,
    our_contender,
    paths_table,
    peer_contenders,
    rows_of,
    thread_count,
    to_json,
)
from ..bench_peers import GGML_FORMATS
from ..bench_plot import plot
from ..formats import FORMATS
from .arguments import count, seed

NAME = "bench"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEERS = ("torch float32", "torch bfloat16", *(f"llama.cpp {name}" for name in GGML_FORMATS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("--list", action="store_true", help="only print what computes each op here, and leave")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=[(4096, 4096)], help="weights, as NxK", metavar="NxK"
    )
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 4, 16, 64, 512], help="rows of x", metavar="M")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["binary", "ternary", "int4", "int8"])
    parser.add_argument("--group-size", type=int, default=128, help="columns that share a scale, -1 for whole rows")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"], help="dtypes of x")
    parser.add_argument("--activations", nargs="+", default=["none", "int8"], choices=["none", "int8", "int4", "int2"])
    parser.add_argument("--threads", nargs="+", type=count, default=None, help="by default 1 and all", metavar="T")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS[:2]), help="what to compare with")
    parser.add_argument("--seconds", type=float, default=2.0, help="of turns for every case")
    parser.add_argument("--working-set", type=count, default=512, help="megabytes that weights take turns in")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--json", type=Path, help="write results and machine to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to torch float32 into this file")


def shape(text: str) -> tuple[int, int]:
    """``NxK`` as two integers of at least 1."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be NxK with two integers of at least 1, got {text!r}")
    return int(sides[0]), int(sides[1])


def run(args: argparse.Namespace) -> None:
    """Measure every case, print as it goes, write what was asked for."""
    if args.list:
        for op, formats, path in paths_table():
            print(f"{op:15s} cpu: {path:12s} {formats}")
        return
    limits, rows = Limits(args.working_set << 20), []
    for n, k in args.shapes:
        for threads in args.threads or sorted({1, torch.get_num_threads()}):
            for m in args.rows:
                rows += _measure(args, Case(m, n, k, threads), limits)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "results": to_json(rows)}, indent=1) + "\n")
    if args.plot is not None:
        plot(rows, args.plot)


def _measure(args: argparse.Namespace, case: Case, limits: Limits) -> list[Row]:
    generator = torch.Generator().manual_seed(args.seed)
    working_set = args.working_set << 20
    wide = torch.randn(case.count, case.columns, generator=generator)
    rows = []
    with thread_count(case.threads):
        contenders = list(peer_contenders(case, wide, working_set, generator, tuple(args.peers)))
        for name in args.formats:
            for dtype in args.dtypes:
                for activations in args.activations:
                    asked = None if activations == "none" else activations
                    x = wide.to(DTYPES[dtype])
                    contenders.append(our_contender(case, x, name, args.group_size, asked, working_set, generator))
        measure(contenders, args.seconds)
        rows = rows_of(case, contenders, limits)
    print(f"x ({case.count}, {case.columns}) times ({case.rows}, {case.columns}), {case.threads} threads")
    for row in rows:
        print("  " + _line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    shares = [
        "" if share is None else f"  {100 * share:3.0f} % of {what}"
        for share, what in ((row.bandwidth_share, "read bandwidth"), (row.peak_share, "integer peak"))
    ]
    return f"{row.contender:24s} {1e6 * row.median:9.0f} us (best {1e6 * row.best:9.0f})  x{row.ratio:6.2f}{''.join(shares)}"
