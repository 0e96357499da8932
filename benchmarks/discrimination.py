"""The claims about feature discrimination on real data, its speed on many rows, and search by packed codes.

    python benchmarks/discrimination.py [--data FOLDER] [--only claims speed recall scale] [--case Yale ...]

FOLDER as in ``realdata.py``; without it, only data that come with scikit-learn. ``claims``: the studies of
``examples/discrimination_*.py``; with ``--keep-accuracies`` their D alone. ``speed``: time of packed dot products.
``recall``: of search with real sentences, with FOLDER only. ``scale``: time and memory of the streaming measure; run it
alone, memory is the peak of the whole process. Results go to ``benchmarks/results/discrimination.json``,
``docs/discrimination-results.md`` and ``docs/discrimination.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, machine
from discrimination_pages import BATCH, EMBEDDINGS, NEIGHBORS, REPEATS, WIDTH, write_page
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from threadpoolctl import threadpool_info

from hf_catquant import BinaryQuantizer, TernaryQuantizer, stream_discrimination
from hf_catquant.kernels import native
from hf_catquant.similarity import PackedIndex
from hf_catquant.tasks import read_rows

sys.path.insert(0, str(ROOT / "examples"))
import discrimination_speech
import discrimination_study
import discrimination_text
import discrimination_vision

RESULTS = ROOT / "benchmarks" / "results" / "discrimination.json"
ROWS, FEATURES, CLASSES = 1_000_000, 768, 1000
PAUSE = 0.5  # seconds
PARTS = ("claims", "speed", "recall", "scale")
SENTENCES, QUERIES = 2000, 200


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--case", nargs="+", default=[""], help="parts of names of data, for claims")
    parser.add_argument(
        "--keep-accuracies", action="store_true", help="claims: D alone, beside the accuracies of an earlier run"
    )
    args = parser.parse_args()
    if "claims" in args.only:
        claims(args.data, args.case, args.keep_accuracies)
    if "speed" in args.only:
        add("speed", speed())
    if "recall" in args.only and args.data is not None:
        add("recall", recall(args.data))
    if "scale" in args.only:
        add("scale", scale())
    write_page(saved())


def claims(data: Path | None, wanted: list[str], keep_accuracies: bool) -> None:
    """Study every data set; results of others are kept."""
    loaders: dict[str, Callable[[], Iterable[Any]]] = {
        "scikit-learn digits wine breast cancer": lambda: [
            ("digits", *load_digits(return_X_y=True)),
            ("wine", *load_wine(return_X_y=True)),
            ("breast cancer", *load_breast_cancer(return_X_y=True)),
        ]
    }
    if data is not None:
        loaders |= {
            "Yale B": lambda: discrimination_vision.faces(data),
            "CIFAR-10": lambda: discrimination_vision.objects(data),
            "ImageNet animals": lambda: discrimination_vision.animals(data),
            "20 Newsgroups": lambda: discrimination_text.news(data),
            "SST-2": lambda: discrimination_text.films(data),
            "spoken digits speakers": lambda: discrimination_speech.cases(data),
        }
    for names, load in loaders.items():
        if any(part in names for part in wanted):
            for case in load():
                key = f"claims: {case[0]}"
                if keep_accuracies:
                    add_discriminations(key, case)
                else:
                    add(key, discrimination_study.study(*case))
                discrimination_study.show(saved()[key])


def add_discriminations(key: str, case: Any) -> None:
    """Measure D of a study again, on the same rows and folds; when, is kept beside when the accuracies were."""
    found, x = discrimination_study.discriminations(*case), case[1]
    results = saved()
    study = results[key]
    if (len(x), x.shape[1]) != (study["n"], study["features"]):
        raise SystemExit(
            f"{key}: the data are {x.shape}, those of the accuracies were not: leave --keep-accuracies out"
        )
    study["folds"] = len(discrimination_study.folds(*case))
    for line in study["lines"]:
        line |= found[line["variant"]]
    study["discrimination"] = {"date": date.today().isoformat(), "machine": machine()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def speed() -> dict[str, Any]:
    """Milliseconds a query of dot products with a million embeddings; what the bits say does not matter to the time.

    Float products are the fastest of three: torch in either order, and numpy. All write into memory that is there already.
    """
    generator, width = np.random.default_rng(0), WIDTH // 8
    embeddings = generator.standard_normal((EMBEDDINGS, WIDTH), dtype=np.float32)
    floats = torch.from_numpy(embeddings)
    bits = generator.integers(0, 256, (EMBEDDINGS, 2 * width), dtype=np.uint8)
    bits[:, width:] &= bits[:, :width]  # what is negative is not 0
    binary, ternary = PackedIndex(bits[:, :width], WIDTH), PackedIndex(bits, WIDTH, ternary=True)
    found: dict[str, Any] = {"kernels": native.PATH, "threads": torch.get_num_threads(), "BLAS": blas(), "CPU": cpu()}
    for count in (1, 10, 100):
        asked, by_query, by_row = floats[:count], torch.zeros(count, EMBEDDINGS), torch.zeros(EMBEDDINGS, count)
        by_numpy, integers = by_query.numpy(), np.zeros((count, EMBEDDINGS), np.int16)
        times = milliseconds(
            {
                "torch, queries by rows": lambda q=asked, out=by_query: torch.mm(q, floats.T, out=out),
                "torch, rows by queries": lambda q=asked, out=by_row: torch.mm(floats, q.T, out=out),
                "numpy": lambda q=embeddings[:count], out=by_numpy: np.matmul(q, embeddings.T, out=out),
                "binary": lambda q=bits[:count, :width], out=integers: binary.scores(q, out),
                "ternary": lambda q=bits[:count], out=integers: ternary.scores(q, out),
                f"binary, best {NEIGHBORS}": lambda q=bits[:count, :width]: binary.search(q, NEIGHBORS),
                f"ternary, best {NEIGHBORS}": lambda q=bits[:count]: ternary.search(q, NEIGHBORS),
            }
        )
        found[str(count)] = {name: value / count for name, value in times.items()}
    return found


def blas() -> str:
    """What multiplies floats, and with how many threads."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    torch_has = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    return "; ".join(
        [
            f"torch with {torch_has}",
            *(
                f"numpy with {p['internal_api']} {p['version']}, {p['num_threads']} threads"
                for p in pools
                if "numpy" in p["filepath"]
            ),
        ]
    )


