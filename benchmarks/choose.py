"""Draw up ``docs/how-to-choose.md`` from the results that are there: size, accuracy and time side by side.

    python benchmarks/choose.py

Reads ``realdata.json`` and ``autoround.json`` of ``benchmarks/results/`` and, if it is there, ``cpu_models.json``;
measures nothing. A test fails while the page is not what these files give, and a piece of advice that they do not bear out
any more stops the script.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from common import CASES, ROOT, pooled, read, sources, span, table, write

RESULTS = ROOT / "benchmarks" / "results"
AUTOROUND = RESULTS / "autoround.json"
PAGE = ROOT / "docs" / "how-to-choose.md"
Row = dict[str, Any]

# What a recommendation is made of: a name, what it costs, and which results show it.
SETTINGS: tuple[tuple[str, str, str, Callable[[Row], bool]], ...] = (
    ("int4, gptq", "minutes", 'CatQuantConfig(weights="int4", group_size=64)', lambda r: _is(r, "int4", "gptq", 64)),
    ("int3, gptq", "minutes", 'CatQuantConfig(weights="int3")', lambda r: _is(r, "int3", "gptq", 128)),
    (
        "int2 mixed with wider formats, gptq",
        "minutes",
        'CatQuantConfig(weights="int2", group_size=-1, average_bits=2.25)',
        lambda r: _is(r, "int2", "gptq", -1),
    ),
    (
        "ternary, gptq",
        "minutes",
        'CatQuantConfig(weights="ternary", group_size=64)',
        lambda r: _is(r, "ternary", "gptq", 64),
    ),
    (
        "ternary_symmetric, gptq",
        "minutes",
        'CatQuantConfig(weights="ternary_symmetric")',
        lambda r: _is(r, "ternary_symmetric", "gptq"),
    ),
    (
        "ternary_symmetric, reconstruct",
        "up to an hour",
        'CatQuantConfig(weights="ternary_symmetric", solver="reconstruct")',
        lambda r: _is(r, "ternary_symmetric", "reconstruct"),
    ),
)
START = """\
# How to choose

Drawn up by `python benchmarks/choose.py` from `benchmarks/results/`; what the columns are and how each number was made is
said in [results.md](results.md).

## In one minute
"""
AFTER = """
Then measure your own model: `catquant eval OUT --float MODEL --dataset test.parquet` prints float, quantized, and quantized
with correction side by side, with intervals.

## What a setting costs in accuracy

The change against float, of accuracy in points, and of perplexity as a factor for the language model; on all images that a
setting was measured on, 700 or 1,100. Results of the printed request where there are any; *not measured* means that there
is none.
"""
MIDDLE = """
## Size, accuracy and time of every result without quantized inputs

