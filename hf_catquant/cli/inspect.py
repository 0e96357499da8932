"""Print what is in a quantized model: layers, coverage, bits, what was skipped and why, corrections."""

from __future__ import annotations

import argparse
import json

from ..report import report
from ..tasks import load_quantized

NAME = "inspect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("model", help="folder or Hub id of a quantized model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the model"
    )


def run(args: argparse.Namespace) -> None:
    """Load the model, which verifies it, and print its report."""
    summary = report(load_quantized(args.model, args.trust_remote_code))
    print(json.dumps(summary.to_dict(), indent=2) if args.json else summary)