def cpu() -> str:
    """The processor, as Linux names it."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def milliseconds(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The fastest of ``REPEATS`` runs of each, taken in turns: other work on the machine disturbs all alike.

    With a pause before each: threads of a BLAS go on looking for work for some 200 ms, on the cores of what comes next.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            way()
            found[name].append(1000 * (time.perf_counter() - start))
    return {name: min(values) for name, values in found.items()}


def recall(data: Path) -> dict[str, float]:
    """Share of the ten nearest sentences, by cosine of float embeddings, that packed codes find."""
    files = ("wikitext2/validation.parquet", "c4/calibration.parquet")
    texts = [text for file in files for text in read_rows(str(data / "data" / file), "text")["text"]]
    sentences = [s.strip() for text in texts for s in text.replace("\n", " ").split(". ") if 40 < len(s) < 300]
    sentences = [sentences[i] for i in np.random.default_rng(0).permutation(len(sentences))[: SENTENCES + QUERIES]]
    x = discrimination_text.network(data, sentences, "bert.encoder.layer.5")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    stored, asked = x[QUERIES:], x[:QUERIES]
    nearest = np.argsort(-asked @ stored.T, axis=1)[:, :NEIGHBORS]
    found = {"sentences": len(stored), "queries": len(asked)}
    for name, quantizer in (
        ("binary at 0", BinaryQuantizer(standardize=False, packing="bits")),
        ("binary at the mean", BinaryQuantizer(packing="bits")),
        ("ternary, eta 0.75", TernaryQuantizer(packing="bits")),
    ):
        index = PackedIndex(
            quantizer.fit_transform(stored), x.shape[1], ternary=isinstance(quantizer, TernaryQuantizer)
        )
        codes = quantizer.transform(asked)
        found[f"{name}, codes only"] = overlap(index.search(codes, NEIGHBORS)[0], nearest)
        for times in (2, 4, 8):
            rows, _ = index.search(codes, NEIGHBORS, embeddings=stored, float_queries=asked, oversample=times)
            found[f"{name}, {times * NEIGHBORS} scored again"] = overlap(rows, nearest)
    return found


def overlap(rows: np.ndarray, nearest: np.ndarray) -> float:
    return float(
        np.mean([len(set(a) & set(b)) / NEIGHBORS for a, b in zip(rows.tolist(), nearest.tolist(), strict=True)])
    )


def scale() -> dict[str, Any]:
    """Seconds and gigabytes of the streaming measure; making the rows is part of the time."""
    start, used = time.perf_counter(), time.process_time()
    found = stream_discrimination(batches)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    making = time.perf_counter()
    for _ in range(3):
        for _ in batches():
            pass
    making = time.perf_counter() - making
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sizes = {key: found[key] for key in ("n", "num_features", "num_classes", "discrimination")}
    return {
        **sizes,
        "seconds": seconds,
        "CPU seconds": used,
        "of which making rows": making,
        "peak GB": peak,
        "CPU": cpu(),
    }


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of Gaussian classes: every batch has other labels and other noise, cut from one block of it."""
    generator = np.random.default_rng(0)
    means = 0.3 * generator.standard_normal((CLASSES, FEATURES), dtype=np.float32)
    noise = generator.standard_normal((2 * BATCH, FEATURES), dtype=np.float32)
    for _ in range(ROWS // BATCH):
        labels, start = generator.integers(0, CLASSES, BATCH), generator.integers(BATCH)
        yield noise[start : start + BATCH] + means[labels], labels


def saved() -> dict[str, Any]:
    """What was measured before."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def add(key: str, result: dict[str, Any]) -> None:
    """Keep a result, in the place of an older one."""
    old = saved()
    old[key] = {**result, "date": date.today().isoformat(), "machine": machine()}
    RESULTS.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
