"""What the benchmarks share: the six models with their data, evaluation on test rows, and the files of results."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_catquant import __version__
from hf_catquant.evaluation import evaluate_classifier, evaluate_language_model
from hf_catquant.evaluation_table import Evaluation
from hf_catquant.samples import collect
from hf_catquant.tasks import LANGUAGE_MODELS, as_samples, auto_class, labels_of, load_processor, read_rows

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A model, its calibration and test files, and what they need on the command line."""

    model: str
    calibration: str
    test: str
    samples: int
    column: str | None = None
    options: tuple[str, ...] = ()
    eval_options: tuple[str, ...] = ()
    batch_size: int = 16
    second: str | None = None  # more test rows

    @property
    def label_offset(self) -> int:
        """Classes that the model has before the first one of the labels."""
        return int(self.eval_options[1]) if self.eval_options else 0


IMAGES = ("imagenet/calibration_train.parquet", "imagenet/val_acuity.parquet")
MORE_IMAGES = "imagenet/nips17.parquet"
CASES = (
    Case("minilm-l6-sst2", "sst2/calibration_train.parquet", "sst2/validation.parquet", 512, "sentence"),
    Case("resnet-18-pq", *IMAGES, 512, "image", second=MORE_IMAGES),
    Case("mobilenet_v2_1.0_224", *IMAGES, 512, "image", eval_options=("--label-offset", "1"), second=MORE_IMAGES),
    Case("deit-tiny-patch16-224", *IMAGES, 512, "image", second=MORE_IMAGES),
    Case(
        "kwt1-speech-commands-12",
        "speech_commands/calibration.parquet",
        "speech_commands/test.parquet",
        44,
        "audio",
        options=("--trust-remote-code",),
        batch_size=4,
    ),
    Case("stories260K", "tinystories/calibration.parquet", "tinystories/test.parquet", 60, "text", batch_size=4),
)


def chosen(only: Iterable[str]) -> list[Case]:
    """The cases whose models have one of these parts in their names."""
    return [case for case in CASES if any(part in case.model for part in only)]


class Bench:
    """One case in memory: the float model, its calibration samples, and the judgement of other models on the test rows."""

    def __init__(self, case: Case, data: Path) -> None:
        self.case = case
        self.folder = str(data / "models" / case.model)
        self.trust = bool(case.options)
        self.auto = auto_class(transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust))
        self.teacher = self.load()
        self.processor = load_processor(self.folder, self.trust)
        self.calibration = self.samples(read_rows(str(data / "data" / case.calibration), case.column))
        rows = read_rows(str(data / "data" / case.test), case.column)
        self.batches = self.collected(self.samples(rows))
        self.labels = None if self.auto in LANGUAGE_MODELS else labels_of(rows, "label", self.teacher)

    def load(self, **options: Any) -> Any:
        """The model in float, or as ``options`` of from_pretrained say."""
        options = {"dtype": torch.float32, "trust_remote_code": self.trust, **options}
        return self.auto.from_pretrained(self.folder, **options).eval()

    def collected(self, samples: list[Any], batch_size: int = 32) -> list[dict[str, Tensor]]:
        """Batches of raw samples."""
        options = {"processor": self.processor, "num_samples": len(samples), "batch_size": batch_size}
        return collect(samples, self.teacher, **options).batches

    def evaluate(self, model: nn.Module) -> Evaluation:
        """The package's own table of the float model and ``model``, on all test rows."""
        if self.labels is None:
            return evaluate_language_model(self.teacher, model, self.batches)
        return evaluate_classifier(self.teacher, model, self.batches, self.labels, self.case.label_offset)

    def samples(self, rows: Any) -> list[Any]:
        """Rows of a file as the model takes them."""
        return list(as_samples(rows, self.processor, self.case.column))


def weight_bits(found: dict[str, Any]) -> float:
    """Stored bits a weight inside the repeated blocks, scales and offsets included, from the fields of a report.

    Without mixed formats, layers in int8 are those outside the blocks; mixed ones may have made one inside int8, and the
    report says what all inside take.
    """
    for note in found["notes"]:
        if match := re.fullmatch(r"mixed formats: .*; ([\d.]+) bits a weight", note):
            return float(match.group(1))
    chosen = [layer for layer in found["layers"] if layer["weights"] != "int8"]
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in chosen]
    return sum(layer["bits"] * size for layer, size in zip(chosen, sizes, strict=True)) / sum(sizes)


def machine() -> str:
    """What the numbers were made on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, hf-catquant {__version__}"
    )


def made() -> dict[str, str]:
    """When, on what and by which code: part of every result."""
    return {"date": date.today().isoformat(), "machine": machine(), "commit": commit()}


def commit() -> str:
    """The commit of the package's code, with a "+" where that was changed since; "" outside of a clone."""
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None or head.returncode:
        return ""
    changed = _git("diff", "--quiet", "HEAD", "--", "hf_catquant")
    return head.stdout.strip() + ("+" if changed is not None and changed.returncode else "")


def _git(*words: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None


def read(path: Path) -> list[dict]:
    """Results, none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def put(path: Path, results: list[dict], *names: str) -> None:
    """Add ``results`` to the file, in the place of older ones with the same values of ``names``."""
    new = {tuple(result[name] for name in names) for result in results}
    kept = [old for old in read(path) if tuple(old[name] for name in names) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*kept, *results], indent=1) + "\n", encoding="utf-8")


def span(result: dict) -> str:
    """A metric with its interval."""
    return f"{result['metric']:.2f} [{result['low']:.2f}, {result['high']:.2f}]"


def pooled(result: dict) -> tuple[int, float, float]:
    """How many test rows a result of ``realdata.py`` has, and the metric on all of them, in float and quantized."""
    parts = [result[name] for name in ("evaluation", "second") if name in result]
    count = sum(part["n"] for part in parts)
    before, after = (sum(part["n"] * part["rows"][at]["metric"] for part in parts) / count for at in (0, -1))
    return count, before, after


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    return [_row(head), "|---" * len(head) + "|", *map(_row, rows)]


def sources(results: list[dict]) -> list[str]:
    """Lines that say when and on what the results were made."""
    return [
        line for day, what in sorted({(r["date"], r["machine"]) for r in results}) for line in ("", f"{day}: {what}.")
    ]


def write(page: Path, lines: list[str]) -> None:
    """Write a page."""
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
