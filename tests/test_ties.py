"""Layers that share one weight, right after quantizing with data: the owner is the layer, not what stood in for it."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.journal import open_journal
from hf_catquant.layers import QuantizedModule
from hf_catquant.packed_model import dequantize_modules, quantized_modules
from hf_catquant.plain import load_quantized, save_quantized
from hf_catquant.replay import Replay
from hf_catquant.swap import original_at
from hf_catquant.walk import Walk

FIELDS = {"weights": "int4", "group_size": 8, "correction": None, "edge_weights": None}


class Block(nn.Module):
    """Two linears, of which the first is every other block's first, too."""

    def __init__(self, first: nn.Linear | None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        if first is not None:
            self.up.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tied(nn.Module):
    """The weight of ``stem``, a unit of its own, is that of ``head``; that of a layer inside a block, of its neighbour's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.head.weight = self.stem.weight
        first = Block(None)
        self.blocks = nn.ModuleList([first, Block(first.up)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


OWNERS = {"head": "stem", "blocks.1.up": "blocks.0.up"}
ROWS = [{"x": row} for row in torch.randn(24, 16, generator=torch.Generator().manual_seed(0))]
X = torch.stack([row["x"] for row in ROWS[:4]])


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied().eval()


def quantized(journal: object = None) -> nn.Module:
    return quantize(build(), CatQuantConfig(**FIELDS, dataset=ROWS), journal)


def check(model: nn.Module, owners: dict[str, str] = OWNERS) -> None:
    """Every tied layer knows the layer in the model that it shares with, and that layer knows that it is shared."""
    for name, owner in owners.items():
        layer = model.get_submodule(owner)
        assert isinstance(layer, QuantizedModule)
        assert model.get_submodule(name).owner is layer
        assert layer.sharers == (model.get_submodule(name),)
        assert model.get_submodule(name).weight_packed is layer.weight_packed
    assert {name for name, m in quantized_modules(model).items() if m.owner is not None} == set(owners)


def test_the_owner_is_the_layer_itself():
    check(quantized())
    model = tiny_models.build("llama_tied")
    rows = tiny_models.samples("llama_tied")
    quantize(model, CatQuantConfig(**FIELDS, dataset=rows))
    check(model, {"lm_head": "model.embed_tokens"})


def test_an_owner_from_the_journal_is_the_layer_itself(tmp_path: Path):
    journal = open_journal(tmp_path / "journal", resume=False)
    whole = quantized(journal)
    last = sorted((tmp_path / "journal").glob("unit-*"))[-1]
    last.unlink()  # the unit of the head, whose weight is that of a unit that is taken from the journal
    journal.close()
    journal = open_journal(tmp_path / "journal", resume=True)
    resumed = quantized(journal)
    journal.close()
    check(resumed)
    assert torch.equal(resumed(X), whole(X))


def test_a_stand_in_of_a_stand_in_is_seen_through():
    model = build()
    stem = model.stem
    model.stem = Replay(Replay(stem, lambda call: None), lambda call: None)
    assert original_at(model, "stem") is stem
    inner = model.blocks[0].up
    model.blocks[0].up = Replay(inner, lambda call: None)
    model.blocks[0] = Replay(model.blocks[0], lambda call: None)
    assert original_at(model, "blocks.0.up") is inner
    with pytest.raises(TypeError, match="Replay is no quantized layer"):
        quantized().head.share(model.stem)


def test_nothing_of_the_walk_stays_with_the_model():
    model = quantized()
    gc.collect()
    assert not [held for held in gc.get_objects() if type(held) is Walk and held.model is model]
    again = pickle.loads(pickle.dumps(model))
    check(again)
    assert torch.equal(again(X), model(X))


def test_ties_outlive_dequantizing_and_saving(tmp_path: Path):
    model = quantized()
    save_quantized(model, tmp_path)
    again = load_quantized(build(), tmp_path)
    check(again)
    for either in (model, again):
        dequantize_modules(either)
        for name, owner in OWNERS.items():
            assert either.get_submodule(name).weight is either.get_submodule(owner).weight


def test_nothing_is_added_to_a_shared_weight():
    """What merging an adapter does (``peer_peft.py``): the other layer would not have it, and no file could say so."""
    model = quantized()
    for name in (*OWNERS, *OWNERS.values()):
        with pytest.raises(ValueError, match="tied to that of another one"):
            model.get_submodule(name).add_product(torch.ones(16, 1), torch.ones(1, 16))
