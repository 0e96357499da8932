"""Tasks for the notebooks: small trained models with their data, made in seconds, or the real ones of a folder.

Without a folder everything is made here: sentences from a grammar, sung vowels, and the scanned digits of scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from hf_catquant.demo import digits, train
from hf_catquant.samples import collect
from hf_catquant.tasks import as_samples, auto_class, labels_of, load_config, load_processor, read_rows

REAL = {  # model, calibration rows, test rows, column, labels: what CONTRIBUTING.md says of the folder
    "text": ("minilm-l6-sst2", "sst2/calibration_train.parquet", "sst2/validation.parquet", "sentence"),
    "speech": ("ast-tiny-fsdd", "fsdd/calibration_train.parquet", "fsdd/test.parquet", "audio"),
    "vision": ("deit-tiny-patch16-224", "imagenet/calibration_train.parquet", "imagenet/val_acuity.parquet", "image"),
}
SAMPLES = 256


@dataclass
class Task:
    """What a notebook works on.

    Attributes:
        name: folder of the float model.
        auto: the Auto class that loads it.
        processor: of raw samples, None where samples are tensors.
        samples: to calibrate on.
        batches, labels: to test on, in order.
    """

    name: str
    auto: Any
    processor: Any
    samples: list[Any]
    batches: list[dict[str, torch.Tensor]]
    labels: list[int]

    @property
    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The test rows one by one."""
        return [
            {name: value[i] for name, value in batch.items()} for batch in self.batches for i in range(_size(batch))
        ]


def _size(batch: dict[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))


def task(kind: str, work: Path, data: str | Path | None = None) -> Task:
    """A text, speech or vision task; its float model is saved under ``work``, or is that of the folder ``data``."""
    return _real(kind, Path(data)) if data else {"text": _text, "speech": _speech, "vision": _vision}[kind](work)


def _real(kind: str, data: Path) -> Task:
    name, calibration, test, column = REAL[kind]
    folder = str(data / "models" / name)
    auto, processor = auto_class(load_config(folder)), load_processor(folder)
    model = auto.from_pretrained(folder, dtype=torch.float32)
    samples = list(as_samples(read_rows(str(data / "data" / calibration), column, SAMPLES), processor, column))
    rows = read_rows(str(data / "data" / test), column, SAMPLES)
    tests = as_samples(rows, processor, column)
    batches = collect(tests, model, processor=processor, num_samples=len(rows), batch_size=16).batches
    return Task(folder, auto, processor, samples, batches, labels_of(rows, "label", model))


def _text(work: Path) -> Task:
    """Praise or blame; "not" turns either round, so that counting words is not enough."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    rng = np.random.default_rng(0)
    things = ["film", "book", "song", "play", "meal"]
    good, bad = ["great", "fine", "lovely", "superb"], ["dull", "poor", "awful", "weak"]
    words = ["[PAD]", "[UNK]", "[CLS]", "the", "was", "not", "very", *things, *good, *bad]

    def sentence() -> tuple[str, int]:
        praise, turned = rng.integers(2), rng.integers(2)
        word = rng.choice(good if praise else bad)
        middle = ["not"] * turned + ["very"] * int(rng.integers(2))
        return " ".join(["the", rng.choice(things), "was", *middle, word]), int(praise ^ turned)

    rows = [sentence() for _ in range(800)]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, pad_token="[PAD]", unk_token="[UNK]")
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        id2label={0: "blame", 1: "praise"},
        label2id={"blame": 0, "praise": 1},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    return _trained(transformers.BertForSequenceClassification, config, tokenizer, rows, work / "float", 500)


def _speech(work: Path) -> Task:
    """Vowels as two formants over a pitch, in noise: half a second at 2 kHz."""
    rng = np.random.default_rng(0)
    formants = {"a": (730, 940), "e": (530, 800), "i": (270, 900), "u": (300, 570)}

    def sung() -> tuple[np.ndarray, int]:
        at = int(rng.integers(len(formants)))
        time, pitch = np.arange(800) / 2000, rng.uniform(90, 140)
        harmonics = np.arange(1, 8)[:, None] * pitch
        loud = sum(np.exp(-(((harmonics - peak) / 90) ** 2)) for peak in list(formants.values())[at]) + 0.05
        wave = (loud * np.sin(2 * np.pi * harmonics * time + rng.uniform(0, 6, (7, 1)))).sum(0)
        return (wave + 0.1 * rng.normal(size=800)).astype(np.float32), at

    rows = [sung() for _ in range(500)]
    processor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=2000, do_normalize=True)
    config = transformers.Wav2Vec2Config(
        vocab_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32, 32),
        conv_kernel=(16, 8),
        conv_stride=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=32,
        id2label=dict(enumerate(formants)),
        label2id={name: i for i, name in enumerate(formants)},
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    return _trained(transformers.Wav2Vec2ForSequenceClassification, config, processor, rows, work / "float", 300)


def _vision(work: Path) -> Task:
    """The scanned digits of scikit-learn and the vision transformer of ``catquant demo``, trained for half as long."""
    train_x, test_x, train_y, test_y = digits(0)
    model = train(train_x, train_y, 20, 0)
    model.save_pretrained(work / "float")
    batches = [{"pixel_values": part} for part in test_x.split(128)]
    samples = [{"pixel_values": image} for image in train_x[:SAMPLES]]
    auto = transformers.AutoModelForImageClassification
    return Task(str(work / "float"), auto, None, samples, batches, test_y.tolist())


def _trained(kind: Any, config: Any, processor: Any, rows: list[tuple[Any, int]], folder: Path, cut: int) -> Task:
    """Train a model on the rows before ``cut``, save it with its processor, and keep the other rows to test on."""
    raw, labels = [row for row, _ in rows], torch.tensor([label for _, label in rows])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).train()
        batch = collect(raw, model, processor=processor, num_samples=len(raw), batch_size=len(raw)).batches[0]
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(12):
            for at in torch.randperm(cut, generator=generator).split(32):
                logits = model(**{name: value[at] for name, value in batch.items()}).logits
                loss = nn.functional.cross_entropy(logits, labels[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    tests = [{name: value[cut:] for name, value in batch.items()}]
    return Task(str(folder), auto_class(model.config), processor, raw[:SAMPLES], tests, labels[cut:].tolist())
