"""``load_state_dict`` of quantized models: nothing is taken that stands for other weights, and nothing stays old."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.layers import QuantizedModule
from hf_catquant.packed_model import quantized_modules

X = torch.arange(4 * 16).sin().view(4, 16)
IDS = torch.arange(3, 19).view(2, 8)


def plain(seed: int, **fields: Any) -> nn.Module:
    """Two quantized linears over 16 columns, the weights drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    asked = {"weights": "int4", "group_size": 8, "rotation": None} | fields
    return quantize(model, CatQuantConfig(overrides={"0|1": asked}, solver="rtn", correction=None))


def tied(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        model = tiny_models.build("llama_tied")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return quantize(model, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))


def clones(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_a_head_is_there_after_a_load_from_meta():
    """As a model is restored without memory for it twice: all keys match, and nothing may be left on meta."""
    source = tied(0)
    model = copy.deepcopy(source).to("meta")
    assert model.load_state_dict(source.state_dict(), assign=True).missing_keys == []
    assert not model.lm_head.weight_packed.is_meta
    assert model.lm_head.weight_packed is model.get_input_embeddings().weight_packed


@pytest.mark.parametrize("assign", [True, False])
def test_a_head_follows_its_embedding(assign: bool):
    model, other = tied(0), tied(1)
    model(input_ids=IDS)
    wanted = other(input_ids=IDS).logits
    assert model.load_state_dict(clones(other), assign=assign).missing_keys == []
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    head, owner = model.lm_head, model.model.embed_tokens
    assert head.owner is owner
    assert head.weight_packed is owner.weight_packed

    owner.load_state_dict({name: tensor.clone() for name, tensor in tied(2).model.embed_tokens.state_dict().items()})
    assert torch.equal(head.weight, owner.weight)


@pytest.mark.parametrize("head_first", [False, True])
def test_a_moved_head_still_shares(head_first: bool):
    """A move makes a copy of every buffer: the shared ones must not become two."""
    model = tied(0)
    head, owner = model.lm_head, model.model.embed_tokens
    for layer in (head, owner) if head_first else (owner, head):
        layer._apply(torch.clone)
    for name in ("weight_packed", "weight_scale"):
        assert getattr(head, name) is getattr(owner, name)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert again.lm_head.owner is again.model.embed_tokens
    assert again.model.embed_tokens.sharers == (again.lm_head,)
    again.to("meta")
    assert again.lm_head.weight_packed is again.model.embed_tokens.weight_packed


OTHERS = [
    ({"rotation": "hadamard"}, "rotation is 'hadamard' in the state dict, None here"),
    ({"activations": "int8"}, "activations is 'int8' in the state dict, None here"),
    ({"group_size": 16}, "group_size is 16 in the state dict, 8 here"),
]


@pytest.mark.parametrize(("fields", "message"), OTHERS)
def test_another_scheme_is_refused(fields: dict[str, Any], message: str, tmp_path: Path):
    model, other = plain(0), plain(1, **fields)
    before = model(X)
    torch.save(other.state_dict(), tmp_path / "state.pt")
    for state in (other.state_dict(), torch.load(tmp_path / "state.pt", weights_only=True)):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"0: {message}.*from_pretrained"):
                model.load_state_dict(state, strict=strict)
    assert torch.equal(model(X), before)


def test_the_same_scheme_is_taken(tmp_path: Path):
    model, other = plain(0, rotation="hadamard"), plain(1, rotation="hadamard")
    torch.save(other.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(X), other(X))
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(again(X), other(X))


def test_another_dtype_is_refused_without_metadata():
    model = plain(0)
    state = clones(plain(1))
    state["1.weight_scale"] = state["1.weight_scale"].float()
    for assign in (True, False):
        with pytest.raises(RuntimeError, match=r"1\.weight_scale is torch\.float32 in the state dict, torch\.float16"):
            model.load_state_dict(state, assign=assign)


def test_a_scheme_is_no_tensor():
    """What a file or another library makes of a state dict has the names that the documentation lists, and no more."""
    names = {name.partition(".")[2] for name in plain(0).state_dict()}
    assert names == {"weight_packed", "weight_scale", "weight_offset", "bias"}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("buffer", ["weight_packed", "weight_scale"])
def test_loading_in_place_after_a_product(mode: Any, buffer: str):
    """Tensors of inference mode count no versions: kernels went on with the weight that they had laid out."""
    with mode():
        model, other = plain(0), plain(1)
        model(X)
        kept = quantized_modules(model)["0"].weight_packed
        assert kept.is_inference() == (mode is torch.inference_mode)
        state = {name: tensor for name, tensor in clones(other).items() if buffer in name}
        model.load_state_dict(state, strict=False)
        assert quantized_modules(model)["0"].weight_packed is kept
        for layer in model:
            assert isinstance(layer, QuantizedModule)
            assert torch.allclose(layer(X), nn.functional.linear(X, layer.weight, layer.bias), atol=1e-5)


def test_from_pretrained_with_tensors_and_no_files(tmp_path: Path):
    model, other = tied(0), tied(1)
    model.save_pretrained(tmp_path)
    config, kind = type(model.config).from_pretrained(tmp_path), type(model)
    wanted = model(input_ids=IDS).logits
    for state in (load_file(tmp_path / "model.safetensors"), model.state_dict()):
        assert torch.equal(kind.from_pretrained(None, config=config, state_dict=state)(input_ids=IDS).logits, wanted)
    trained = clones(model)
    trained["model.norm.weight"] *= 2
    again = kind.from_pretrained(None, config=config, state_dict=trained)
    assert torch.equal(again.model.norm.weight, 2 * model.model.norm.weight)
    with pytest.raises(
        ValueError, match=r"weight_packed of the state_dict is not the tensor that the config was saved"
    ):
        kind.from_pretrained(None, config=config, state_dict=clones(other))