Smallest first. MB are those of the whole file, of float models in float32, in which all are quantized here (the files of
MiniLM and ResNet-18 are in float16: beside those it is half as many times smaller); a weight counts its scales and offsets;
seconds are those of quantizing on a machine that did other work beside it. Accuracy in percent on the first test set,
perplexity for stories260K, with 95 % intervals; [results.md](results.md) has the second set of images.
"""


def learned_for(steps: str) -> float:
    """Mean divergence over the seeds of the text encoder in ternary, as ``autoround.py`` has it, learned so many steps."""
    what = f"hf_catquant ternary, group 192, rotated, reconstruct{steps}"
    return fmean(r["kl"] for r in read(AUTOROUND) if (r["model"], r["what"]) == ("minilm-l6-sst2", what))


def advice(results: list[Row]) -> list[str]:
    """The short answer, each line with what the results have to say for it.

    Raises:
        ValueError: they do not say it any more.
    """
    int4, int3 = worst(results, "int4", 64), worst(results, "int3", 128)  # the groups of the printed requests
    depthwise, transformers = "mobilenet_v2_1.0_224", ("deit-tiny-patch16-224", "stories260K")
    learned = {name: best(results, name, "ternary_symmetric", "reconstruct") for name in transformers}
    rounded = {name: best(results, name, "ternary", "gptq") for name in (*transformers, depthwise)}
    deit, mixed = transformers[0], best(results, transformers[0], "int2", "gptq")
    shorter, longer = (learned_for(steps) for steps in ("", ", 800 steps a block"))
    found = (
        (
            int4 < 1,
            "**Next to nothing may change**: `int4` in groups of 64 by `gptq`.",
            f"The classifiers below lose at most {int4:.1f} points.",
        ),
        (
            int3 < 5,
            "**Smaller, in minutes**: `int3` by `gptq`.",
            f"They lose at most {int3:.1f} points, in groups of 128 (DeiT-Tiny; less in groups of 64, or learned).",
        ),
        (
            mixed < rounded[deit],
            '**About two bits, in minutes**: `CatQuantConfig(weights="int2", group_size=-1, average_bits=2.25)`.',
            (
                "One scale a row, and what groups would take goes to the layers that need it, 2.5 where rows are short:"
                f" DeiT-Tiny loses {mixed:.0f} points, not {rounded[deit]:.0f} as in ternary of 2.12 bits."
            ),
        ),
        (
            all(learned[name] < rounded[name] for name in transformers),
            '**As small as it gets**: `ternary_symmetric`, with `solver="reconstruct"` where `gptq` loses too much.',
            "It learns codes and scales block by block, which is worth its time on transformers.",
        ),
        (
            longer < shorter,
            '**Time to spare**: `solver_options={"block_steps": 800}`.',
            f"The ternary text encoder: divergence {longer:.3f}, not {shorter:.3f} ([autoround.md](autoround.md)).",
        ),
        (
            rounded[depthwise] > 10 > best(results, depthwise, "int3", "gptq"),
            "**Depthwise convolutions** (MobileNet): `int3` at least.",
            (
                f"Ternary loses {rounded[depthwise]:.0f} points there, int2 mixed with wider formats (2.5 bits)"
                f" {best(results, depthwise, 'int2', 'gptq'):.0f}."
            ),
        ),
        (
            True,
            '**No data at hand**: `CatQuantConfig(weights="int4", solver="rtn", correction=None)`,',
            "or `catquant quantize --generate 340` for a language model.",
        ),
        (
            True,
            "**A size to meet**: `average_bits=2.5` or `target_bytes=5_000_000`",
            "give wider formats to the layers that need them.",
        ),
        (True, "**Other runtimes**: [exports.md](exports.md)", "says which settings have an exact form elsewhere."),
    )
    for holds, line, _ in found:
        if not holds:
            raise ValueError(f"the results do not say this any more, write it anew: {line}")
    return [f"- {line} {why}" for _, line, why in found]


def worst(results: list[Row], weights: str, group_size: int) -> float:
    """The largest loss in points of gptq among the classifiers."""
    asked = [r for r in results if _is(r, weights, "gptq", group_size)]
    found = [r for r in asked if r["evaluation"]["metric"] == "accuracy"]
    return max(best(found, model, weights, "gptq") for model in {r["model"] for r in found})


def best(results: list[Row], model: str, weights: str, solver: str) -> float:
    """The least loss of one model among its results with a format and a solver."""
    return min(map(_loss, _plain([r for r in results if r["model"] == model and _is(r, weights, solver)])))


def _is(result: Row, weights: str, solver: str, group_size: int | None = None) -> bool:
    return (
        result["weights"] == weights
        and result["solver"].split(",")[0] == solver
        and result["activations"] == "none"
        and group_size in (None, result["group_size"])
    )


def page() -> list[str]:
    """The lines of the page."""
    results = read(RESULTS / "realdata.json")
    lines = [*START.splitlines(), "", *advice(results), *AFTER.splitlines(), "", *costs(results), *MIDDLE.splitlines()]
    for case in CASES:
        lines += ["", f"### {case.model}", "", *one_model([r for r in results if r["model"] == case.model])]
    timed = RESULTS / "cpu_models.json"
    lines += ["", *(times(json.loads(timed.read_text(encoding="utf-8"))) if timed.exists() else [])]
    return [*lines, *sources(results)]


def costs(results: list[Row]) -> list[str]:
    """A table of the loss of every setting on every model."""
    head = ["setting", *(case.model for case in CASES), "work", "request"]
    rows = []
    for name, work, request, belongs in SETTINGS:
        cells = [_cost([r for r in results if r["model"] == case.model and belongs(r)]) for case in CASES]
        rows.append([name, *cells, work, f"`{request}`"])
    return [
        *table(head, rows),
        "",
        "\\* The best of the rows below with further options or other groups; without any it was not measured.",
    ]


def _plain(results: list[Row]) -> list[Row]:
    """Those without further options, which the printed requests have none of; all, if there are no such."""
    return [r for r in results if _is_plain(r)] or results


def _is_plain(result: Row) -> bool:
    """Whether its request is printed: no options, and for symmetric codes the default groups."""
    return "," not in result["solver"] and (result["weights"] != "ternary_symmetric" or result["group_size"] == 128)


def _cost(results: list[Row]) -> str:
    if not results:
        return "not measured"
    best = min(_plain(results), key=_loss)
    mark = "" if _is_plain(best) else " *"
    _, before, after = pooled(best)
    if best["evaluation"]["metric"] == "perplexity":
        return f"x {after / before:.2f}{mark}"
    return f"{after - before:+.2f}{mark}"


def _loss(result: Row) -> float:
    """What is lost, the smaller the better for both metrics."""
    _, before, after = pooled(result)
    change = after - before
    return float(change if result["evaluation"]["metric"] == "perplexity" else -change)


def one_model(results: list[Row]) -> list[str]:
    """Float and every result of one model, smallest first."""
    plain = [r for r in results if r["activations"] == "none"]
    if not plain:
        return ["Not measured."]
    first = plain[0]["evaluation"]["rows"][0]
    rows = [["float", "32", f"{first['bytes'] / 1e6:.2f}", "1", span(first), "-", "0"]]
    for result in sorted(plain, key=lambda r: (r["evaluation"]["rows"][-1]["bytes"], r["solver"])):
        last = result["evaluation"]["rows"][-1]
        rows.append(
            [
                f"{result['weights']}, group {result['group_size']}, {result['solver']}",
                f"{result['weight_bits']:.2f}",
                f"{last['bytes'] / 1e6:.2f}",
                f"{first['bytes'] / last['bytes']:.1f}",
                span(last),
                "on" if last["name"].endswith("CAT") else "off",
                f"{result['seconds']:.0f}",
            ]
        )
    return table(["setting", "bits a weight", "MB", "times smaller", "result", "correction", "s"], rows)


def times(models: dict[str, Row]) -> list[str]:
    """How fast whole models run: of every contender the time beside float32 and bfloat16."""
    lines = ["## How fast models run on a CPU", "", "Above 1: faster than the same model in torch."]
    for name, found in models.items():
        rows = [
            [
                r["task"],
                r["contender"],
                f"{1e3 * r['median']:.1f}",
                f"{r['to_float32']:.2f}",
                f"{r['to_bfloat16']:.2f}",
            ]
            for r in found["results"]
        ]
        head = ["task", "model", "ms", "times float32", "times bfloat16"]
        lines += ["", f"### {name}", "", *table(head, rows), "", f"{found['date']}: {_machine(found['machine'])}."]
    return lines


def _machine(found: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, dict) else str(found)


def main(place: Path = PAGE) -> None:
    write(place, page())
    print(place)


if __name__ == "__main__":
    main()
