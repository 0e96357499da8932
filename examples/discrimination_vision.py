"""Image features, float against binary and ternary: discrimination, nearest neighbours, a linear classifier.

    python examples/discrimination_vision.py                  # scanned digits, pixels
    python examples/discrimination_vision.py --data FOLDER    # Extended Yale B, CIFAR-10 and ImageNet by ImageNet networks

FOLDER is laid out as CONTRIBUTING.md says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import concatenate_datasets
from discrimination_study import arguments, digits, drawn, run
from scipy.fft import dctn

from hf_catquant import extract_features
from hf_catquant.tasks import as_samples, load_processor, read_rows

NETWORKS = ("resnet-18-pq", "deit-tiny-patch16-224")
# ImageNet orders its classes by what they are: first and last of each group. Its test files have one or two rows of a class,
# which leaves D and folds nothing to work with; of these groups they have 21 to 88.
GROUPS = {
    "fish": ((0, 6), (389, 397)),
    "birds": ((7, 24), (80, 100), (127, 146)),
    "amphibians and reptiles": ((25, 68),),
    "dogs": ((151, 268),),
    "other carnivores": ((269, 299),),
    "insects": ((300, 326),),
    "ungulates": ((339, 355),),
    "primates": ((365, 384),),
}


def cases(
    folder: Path, limit: int | None = None, networks: tuple[str, ...] = NETWORKS
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Faces as pixels and as DCT coefficients; CIFAR-10 and animals of ImageNet by ImageNet networks."""
    yield from faces(folder, limit)
    yield from objects(folder, limit, networks)
    yield from animals(folder, limit, networks)


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
    """CIFAR-10."""
    rows = read_rows(str(folder / "data" / "cifar10" / "test.parquet"), "image")
    rows = rows.select(drawn(rows["label"], limit))
    for name in networks:
        yield f"CIFAR-10, {name}", network(folder, name, rows), np.array(rows["label"])


def animals(
    folder: Path, limit: int | None = None, networks: tuple[str, ...] = NETWORKS
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Groups of classes of ImageNet, which the networks were trained to tell apart one by one."""
    files = ("val_acuity.parquet", "nips17.parquet")
    tables = [read_rows(str(folder / "data" / "imagenet" / file), "image") for file in files]
    rows = concatenate_datasets([table.select_columns(["image", "label"]) for table in tables])
    group = np.array([group_of(label) for label in rows["label"]])
    kept = np.flatnonzero(group != "")
    kept = kept[drawn(group[kept], limit)]
    for name in networks:
        yield f"ImageNet animals, {name}", network(folder, name, rows.select(kept)), group[kept]


def group_of(label: int) -> str:
    """The group of a class of ImageNet; "" for none."""
    found = (name for name, ranges in GROUPS.items() if any(low <= label <= high for low, high in ranges))
    return next(found, "")


def network(folder: Path, name: str, rows: object) -> np.ndarray:
    """What enters the head of an ImageNet classifier, (n, d)."""
    path = str(folder / "models" / name)
    model = transformers.AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32)
    processor = load_processor(path)
    return extract_features(model, as_samples(rows, processor, "image"), processor, batch_size=32).numpy()


if __name__ == "__main__":
    args = arguments(__doc__)
    run([digits(args.rows)] if args.data is None else cases(args.data, args.rows), args.plot)
