"""Models that are no transformers models: saved and loaded, and refused where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_catquant import CatConfig, CatQuantConfig, quantize, report
from hf_catquant.correction import corrections
from hf_catquant.layers import QuantizedModule
from hf_catquant.packed_model import quantized_modules
from hf_catquant.plain import load_quantized, save_quantized
from hf_catquant.verify import verify
from toys import Cnn, Deep, Shared

RTN = {"weights": "ternary", "group_size": 8, "solver": "rtn", "correction": None}


def build(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build(Cnn)
    quantize(model, CatQuantConfig(**RTN))
    save_quantized(model, tmp_path / "cnn")
    return tmp_path / "cnn"


@torch.no_grad()
def test_round_trip_with_data_and_corrections(tmp_path: Path):
    images = list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    model = build(Cnn)
    correction = CatConfig(num_clusters=2, alpha=0.5)
    quantize(model, CatQuantConfig(weights="ternary", group_size=8, dataset=images, correction=correction))
    assert corrections(model)
    save_quantized(model, tmp_path)
    x = torch.stack(images[:3])
    assert torch.equal(load_quantized(build(Cnn), tmp_path)(x), model(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catquant.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("again", [False, True], ids=["once", "after loading"])
def test_a_merged_adapter_is_saved_and_loaded(again: bool, tmp_path: Path):
    model, x = quantize(build(Deep), CatQuantConfig(**RTN)), torch.linspace(-2, 2, 12).view(2, 6)
    before = model(x)
    model.blocks[2].up.add_product(torch.ones(12, 2), torch.ones(2, 6))
    if again:
        save_quantized(model, tmp_path)
        model = load_quantized(build(Deep), tmp_path)
        model.blocks[2].up.add_product(torch.ones(12, 1), torch.ones(1, 6))
    save_quantized(model, tmp_path)
    save_quantized(model, tmp_path)  # the adapters count once
    assert verify(tmp_path).problems == []
    loaded = load_quantized(build(Deep), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(model(x), before, atol=0.1)
    for found in (report(model), report(loaded)):
        errors = {layer.name: layer.error for layer in found.layers}
        assert [name for name, error in errors.items() if error is None] == ["blocks.2.up"]
        assert found.notes[-1].startswith(f"adapters of rank {2 + again} were merged into 1 layer after quantizing")
    assert loaded.quantization_config.provenance["merged_adapters"] == {"blocks.2.up": 2 + again}


@torch.no_grad()
def test_a_layer_at_two_names_is_stored_once(tmp_path: Path):
    model = build(Shared)
    quantize(model, CatQuantConfig(**RTN))
    save_quantized(model, tmp_path)
    again = load_quantized(build(Shared), tmp_path)
    assert again.first is again.second
    assert torch.equal(again(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_what_is_not_whole_is_refused(folder: Path):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="are not those that were saved"):
        load_quantized(build(Cnn), folder)


def test_another_model_is_refused(folder: Path):
    with pytest.raises(ValueError, match="the model has no module there"):
        load_quantized(build(Shared), folder)
    model = build(Cnn)
    model.extra = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"it lacks \['extra.weight'"):
        load_quantized(model, folder)


@torch.no_grad()
@pytest.mark.parametrize("fault", ["another model", "a lost layer", "another shape", "a scale that is no number"])
def test_after_a_refusal_the_model_is_as_it_was(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    stored = build(Cnn)
    correction = CatConfig(num_clusters=2, alpha=0.5)
    quantize(stored, CatQuantConfig(weights="ternary", group_size=8, dataset=images, correction=correction))
    model = build(Cnn)
    for parameter in model.parameters():
        parameter.add_(0.25)  # the file has other numbers
    if fault == "a scale that is no number":
        list(quantized_modules(stored).values())[-1].weight_scale.fill_(float("nan"))
    elif fault == "another shape":
        model.blocks[1].norm2 = nn.BatchNorm2d(5)
    elif fault == "a lost layer":
        del model.head
    else:
        model.extra = nn.BatchNorm2d(3)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedModule, "check_values", lambda layer: None)  # saving would refuse what is no number
        save_quantized(stored, tmp_path)
    x = torch.stack(images[:3])
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in modules]
    with pytest.raises(ValueError, match=r"is of another|no module|not finite|must be"):
        load_quantized(model, tmp_path)
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if fault == "another model":
        assert torch.isfinite(model(x)).all()


def test_changed_entries_and_other_folders_are_refused(folder: Path, tmp_path: Path):
    stored = json.loads((folder / "catquant.json").read_text())
    stored["modules"]["stem"]["group_size"] = 16
    (folder / "catquant.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="modules, corrections and checksums are not those that were saved"):
        load_quantized(build(Cnn), folder)
    with pytest.raises(ValueError, match=r"has no catquant\.json"):
        load_quantized(build(Cnn), tmp_path)
    with pytest.raises(ValueError, match="is not quantized by hf_catquant"):
        save_quantized(build(Cnn), tmp_path)
