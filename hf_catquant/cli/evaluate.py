"""Compare a quantized model with its float model on labelled rows, or on text for a language model.

Prints float, quantized, and quantized with correction on the same rows: accuracy or perplexity with 95 % intervals,
agreement and flips, divergence, discrimination of the features, and size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..by_layer import LayerDiscrimination, discrimination_by_layer
from ..disk import beside, writing
from ..evaluation import evaluate_classifier, evaluate_language_model
from ..evaluation_table import Evaluation
from ..identity import identity
from ..samples import collect
from ..tasks import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    as_samples,
    auto_class,
    float_config,
    labels_of,
    load_config,
    load_processor,
    model_class,
    read_rows,
)
from ..whole import check_whole, load_whole
from .arguments import count, natural

NAME = "eval"
PLOTS = (".png", ".pdf", ".svg")
LEAST = 2  # rows; of one there is no interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("model", help="folder or Hub id of the quantized model")
    parser.add_argument("--float", dest="teacher", required=True, help="folder or Hub id of the float model")
    parser.add_argument("--dataset", required=True, help="file of test rows")
    parser.add_argument("--dataset-name", help="what the rows are called on the model card, if not by their file")
    parser.add_argument("--column", help="column of the raw samples")
    parser.add_argument("--label-column", default="label", help="column of the classes")
    parser.add_argument(
        "--label-offset", type=natural, default=0, help="outputs before class 0 (1 for a background class)"
    )
    parser.add_argument("--limit", type=count, help="use the first rows only")
    parser.add_argument("--batch-size", type=count, default=32, help="rows in one forward")
    parser.add_argument(
        "--discrimination",
        metavar="FILE",
        help="measure how well every block keeps the classes apart, print it, and draw it as PNG, PDF or SVG",
    )
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the model"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the table."""
    if args.discrimination is not None and Path(args.discrimination).suffix not in PLOTS:
        raise ValueError(f"--discrimination must end in {', '.join(PLOTS)}, got {args.discrimination}")
    for path in (args.json, args.markdown, args.discrimination):
        if path is not None and not (Path(path).resolve().parent.is_dir() and not Path(path).is_dir()):
            raise ValueError(f"{path} cannot be written: it must be a file in a folder that exists")
    table, layers, checkpoint = evaluate(args)
    print(table)
    values = {**table.to_dict(), "dataset": args.dataset_name or Path(args.dataset).name, **checkpoint}
    if layers is not None:
        print(f"\n{layers}")
        layers.draw(args.discrimination)
        values["by_layer"] = layers.to_dict()
    for path, text in ((args.json, json.dumps(values, indent=2)), (args.markdown, table.to_markdown())):
        if path is not None:
            with writing(path), beside(Path(path)) as new:
                new.write_text(text + "\n", encoding="utf-8")


def evaluate(args: argparse.Namespace) -> tuple[Evaluation, LayerDiscrimination | None, dict[str, int]]:
    """The table that the arguments ask for, discrimination layer by layer if they do, and which checkpoint it is of."""
    trust = args.trust_remote_code
    rows = read_rows(args.dataset, args.column, args.limit)
    if len(rows) < LEAST:
        raise ValueError(f"an evaluation needs at least {LEAST} rows, --dataset and --limit leave {len(rows)}")
    config = float_config(args.teacher, trust)
    auto = auto_class(config)
    if auto not in (*LANGUAGE_MODELS, *CLASSIFIERS):
        raise ValueError(
            "eval measures classifiers of texts, images and sounds, and causal language models; "
            f"{args.teacher} is a {_class_of(config)}"
        )
    if args.discrimination is not None and auto in LANGUAGE_MODELS:
        raise ValueError(f"--discrimination needs classes, and {args.teacher} is a language model: leave it out")
    quantized = load_config(args.model, trust)
    if getattr(quantized, "quantization_config", None) is None:
        raise ValueError(
            f"{args.model} is not quantized: the first model is the quantized one, --float names the other"
        )
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust}
    kind = model_class(config, trust)
    teacher = load_whole(kind, args.teacher, **options).eval()
    # What is loaded counts: the name in an old float config may be that of another model type's class.
    saved, loaded = _class_of(quantized), type(teacher).__name__
    if saved not in (loaded, _class_of(config)):
        raise ValueError(
            f"{args.model} is a {saved} and {args.teacher} a {loaded}: --float must name the model that the quantized "
            "one was made from"
        )
    model, found = kind.from_pretrained(args.model, output_loading_info=True, **options)
    check_whole(model.eval(), args.model, found, kind)
    processor = load_processor(args.teacher, trust)
    # The answer is no input, whatever its column is called.
    asked = rows if args.label_column == args.column else _without(rows, args.label_column)
    labels = None if auto in LANGUAGE_MODELS else labels_of(rows, args.label_column, teacher)
    data = collect(
        as_samples(asked, processor, args.column),
        teacher,
        processor=processor,
        num_samples=len(rows),
        batch_size=args.batch_size,
    )
    if labels is None:
        return evaluate_language_model(teacher, model, data.batches), None, identity(model)
    table = evaluate_classifier(teacher, model, data.batches, labels, args.label_offset)
    if args.discrimination is None:
        return table, None, identity(model)
    return table, discrimination_by_layer(teacher, model, data.batches, labels), identity(model)


def _class_of(config: Any) -> str:
    return (getattr(config, "architectures", None) or ["model without a task"])[0]


def _without(rows: Dataset, column: str) -> Dataset:
    return rows.remove_columns([column]) if column in rows.column_names else rows
