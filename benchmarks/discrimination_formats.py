"""Which blocks of a model to keep in more bits: chosen by discrimination, by divergence, by squared error.

    python benchmarks/discrimination_formats.py --data FOLDER [--only minilm ...] [--solvers rtn gptq] [--resume]

FOLDER as in ``realdata.py``. Each block is rounded alone to ``LOW``; what that costs is measured on labelled calibration
rows in three ways: the fall of D of the features that enter the head, the divergence of the answers, the squared error of
these features. Half of the blocks, those that cost most, are kept in ``HIGH``; then the model is quantized and judged
on test rows. The ImageNet network gets a head for the classes of CIFAR-10 first, fitted to its features of the calibration
rows (logistic regression): ImageNet's calibration file has one image a class, and so no D.
Results go to ``benchmarks/results/discrimination_formats.json`` and ``docs/discrimination-formats.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import ROOT, machine
from sklearn.linear_model import LogisticRegression

from hf_catquant import CatQuantConfig, extract_features, feature_discrimination, quantize
from hf_catquant.answers import divergences
from hf_catquant.model import stacks
from hf_catquant.tasks import load_processor, read_rows

RESULTS = ROOT / "benchmarks" / "results" / "discrimination_formats.json"
PAGE = ROOT / "docs" / "discrimination-formats.md"
LOW, HIGH, GROUP = "binary", "int4", 64
FIXED = ("first half", "last half", f"none: all {LOW}", f"all {HIGH}")  # to compare with
SAMPLES = 200


@dataclass(frozen=True)
class Case:
    """A model, its labelled calibration rows and its test rows: ``tests`` of them, None for all.

    ``probe``: whether its head is fitted to the classes of the calibration rows first.
    """

    model: str
    auto: Any
    calibration: str
    test: str
    column: str
    label: str
    tests: int | None = None
    probe: bool = False


CASES = (
    Case(
        "minilm-l6-sst2",
        transformers.AutoModelForSequenceClassification,
        "sst2/calibration_train.parquet",
        "sst2/validation.parquet",
        "sentence",
        "label",
    ),
    Case(
        "ast-tiny-fsdd",
        transformers.AutoModelForAudioClassification,
        "fsdd/calibration_train.parquet",
        "fsdd/test.parquet",
        "audio",
        "digit",
    ),
    Case(
        "deit-tiny-patch16-224",
        transformers.AutoModelForImageClassification,
        "cifar10/calibration_train.parquet",
        "cifar10/test.parquet",
        "image",
        "label",
        tests=300,
        probe=True,
    ),
)


def main() -> None:
    """Run the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    parser.add_argument("--solvers", nargs="*", default=["rtn", "gptq"], help="for the final model; none: costs alone")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run was stopped")
    args = parser.parse_args()
    for case in CASES:
        if any(part in case.model for part in args.only):
            run(case, args.solvers, args.data, args.resume)
    write_page()


def run(case: Case, solvers: list[str], data: Path, resume: bool) -> None:
    """Costs of every block, the choices they lead to, and what becomes of the model; kept as they come."""
    folder = str(data / "models" / case.model)
    processor = load_processor(folder)
    samples, labels = rows(data, case, case.calibration, SAMPLES, processor)
    teacher = load(case, folder, data, processor)
    blocks = [block for stack in stacks(teacher).values() for block in stack]
    costs = saved().get(case.model, {}).get("costs", {}) if resume else {}
    missing = [block for block in blocks if block not in costs]
    truth = outputs(teacher, samples, processor) if missing else None
    for block in missing:
        costs[block] = cost(teacher, block, (samples, labels), processor, truth)
        keep(case.model, "costs", costs)
    if not solvers:
        return
    half = len(blocks) // 2
    choices = {key: sorted(blocks, key=lambda b, key=key: -costs[b][key])[:half] for key in next(iter(costs.values()))}
    choices |= dict(zip(FIXED, (blocks[:half], blocks[half:], [], blocks), strict=True))
    tests, answers = rows(data, case, case.test, case.tests, processor)
    wanted = outputs(teacher, tests, processor)
    sizes = {"n": len(answers), "float": judge(wanted, wanted, answers)}
    for solver in solvers:
        done = saved().get(case.model, {}).get(solver, {}).get("choices", {}) if resume else {}
        for name, kept in choices.items():
            chosen = [block for block in blocks if block in kept]
            row = next((row for row in done.values() if row["kept"] == chosen and "right" in row), None)
            if row is None:
                model = quantized(teacher, chosen, LOW, HIGH, None if solver == "rtn" else samples, processor)
                row = {"kept": chosen, **judge(outputs(model, tests, processor), wanted, answers)}
                print(case.model, solver, name, row, flush=True)
            done[name] = row
            result = {**sizes, "choices": done, "date": date.today().isoformat(), "machine": machine()}
            keep(case.model, solver, result)


