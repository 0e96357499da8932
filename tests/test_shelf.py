"""The shelf: weights are there when their unit runs, and only then."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForAudioClassification, AutoModelForCausalLM

import tiny_models
from hf_catquant import CatQuantConfig, quantize, streaming
from hf_catquant.checkpoint import weight_files
from hf_catquant.integrity import read_header
from hf_catquant.shelf import Shelf, Source, absent, is_absent, resident, shelf_of
from hf_catquant.swap import Swap
from hf_catquant.tasks import auto_class, load_config


def opened(name, root, dtype=torch.float32):
    folder = tiny_models.folder_of(name, str(root))
    auto = AutoModelForAudioClassification if name == "wav2vec2" else auto_class(load_config(folder))
    files = weight_files(Path(folder))
    return streaming.open_on_shelf(auto, folder, files, dtype=dtype, least=1), auto.from_pretrained(
        folder, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_a_tensor_is_read_as_it_is_stored_and_cast(tmp_path, generator, dtype, size, monkeypatch):
    monkeypatch.setattr("hf_catquant.shelf._PIECE", 999)  # several pieces
    values = torch.randn(size, 3, generator=generator).to(torch.bfloat16)
    save_file({"first": torch.ones(7), "x": values}, tmp_path / "x.safetensors")
    source = Source(tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors")["x"])
    assert source.dtype == torch.bfloat16
    assert torch.equal(source.read(dtype), values.to(dtype))
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="has become shorter"):
        source.read(dtype)


@pytest.mark.parametrize("name", ["llama_tied", "bert", "resnet", "wav2vec2", "t5"])
def test_the_same_outputs_as_the_whole_model(tmp_path, name):
    shelved, whole = opened(name, tmp_path)
    batch = tiny_models.batch(name)
    with torch.no_grad():
        for _ in range(2):  # the second time units come back
            found, wanted = (
                next(v for v in m(**batch).values() if isinstance(v, torch.Tensor)) for m in (shelved, whole)
            )
            assert torch.equal(found, wanted)
    shelf_of(shelved).finish()
    for (a, x), (b, y) in zip(shelved.state_dict().items(), whole.state_dict().items(), strict=True):
        assert a == b
        assert torch.equal(x, y)
    assert shelved.config.to_dict() == whole.config.to_dict()
    if whole.can_generate():
        assert shelved.generation_config.to_dict() == whole.generation_config.to_dict()


def test_one_unit_is_in_memory_at_a_time(tmp_path):
    model, _ = opened("llama", tmp_path)
    inside = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    there = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *args: there.append([is_there(model, name) for name in inside]))
    with torch.no_grad():
        model(**tiny_models.batch("llama"))
    assert there == [[True, False], [False, True]]
    assert is_there(model, "lm_head")
    assert not is_there(model, "model.embed_tokens")


def test_a_taken_unit_stays_and_a_finished_one_frees_what_was_replaced(tmp_path):
    model, _ = opened("llama", tmp_path)
    shelf, name = shelf_of(model), "model.layers.0"
    weight = model.get_submodule(name).self_attn.q_proj.weight
    shelf.take(f"{name}.mlp.up_proj")  # a part stands for its unit
    shelf.enter("model.layers.1")
    assert is_there(model, f"{name}.self_attn.q_proj")
    model.get_submodule(name).self_attn.q_proj = nn.Identity()
    shelf.done(name)
    assert bool(weight.isnan().all())
    assert is_there(model, f"{name}.self_attn.k_proj")  # still part of the model
    assert len(copy.deepcopy(model.get_submodule(name))._forward_pre_hooks) == 0


@pytest.mark.parametrize(("options", "freed"), [({}, True), ({"solver": "reconstruct"}, False)])
def test_replaced_weights_are_gone_while_the_last_layer_of_a_block_is_solved(tmp_path, monkeypatch, options, freed):
    model, _ = opened("llama", tmp_path)
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith("proj.weight")}
    away: dict[str, set[str]] = {}
    solve = Swap.solve

    def solve_and_look(self, name, *rest):
        block = name[: len("model.layers.0.")]
        away[name] = {n.removeprefix(block) for n, w in weights.items() if n.startswith(block) and is_absent(w)}
        return solve(self, name, *rest)

    monkeypatch.setattr(Swap, "solve", solve_and_look)
    data = {"dataset": tiny_models.samples("llama", 8), "batch_size": 4, "solver_options": {}}
    if not freed:
        data["solver_options"] = {"block_steps": 1, "model_steps": 0}
    quantize(model, CatQuantConfig(group_size=16, correction=None, **data, **options))
    last = {name: found for name, found in away.items() if name.endswith("down_proj")}
    assert len(last) == 2
    for found in last.values():
        assert len(found) == (6 if freed else 0)
        assert "mlp.down_proj.weight" not in found
    assert not any(found for name, found in away.items() if name not in last)


@pytest.mark.parametrize("shape", [(3, 4), (8, 4, 1, 1), (5, 1), (1, 7)])
def test_a_side_of_one_does_not_hide_that_a_weight_is_away(shape):
    """The weights of convolutions with a kernel of one."""
    assert is_absent(absent(shape, torch.float32))


def test_what_is_read_while_it_is_away_is_not_a_number(tmp_path):
    model, _ = opened("llama", tmp_path)
    assert model.lm_head.weight.device.type == "cpu"
    assert model.lm_head.weight.isnan().all()
    assert model.lm_head.weight.untyped_storage().nbytes() == 4
    with resident(model, "lm_head"):
        assert torch.isfinite(model.lm_head.weight).all()


def test_parameters_of_no_unit_are_read_at_once(tmp_path):
    save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "x.safetensors")
    source = Source(tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors")["w"])
    model = nn.Module()
    model.w = nn.Parameter(absent((2, 3), torch.float32))
    Shelf(model, {"w": source}, [])
    assert torch.equal(model.w, torch.arange(6.0).view(2, 3))


def test_experts_that_the_loader_puts_together(tmp_path):
    import transformers

    config = transformers.MixtralConfig(**tiny_models.LLAMA, num_local_experts=2, num_experts_per_tok=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    files = weight_files(tmp_path / "m")
    kwargs = {"dtype": torch.float32}
    shelved = streaming.open_on_shelf(AutoModelForCausalLM, str(tmp_path / "m"), files, least=1, **kwargs)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m", **kwargs)
    shelf_of(shelved).finish()
    for name, value in whole.state_dict().items():
        assert torch.equal(shelved.state_dict()[name], value), name


def test_a_damaged_index_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text, words in (
        ("{", "it is no JSON"),
        ('{"weight_map": {"a": "../x"}, "metadata": {}}', "no safetensors file of this folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "metadata must be an object"),
        ("[]", "must hold a JSON object"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=words):
            weight_files(tmp_path)


def is_there(model, name):
    return not bool(model.get_submodule(name).weight.flatten()[0].isnan())
