"""Real models on real data, through the command line: what the README promises, with room for another machine."""

from __future__ import annotations

import json

import pytest

from hf_catquant.cli import main

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


def table(realdata, folder, model: str, weights: str, files: tuple[str, str], column: str, *more: str) -> dict:
    """Quantize and evaluate; the table as ``catquant eval --json`` writes it."""
    source = str(realdata / "models" / model)
    calibration, test = (str(realdata / "data" / f"{file}.parquet") for file in files)
    words = ["quantize", source, str(folder), "--weights", weights, "--group-size", "64", "--column", column]
    assert main([*words, "--dataset", calibration, "--num-samples", "64", *more]) == 0
    words = ["eval", str(folder), "--float", source, "--dataset", test, "--column", column]
    assert main([*words, "--json", str(folder / "table.json"), *more]) == 0
    return json.loads((folder / "table.json").read_text())


def test_custom_code_speech_model_in_ternary(realdata, tmp_path):
    files = ("speech_commands/calibration", "speech_commands/test")
    result = table(realdata, tmp_path, "kwt1-speech-commands-12", "ternary", files, "audio", "--trust-remote-code")
    assert result["rows"][0]["metric"] == pytest.approx(97.17, abs=0.01)
    assert result["rows"][-1]["metric"] > 90
    assert not result["significantly_worse"]


def test_language_model_in_int4(realdata, tmp_path):
    files = ("tinystories/calibration", "tinystories/test")
    result = table(realdata, tmp_path, "stories260K", "int4", files, "text")
    assert result["rows"][0]["metric"] == pytest.approx(4.70, abs=0.02)
    assert result["rows"][-1]["metric"] < 5.1
    assert not result["significantly_worse"]
