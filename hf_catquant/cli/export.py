"""Write a quantized model in a form that runs without this package.

safetensors: a float model for transformers. gguf: a file for llama.cpp, of Llama-like language models. gemma, metal: packed
integers as transformers' own quantizers of these names store them. onnx: a graph with packed weights, of a model that reads
text, images or sound. What a form has no place for is refused, or with --lossy left out and said.
"""

from __future__ import annotations

import argparse

from ..exports import TARGETS, export
from ..exports.gguf_file import TERNARY

NAME = "export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("model", help="folder or Hub id of a quantized model")
    parser.add_argument("out", help="folder to make, for gguf and onnx the file")
    parser.add_argument("--to", choices=TARGETS, default="safetensors", help="form")
    parser.add_argument("--lossy", action="store_true", help="leave out what the form has no place for, and say it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="safetensors: of the weights")
    parser.add_argument("--ternary", choices=TERNARY, help="gguf: type of ternary weights without offsets")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--no-vocabulary", action="store_true", help="gguf: leave the tokenizer out")


def run(args: argparse.Namespace) -> None:
    """Export and say what was written."""
    options = {"dtype": args.dtype, "ternary": args.ternary, "vocabulary": False if args.no_vocabulary else None}
    given = {name: value for name, value in options.items() if value is not None}
    trust = args.trust_remote_code
    print(export(args.model, args.out, args.to, lossy=args.lossy, trust_remote_code=trust, **given))
