"""Whole models on the CPU: quantized ones beside the same model in float32 and bfloat16.

    python benchmarks/cpu_models.py [--only bert vit resnet llama] [--formats ternary int4] [--seconds 10] [--threads 2]

Weights and codes are random, drawn from a seed, since what they are does not change how long they take; shapes are those
of the published models. Which layers are packed, in which format, and that their inputs are rotated, is what the defaults
choose; there is no correction. Contenders take turns in one run: compare ratios. Results go to
``benchmarks/results/cpu_models.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_catquant import CatQuantConfig
from hf_catquant.bench import machine, random_weight
from hf_catquant.formats import FORMATS, get_format
from hf_catquant.layers import QuantizedModule, layer_for
from hf_catquant.log import logger
from hf_catquant.model import select
from hf_catquant.modules import replace_module
from hf_catquant.packed_model import share_weight
from hf_catquant.weight import fit_static_range

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_models.json"
KEEP = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 32))
Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Task:
    """One thing that a model is timed at: ``prepare(model)`` gives the call; a call makes ``items`` of ``unit``."""

    name: str
    items: int
    unit: str
    prepare: Callable[[nn.Module], Callable[[], Any]]


@dataclass
class Contender:
    """One model at one task, and its times in seconds."""

    name: str
    call: Callable[[], Any]
    times: list[float] = field(default_factory=list)


def bert() -> nn.Module:
    """BERT-base, 110 M weights, with a head of two classes."""
    return transformers.BertForSequenceClassification(transformers.BertConfig())


def vit() -> nn.Module:
    """ViT-B/16 at 224 pixels, 86 M weights."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


def resnet() -> nn.Module:
    """ResNet-50, 26 M weights."""
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def llama() -> nn.Module:
    """The shape of Llama 3.2 1B: 1.2 G weights, the head shares the embedding's."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def texts(batch: int, length: int) -> Task:
    """Sentences of ``length`` tokens, all of them at once."""
    ids = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
    return Task(f"{batch} x {length} tokens", batch, "sentences", lambda model: lambda: model(input_ids=ids).logits)


def images(batch: int) -> Task:
    """Images of 224 x 224 pixels."""
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def prepare(model: nn.Module) -> Callable[[], Any]:
        moved = pixels.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
        return lambda: model(pixel_values=moved).logits

    return Task(f"{batch} images", batch, "images", prepare)


def prefill(length: int) -> Task:
    """Reading a prompt, with the logits of its last token."""
    ids = torch.randint(0, 128000, (1, length), generator=torch.Generator().manual_seed(0))
    call: Run = lambda model: lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits  # noqa: E731
    return Task(f"prompt of {length}", length, "tokens", call)


def decode(context: int) -> Task:
    """The next token after ``context`` others, whose keys and values are there."""
    ids = torch.randint(0, 128000, (1, context + 1), generator=torch.Generator().manual_seed(0))

    def prepare(model: Any) -> Callable[[], Tensor]:
        cache = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

        def call() -> Tensor:
            logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
            cache.crop(-1)  # the one that was added
            return logits

        return call

    return Task(f"a token after {context}", 1, "tokens", prepare)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Task]]] = {
    "bert": (bert, [texts(1, 128), texts(8, 128)]),
    "vit": (vit, [images(1), images(8)]),
    "resnet": (resnet, [images(1), images(8)]),
    "llama": (llama, [decode(128), prefill(128)]),
}


def quantized(base: nn.Module, name: str, activations: str | None, seed: int) -> nn.Module:
    """The model with packed weights: the layers and formats that the defaults choose. It shares what stays in float."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    config = CatQuantConfig(weights=name, activations=activations, solver="rtn", correction=None)
    generator = torch.Generator().manual_seed(seed)
    for site in select(model, config).sites:
        kind: Any = layer_for(site.module)
        layer = kind(site.module, site.scheme)
        if site.tied_to is None:
            drawn(layer, generator)
        if layer.input_scale is not None:
            layer.fill_input_range(*fit_static_range(torch.randn(1000), get_format(site.scheme.activations or "")))
        replace_module(model, site.name, layer)
        if site.tied_to is not None:
            share_weight(model, site.name, site.tied_to)
    return model


