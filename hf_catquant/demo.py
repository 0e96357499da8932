"""The demonstration: one small vision transformer on real scans, from training to a verified ternary checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from .config import CatQuantConfig
from .evaluation import evaluate_classifier
from .log import logger
from .report import report
from .report_page import write_page

BATCH = 64


def run_demo(out: str | Path, epochs: int = 40, weights: str = "ternary", seed: int = 0) -> Path:
    """Train, quantize, save, reload, check, compare, and write the page; returns its path.

    Raises:
        RuntimeError: the reloaded model is not bit for bit the saved one.
    """
    folder = Path(out)
    train_x, test_x, train_y, test_y = digits(seed)
    logger.info("training a vision transformer on %d scanned digits, %d epochs", len(train_x), epochs)
    teacher = train(train_x, train_y, epochs, seed)
    teacher.save_pretrained(folder / "float")
    config = CatQuantConfig(
        weights=weights,
        group_size=64,
        edge_weights=weights,  # so small a model shows nothing if its first and last layers keep 8 bits
        dataset=[{"pixel_values": image} for image in train_x],
        num_samples=len(train_x),
        batch_size=32,
        seed=seed,
    )
    model = AutoModelForImageClassification.from_pretrained(folder / "float", quantization_config=config)
    summary = report(model)
    print(summary)
    model.save_pretrained(folder / "quantized")
    reloaded = AutoModelForImageClassification.from_pretrained(folder / "quantized")
    check_reload(model, reloaded, test_x, folder)
    batches = [{"pixel_values": part} for part in test_x.split(128)]
    table = evaluate_classifier(teacher, reloaded, batches, test_y.tolist())
    print(table)
    page = write_page(folder, f"Digits in {weights}", teacher, reloaded, batches, test_y, table, summary)
    print(f"report: {page}")
    return page


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) float32 in [-1, 1] and their classes (n,), 70 to 30."""
    images, classes = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    parts = train_test_split(images, classes, test_size=0.3, random_state=seed, stratify=classes)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return train_x, test_x, train_y, test_y


def train(images: Tensor, classes: Tensor, epochs: int, seed: int) -> ViTForImageClassification:
    """A four-layer vision transformer, trained with AdamW."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
        hidden_dropout_prob=0.0,
        initializer_range=0.08,  # small models learn slowly from the usual 0.02
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers initialises from the global generator
        model = ViTForImageClassification(config).train()
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(pixel_values=images[rows]).logits
            loss = nn.functional.cross_entropy(logits, classes[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            logger.info("epoch %d/%d: loss %.4f", epoch + 1, epochs, total / len(images))
    return model.eval()


@torch.no_grad()
def check_reload(model: nn.Module, reloaded: nn.Module, images: Tensor, folder: Path) -> None:
    """Refuse a reload whose logits, or whose file when it is saved again, differ in a single bit.

    Raises:
        RuntimeError: they do.
    """
    if not torch.equal(model(pixel_values=images).logits, reloaded(pixel_values=images).logits):
        raise RuntimeError("the reloaded model does not give the logits of the saved one")
    reloaded.save_pretrained(folder / "saved-again")  # type: ignore[operator]
    first, second = (_digest(folder / name / "model.safetensors") for name in ("quantized", "saved-again"))
    if first != second:
        raise RuntimeError(f"the model saved again is another file: {first} and {second}")
    print(f"reload: bit-exact, logits of {len(images)} images and file sha256 {first[:16]}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
