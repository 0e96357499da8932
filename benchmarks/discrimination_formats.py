"""Which blocks of a model to keep in more bits: chosen by discrimination, by divergence, by squared error.

    python benchmarks/discrimination_formats.py --data FOLDER [--only minilm ...] [--solvers rtn gptq]

FOLDER as in ``realdata.py``. Each block is rounded alone to ``LOW``; what that costs is measured on labelled calibration
rows in three ways: the fall of D of the features that enter the head, the divergence of the answers, the squared error of
these features. Half of the blocks, those that cost most, are kept in ``HIGH``; then the model is quantized and judged
on test rows. Results go to ``benchmarks/results/discrimination_formats.json`` and ``docs/discrimination-formats.md``.
"""

from __future__ import annotations

import argparse
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

from hf_catquant import CatQuantConfig, extract_features, feature_discrimination, quantize
from hf_catquant.logits import divergences
from hf_catquant.model import stacks
from hf_catquant.tasks import load_processor, read_rows

RESULTS = ROOT / "benchmarks" / "results" / "discrimination_formats.json"
PAGE = ROOT / "docs" / "discrimination-formats.md"
LOW, HIGH, GROUP = "binary", "int4", 64
SAMPLES = 200


@dataclass(frozen=True)
class Case:
    """A model, its labelled calibration rows and its test rows."""

    model: str
    auto: Any
    calibration: str
    test: str
    column: str
    label: str


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
)


def main() -> None:
    """Run the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    parser.add_argument("--solvers", nargs="+", default=["rtn", "gptq"], help="for the final model")
    args = parser.parse_args()
    for case in CASES:
        if any(part in case.model for part in args.only):
            for solver in args.solvers:
                add(f"{case.model}, {solver}", run(case, solver, args.data))
    write_page()


def run(case: Case, solver: str, data: Path) -> dict[str, Any]:
    """Costs of every block, the choices they lead to, and what becomes of the model."""
    folder = str(data / "models" / case.model)
    processor = load_processor(folder)
    samples, labels = rows(data, case, case.calibration, SAMPLES)
    tests, answers = rows(data, case, case.test, None)
    teacher = load(case, folder)
    blocks = [block for stack in stacks(teacher).values() for block in stack]
    truth = outputs(teacher, samples, processor)
    costs = {block: cost(case, folder, block, (samples, labels), processor, truth) for block in blocks}
    half = len(blocks) // 2
    choices = {key: sorted(blocks, key=lambda b, key=key: -costs[b][key])[:half] for key in next(iter(costs.values()))}
    choices |= {"first half": blocks[:half], "last half": blocks[half:], f"none: all {LOW}": [], f"all {HIGH}": blocks}
    found: dict[tuple[str, ...], dict[str, float]] = {}
    wanted = outputs(teacher, tests, processor)
    for kept in choices.values():
        chosen = tuple(block for block in blocks if block in kept)
        if chosen not in found:
            learned = None if solver == "rtn" else samples
            model = quantized(case, folder, list(chosen), LOW, HIGH, learned, processor)
            found[chosen] = judge(outputs(model, tests, processor), wanted, answers)
            print(case.model, chosen, found[chosen], flush=True)
    results = {
        name: {"kept": [b for b in blocks if b in kept], **found[tuple(b for b in blocks if b in kept)]}
        for name, kept in choices.items()
    }
    return {"costs": costs, "float": judge(wanted, wanted, answers), "n": len(answers), "choices": results}


def rows(data: Path, case: Case, file: str, limit: int | None) -> tuple[list[Any], np.ndarray]:
    """Samples and classes of a file."""
    table = read_rows(str(data / "data" / file), case.column, limit)
    samples = list(table[case.column])
    if case.column == "audio":
        samples = [np.asarray(wave, np.float32) / 32768 for wave in samples]
    return samples, np.array(table[case.label])


def load(case: Case, folder: str) -> Any:
    """The float model."""
    return case.auto.from_pretrained(folder, dtype=torch.float32).eval()


def cost(
    case: Case, folder: str, block: str, labelled: tuple[list[Any], np.ndarray], processor: Any, truth: tuple[Any, Any]
) -> dict[str, float]:
    """What rounding one block alone costs, in three measures."""
    samples, labels = labelled
    model = quantized(case, folder, [block], "int8", LOW, None, None)
    features, logits = outputs(model, samples, processor)
    before, after = (feature_discrimination(x, labels)["discrimination"] for x in (truth[0], features))
    return {
        "discrimination": before - after,
        "divergence": float(divergences(truth[1], logits).mean()),
        "squared error": float((features - truth[0]).square().sum() / truth[0].square().sum()),
    }


def quantized(
    case: Case, folder: str, blocks: list[str], rest: str, weights: str, samples: Any, processor: Any
) -> Any:
    """The model with ``blocks`` in ``weights`` and the others in ``rest``; by gptq if there are samples, else by rtn."""
    model = load(case, folder)
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


def judge(found: tuple[Any, Any], wanted: tuple[Any, Any], answers: np.ndarray) -> dict[str, float]:
    """Accuracy in percent, agreement with the float model, divergence, D of the features."""
    choice = found[1].argmax(1).numpy()
    return {
        "accuracy": 100 * float((choice == answers).mean()),
        "agreement": 100 * float((choice == wanted[1].argmax(1).numpy()).mean()),
        "divergence": float(divergences(wanted[1], found[1]).mean()),
        "discrimination": feature_discrimination(found[0], answers)["discrimination"],
    }


def add(key: str, result: dict[str, Any]) -> None:
    """Keep a result, in the place of an older one."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    old[key] = {**result, "date": date.today().isoformat(), "machine": machine()}
    RESULTS.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")


