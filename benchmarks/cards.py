"""Model cards of the models in the data folder, each from a checkpoint that is quantized and measured for it.

    python benchmarks/cards.py --data FOLDER --work FOLDER [--only resnet ...]

FOLDER as in ``realdata.py``. Every model goes through the commands that users have: ``catquant quantize`` (ternary,
groups of 64, gptq), ``catquant eval``, ``catquant push --dry-run``. Checkpoints stay in the work folder, and what is
there is not made again; the cards and their plots go to ``model_cards/``.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from common import CASES, ROOT, Case

from hf_catquant.cli import main as catquant

CARDS = ROOT / "model_cards"
OWNER = "hf-catquant"  # of the Hub ids on the cards


@dataclass(frozen=True)
class Facts:
    """What no file of a model says: its test rows' name, base model and its relation, licence, and where it comes from.

    A float model that is itself on the Hub is the base model; of the others ``origin`` says where they come from.
    """

    rows: str
    base_model: str | None = None
    license: str | None = None
    relation: str = "quantized"
    origin: str | None = None


IMAGES = "ImageNet-1k validation, Acuity's images"
FACTS = {
    "minilm-l6-sst2": Facts(
        "SST-2 validation",
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
        relation="finetune",
        origin="The float model was fine-tuned from that one for this project, on the training part of SST-2.",
    ),
    "resnet-18-pq": Facts(
        IMAGES,
        license="cc-by-nc-4.0",
        origin="The float model is no model of the Hub: it is ResNet-18 of facebookresearch/kill-the-bits (GitHub), whose "
        "weights were product-quantized already, so that each convolution has few distinct values.",
    ),
    "mobilenet_v2_1.0_224": Facts(IMAGES, "google/mobilenet_v2_1.0_224"),
    "deit-tiny-patch16-224": Facts(IMAGES, "facebook/deit-tiny-patch16-224"),
    "kwt1-speech-commands-12": Facts(
        "Speech Commands, 12 words",
        license="apache-2.0",
        origin="The float model is no model of the Hub: it has the weights of ARM-software/keyword-transformer (GitHub) "
        "and modelling code of its own.",
    ),
    "stories260K": Facts(
        "TinyStories",
        "karpathy/tinyllamas",
        "mit",
        origin="The float model is stories260K of that repository, in the layout of transformers.",
    ),
    "ast-tiny-fsdd": Facts(
        "Free Spoken Digit Dataset, other takes than the calibration",
        origin="The float model is no model of the Hub: it was trained for this project, on the Free Spoken Digit Dataset.",
    ),
}
DIGITS = Case(
    "ast-tiny-fsdd",
    "fsdd/calibration_train.parquet",
    "fsdd/test.parquet",
    200,
    "audio",
    eval_options=("--label-column", "digit"),
)


def main() -> None:
    """Make the cards that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with models/ and data/")
    parser.add_argument("--work", required=True, type=Path, help="folder for the checkpoints")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of model names")
    args = parser.parse_args()
    for case in (*CASES, DIGITS):
        if any(part in case.model for part in args.only):
            make(case, args.data, args.work)


def make(case: Case, data: Path, work: Path) -> None:
    """Quantize, evaluate, describe; copy the card and its plots."""
    facts, model, name = FACTS[case.model], str(data / "models" / case.model), f"{case.model}-ternary"
    folder = work / name
    column = ["--column", case.column] if case.column else []
    if not (folder / "report.json").exists():
        words = ["quantize", model, str(folder), "--weights", "ternary", "--group-size", "64", "--overwrite", *column]
        words += ["--dataset", str(data / "data" / case.calibration), "--num-samples", str(case.samples)]
        run([*words, *case.options])
    if not (folder / "evaluation.json").exists():
        words = ["eval", str(folder), "--float", model, "--dataset", str(data / "data" / case.test), *column]
        words += ["--dataset-name", facts.rows, "--json", str(folder / "evaluation.json")]
        run([*words, *case.options, *case.eval_options])
    known = ["--relation", facts.relation]
    for option, value in (
        ("--base-model", facts.base_model),
        ("--license", facts.license),
        ("--origin", facts.origin),
    ):
        known += [option, value] if value else []
    run(["push", str(folder), f"{OWNER}/{name}", "--dry-run", *known])
    (CARDS / name).mkdir(parents=True, exist_ok=True)
    for file in ("README.md", "accuracy.png", "errors.png"):
        shutil.copyfile(folder / file, CARDS / name / file)


def run(words: list[str]) -> None:
    """A command of the package; the first that fails ends the script."""
    if catquant(words):
        raise SystemExit(f"failed: catquant {' '.join(words)}")


if __name__ == "__main__":
    main()
