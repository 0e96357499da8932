"""Quantize on load, save, reload: bit-exact, for every architecture and every format, and the same file when saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hf_catquant
import tiny_models
from helpers import ALL_FORMATS
from hf_catquant import CatQuantConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("float"))


@torch.no_grad()
def check_round_trip(name: str, root: str, folder: Path, config: CatQuantConfig) -> hf_catquant.report.__class__:
    cls = type(tiny_models.build(name))
    model = cls.from_pretrained(tiny_models.folder_of(name, root), quantization_config=config)
    model.save_pretrained(folder / "first")
    reloaded, info = cls.from_pretrained(folder / "first", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    batch = tiny_models.batch(name)
    expected, actual = (tiny_models.main_output(m(**batch)) for m in (model, reloaded))
    assert torch.isfinite(expected).all()
    assert torch.equal(expected, actual)
    reloaded.save_pretrained(folder / "second")
    files = [(folder / part / "model.safetensors").read_bytes() for part in ("first", "second")]
    assert files[0] == files[1]
    assert (folder / "first/config.json").read_text() == (folder / "second/config.json").read_text()
    return hf_catquant.report(reloaded)


@pytest.mark.parametrize("weights", ALL_FORMATS)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_without_data(name, weights, root, tmp_path):
    config = CatQuantConfig(weights=weights, group_size=16, solver="rtn", correction=None)
    report = check_round_trip(name, root, tmp_path, config)
    print(f"{name} {weights}: {report.coverage:.1f} % of {report.parameters} parameters, {report.skipped}")
    assert report.coverage >= tiny_models.LEAST_COVERAGE.get(name, 90.0)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_calibrated_and_corrected(name, root, tmp_path):
    config = CatQuantConfig(
        weights="ternary",
        group_size=16,
        correction={"num_clusters": 2, "alpha": 0.5},
        dataset=tiny_models.samples(name),
        batch_size=4,
    )
    report = check_round_trip(name, root, tmp_path, config)
    assert all(layer.error is not None or layer.tied_to for layer in report.layers)
    has_logits = name != "clip"  # its logits are a product of two towers, no module returns them
    assert bool(report.corrections) == has_logits
    assert not any("not reached" in note for note in report.notes if name not in ("t5", "clip"))
