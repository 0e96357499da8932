"""Text features, float against binary and ternary: discrimination, nearest neighbours, a linear classifier.

    python examples/discrimination_text.py                  # scanned digits, as no text comes with scikit-learn
    python examples/discrimination_text.py --data FOLDER    # 20 Newsgroups, SST-2

FOLDER is laid out as CONTRIBUTING.md says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from discrimination_study import arguments, digits, drawn, run
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_catquant import extract_features
from hf_catquant.tasks import load_processor, read_rows

MODEL = "minilm-l6-sst2"
TERMS = 1000
CHARACTERS = 300  # of a newsgroup message that the network reads: about 70 tokens


def cases(folder: Path, limit: int | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Messages as words and by a sentence network that was fine-tuned on other texts; sentences of the task it knows."""
    yield from news(folder, limit)
    yield from films(folder, limit)


def news(folder: Path, limit: int | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """20 Newsgroups."""
    rows = read_rows(str(folder / "data" / "20newsgroups" / "train.parquet"), "text")
    rows = rows.select(drawn(rows["label"], limit))
    topics = np.array(rows["label"])
    words = TfidfVectorizer(max_features=TERMS, stop_words="english", sublinear_tf=True).fit_transform(rows["text"])
    yield "20 Newsgroups, tf-idf", words.toarray(), topics
    short = [text[:CHARACTERS] or "empty" for text in rows["text"]]
    yield "20 Newsgroups, MiniLM", network(folder, short, "bert.encoder.layer.5"), topics


def films(folder: Path, limit: int | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """SST-2."""
    rows = read_rows(str(folder / "data" / "sst2" / "validation.parquet"), "sentence")
    rows = rows.select(drawn(rows["label"], limit))
    yield "SST-2, MiniLM", network(folder, list(rows["sentence"]), "head"), np.array(rows["label"])


def network(folder: Path, texts: list[str], at: str) -> np.ndarray:
    """Features (n, d) of texts at a place of the network."""
    path = str(folder / "models" / MODEL)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return extract_features(model, texts, load_processor(path), at=at, batch_size=32).numpy()


if __name__ == "__main__":
    args = arguments(__doc__)
    run([digits(args.rows)] if args.data is None else cases(args.data, args.rows), args.plot)
