"""Quantize a model and save it with its report.

The model comes from a folder or from the Hub; calibration rows come from a parquet, JSON, CSV or text file.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from ..config import CatQuantConfig
from ..folder import places, quantize_folder
from ..formats import ACTIVATION_FORMATS, FORMATS
from ..generate import generate_samples
from ..memory import map_large_blocks
from ..report import report
from ..rotation import ROTATIONS
from ..solvers import names
from ..tasks import as_samples, float_config, load_processor, model_class, read_rows
from ..whole import load_whole
from .arguments import count, natural, seed

NAME = "quantize"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("model", help="folder or Hub id of the float model")
    parser.add_argument("out", help="folder to write")
    add_request(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="write into a folder that is not empty; drop an interrupted run"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run into this folder that was interrupted, if there is one"
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    """What to do with the model, where from, and in how much memory."""
    parser.add_argument("--weights", choices=FORMATS, default="ternary", help="format of the weights")
    parser.add_argument("--group-size", type=int, default=128, help="columns that share a scale, -1 for whole rows")
    parser.add_argument(
        "--activations", choices=("none", *ACTIVATION_FORMATS), default="none", help="format of the inputs"
    )
    parser.add_argument(
        "--low-rank", type=natural, default=0, help="rank of a float16 product that is added to the weights"
    )
    parser.add_argument(
        "--rotation",
        choices=("auto", "none", *ROTATIONS),
        default="auto",
        help="rotate the inputs of the linears in the blocks; auto: where few levels are left",
    )
    parser.add_argument(
        "--average-bits", type=float, help="bits a weight may take on average: layers that matter most get more"
    )
    parser.add_argument(
        "--target-bytes",
        type=int,
        help="the same, for all tensors of the model together, corrections included, in bytes",
    )
    parser.add_argument("--edge-weights", choices=("same", *FORMATS), default="int8", help="format outside the blocks")
    parser.add_argument("--solver", choices=names(), default="gptq", help="how codes are found; rtn needs no data")
    parser.add_argument(
        "--solver-options", nargs="*", default=[], metavar="OPTION=VALUE", help="of the solver, e.g. model_steps=100"
    )
    parser.add_argument("--correction", choices=("cat", "none"), default="cat", help="output correction")
    parser.add_argument("--dataset", help="file of calibration rows")
    parser.add_argument("--column", help="column of the raw samples")
    parser.add_argument(
        "--generate",
        type=natural,
        default=0,
        metavar="N",
        help="calibrate on N more texts, which the language model writes",
    )
    parser.add_argument("--num-samples", type=count, default=256, help="samples to calibrate on")
    parser.add_argument("--batch-size", type=count, default=16, help="samples in one forward")
    parser.add_argument("--seed", type=seed, default=0, help="of the choice of samples")
    parser.add_argument("--skip", nargs="*", metavar="MODULE", help="modules to leave in float")
    parser.add_argument("--strict", action="store_true", help="fail if any layer would be skipped")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the float parts"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the model"
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="load the whole float model, instead of a unit at a time from the disk",
    )


def run(args: argparse.Namespace) -> None:
    """Quantize, save and print the report."""
    map_large_blocks()
    out = Path(args.out)
    places(args.model, out, args.resume, args.overwrite)  # before data is read, or written by the model
    config = float_config(args.model, args.trust_remote_code)
    processor = load_processor(args.model, args.trust_remote_code)
    model = quantize_folder(
        args.model,
        out,
        request(args, processor, model_class(config, args.trust_remote_code)),
        dtype=getattr(torch, args.dtype),
        stream=not args.in_memory,
        resume=args.resume,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        made={"model": _without_folder(args.model), "command": _command(args)},
    )
    print(report(model))
    print(f"saved to {out}")


def request(args: argparse.Namespace, processor: Any, auto: Any) -> CatQuantConfig:
    """What the arguments ask for."""
    return CatQuantConfig(
        weights=args.weights,
        group_size=args.group_size,
        activations=None if args.activations == "none" else args.activations,
        edge_weights=None if args.edge_weights == "same" else args.edge_weights,
        low_rank=args.low_rank,
        rotation=None if args.rotation == "none" else args.rotation,
        average_bits=args.average_bits,
        target_bytes=args.target_bytes,
        solver=args.solver,
        solver_options=dict(_option(text) for text in args.solver_options),
        correction=None if args.correction == "none" else args.correction,
        dataset=_samples(args, processor, auto),
        processor=processor,
        num_samples=args.num_samples + args.generate,
        batch_size=args.batch_size,
        seed=args.seed,
        modules_to_not_convert=args.skip,
        strict=args.strict,
    )


def _samples(args: argparse.Namespace, processor: Any, auto: Any) -> Any:
    """Calibration samples: rows of the file, and texts that the model writes."""
    rows = None if args.dataset is None else as_samples(read_rows(args.dataset, args.column), processor, args.column)
    if not args.generate:
        return rows
    if rows is not None and args.column is None:
        raise ValueError("--generate adds texts to those of --dataset: --column must name the column of its texts")
    if not hasattr(processor, "batch_decode"):
        raise ValueError("--generate needs a language model with a tokenizer, which this one ships without")
    model = load_whole(auto, args.model, trust_remote_code=args.trust_remote_code)
    written = generate_samples(model, args.generate, seed=args.seed)
    texts = processor.batch_decode([row["input_ids"] for row in written], skip_special_tokens=True)
    return texts if rows is None else [*rows[args.column], *texts]


def _command(args: argparse.Namespace) -> str:
    """The command as it was given, for the card; folders that differ in their place alone get names that differ."""
    out = _without_folder(args.out)
    if out == _without_folder(args.model):
        out = f"{out}-{args.weights}"
    return shlex.join(["catquant", *(out if word == args.out else _without_folder(word) for word in args.words)])


def _without_folder(word: str) -> str:
    """Of files and folders on this machine the name: where they are is nobody else's business."""
    option, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if option and not sign:
        return word
    return f"{option}{sign}{_name(value) if _is_place(value) else value}"


def _is_place(value: str) -> bool:
    """Whether a value names a place on a machine, or a URL; what has one slash may be the name of a repository."""
    drive = value[1:2] == ":" and value[:1].isalpha()
    begins = value.startswith(("/", "~", "./", "../", "file:"))
    return begins or drive or "\\" in value or value.count("/") > 1 or (bool(value) and Path(value).exists())


def _name(place: str) -> str:
    """The last part of a path or URL; of a home folder, or where a file system begins, nothing but the sign."""
    name = PureWindowsPath(place.removeprefix("file:")).name  # knows slashes of both kinds
    return "~" if name.startswith("~") and len(PureWindowsPath(place).parts) == 1 else name or "."


def _option(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    try:
        return name, int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"--solver-options must be OPTION=NUMBER, got {text!r}") from None
