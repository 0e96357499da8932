"""The examples run as they stand, on the data that come with scikit-learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow  # each is a new process that trains 110 classifiers
@pytest.mark.parametrize("kind", ["text", "speech", "vision"])
def test_discrimination(kind, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"discrimination_{kind}.py"), "--plot", str(tmp_path / "plot.png")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits, pixels: 1797 rows, 64 features, 10 classes" in done.stdout
    assert "ternary, eta 0.75                       0.8335" in done.stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000
