"""Image features, float against binary and ternary: discrimination, nearest neighbours, a linear classifier.

    python examples/discrimination_vision.py                  # scanned digits, pixels
    python examples/discrimination_vision.py --data FOLDER    # Extended Yale B, CIFAR-10, ImageNet networks

FOLDER is laid out as CONTRIBUTING.md says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from discrimination_study import arguments, digits, drawn, run
from scipy.fft import dctn

from hf_catquant import extract_features
from hf_catquant.tasks import as_samples, load_processor, read_rows

NETWORKS = ("resnet-18-pq", "deit-tiny-patch16-224")


def cases(
    folder: Path, limit: int | None = None, networks: tuple[str, ...] = NETWORKS
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Faces as pixels and as DCT coefficients; CIFAR-10 by ImageNet networks, which never saw it."""
    yield from faces(folder, limit)
    yield from objects(folder, limit, networks)


def faces(folder: Path, limit: int | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Extended Yale B."""
    found = np.load(folder / "data" / "yaleb" / "yaleb_32x32_dev.npz")
    kept = drawn(found["labels"], limit)
    images, labels = found["images"][kept].astype(np.float64), found["labels"][kept]
    yield "Yale B, pixels", images.reshape(len(images), -1), labels
    waves = dctn(images.reshape(len(images), 32, 32), axes=(1, 2), norm="ortho").reshape(len(images), -1)
    yield "Yale B, DCT", waves, labels


def objects(
    folder: Path, limit: int | None = None, networks: tuple[str, ...] = NETWORKS
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """CIFAR-10. ImageNet itself is no case: its test files have hardly a class with rows for two folds."""
    rows = read_rows(str(folder / "data" / "cifar10" / "test.parquet"), "image")
    rows = rows.select(drawn(rows["label"], limit))
    for name in networks:
        yield f"CIFAR-10, {name}", network(folder, name, rows), np.array(rows["label"])


def network(folder: Path, name: str, rows: object) -> np.ndarray:
    """What enters the head of an ImageNet classifier, (n, d)."""
    path = str(folder / "models" / name)
    model = transformers.AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32)
    processor = load_processor(path)
    return extract_features(model, as_samples(rows, processor, "image"), processor, batch_size=32).numpy()


if __name__ == "__main__":
    args = arguments(__doc__)
    run([digits(args.rows)] if args.data is None else cases(args.data, args.rows), args.plot)
