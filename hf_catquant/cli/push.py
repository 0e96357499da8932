"""Check a quantized folder, write its model card and plots, and upload it to the Hub in one commit.

The card is made from the folder's config.json, report.json and evaluation.json; what was not measured is said to be
missing. Files that are no part of the model (data, Python objects, older
checkpoints) are not uploaded, and named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..card import RELATIONS
from ..describing import describe
from ..hub import push

NAME = "push"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("folder", help="what catquant quantize wrote")
    parser.add_argument("repo", help="Hub id, owner/name; it is created if it is not there")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the float model, if report.json does not say it")
    parser.add_argument(
        "--relation",
        choices=RELATIONS,
        default=RELATIONS[0],
        help="finetune: the float model is not the base model, it was fine-tuned from it",
    )
    parser.add_argument("--origin", metavar="TEXT", help="a sentence for the card: where the float model comes from")
    parser.add_argument(
        "--license", metavar="WORD", help="Hub word for the licence, that of the base model: apache-2.0"
    )
    parser.add_argument("--evaluation", metavar="FILE", help="what catquant eval --json wrote for this folder")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME", help="more files that belong to the model")
    parser.add_argument("--keep-card", action="store_true", help="upload the folder's README.md as it is")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, where a report is made"
    )
    parser.add_argument("--dry-run", action="store_true", help="write the card and the plots, upload nothing")


def run(args: argparse.Namespace) -> None:
    """Describe and upload."""
    if args.evaluation is not None and not Path(args.evaluation).is_file():
        raise ValueError(f"--evaluation: there is no file {args.evaluation}")
    facts = {
        name: getattr(args, name) for name in ("base_model", "license", "evaluation", "relation", "origin", "also")
    }
    facts["trust_remote_code"] = args.trust_remote_code
    if args.dry_run:
        print(f"card: {describe(args.folder, args.repo, **facts)}")
        return
    print(push(args.folder, args.repo, **facts, private=args.private, keep_card=args.keep_card))
