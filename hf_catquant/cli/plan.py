"""Say what quantizing a model would take: memory, disk and time, found by trying a part of it.

The arguments are those of ``catquant quantize``. Nothing is written.
"""

from __future__ import annotations

import argparse
import json

import torch

from ..folder import open_source
from ..memory import map_large_blocks
from ..planning import plan_model
from ..tasks import float_config, load_processor, model_class
from . import quantize

NAME = "plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb: those of quantize without a folder to write."""
    parser.add_argument("model", help="folder or Hub id of the float model")
    quantize.add_request(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> None:
    """Try, count and print."""
    map_large_blocks()
    config = float_config(args.model, args.trust_remote_code)
    processor = load_processor(args.model, args.trust_remote_code)
    request = quantize.request(args, processor, model_class(config, args.trust_remote_code))
    model = open_source(args.model, getattr(torch, args.dtype), not args.in_memory, args.trust_remote_code)
    plan = plan_model(model, request)
    print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
