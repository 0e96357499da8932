"""Does matching the batch norms behind quantized convolutions help? The same case with and without it.

    python benchmarks/batch_norm.py --data FOLDER [--weights ternary int4]

FOLDER as in ``realdata.py``. Results go to ``benchmarks/results/batch_norm.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest.mock import patch

from common import CASES
from realdata import run

RESULTS = Path(__file__).resolve().parent / "results" / "batch_norm.json"


def main() -> None:
    """Run every convolutional network of the data folder both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--weights", nargs="+", default=["ternary", "int4"], help="formats")
    args = parser.parse_args()
    results = []
    for weights in args.weights:
        for case in CASES:
            if case.model.startswith(("resnet", "mobilenet")):
                matched = run(case, weights, ["--group-size", "64"], args.data)
                with patch("hf_catquant.gather.match_batch_norm"):
                    left = run(case, weights, ["--group-size", "64"], args.data)
                results += [{"matched": True, **matched}, {"matched": False, **left}]
                print(case.model, weights, *(f"{rows(r)}" for r in (matched, left)))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def rows(result: dict) -> str:
    """Accuracy, interval and divergence of the quantized model without a correction."""
    row = result["evaluation"]["rows"][1]
    return f"{row['metric']:.2f} [{row['low']:.2f}, {row['high']:.2f}] KL {row['kl']:.3f}"


if __name__ == "__main__":
    main()
