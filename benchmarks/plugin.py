"""The correction on models that other libraries quantized: gains, and where there are none.

    pip install bitsandbytes torchao optimum-quanto hqq
    python benchmarks/plugin.py --data FOLDER [--only deit ...] [--peers hqq ...]

FOLDER as in ``realdata.py``. Each library quantizes the model in its own way, with its own defaults: bitsandbytes through
transformers (NF4 only linears of a multiple of 64 inputs and outputs, its kernel for the CPU refuses others), optimum-quanto
and torchao on their own modules, HQQ on its own linears inside the blocks. Then
``hf_catquant.fit_correction`` is fitted on the calibration samples and judged on the test rows. Results go to
``benchmarks/results/plugin.json`` and ``docs/plugin.md``.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from common import CASES, ROOT, Bench, chosen, made, put, read, sources, span, table, write
from torch import nn

from hf_catquant import fit_correction
from hf_catquant.model import stacks

RESULTS = ROOT / "benchmarks" / "results" / "plugin.json"
PAGE = ROOT / "docs" / "plugin.md"


def bitsandbytes(multiple: int = 1, **options: Any) -> Callable[[Bench], nn.Module]:
    """As ``from_pretrained`` makes it, on linears whose sizes are multiples of ``multiple``."""

    def make(bench: Bench) -> nn.Module:
        linears = {name: m for name, m in bench.teacher.named_modules() if isinstance(m, nn.Linear)}
        skipped = [n for n, m in linears.items() if m.in_features % multiple or m.out_features % multiple]
        config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=skipped or None, **options)
        return bench.load(quantization_config=config, device_map="cpu")

    return make


def quanto(name: str) -> Callable[[Bench], nn.Module]:
    """optimum-quanto on every module that it takes."""

    def make(bench: Bench) -> nn.Module:
        from optimum import quanto as library

        model = bench.load()
        library.quantize(model, weights=getattr(library, name))
        library.freeze(model)
        return model

    return make


def torchao(bits: int) -> Callable[[Bench], nn.Module]:
    """torchao's weight-only integers; of four bits in groups of 32, on linears that these divide."""

    def make(bench: Bench) -> nn.Module:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        model = bench.load()
        if bits == 8:
            quantize_(model, Int8WeightOnlyConfig())
        else:
            four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
            quantize_(model, four, lambda m, name: isinstance(m, nn.Linear) and m.in_features % 32 == 0)
        return model

    return make


def hqq(bits: int) -> Callable[[Bench], nn.Module]:
    """HQQ's own linears inside the blocks, in groups of 64."""

    def make(bench: Bench) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        model = bench.load()
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        blocks = tuple(f"{name}." for names in stacks(model).values() for name in names)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.startswith(blocks):
                made = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
                model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], made)
        return model

    return make


PEERS: dict[str, tuple[str, Callable[[Bench], nn.Module]]] = {
    "bitsandbytes int8": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes(64, load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "optimum-quanto qint4": ("optimum-quanto", quanto("qint4")),
    "optimum-quanto qint2": ("optimum-quanto", quanto("qint2")),
    "torchao int8": ("torchao", torchao(8)),
    "torchao int4": ("torchao", torchao(4)),
    "HQQ 4 bits": ("hqq", hqq(4)),
    "HQQ 3 bits": ("hqq", hqq(3)),
    "HQQ 2 bits": ("hqq", hqq(2)),
}

# Who quantizes convolutions. The others would change the classifier of these models alone.
CONVOLUTIONS = "optimum-quanto"
CONVOLUTIONAL = ("resnet", "mobilenet")


def peers_of(model: str) -> list[str]:
    """The libraries and formats that are run on a model."""
    is_convolutional = model.startswith(CONVOLUTIONAL)
    return [name for name, (package, _) in PEERS.items() if package == CONVOLUTIONS or not is_convolutional]


def main() -> None:
    """Run the models and libraries that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    parser.add_argument("--peers", nargs="+", default=[""], help="parts of the names of libraries and formats")
    args = parser.parse_args()
    for case in chosen(args.only):
        bench = Bench(case, args.data)
        for name in [name for name in peers_of(case.model) if any(part in name for part in args.peers)]:
            put(RESULTS, [run(bench, name)], "model", "peer")
            write_page()


def run(bench: Bench, name: str) -> dict[str, Any]:
    """One library on one model; where it fails, how."""
    package, make = PEERS[name]
    what = {"model": bench.case.model, "peer": name, "version": version(package), "seed": 0, **made()}
    try:
        model = make(bench)
        start = time.perf_counter()
        fits = fit_correction(
            model,
            bench.teacher,
            bench.calibration,
            processor=bench.processor,
            num_samples=len(bench.calibration),
            batch_size=bench.case.batch_size,
        )
        seconds = round(time.perf_counter() - start, 1)
        judged = bench.evaluate(model)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        print(f"{bench.case.model}: {name}: {error}", flush=True)
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).splitlines() or [f"{place.name}: {place.line}"]
        return {**what, "error": f"{type(error).__name__}: {said[0]}"}
    rows = [
        {key: getattr(row, key) for key in ("metric", "low", "high", "kl", "agreement")} for row in judged.rows[1:]
    ]
    gain = {"gain": judged.gain, "gain_low": judged.gain_low, "gain_high": judged.gain_high}
    print(f"{bench.case.model}: {name}: {rows[0]['metric']:.2f}, gain {judged.gain}", flush=True)
    clusters = [fit.get("clusters") for fit in fits.values()]
    return {**what, "n": judged.n, "rows": rows, **gain, "clusters": clusters, "seconds": seconds}


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    lines = [
        "# The correction on models of other libraries",
        "",
        "Made by `python benchmarks/plugin.py --data FOLDER`: `fit_correction(model, teacher, samples)` with its",
        "defaults on the calibration samples, judged on the test rows. Accuracy in percent, perplexity for stories260K;",
        "gains are paired, with 95 % intervals; off: cross-validation found nothing to gain. Seed 0. ResNet-18 and",
        f"MobileNetV2 by {CONVOLUTIONS} only: the others take no convolutions, and would change the classifier alone.",
    ]
    for case in CASES:
        mine = {r["peer"]: r for r in results if r["model"] == case.model}
        rows = [cells(mine[name]) for name in PEERS if name in mine]
        if rows:
            head = ("quantized by", "quantized", "KL", "with the correction", "KL", "gain")
            lines += ["", f"## {case.model}", "", *table(head, rows)]
    versions = sorted({f"{PEERS[r['peer']][0]} {r['version']}" for r in results})
    write(PAGE, [*lines, *sources(results), "", f"{', '.join(versions)}."])


def cells(result: dict[str, Any]) -> list[str]:
    """One row of the page."""
    if "error" in result:
        return [result["peer"], result["error"].replace("|", "/")[:120], "-", "-", "-", "-"]
    first, last = result["rows"][0], result["rows"][-1]
    if result["gain"] is None:
        return [result["peer"], span(first), f"{first['kl']:.4f}", "off", "-", "0"]
    gain = f"{result['gain']:+.2f} [{result['gain_low']:+.2f}, {result['gain_high']:+.2f}]"
    return [result["peer"], span(first), f"{first['kl']:.4f}", span(last), f"{last['kl']:.4f}", gain]


if __name__ == "__main__":
    main()
