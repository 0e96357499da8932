"""Speech features, float against binary and ternary: discrimination, nearest neighbours, a linear classifier.

    python examples/discrimination_speech.py                  # scanned digits, as no speech comes with scikit-learn
    python examples/discrimination_speech.py --data FOLDER    # spoken digits

FOLDER is laid out as CONTRIBUTING.md says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from discrimination_study import arguments, digits, drawn, run

from hf_catquant import extract_features
from hf_catquant.tasks import load_processor, read_rows

MODEL = "ast-tiny-fsdd"
EARLY = "audio_spectrogram_transformer.layers.1"


def cases(folder: Path, limit: int | None = None) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Spoken digits: early in a network that knows them, and before its head; and who speaks, which it was not taught."""
    rows = read_rows(str(folder / "data" / "fsdd" / "test.parquet"), "audio")
    rows = rows.select(drawn(rows["digit"], limit))
    path = str(folder / "models" / MODEL)
    model = transformers.AutoModelForAudioClassification.from_pretrained(path, dtype=torch.float32)
    waves = [np.asarray(wave, np.float32) / 32768 for wave in rows["audio"]]
    found = extract_features(model, waves, load_processor(path), at=[EARLY, "head"], batch_size=32)
    digit, speaker = np.array(rows["digit"]), np.array(rows["speaker"])
    return [
        ("spoken digits, block 1", found[EARLY].numpy(), digit),
        ("spoken digits, head", found["head"].numpy(), digit),
        ("speakers, block 1", found[EARLY].numpy(), speaker),
    ]


if __name__ == "__main__":
    args = arguments(__doc__)
    run([digits(args.rows)] if args.data is None else cases(args.data, args.rows), args.plot)
