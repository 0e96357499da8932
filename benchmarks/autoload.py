"""What ``hf_catquant_autoload.pth`` costs every Python process of an environment.

    python benchmarks/autoload.py [--runs 200]

CPU milliseconds of ``python -c pass`` and of the same with the line of the .pth file, one after the other, so that both see
the same machine; the medians and the quartiles of their differences go to ``benchmarks/results/autoload.json``.
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
    cases = {"without": ("pass", {}), "with": (line, {}), "switched off": (line, {"CATQUANT_AUTOLOAD": "0"})}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.runs):
        for name, (code, environment) in cases.items():
            times[name].append(milliseconds(code, environment))
    more = [b - a for a, b in zip(times["without"], times["with"], strict=True)]
    result = {
        "runs": args.runs,
        "median_ms": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "cost_ms_quartiles": [round(value, 2) for value in statistics.quantiles(more, n=4)],
        **made(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def milliseconds(code: str, environment: dict[str, str]) -> float:
    """CPU time of a process that runs ``code`` with the package's folder on its path."""
    env = {**os.environ, "PYTHONPATH": str(Path(ROOT)), **environment}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
