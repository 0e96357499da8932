"""What ``gpu.py`` says at its end: the verdict of compute-sanitizer, and what was asked for beside what was measured."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_tools import SHAPES

Row = dict[str, Any]


def sanitize(script: Path) -> dict[str, str]:
    """What compute-sanitizer says about the smallest cases, where it is installed."""
    tool = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    found = {}
    for check in ("memcheck", "racecheck") if tool else ():
        command = [str(tool), "--tool", check, "--error-exitcode", "9", sys.executable, str(script), "--quick"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=55)
            found[check] = f"exit {done.returncode}: {' '.join(done.stdout.strip().splitlines()[-2:])}"
        except subprocess.TimeoutExpired:
            found[check] = "took more than 55 seconds"
    return found or {"compute-sanitizer": "not installed"}


def targets(held: dict[str, Any]) -> list[Row]:
    """What was asked for beside what was measured, in the same run."""
    times = {
        (r["weights"], r["group_size"], r["activations"], *r["shape"], r["tokens"]): r
        for r in held.get("products", [])
        if "us" in r
    }
    copied = next((r["copy_tb_s"] for r in held.get("bandwidth", []) if "copy_tb_s" in r), float("nan"))
    rows: list[Row] = []

    def ask(what: str, wanted: float, found: float | None) -> None:
        rows.append({"target": what, "wanted": wanted, "found": found, "met": found is not None and found >= wanted})

    for name, activations, shape, tokens, wanted in (
        ("ternary", None, SHAPES[0], 1, 2.5),
        ("ternary", None, SHAPES[1], 1, 4.3),
        ("ternary", None, SHAPES[2], 1, 5.3),
        ("binary", None, SHAPES[2], 1, 8.0),
        ("ternary", None, SHAPES[1], 16, 3.5),
        ("ternary", None, SHAPES[1], 64, 1.6),
        ("ternary", None, SHAPES[1], 2048, 0.9),
        ("ternary", "int8", SHAPES[1], 512, 1.2),
        ("ternary", "int8", SHAPES[1], 2048, 1.2),
    ):
        row = times.get((name, 128, activations, *shape, tokens))
        label = (
            f"{name} {shape[0]} x {shape[1]}, {tokens} tokens, {activations or '16-bit'} activations: times bfloat16"
        )
        ask(label, wanted, row and row["speedup"])
    row = times.get(("ternary", 128, None, *SHAPES[2], 1))
    ask("ternary 28672 x 8192, 1 token: share of the copy bandwidth", 0.75, row and row["tb_s"] / copied)
    for peer in held.get("peers", []):
        if "us" not in peer or peer["peer"] not in ("bitsandbytes_nf4", "gemlite_two"):
            continue
        row = times.get(("ternary", 128, None, *peer["shape"], peer["tokens"]))
        if peer["peer"] == "bitsandbytes_nf4" or peer["tokens"] == 1:
            label = f"{peer['peer']} {peer['shape']}, {peer['tokens']} tokens: times as fast"
            ask(label, 1.0 if peer["peer"] == "bitsandbytes_nf4" else 2.0, row and peer["us"] / row["us"])
    return rows
