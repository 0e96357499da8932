"""Everything that can only be known on a GPU, in one run of a few minutes: are the CUDA kernels right, and how fast.

    python benchmarks/gpu.py [--out FILE] [--minutes 8] [--only STAGE ...]
    python benchmarks/gpu.py --dry 90          no GPU: goes through every stage and compiles all its kernels for sm_90

Needs torch with CUDA and a GPU of compute capability 8.0 or newer; the rest of the package's dependencies are not used.

First all kernels are compiled, side by side. Then come the stages, each in its time; what one has found is written to
``benchmarks/results/gpu.json`` row by row. An error ends its stage, and one that leaves the GPU unusable, or a kernel that
hangs, the process, which is started again for the next stage. Wrong answers are never timed: a case is skipped unless every
check of the kernels that it launches has passed. Times are the shortest of several replays of a CUDA graph whose calls go
through copies of the weight that together are far larger than the second-level cache. Exits with 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_checks import CHECKS
from gpu_report import sanitize, targets
from gpu_stages import STAGES
from gpu_tools import ROOT, Launches, no_device

from hf_catquant.kernels import cuda, cuda_compile, cuda_trial

# Stages in order, and the seconds after which one is given up.
LIMITS = {
    **dict.fromkeys(CHECKS, 60.0),
    "bandwidth": 30.0,
    "products": 150.0,
    "thresholds": 60.0,
    "decode": 60.0,
    "peers": 90.0,
    "other ops": 40.0,
    "trials": 30.0,
    "launches": 90.0,
    "sanitizer": 120.0,
}
BROKEN = 3  # exit status of a process whose GPU does not answer any more


class Results:
    """What is known so far; every change is on disk before the next thing is tried."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, key: str, value: Any) -> None:
        """Set one entry."""
        self.held[key] = value
        self.write()

    def add(self, key: str, row: Any) -> None:
        """Append to the list of a stage."""
        self.held.setdefault(key, []).append(row)
        self.write()

    def write(self) -> None:
        """Write beside and rename."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.held, indent=1, default=str) + "\n")
        beside.replace(self.path)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, cuda_compile.version())),
        "date": str(date.today()),
        "seed": 0,
    }


def check(name: str, device: torch.device, results: Results, quick: bool = False) -> bool:
    """Run one family of checks; its kernels count as right if all of it passed."""
    launches, wrong, count, worst = Launches(), [], 0, 0.0
    with launches.watch():
        for row in CHECKS[name](device, quick):
            count, worst = count + 1, max(worst, row["error"])
            if not row["error"] <= 1:
                wrong.append(row)
            if "times_rounding" in row:
                results.add("errors at 1024 x 4096", row)
    results.put(name, {"cases": count, "largest_error": worst, "wrong": wrong[:50]})
    key = "wrong kernels" if wrong else "right kernels"
    results.put(key, sorted({*results.held.get(key, []), *launches.sources}))
    print(f"{name}: {count} cases, largest error {worst:.3g} of what rounding allows", flush=True)
    return not wrong


def stage(name: str, device: torch.device, results: Results) -> None:
    """Run one stage and keep its rows."""
    if name in CHECKS:
        check(name, device, results)
        return
    if name == "sanitizer":
        results.put(name, sanitize(Path(__file__)))
        return
    right = set(results.held.get("right kernels", [])) - set(results.held.get("wrong kernels", []))
    for row in STAGES[name](device, right):
        results.add(name, row)
        print(name, json.dumps(row, default=str), flush=True)


def child(names: list[str], out: Path, until: float) -> int:
    """Go through the stages, in this process. Says where it is before it begins each."""
    device, results = torch.device("cuda"), Results(out)
    if "machine" not in results.held:
        results.put("machine", machine(device))
    for name in names:
        if time.time() > until:
            results.add("not begun", name)
            continue
        results.put("in progress", [name, time.time()])
        try:
            stage(name, device, results)
        except Exception as error:
            results.add("failed", {"stage": name, "error": f"{type(error).__name__}: {error}"[:2000]})
            traceback.print_exc()
            try:
                torch.cuda.synchronize()
            except Exception:
                return BROKEN
        results.add("seconds", [name, round(time.time() - results.held["in progress"][1], 1)])
        torch.cuda.empty_cache()
    return 0


def supervise(names: list[str], out: Path, until: float) -> None:
    """Run the stages in a process that is ended when one takes too long, and begun again after what ended it."""
    left = list(names)
    while left:
        command = [sys.executable, __file__, "--child", "--out", str(out), "--until", str(until), "--only", *left]
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(0.2)
            name, begun = Results(out).held.get("in progress", [left[0], time.time()])
            if time.time() > begun + LIMITS[name]:
                process.kill()
                process.wait()
        results = Results(out)
        if process.returncode == 0:
            return
        name = results.held.get("in progress", [left[0]])[0]
        if process.returncode != BROKEN:
            results.add("failed", {"stage": name, "error": f"ended with {process.returncode}: hung, or crashed"})
        left = left[left.index(name) + 1 :] if name in left else left[1:]
        results.held.pop("in progress", None)
        results.write()


def record(names: list[str], processors: int, compile_for: int | None) -> Launches:
    """Go through the stages on the meta device; note, and compile for an architecture, every kernel they launch."""
    launches, device = Launches(), torch.device("meta")
    with no_device(processors, compile_for in (None, 90)), launches.watch():
        for name in names:
            if name in CHECKS:
                for _ in CHECKS[name](device, False):
                    pass
            elif name not in ("sanitizer", "peers", "bandwidth"):
                for _ in STAGES[name](device, launches.sources | {"split8", "product8", "product16", "gemm"}):
                    pass
    if compile_for is not None:
        start = time.time()
        with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
            images = list(
                pool.map(cuda_compile.machine_code, launches.variants, [compile_for] * len(launches.variants))
            )
        print(f"{len(images)} kernels for sm_{compile_for} in {time.time() - start:.1f} s", flush=True)
    return launches


def run(names: list[str], out: Path, minutes: float) -> int:
    """All of it. Returns the exit status."""
    until = time.time() + 60 * minutes
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    asked = torch.cuda.get_device_properties(0)  # makes no context
    arch = str(10 * asked.major + asked.minor)
    command = [
        sys.executable,
        __file__,
        "--dry",
        arch,
        "--processors",
        str(asked.multi_processor_count),
        "--only",
        *names,
    ]
    try:
        ahead = subprocess.run(command, check=False, timeout=150).returncode == 0
    except subprocess.TimeoutExpired:
        ahead = False  # what is missing is compiled when it is used
    supervise(names, out, until)
    results = Results(out)
    results.held.pop("in progress", None)
    results.put("compiled ahead", ahead)
    results.put("targets", targets(results.held))
    for row in results.held["targets"]:
        print(json.dumps(row))
    for row in results.held.get("failed", []):
        print(f"failed: {json.dumps(row)}", file=sys.stderr)
    wrong = results.held.get("wrong kernels", [])
    if wrong:
        print(f"wrong answers from {', '.join(wrong)}: see {out}", file=sys.stderr)
    return 1 if wrong or results.held.get("failed") else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=7, help="no stage is begun after these")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--dry", type=int, metavar="ARCH", help="compile every kernel for sm_ARCH and run none")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors of the device of --dry")
    parser.add_argument("--quick", action="store_true", help="check a few cases and time nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry is not None:
        record(arguments.only, arguments.processors, arguments.dry)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU: torch finds no CUDA device", file=sys.stderr)
        return 2
    os.environ[cuda.SWITCH] = "cuda"  # what has no kernel raises instead of running on the reference
    os.environ[cuda_trial.SWITCH] = "0"  # a kernel that is wrong is found wrong here, not replaced
    if arguments.quick:
        found = [row for name in CHECKS for row in CHECKS[name](torch.device("cuda"), True)]
        wrong = [row for row in found if not row["error"] <= 1]
        print(f"{len(found)} cases, wrong: {wrong}")
        return 1 if wrong else 0
    if arguments.child:
        return child(arguments.only, arguments.out, arguments.until)
    return run(arguments.only, arguments.out, arguments.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
