"""Where a correction may sit, what it may correct there, and files that must not half load."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from hf_catquant import CatConfig, load_correction, save_correction
from hf_catquant.correction import ClusterAffine, attach, corrections, detach
from toys import Returns

Pair = collections.namedtuple("Pair", "first second")


def doubling(width: int = 4) -> ClusterAffine:
    return ClusterAffine.of(None, torch.zeros(1, width), torch.full((1, width), 2.0), torch.zeros(1, width))


def pair_of_linears() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})


def test_a_named_tuple_stays_one():
    model = nn.ModuleDict({"site": Returns(lambda x: Pair(x, 7))})
    attach(model, "site", doubling())
    out = model["site"](torch.ones(2, 4))
    assert isinstance(out, Pair)
    assert torch.equal(out.first, torch.full((2, 4), 2.0))
    assert out.second == 7


def test_the_loss_that_comes_first_is_not_corrected():
    model = nn.ModuleDict({"site": Returns(lambda x: SequenceClassifierOutput(loss=x.sum(), logits=x))})
    attach(model, "site", doubling())
    out = model["site"](torch.ones(2, 4))
    assert out.loss == 8
    assert torch.equal(out.logits, torch.full((2, 4), 2.0))


@pytest.mark.parametrize(
    ("wrap", "first"),
    [
        (lambda x: (x, x + 1), lambda o: o[0]),
        (lambda x: [x], lambda o: o[0]),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda o: o.last_hidden_state),
    ],
)
def test_every_kind_of_output_compiles_in_one_graph(wrap, first):
    torch.compiler.reset()
    model = Returns(wrap)
    attach(model, "", doubling())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(first(compiled(torch.ones(2, 4))), torch.full((2, 4), 2.0))


def test_places_that_cannot_be():
    model = pair_of_linears()
    with pytest.raises(ValueError, match="ModuleDict has no module 'c' for a correction"):
        attach(model, "c", doubling())
    with pytest.raises(ValueError, match="has no module 'c'"):
        detach(model, "c")
    with pytest.raises(ValueError, match="correction of 'a' must have its 4 output features, got 5"):
        attach(model, "a", doubling(5))
    with pytest.raises(ValueError, match="cannot sit on '', a Sequential: name its last child, '1'"):
        attach(nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), "", doubling())
    assert not corrections(model)


def test_a_child_called_correction_is_left_alone():
    model = pair_of_linears()
    own = nn.Linear(1, 1)
    model["a"].correction = own
    with pytest.raises(ValueError, match="'a', whose Linear has its own `correction`"):
        attach(model, "a", doubling())
    assert detach(model, "a") is None
    assert model["a"].correction is own


def test_a_fold_is_exact_in_half_precision_and_takes_matrices_only():
    correction = ClusterAffine.of(None, torch.zeros(1, 2), torch.tensor([[1.0001, 3.0]]), torch.zeros(1, 2))
    weight = torch.full((2, 3), 1000.0, dtype=torch.float16)
    folded, bias = correction.fold_into(weight, None)
    assert folded.dtype == bias.dtype == torch.float16
    assert torch.equal(folded, (weight.double() * correction.gamma.double().T).half())
    for wrong in (torch.zeros(3, 3), torch.zeros(2, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"the weight must be \(2, K\) to fold this in"):
            correction.fold_into(wrong, None)


def test_loading_is_all_or_nothing(tmp_path):
    model = pair_of_linears()
    for name in model:
        attach(model, name, doubling())
    save_correction(model, tmp_path)
    for wrong, message in (
        (nn.Sequential(nn.Linear(3, 4)), "cannot sit on 'b'"),
        (nn.Linear(3, 9), "9 output features"),
    ):
        other = pair_of_linears()
        other["b"] = wrong
        with pytest.raises(ValueError, match=rf"correction\.safetensors: .*{message}"):
            load_correction(other, tmp_path)
        assert not corrections(other)


def test_a_model_without_parameters_and_one_partly_on_meta_load(tmp_path):
    model = nn.ModuleDict({"site": nn.Identity()})
    attach(model, "site", doubling())
    save_correction(model, tmp_path)
    bare = nn.ModuleDict({"site": nn.Identity()})
    load_correction(bare, tmp_path)
    assert torch.equal(bare["site"](torch.ones(1, 4)), torch.full((1, 4), 2.0))
    offloaded = nn.ModuleDict({"far": nn.Linear(4, 4, device="meta"), "site": nn.Identity()})
    load_correction(offloaded, tmp_path)
    assert torch.equal(offloaded["site"](torch.ones(1, 4)), torch.full((1, 4), 2.0))


def test_one_flipped_bit_is_refused(tmp_path):
    model = nn.Linear(3, 4)
    attach(model, "", doubling())
    path = save_correction(model, tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # the lowest bits of a finite number
    path.write_bytes(data)
    with pytest.raises(ValueError, match="correction"):
        load_correction(nn.Linear(3, 4), path)


def entry(**changes) -> str:
    return json.dumps({"": {"width": 4, "clusters": 1, "rank": None, "dim": -1, **changes}})


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("[]", "must be a JSON object, got"),
        ("{", "not a whole correction file"),
        ({"version": "1"}, "not a whole correction file: 'sites'"),
        ({"version": "1", "sites": "[1]"}, "must be a JSON object, got"),
        ({"version": "1", "sites": {"": 1}}, "not a whole correction file"),
        ({"version": "1", "sites": '{"": 3}'}, "must have width, clusters, rank and dim, got 3"),
        ({"version": "1", "sites": entry(dim=[])}, "positive sizes of at most 16777216 and dim"),
        ({"version": "1", "sites": entry(width=10**6)}, r"must be \(1, 1000000\) float32, got \(1, 4\)"),
        ({"version": "1", "sites": entry(clusters=2)}, r"centroids must be \(2, 4\) float32, got \(1, 4\)"),
    ],
)
def test_metadata_that_does_not_fit(head, message, tmp_path):
    tensors = {f".correction.{name}": value.clone() for name, value in doubling().named_buffers()}
    path = tmp_path / "correction.safetensors"
    save_file(tensors, path, metadata={"catquant": head if isinstance(head, str) else json.dumps(head)})
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=message):
        load_correction(model, path)
    assert not corrections(model)


@pytest.mark.parametrize(
    "fields", [{"at": 5}, {"at": ["a", 1]}, {"shrinkage": float("inf")}, {"seed": 1 << 32}, {"seed": True}]
)
def test_values_that_would_fail_later(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"CatConfig: {name} must be"):
        CatConfig(**fields)
    with pytest.raises(ValueError, match="must be a dict"):
        CatConfig.from_dict([fields])
