"""Quantize a small vision transformer to ternary from start to end, offline, in about a minute.

Trains it on scikit-learn's scanned digits, quantizes it on load, fits the correction, saves, reloads, proves the reload
bit-exact, compares, and writes a page with plots.
"""

from __future__ import annotations

import argparse

from ..demo import run_demo
from ..formats import FORMATS
from .arguments import count, seed

NAME = "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("--out", default="catquant-demo", help="folder to write")
    parser.add_argument("--epochs", type=count, default=40, help="passes over the training digits")
    parser.add_argument("--weights", choices=FORMATS, default="ternary", help="format of the weights")
    parser.add_argument("--seed", type=seed, default=0, help="of the training and the calibration")


def run(args: argparse.Namespace) -> None:
    """Run the demonstration."""
    run_demo(args.out, epochs=args.epochs, weights=args.weights, seed=args.seed)