def rows(data: Path, case: Case, file: str, limit: int | None, processor: Any) -> tuple[list[Any], np.ndarray]:
    """Samples and classes of a file; images ready for the network, because they are read many times."""
    table = read_rows(str(data / "data" / file), case.column, limit)
    samples = list(table[case.column])
    if case.column == "audio":
        samples = [np.asarray(wave, np.float32) / 32768 for wave in samples]
    if case.column == "image":
        images = processor([image.convert("RGB") for image in samples], return_tensors="pt")["pixel_values"]
        samples = [{"pixel_values": image} for image in images]
    return samples, np.array(table[case.label])


def load(case: Case, folder: str, data: Path, processor: Any) -> Any:
    """The float model."""
    model = case.auto.from_pretrained(folder, dtype=torch.float32).eval()
    if case.probe:
        samples, labels = rows(data, case, case.calibration, None, processor)
        features = extract_features(model, samples, processor, batch_size=32)
        fitted = LogisticRegression(C=0.1, max_iter=1000).fit(features.numpy(), labels)
        model.classifier = torch.nn.Linear(features.shape[1], len(fitted.classes_))
        model.classifier.weight.data = torch.from_numpy(fitted.coef_).float()
        model.classifier.bias.data = torch.from_numpy(fitted.intercept_).float()
    return model


def cost(
    teacher: Any, block: str, labelled: tuple[list[Any], np.ndarray], processor: Any, truth: Any
) -> dict[str, float]:
    """What rounding one block alone costs, in three measures."""
    samples, labels = labelled
    model = quantized(teacher, [block], "int8", LOW, None, None)
    features, logits = outputs(model, samples, processor)
    before, after = (feature_discrimination(x, labels)["discrimination"] for x in (truth[0], features))
    return {
        "discrimination": before - after,
        "divergence": float(divergences(truth[1], logits).mean()),
        "squared error": float((features - truth[0]).square().sum() / truth[0].square().sum()),
    }


def quantized(teacher: Any, blocks: list[str], rest: str, weights: str, samples: Any, processor: Any) -> Any:
    """The model with ``blocks`` in ``weights`` and the others in ``rest``; by gptq if there are samples, else by rtn."""
    model = copy.deepcopy(teacher)
    config = CatQuantConfig(
        weights=rest,
        group_size=GROUP,
        overrides={rf"^{re.escape(block)}\.": {"weights": weights} for block in blocks},
        solver="rtn" if samples is None else "gptq",
        correction=None,
        dataset=samples,
        processor=processor,
        num_samples=SAMPLES,
    )
    return quantize(model, config)


