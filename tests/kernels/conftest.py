"""What the tests of the CUDA kernels share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """Kernels that were compiled for the emulator: they outlive the run, as other caches of pytest do."""
    return Path(request.config.cache.mkdir("cuda_emulator"))
