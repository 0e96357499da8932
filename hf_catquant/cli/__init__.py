"""The command line: ``catquant demo | plan | quantize | inspect | eval | verify | export | push | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, demo, evaluate, export, inspect, plan, push, quantize, verify

VERBS = (demo, plan, quantize, inspect, evaluate, verify, export, push, bench)


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a subcommand for every verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        summary = (verb.__doc__ or "").splitlines()[0]
        sub = verbs.add_parser(verb.NAME, help=summary, description=verb.__doc__, formatter_class=_Formatter)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns 0, or 1 after printing one line that says what is wrong."""
    args = build_parser().parse_args(argv)
    args.words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    return run(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        "catquant", description="Low-bit quantization for models of the Hugging Face Hub."
    )
    add_verbs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the verb that was parsed."""
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("catquant: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last stop before the user: one line instead of a traceback
        if args.debug:
            raise
        print(f"catquant {args.verb}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass
