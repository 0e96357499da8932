"""What ``hf_catquant_autoload.pth`` costs every Python process of an environment.

    python benchmarks/autoload.py [--runs 200]

Every run is a process of its own that times the line of the .pth file with ``time.perf_counter_ns``, as it is and switched
off; and the CPU milliseconds of ``python -c pass``, which the line comes on top of. Medians and quartiles go to
``benchmarks/results/autoload.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import py_compile
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, made

RESULTS = ROOT / "benchmarks" / "results" / "autoload.json"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    py_compile.compile(str(ROOT / "hf_catquant_autoload.py"))  # as an installation does
    line = (ROOT / "hf_catquant_autoload.pth").read_text(encoding="utf-8")
    cost: dict[str, list[float]] = {"1": [], "0": []}
    empty = []
    for _ in range(args.runs):
        empty.append(milliseconds("pass"))
        for switch, found in cost.items():
            found.append(line_cost(line, switch))
    result = {
        "runs": args.runs,
        "empty_process_ms": round(statistics.median(empty), 2),
        "line_ms_quartiles": quartiles(cost["1"]),
        "switched_off_ms_quartiles": quartiles(cost["0"]),
        **made(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def line_cost(line: str, switch: str) -> float:
    """Milliseconds that the line takes, ``CATQUANT_AUTOLOAD`` being ``switch``, in a process that ran no .pth file yet.

    Python has ``os`` by then, which the line needs.
    """
    code = f"import os, time; start = time.perf_counter_ns(); exec({line!r}); print(time.perf_counter_ns() - start)"
    env = {**os.environ, "PYTHONPATH": str(Path(ROOT)), "CATQUANT_AUTOLOAD": switch}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1e6


def milliseconds(code: str) -> float:
    """CPU time of a process that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