def outputs(model: Any, samples: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that enter the head and logits, of all samples."""
    found = extract_features(model, samples, processor, at=["head", ""], batch_size=32)
    return found["head"], found[""]


def judge(found: tuple[Any, Any], wanted: tuple[Any, Any], answers: np.ndarray) -> dict[str, Any]:
    """Accuracy in percent, agreement with the float model, divergence, D of the features; which rows are right (0, 1)."""
    choice = found[1].argmax(1).numpy()
    return {
        "accuracy": 100 * float((choice == answers).mean()),
        "agreement": 100 * float((choice == wanted[1].argmax(1).numpy()).mean()),
        "divergence": float(divergences(wanted[1], found[1]).mean()),
        "discrimination": feature_discrimination(found[0], answers)["discrimination"],
        "right": "".join("01"[int(hit)] for hit in choice == answers),
    }


def paired(row: dict[str, Any], base: dict[str, Any]) -> str:
    """Points of accuracy over ``base``, and half the 95 % interval of the difference on the same rows, if they are kept."""
    if row["kept"] == base["kept"]:
        return "the same blocks"
    points = f"{row['accuracy'] - base['accuracy']:+.2f}"
    if "right" not in row or "right" not in base:
        return f"{points} (rows not kept)"
    gains = 100.0 * np.array([int(a) - int(b) for a, b in zip(row["right"], base["right"], strict=True)])
    return f"{points} ± {1.96 * gains.std(ddof=1) / len(gains) ** 0.5:.2f}"


def saved() -> dict[str, Any]:
    """What was measured before."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(model: str, key: str, result: dict[str, Any]) -> None:
    """Keep a result, in the place of an older one."""
    old = saved()
    old.setdefault(model, {})[key] = result
    RESULTS.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")


def write_page() -> None:
    """Draw up the page; what has no result yet is named there."""
    results = saved()
    lines = [
        "# Formats of blocks, chosen by discrimination",
        "",
        f"Made by `python benchmarks/discrimination_formats.py --data FOLDER`: half of the blocks in {HIGH}, the others",
        f"in {LOW}, groups of {GROUP}, no correction, seed 0; rtn rounds without data, gptq has {SAMPLES} calibration rows.",
        "The blocks to keep are those whose rounding alone costs most on calibration rows, in one of three measures;",
        "compared with keeping the first or the last half. Test rows were not looked at for the choice. D over: points of",
        "accuracy that the choice by D has over this one, with the 95 % interval of the difference on the same rows, where",
        "it was kept which rows are right. What it means is in",
        "[discrimination.md](discrimination.md#which-claims-hold).",
    ]
    for case in CASES:
        found = results.get(case.model, {})
        for solver in ("rtn", "gptq"):
            lines += table(case.model, solver, found[solver]) if solver in found else []
        lines += costs_table(case.model, found["costs"]) if "costs" in found else []
    missing = [f"{c.model}, {s}" for c in CASES for s in ("rtn", "gptq") if s not in results.get(c.model, {})]
    if missing:
        lines += ["", f"Not measured: {'; '.join(missing)}."]
    runs = [found[solver] for found in results.values() for solver in ("rtn", "gptq") if solver in found]
    for made in sorted({(value["date"], value["machine"]) for value in runs}):
        lines += ["", f"{made[0]}: {made[1]}."]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(model: str, solver: str, result: dict[str, Any]) -> list[str]:
    """Lines about a model that was quantized in each of the choices."""
    lines = [
        "",
        f"## {model}, {solver}",
        "",
        f"{result['n']} test rows, float accuracy {result['float']['accuracy']:.2f} %.",
        "",
        "| chosen by | blocks kept | accuracy % | D over | agreement % | divergence | D |",
        "|---|---|---|---|---|---|---|",
    ]
    own = result["choices"]["discrimination"]
    for choice, row in result["choices"].items():
        kept = ", ".join(block.rsplit(".", 1)[-1] for block in row["kept"]) or "-"
        over = "" if choice == "discrimination" else paired(own, row)
        rates = f"{row['accuracy']:.2f} | {over} | {row['agreement']:.2f}"
        lines.append(f"| {choice} | {kept} | {rates} | {row['divergence']:.4f} | {row['discrimination']:.4f} |")
    missing = [name for name in FIXED if name not in result["choices"]]
    return [*lines, "", f"Not measured: {', '.join(missing)}."] if missing else lines


def costs_table(model: str, costs: dict[str, Any]) -> list[str]:
    """Lines about what rounding each block alone costs."""
    lines = ["", f"{model}, cost of rounding a block alone to {LOW}, by rtn:", ""]
    lines += ["| block | fall of D | divergence | squared error |", "|---|---|---|---|"]
    for block, row in costs.items():
        numbers = f"{row['discrimination']:.4f} | {row['divergence']:.4f} | {row['squared error']:.4f}"
        lines.append(f"| {block.rsplit('.', 1)[-1]} | {numbers} |")
    return lines


if __name__ == "__main__":
    main()
