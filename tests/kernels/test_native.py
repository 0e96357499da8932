"""A library of other sources than those beside it is not called: its functions may want other arguments."""

from __future__ import annotations

import shutil

import pytest

from hf_catquant.kernels import native
from hf_catquant.log import logger


@pytest.mark.skipif(native.library() is None, reason="there is no compiled library")
@pytest.mark.parametrize("change", [False, True])
def test_a_library_of_other_sources_is_left_alone(change, tmp_path, monkeypatch, caplog):
    sources = tmp_path / "csrc"
    shutil.copytree(native.SOURCES, sources)
    if change:
        (sources / "pool.c").open("a").write("/* newer */\n")
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setattr(logger, "propagate", True)
    found = native.library.__wrapped__()
    assert (found is None) == change
    assert ("was built from other sources" in caplog.text) == change
