"""Check that a quantized model is whole: format, entries, hashes, shapes, ranges, provenance. Exit status 1 if it is not.

Nothing is built and no code of the model runs. Of a Hub id the JSON and the weights are downloaded, and compared with the
SHA-256 that the Hub has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..hub import verify_repo
from ..verify import verify

NAME = "verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("model", help="folder or Hub id of a quantized model")
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--expect", nargs="*", default=[], metavar="SHA256", help="hashes that files must have")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Verify, print, and fail if something is wrong."""
    found = verify(args.model) if Path(args.model).is_dir() else verify_repo(args.model, args.revision)
    for digest in args.expect:
        if digest.removeprefix("sha256:").lower() not in found.files.values():
            found.problems.append(f"no file of the model has the SHA-256 {digest}")
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    if not found.is_whole:
        raise ValueError(f"{args.model}: {len(found.problems)} problems, the first: {found.problems[0]}")
