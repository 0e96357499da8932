"""Figures that papers and their code state for the same architectures: part of ``docs/peers.md``.

They are top-1 on all 50,000 validation images of ImageNet, from the float checkpoints of those papers; what can be set side
by side with results on other images is the share of float that is left.
"""

from __future__ import annotations

from common import pooled, table

# model, weights and inputs of ours; method, its source, float and quantized top-1.
FIGURES = (
    ("resnet-18-pq", "int2", "int2", "QDrop", "arXiv 2203.05740", 71.0, 51.69),
    ("resnet-18-pq", "int2", "int2", "PD-Quant", "arXiv 2212.07048", 71.0, 53.08),
    ("resnet-18-pq", "int2", "int2", "PD-Quant with CAT", "arXiv 2509.26277", 71.0, 53.27),
    ("deit-tiny-patch16-224", "int4", "int4", "RepQ-ViT", "arXiv 2212.08254", 72.2, 57.43),
    ("deit-tiny-patch16-224", "int4", "int4", "ERQ", "arXiv 2407.06794", 72.2, 61.79),
    ("deit-tiny-patch16-224", "int4", "int4", "APHQ-ViT", "arXiv 2504.02508", 72.2, 66.66),
    ("deit-tiny-patch16-224", "int4", "int4", "AdaLog", "arXiv 2407.12951", 72.2, 67.14),
)
NAMES = {"resnet-18-pq": "ResNet-18", "deit-tiny-patch16-224": "DeiT-Tiny"}


def lines(results: list[dict]) -> list[str]:
    """The section, with the rows of ``results`` (of ``realdata.json``) that quantize the same."""
    rows = []
    for key in dict.fromkeys(figure[:3] for figure in FIGURES):
        for *same, method, source, before, after in FIGURES:
            if tuple(same) == key:
                rows.append([*named(*key), f"{method}, {source}", "-", before, after, f"{100 * after / before:.1f} %"])
        for r in (r for r in results if (r["model"], r["weights"], r["activations"]) == key):
            count, before, after = pooled(r)
            how = f"hf_catquant, group {r['group_size']}, {r['solver']}, on {count:,} images"
            tops = (f"{before:.2f}", f"{after:.2f}", f"{100 * after / before:.1f} %")
            rows.append([*named(*key), how, f"{r['weight_bits']:.2f}", *tops])
    return [
        "",
        "## Published figures, on other images",
        "",
        "Weights and inputs of few bits; first and last layer 8 bits. The papers' figures are of all 50,000 validation",
        "images and of other float checkpoints: only the share of float that is left can be set side by side. Nor is the",
        "work the same: those methods have a scale for a whole channel of weights, ranges of inputs that are fixed before,",
        "and for transformers they round what enters attention's two products, too. Here every group of weights has its own",
        "scale (the bits count them), a linear's input has a range for every token, and attention computes in float.",
        "",
        *table(("model", "weights, inputs", "method", "bits a weight", "float", "quantized", "left"), rows),
    ]


def named(model: str, weights: str, inputs: str) -> tuple[str, str]:
    """The first two cells of a row."""
    return NAMES[model], f"{weights}, {inputs}"
