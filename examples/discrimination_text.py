"""Text features, float against binary and ternary: discrimination, nearest neighbours, a linear classifier.

    python examples/discrimination_text.py                  # scanned digits, as no text comes with scikit-learn
    python examples/discrimination_text.py --data FOLDER    # 20 Newsgroups, SST-2

FOLDER is laid out as CONTRIBUTING.md says.
"""

from __future__ import annotations

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


def cases(folder: Path, limit: int | None = None) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Messages as words and by a sentence network that was fine-tuned on other texts; sentences of the task it knows."""
    news = read_rows(str(folder / "data" / "20newsgroups" / "train.parquet"), "text")
    news = news.select(drawn(news["label"], limit))
    topics = np.array(news["label"])
    words = TfidfVectorizer(max_features=TERMS, stop_words="english", sublinear_tf=True).fit_transform(news["text"])
    short = [text[:CHARACTERS] or "empty" for text in news["text"]]
    films = read_rows(str(folder / "data" / "sst2" / "validation.parquet"), "sentence")
    films = films.select(drawn(films["label"], limit))
    return [
        ("20 Newsgroups, tf-idf", words.toarray(), topics),
        ("20 Newsgroups, MiniLM", network(folder, short, "bert.encoder.layer.5"), topics),
        ("SST-2, MiniLM", network(folder, list(films["sentence"]), "head"), np.array(films["label"])),
    ]


def network(folder: Path, texts: list[str], at: str) -> np.ndarray:
    """Features (n, d) of texts at a place of the network."""
    path = str(folder / "models" / MODEL)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return extract_features(model, texts, load_processor(path), at=at, batch_size=32).numpy()


if __name__ == "__main__":
    args = arguments(__doc__)
    run([digits(args.rows)] if args.data is None else cases(args.data, args.rows), args.plot)
