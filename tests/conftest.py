"""Fixtures of every test: devices that exist, seeds that do not leak, the folder of real models and data."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before the libraries that read them are imported: a test never reaches for the network or for a screen.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

with contextlib.suppress(ImportError):  # a machine that is there for its GPU has it not, and test_gpu.py needs it not
    from hypothesis import settings

    # Drawn examples are the same in every run: a test that fails, fails for everybody.
    settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

# The tensor cores' 10-bit products, which convolutions take by default, are too rough to compare float32 with.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine, one after another."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed the global generators for one test, then put them back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  it is the global one we guard
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        yield 0
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder that holds ``models/`` and ``data/``; the test is skipped where there is none."""
    named = os.environ.get("CATQUANT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if (folder / "models").is_dir() and (folder / "data").is_dir():
        return folder
    if named:
        pytest.fail(f"CATQUANT_DATA must be a folder that holds models/ and data/, got {named!r}")
    pytest.skip("needs real models and data: set CATQUANT_DATA to the folder that holds models/ and data/")
