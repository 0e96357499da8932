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
from scipy.stats import rankdata
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
PAGE, PLOT = ROOT / "docs" / "discrimination-results.md", ROOT / "docs" / "discrimination.png"
ROWS, FEATURES, CLASSES, BATCH = 1_000_000, 768, 1000, 10_000
EMBEDDINGS, WIDTH, REPEATS = 1_000_000, 384, 5
PAUSE = 0.5  # seconds
PARTS = ("claims", "speed", "recall", "scale")
SENTENCES, QUERIES, NEIGHBORS = 2000, 200, 10


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
    write_page()


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


def write_page() -> None:
    """Draw up the page and the plot."""
    results = saved()
    studies = [value for key, value in results.items() if key.startswith("claims: ")]
    lines = [
        "# Feature discrimination: measurements",
        "",
        "Made by `python benchmarks/discrimination.py --data FOLDER`; what they mean is in",
        "[discrimination.md](discrimination.md).",
        "",
        "D: mean over pairs of classes and 5 folds (seed 0), of the rows of each fold; means, deviations and thresholds",
        "were learned from the other folds. In brackets: folds in which it is above that of float. D in sample: of all",
        "rows, after learning from the same rows: a threshold that is chosen for D, above all one for each feature,",
        "promises too much there. -: measured in sample only; the plot has that D there. Accuracy: percent, of the same",
        "folds; in brackets points over float with the paired 95 % interval. Linear SVM: C = 0.1, one class against",
        "another. Codes have many neighbours at equal distances, of which scikit-learn takes some: 5-NN of codes moves",
        "by tenths of a point with the number of threads.",
        "",
        "![D and accuracy against the threshold, and accuracy against D](discrimination.png)",
    ]
    for study in studies:
        lines += [
            "",
            f"## {study['data']}",
            "",
            f"{study['n']} rows, {study['features']} features, {study['classes']} classes.",
        ]
        lines += ["", "| features | D | D in sample | 5-NN | linear SVM |", "|---|---|---|---|---|"]
        for line in study["lines"]:
            cells = [
                f"{line[c]:.2f} ({line[f'{c}_gain'][0]:+.2f} ± {line[f'{c}_gain'][1]:.2f})" for c in ("knn", "svm")
            ]
            d = f"- | {line['discrimination']:.4f}"  # of before D was measured on other rows
            if "above" in line:
                d = f"{line['discrimination']:.4f} ({line['above']}/{study['folds']}) | {line['in_sample']:.4f}"
            lines.append(f"| {line['variant']} | {d} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        *claims_table(studies),
        "",
        *model_table(studies),
        "",
        *search_table(results),
        "",
        *scale_table(results),
    ]
    runs = [*results.values(), *(study["discrimination"] for study in studies if "discrimination" in study)]
    made = sorted({(value["date"], value["machine"]) for value in runs})
    lines += [text for pair in made for text in ("", f"{pair[0]}: {pair[1]}.")]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    discrimination_study.draw(studies, PLOT)


