"""Mixed formats: within the bits that were asked for, spent where they save most, and reported."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, mixed, pipeline, quantize, report
from hf_catquant.formats import get_format
from hf_catquant.journal import open_journal
from hf_catquant.model import select
from hf_catquant.sizes import output_bytes


class Uneven(nn.Module):
    """A stack of layers of which only the third says anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList([Pair(1e-3), Pair(1.0), Pair(1e-3)])
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class Pair(nn.Module):
    """A residual block whose output has the size ``size``."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.a = nn.Linear(16, 32)
        self.b = nn.Linear(32, 16)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * self.b(self.a(x).relu())


def uneven() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Uneven().eval(), [{"x": torch.randn(16)} for _ in range(40)]


def request(**fields: Any) -> CatQuantConfig:
    return CatQuantConfig(**{"group_size": 16, "correction": None, "batch_size": 8, **fields})


@pytest.mark.parametrize("average_bits", [4.5, 5.0, 7.5])
def test_bits_stay_within_the_budget_and_go_where_they_are_needed(average_bits):
    model, samples = uneven()
    quantize(model, request(dataset=samples, average_bits=average_bits))
    inside = [layer for layer in report(model).layers if layer.name.startswith("layers")]
    sizes = [layer.shape[0] * layer.shape[1] for layer in inside]
    used = sum(layer.bits * size for layer, size in zip(inside, sizes, strict=True)) / sum(sizes)
    assert average_bits - 1.5 < used <= average_bits
    widths = {layer.name: get_format(layer.weights).storage_bits for layer in inside}
    others = [width for name, width in widths.items() if not name.startswith("layers.1")]
    assert min(widths["layers.1.a"], widths["layers.1.b"]) >= max(others)
    assert min(widths["layers.1.a"], widths["layers.1.b"]) > min(others)
    assert any(f"{used:.3f} bits a weight" in note for note in report(model).notes)


@pytest.mark.parametrize("correction", [pytest.param(None, marks=pytest.mark.slow), "cat"])
def test_a_size_to_meet(correction):
    """Of the whole model: the same bytes as reported, corrections included, and close to what was allowed."""
    samples = tiny_models.samples("bert", 32, seed=0)
    least, most = (
        report(quantize(tiny_models.build("bert"), request(dataset=samples, weights=weights))).bytes_after
        for weights in ("ternary", "int8")
    )
    target = least + (most - least) // 4
    config = request(dataset=samples, weights="ternary", target_bytes=target, correction=correction)
    found = report(quantize(tiny_models.build("bert"), config))
    assert 0.85 * target < found.bytes_after <= target
    assert len({layer.weights for layer in found.layers}) > 1


@pytest.mark.parametrize("projection", [4, None])
def test_a_fixed_number_of_clusters_is_within_the_size(projection):
    """It takes what it takes, whatever share of the model that is."""
    model, samples = uneven()
    correction = CatConfig(num_clusters=16, alpha=0.4, gamma="ls", projection=projection, at=("blocks", "logits"))
    fields = {"dataset": samples, "weights": "ternary", "correction": correction}
    with pytest.raises(ValueError, match="target_bytes must be at least") as refused:
        quantize(model, request(target_bytes=1, **fields))
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    model, _ = uneven()
    quantize(model, request(target_bytes=least, **fields))
    assert len(report(model).corrections) == 4
    assert report(model).bytes_after == least


def test_scales_that_take_more_than_was_planned_are_told():
    """Formats are chosen for scales in 16 bits; what is more than that is known when a layer was solved."""
    model, samples = uneven()
    with torch.no_grad():
        model.layers[0].a.weight.mul_(1e-7)
    fields = {"dataset": samples, "weights": "ternary", "correction": None}
    with pytest.raises(ValueError, match="target_bytes must be at least") as refused:
        quantize(model, request(target_bytes=1, **fields))
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    found = report(quantize(model, request(target_bytes=least, **fields)))
    extra = found.bytes_after - least
    assert extra > 0
    assert [n for n in found.notes if f"target_bytes: up to {extra} bytes more" in n and "(layers.0.a ...)" in n]


def test_calibrated_ranges_are_within_the_size():
    samples = tiny_models.samples("resnet", 8, seed=0)
    config = request(weights="ternary", activations="int8", dataset=samples, solver="rtn")
    model = tiny_models.build("resnet")
    least = output_bytes(model, select(model, config))
    assert report(quantize(model, config)).bytes_after == least


def test_classes_of_a_map_are_compared_class_by_class():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 7, 1))
    x = torch.randn(8, 3, 5, 6)
    data = SimpleNamespace(batches=[{"input": x}])
    wanted = mixed.Losses(model, data).wanted[0][0]
    assert torch.equal(wanted, model(x).movedim(1, -1).reshape(-1, 7))


@pytest.mark.parametrize(("weights", "tried"), [("ternary", False), ("ternary_symmetric", True)])
def test_only_what_takes_no_fewer_bits_is_tried(weights, tried, monkeypatch):
    names = []
    monkeypatch.setattr(mixed.Losses, "alone", lambda self, site, name: names.append(name) or 1.0)
    model, samples = uneven()
    quantize(model, request(dataset=samples, weights=weights, average_bits=6.0))
    assert ("ternary_symmetric" in names) == tried
    assert {"ternary", "int2", "int8"} <= set(names)
    assert "binary" not in names


@pytest.mark.parametrize(
    ("activations", "rotation"), [(None, "auto"), ("int8", "auto"), ("int4", "auto"), ("int8", "hadamard")]
)
def test_a_wider_format_has_the_rotation_of_its_own(activations, rotation):
    """As the rule of "auto" says it of the format that was chosen, not of the one that the search began with."""
    model, samples = uneven()
    config = request(dataset=samples, average_bits=7.0, activations=activations, rotation=rotation, solver="rtn")
    inside = [layer for layer in report(quantize(model, config)).layers if layer.name.startswith("layers")]
    assert len({layer.weights in ("int4", "int8") for layer in inside}) == 2
    for layer in inside:
        by_rule = CatQuantConfig(layer.weights, 16, activations, rotation=rotation).scheme_for(layer.name, edge=False)
        if activations is None and rotation == "auto":  # data may have decided against it
            assert layer.rotation in (None, by_rule.rotation)
        else:
            assert layer.rotation == by_rule.rotation


def test_formats_from_a_journal_have_the_same_rotations(tmp_path):
    model, samples = uneven()
    config = request(dataset=samples, average_bits=7.0, activations="int8", solver="rtn")
    batches, journal, schemes = pipeline.collect(model, config), open_journal(tmp_path / "journal", resume=False), []
    for _ in range(2):
        selection = select(model, config)
        pipeline._mixed_formats(model, selection, config, batches, journal)
        schemes.append([site.scheme for site in selection.sites])
    journal.close()
    assert schemes[0] == schemes[1]
    assert len({scheme.rotation for scheme in schemes[0] if scheme.weights != "int8"}) == 2


def test_mixed_is_better_than_uniform_of_the_same_bits():
    errors = []
    for fields in ({"weights": "int2"}, {"weights": "binary", "average_bits": 4.0}):
        model, samples = uneven()
        x = torch.stack([sample["x"] for sample in samples])
        expected = model(x)
        quantize(model, request(dataset=samples, **fields))
        errors.append(float((model(x) - expected).square().mean().detach()))
    assert errors[1] < 0.5 * errors[0]


def test_what_is_set_by_hand_stays(tmp_path):
    model = tiny_models.build("bert")
    samples = tiny_models.samples("bert", 16, seed=0)
    config = request(dataset=samples, average_bits=6.0, overrides={r"layer\.0\.attention": {"weights": "int3"}})
    quantize(model, config)
    layers = {layer.name: layer.weights for layer in report(model).layers}
    assert all(weights == "int3" for name, weights in layers.items() if "layer.0.attention" in name)
    assert layers["classifier"] == "int8"
    assert len(Counter(weights for name, weights in layers.items() if "encoder" in name)) > 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {layer.name: layer.weights for layer in report(again).layers} == layers
    inputs = tiny_models.batch("bert")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"average_bits": 2.0},
            r"average_bits must be at least 4\.\d+, what weights='ternary', group_size=16 and low_rank=0 take, got 2",
        ),
        (
            {"target_bytes": 100},
            r"target_bytes must be at least \d+, what .* edge_weights='int8', group_size=16, low_rank=0 and 0 corrections",
        ),
        ({"target_bytes": 1.5}, r"target_bytes must be None or a positive integer, got 1\.5"),
        ({"target_bytes": 9000, "average_bits": 5}, "average_bits 5 and target_bytes 9000 are both given"),
        ({"target_bytes": 9000, "dataset": None, "solver": "rtn"}, "target_bytes needs calibration data"),
        ({"average_bits": -1}, "average_bits must be None or a number above 0 and below 100, got -1"),
        ({"average_bits": "2"}, "average_bits must be None or a number above 0 and below 100, got '2'"),
        ({"average_bits": 5, "dataset": None, "solver": "rtn"}, "average_bits needs calibration data"),
        ({"average_bits": 5, "overrides": {"": {"weights": "int4"}}}, "no layer inside the blocks is left"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    model = tiny_models.build("bert")
    with pytest.raises(ValueError, match=message):
        quantize(model, request(**{"dataset": tiny_models.samples("bert", 16, seed=0), **fields}))
    assert type(model.classifier) is nn.Linear


def test_a_model_without_logits():
    model = tiny_models.build("bert").bert
    quantize(model, request(dataset=tiny_models.samples("bert", 16, seed=0), average_bits=5.0))
    assert any(note.startswith("mixed formats") for note in report(model).notes)