def write_page() -> None:
    """Draw up the page; what has no result is named there."""
    results = json.loads(RESULTS.read_text())
    lines = [
        "# Formats of blocks, chosen by discrimination",
        "",
        f"Made by `python benchmarks/discrimination_formats.py --data FOLDER`: half of the blocks in {HIGH}, the others",
        f"in {LOW}, groups of {GROUP}, no correction, seed 0; rtn rounds without data, gptq has {SAMPLES} calibration rows.",
        "The blocks to keep are those whose rounding alone costs most on calibration rows, in one of three measures;",
        "compared with keeping the first or the last half. Test rows were not looked at for the choice.",
    ]
    for name, result in results.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{result['n']} test rows, float accuracy {result['float']['accuracy']:.2f} %.",
            "",
        ]
        lines += [
            "| chosen by | blocks kept | accuracy % | agreement % | divergence | D |",
            "|---|---|---|---|---|---|",
        ]
        for choice, row in result["choices"].items():
            kept = ", ".join(block.rsplit(".", 1)[-1] for block in row["kept"]) or "-"
            rates = f"{row['accuracy']:.2f} | {row['agreement']:.2f}"
            lines.append(f"| {choice} | {kept} | {rates} | {row['divergence']:.4f} | {row['discrimination']:.4f} |")
        lines += [
            "",
            "Cost of rounding a block alone:",
            "",
            "| block | fall of D | divergence | squared error |",
            "|---|---|---|---|",
        ]
        for block, row in result["costs"].items():
            numbers = f"{row['discrimination']:.4f} | {row['divergence']:.4f} | {row['squared error']:.4f}"
            lines.append(f"| {block.rsplit('.', 1)[-1]} | {numbers} |")
    wanted = [f"{case.model}, {solver}" for case in CASES for solver in ("rtn", "gptq")]
    missing = [name for name in wanted if name not in results]
    lines += ["", f"Not measured: {'; '.join([*missing, 'any vision model'])}."]
    for made in sorted({(value["date"], value["machine"]) for value in results.values()}):
        lines += ["", f"{made[0]}: {made[1]}."]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