def drawn(layer: QuantizedModule, generator: torch.Generator) -> None:
    """Fill a layer with random codes, and scales that keep the size of what goes through it."""
    fmt, size = get_format(layer.scheme.weights), layer.scheme.group_size
    packed, scale, offset = random_weight(layer.scheme.weights, layer.rows_, layer.columns, size, generator)
    step = (2 / layer.columns) ** 0.5 / (sum(level**2 for level in fmt.levels) / fmt.radix) ** 0.5
    layer.weight_packed, layer.weight_scale = packed, torch.full_like(scale, step)
    layer.weight_offset = None if offset is None else torch.zeros_like(offset)


def made(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The float model of this seed."""
    torch.manual_seed(seed)
    return build().eval().requires_grad_(False)


def contenders(name: str, formats: list[str], activations: list[str | None], seed: int) -> dict[str, nn.Module]:
    """Every model that is compared, by its name in the table."""
    base = made(MODELS[name][0], seed)
    found = {"torch float32": base, "torch bfloat16": copy.deepcopy(base).to(torch.bfloat16)}
    for fmt in formats:
        for act in activations:
            model = quantized(base, fmt, act, seed)
            found[f"{fmt} {act or 'float32'}"] = model
            if act is None:
                found[f"{fmt} bfloat16"] = copy.deepcopy(model).to(torch.bfloat16)
    return found


def measure(task: Task, models: dict[str, nn.Module], seconds: float) -> list[dict[str, Any]]:
    """Medians of turns, and ratios to both float models."""
    rivals = [Contender(name, task.prepare(model)) for name, model in models.items()]
    for rival in rivals:
        if not bool(torch.isfinite(rival.call()).all()):
            raise RuntimeError(f"{rival.name} returns values that are not finite at {task.name}: it is not timed")
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        first = turns % len(rivals)  # nobody always follows the same one
        for rival in (*rivals[first:], *rivals[:first]):
            start = time.perf_counter()
            rival.call()
            rival.times.append(time.perf_counter() - start)
        turns += 1
    medians = {rival.name: statistics.median(rival.times) for rival in rivals}
    return [
        {
            "task": task.name,
            "contender": name,
            "turns": turns,
            "median": median,
            task.unit + "/s": task.items / median,
            "to_float32": medians["torch float32"] / median,
            "to_bfloat16": medians["torch bfloat16"] / median,
        }
        for name, median in medians.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["binary", "ternary", "int4", "int8"])
    parser.add_argument("--activations", nargs="+", default=["none", "int8"], choices=["none", "int8", "int4"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns for every task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logger.setLevel("ERROR")
    activations = [None if a == "none" else a for a in args.activations]
    for name in args.only:
        print(name, flush=True)
        with torch.inference_mode():
            models, rows = contenders(name, args.formats, activations, args.seed), []
            for task in MODELS[name][1]:
                print(f"  {task.name}", flush=True)
                found = measure(task, models, args.seconds)
                for row in found:
                    ratios = f"x{row['to_float32']:6.2f} of float32  x{row['to_bfloat16']:6.2f} of bfloat16"
                    print(f"    {row['contender']:18s} {1e3 * row['median']:9.1f} ms  {ratios}", flush=True)
                rows += found
        save(args, name, rows)
        del models
        gc.collect()


def save(args: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> None:
    """Put the results of one model among those of the others in the file."""
    held = json.loads(args.out.read_text()) if args.out.is_file() else {}
    held[name] = {
        "machine": {**machine(), "threads": args.threads, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
        "seed": args.seed,
        "results": rows,
    }
    args.out.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    if not os.environ.keys() >= KEEP.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    main()