def claims_table(studies: list[dict[str, Any]]) -> list[str]:
    """What quantizing does to D, with a threshold for all features and with one for each; does accuracy follow D."""
    lines = [
        "## D of the best quantizers, and whether accuracy follows it",
        "",
        "D of rows that were not learned from, in brackets folds above float, with thresholds chosen for D: one for all",
        "features (ternary), one for each (binary, ternary). Rank correlation (Spearman): of D and accuracy, over the ten",
        "quantizers.",
        "",
        "| data | float | ternary, shared | binary, per feature | ternary, per feature | with 5-NN | with SVM |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = ("ternary, discrimination, shared", "binary, discrimination", "ternary, discrimination, per feature")
    for study in studies:
        rows = {line["variant"]: line for line in study["lines"]}
        if "above" not in rows["float"]:
            lines.append(f"| {study['data']} | measured in sample only |" + " |" * 5)
            continue
        cells = [f"{rows['float']['discrimination']:.4f}"]
        cells += [f"{rows[v]['discrimination']:.4f} ({rows[v]['above']}/{study['folds']})" for v in chosen]
        codes = [line for name, line in rows.items() if name != "float"]
        ranks = [rankdata([line[key] for line in codes]) for key in ("discrimination", "knn", "svm")]
        cells += [f"{np.corrcoef(ranks[0], rank)[0, 1]:+.2f}" for rank in ranks[1:]]
        lines.append(f"| {study['data']} | {' | '.join(cells)} |")
    return lines


def model_table(studies: list[dict[str, Any]]) -> list[str]:
    """Which features gain, by the model and in fact."""
    lines = [
        "## Single features of two classes: the model and the measurement",
        "",
        "Shares of features, in percent, over pairs of classes (100 at most), whose D quantizing raises: predicted from",
        "mu alone, measured, and the share of features on which both say the same. Binary at 0, ternary at the best tau of",
        "the model.",
        "",
        "| data | median mu | binary predicted | measured | same | ternary predicted | measured | same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        model = study["model"]
        keys = [f"{kind}_{what}" for kind in ("binary", "ternary") for what in ("predicted", "measured", "right")]
        cells = [f"{100 * model[key]:.1f}" for key in keys]
        lines.append(f"| {study['data']} | {model['mu']:.3f} | " + " | ".join(cells) + " |")
    return lines


def speed_table(found: dict[str, Any]) -> list[str]:
    """Times of packed dot products beside the fastest of the float ones."""
    times = {int(key): value for key, value in found.items() if key.isdigit()}
    packed = [name for name in times[1] if name.startswith(("binary", "ternary"))]
    with_what = f"{found['threads']} threads, {found['CPU']}; bits by the kernels of `{found['kernels']}`"
    lines = [
        "## Packed dot products",
        "",
        f"{EMBEDDINGS:,} embeddings of {WIDTH} features, milliseconds a query, fastest of {REPEATS} runs taken in turns.",
        f"All with {with_what}. float32: the fastest of torch in either order and numpy ({found['BLAS']}). All",
        "write into memory that is there already. best: the search, which keeps the nearest only.",
        "",
        "| queries at once | float32 | " + " | ".join(packed) + " |",
        "|---" * (len(packed) + 2) + "|",
    ]
    for count, row in times.items():
        name = min((n for n in row if n not in packed), key=row.__getitem__)
        cells = [f"{row[key]:.3f} ({row[name] / row[key]:.1f} x)" for key in packed]
        lines.append(f"| {count} | {row[name]:.2f} ({name}) | " + " | ".join(cells) + " |")
    return lines


def search_table(results: dict[str, Any]) -> list[str]:
    """Times and recall."""
    lines = []
    if "threads" in results.get("speed", {}):
        lines += speed_table(results["speed"])
    if "recall" in results:
        found = {key: value for key, value in results["recall"].items() if key not in ("date", "machine")}
        sizes = f"{found.pop('sentences')} sentences, {found.pop('queries')} queries"
        lines += ["", f"Recall@{NEIGHBORS} among {sizes}; MiniLM, which was fine-tuned on sentiment.", ""]
        lines += ["| codes | recall |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in found.items())]
    return lines


def scale_table(results: dict[str, Any]) -> list[str]:
    """Time and memory."""
    if "scale" not in results:
        return []
    found = results["scale"]
    shape = f"{found['n']:,} x {found['num_features']} float32 features of {found['num_classes']} classes"
    time_taken = f"{found['seconds']:.1f} s, of which {found['of which making rows']:.1f} s make the rows"
    time_taken += f" ({found['CPU seconds']:.1f} s of processor time, one thread)"
    memory = f"{found['peak GB']:.2f} GB at the peak, libraries included"
    return ["## Many rows", "", f"{shape}, in batches of {BATCH:,}: {time_taken}; {memory}. {found.get('CPU', '')}."]


if __name__ == "__main__":
    main()
