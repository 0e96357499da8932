"""Parts of quantized models, and models around one: what save_pretrained writes loads.

That it does not load without the package is in test_fails_closed.py.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, fit_correction, quantize, report
from hf_catquant.correction import corrections
from hf_catquant.layers import Scheme, layer_for
from hf_catquant.packed_model import quantized_modules
from hf_catquant.sentinels import check_files
from hf_catquant.verify import verify

RTN = {"weights": "int4", "group_size": 16, "solver": "rtn", "correction": None}
IDS = torch.arange(3, 19).view(2, 8)


def bert_config(**fields: object) -> tf.BertConfig:
    return tf.BertConfig(**tiny_models.TEXT, **fields)


@functools.cache
def once(name: str, fields: str) -> tf.PreTrainedModel:
    model = tiny_models.build(name)
    quantize(model, CatQuantConfig(**{**RTN, **json.loads(fields)}))
    return model


def quantized(name: str = "llama", **fields: object) -> tf.PreTrainedModel:
    return copy.deepcopy(once(name, json.dumps(fields)))


class Around(tf.PreTrainedModel):
    """What people write around a model of the Hub."""

    config_class = tf.BertConfig

    def __init__(self, config: tf.BertConfig) -> None:
        super().__init__(config)
        self.trunk, self.head = tf.BertModel(config), nn.Linear(32, 3)
        self.post_init()

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.head(self.trunk(input_ids)[1]),)


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    is_pair = isinstance(model, tf.EncoderDecoderModel)
    return model.eval()(IDS, decoder_input_ids=IDS).logits if is_pair else model.eval()(IDS)[0]


def saved_and_loaded(model: tf.PreTrainedModel, folder: Path, **options: object) -> tf.PreTrainedModel:
    """The model from its files: all of it, with a byte beside each packed weight, and the same when saved again."""
    model.save_pretrained(folder, **options)
    check_files([folder / "model.safetensors"])
    found = verify(folder)
    assert found.is_whole, found
    again = type(model).from_pretrained(folder)
    assert len(quantized_modules(again)) == len(quantized_modules(model))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items() if name in state)
    assert torch.allclose(answer(again), answer(model), atol=1e-5)
    again.save_pretrained(folder.with_name("again"))
    assert (folder / "model.safetensors").read_bytes() == (
        folder.with_name("again") / "model.safetensors"
    ).read_bytes()
    return again


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_trunk_of_a_model(name: str, tmp_path: Path):
    model = quantized(name)
    model.save_pretrained(tmp_path / "before")
    said, wanted = report(model), answer(model)
    errors = {layer.name: layer.error for layer in said.layers}
    part = saved_and_loaded(model.model, tmp_path / "part")
    for layer in report(part).layers:
        assert layer.error == errors[f"model.{layer.name}"] is not None
    assert report(part).bytes_before == sum(p.nbytes for p in tiny_models.build(name).model.parameters())
    assert "saved as a part" in report(part).notes[-1]
    # The whole is as it was, and says of itself what it did, in memory and in its files.
    assert report(model) == said
    assert torch.equal(answer(model), wanted)
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_a_tower_that_has_a_config_of_its_own(tmp_path: Path):
    quantized("clip").save_pretrained(tmp_path / "clip")
    model = tf.CLIPModel.from_pretrained(tmp_path / "clip")
    saved_and_loaded(model.text_model, tmp_path / "text")
    pickle.loads(pickle.dumps(model.text_model)).save_pretrained(tmp_path / "pickled")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "text" / file).read_bytes() == (tmp_path / "pickled" / file).read_bytes()


def test_a_layer_whose_weight_is_outside(tmp_path: Path):
    """The encoder of T5 shares the embedding of the whole; it is saved with the weight, and goes on sharing it."""
    model = quantized("t5")
    embedding = model.encoder.embed_tokens
    assert embedding.owner is model.shared
    saved_and_loaded(model.encoder, tmp_path / "encoder")
    assert embedding.owner is model.shared
    assert embedding in model.shared.sharers
    assert embedding.weight_packed is model.shared.weight_packed
    assert "encoder.embed_tokens.weight_packed" not in model.state_dict()


def test_corrections_go_with_the_part(tmp_path: Path):
    rows = [{"input_ids": torch.randint(3, 50, (8,), generator=torch.Generator().manual_seed(i))} for i in range(16)]
    for at in ("blocks", ["model"]):
        model = quantized(weights="int2")
        fit_correction(model, tiny_models.build("llama"), rows, CatConfig(num_clusters=2, alpha=1.0, at=at))
        sites = {"layers.0", "layers.1"} if at == "blocks" else {""}
        assert set(corrections(saved_and_loaded(model.model, tmp_path / str(len(sites))))) == sites


def test_an_encoder_and_a_decoder(tmp_path: Path):
    encoder = quantized("bert")
    decoder = tf.BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))
    quantize(decoder, CatQuantConfig(**{**RTN, "weights": "ternary"}))
    wanted = answer(encoder)
    model = tf.EncoderDecoderModel(encoder=encoder.bert, decoder=decoder)
    again = saved_and_loaded(model, tmp_path / "pair")
    stored = json.loads((tmp_path / "pair" / "config.json").read_text())
    assert not any("quantization_config" in stored[part] for part in ("encoder", "decoder"))
    said = report(again)
    assert {layer.weights for layer in said.layers} == {"int4", "ternary", "int8"}
    assert None not in [layer.error for layer in said.layers if layer.tied_to is None]
    assert any("quantized by 2 requests" in note for note in said.notes)
    saved_and_loaded(again.encoder, tmp_path / "taken out")
    assert torch.equal(answer(saved_and_loaded(encoder, tmp_path / "encoder")), wanted)
    assert not quantized_modules(again.dequantize())
    assert torch.allclose(answer(again), answer(model), atol=1e-5)
    assert getattr(again, "hf_quantizer", None) is None
    again.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())


def test_a_class_of_ones_own(tmp_path: Path):
    model = Around(bert_config())
    quantize(model.trunk, CatQuantConfig(**RTN))
    saved_and_loaded(model, tmp_path / "around", state_dict=model.state_dict())  # no module is asked for its tensors
    saved_and_loaded(model.trunk, tmp_path / "trunk")


def test_a_model_inside_a_plain_module(tmp_path: Path):
    plain = nn.ModuleDict({"bert": tf.BertModel(bert_config()).eval()}).eval()
    quantize(plain, CatQuantConfig(**RTN))
    saved_and_loaded(plain["bert"], tmp_path / "bert")


def test_layers_that_nobody_knows_are_not_saved(tmp_path: Path):
    """What an interrupted run leaves, for one."""
    model = tiny_models.build("llama")
    model.lm_head = layer_for(model.lm_head)(model.lm_head, Scheme("int4", 16))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not whole: lm_head is packed, but quantizing was not"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_without_packed_layers_have_no_quantizer(tmp_path: Path):
    model, own = tiny_models.build("bert"), HfQuantizer.__new__(tf.quantizers.auto.AUTO_QUANTIZER_MAPPING["sinq"])
    assert not hasattr(model, "hf_quantizer")
    with pytest.raises(AttributeError, match="has no attribute 'hf_quantizer'"):
        _ = model.hf_quantizer
    with pytest.raises(ValueError, match="need to first quantize"):
        model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    model.hf_quantizer = own  # what transformers sets goes before
    assert model.hf_quantizer is own
    del model.hf_quantizer
    assert not hasattr(model, "hf_quantizer")


def test_a_dequantized_part_leaves_a_whole_that_loads(tmp_path: Path):
    model = quantized()
    wanted = answer(model)
    model.model.dequantize()
    assert list(quantized_modules(model)) == ["lm_head"]
    model.model.save_pretrained(tmp_path / "float")
    assert not quantized_modules(type(model.model).from_pretrained(tmp_path / "float"))
    assert torch.allclose(answer(model), wanted, atol=1e-5)
    saved_and_loaded(model, tmp_path / "whole")


def test_a_given_state_dict_is_what_is_saved(tmp_path: Path):
    model = quantized()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] *= 2  # trained elsewhere
    model.save_pretrained(tmp_path, state_dict=state)
    assert verify(tmp_path).is_whole
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, 2 * model.model.norm.weight)
    model.save_pretrained(tmp_path, state_dict=load_file(tmp_path / "model.safetensors"))  # with its one-byte tensors
    assert torch.equal(type(model).from_pretrained(tmp_path).model.norm.weight, again.model.norm.weight)


def test_a_given_state_dict_that_is_the_models_changes_nothing(tmp_path: Path):
    model = quantized("llama_tied", modules_to_not_convert=["lm_head"])
    model.save_pretrained(tmp_path / "one")
    state = model.state_dict()
    model.save_pretrained(tmp_path / "two", state_dict=state)
    state = model.state_dict()
    del state["lm_head.weight"]  # tied, and left out of files anyway
    model.save_pretrained(tmp_path / "three", state_dict=state)
    for file in ("config.json", "model.safetensors"):
        first, second, third = ((tmp_path / each / file).read_bytes() for each in ("one", "two", "three"))
        assert first == second == third


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "it lacks model.norm.weight, without which"),
        (lambda state: state.clear(), r"it lacks model.embed_tokens.weight_packed, .* \.\.\."),
        (lambda state: state.update(x=torch.zeros(1)), "it has x, which the model does not have"),
        (lambda state: state["lm_head.weight_packed"].add_(1), "differ in the shape, .* lm_head.weight_packed"),
        (lambda state: state.update({"model.norm.weight": torch.ones(3)}), "differ in the shape, .*model.norm.weight"),
    ],
)
def test_a_state_dict_of_another_model_is_refused(change, message: str, tmp_path: Path):
    model = quantized()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=rf"state_dict must be one of this LlamaForCausalLM.* {message}"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())


def test_what_a_load_would_refuse_is_not_saved(tmp_path: Path):
    model = quantized()
    model.lm_head.weight_scale[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lm_head: weight_scale has values that are not finite: a checkpoint of"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="distributed_checkpoint must be False for a quantized model"):
        quantized().save_pretrained(tmp_path, distributed_checkpoint=True)
    assert not list(tmp_path.iterdir())


def test_state_dicts_have_no_one_byte_tensors(tmp_path: Path):
    """They are for files of transformers alone: ``torch.save`` of a state dict, of a part too, is as before."""
    model = quantized()
    model.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    torch.save(model.model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert names - set(state) == {f"{name}.weight" for name in quantized_modules(model.model)}
    quantized().model.load_state_dict(state)


def test_configs_are_as_they_were_after_a_part_or_a_model_around_one_was_saved(tmp_path):
    whole = quantized("clip")
    before, own = whole.config.to_dict(), whole.config
    whole.text_model.save_pretrained(tmp_path / "part")
    assert whole.config is own
    assert whole.text_model.config is own.text_config
    assert whole.config.to_dict() == before
    whole.dequantize().save_pretrained(tmp_path / "float")
    tf.CLIPModel.from_pretrained(tmp_path / "float")  # nothing in it speaks of packed weights

    llama = quantized("llama")
    entries = llama.config.quantization_config
    llama.model.save_pretrained(tmp_path / "decoder")
    assert llama.config.quantization_config is entries
    assert type(llama.model.config) is tf.LlamaConfig


def test_a_rank_that_writes_no_config_changes_none(tmp_path):
    whole = quantized("llama")
    own = whole.config
    whole.model.save_pretrained(tmp_path, is_main_process=False)
    assert whole.model.config is whole.config is own
    whole.config.output_hidden_states = True
    pickle.loads(pickle.dumps(whole))
    assert whole(IDS).hidden_states is not None


def test_parts_of_another_method_are_refused(tmp_path):
    """One checkpoint has one method: the weights of the other would be lost."""
    model = quantized("clip")
    other = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="another"))
    model.vision_model.hf_quantizer = other
    around = tiny_models.build("clip")
    around.text_model, around.vision_model = model.text_model, model.vision_model
    with pytest.raises(ValueError, match=r"vision_model was quantized by another, and a checkpoint has one method"):
        around.save_pretrained(tmp_path)
    fresh = tiny_models.build("llama")
    fresh.hf_quantizer = other
    with pytest.raises(ValueError, match="LlamaForCausalLM was quantized by another"):
        quantize(fresh, CatQuantConfig(solver="rtn", correction=None, group_size=16))


def test_a_dequantized_whole_leaves_no_quantized_part(tmp_path):
    whole = tiny_models.build("llama")
    quantize(whole.model, CatQuantConfig(**RTN))
    whole.dequantize()
    assert not hasattr(whole.model, "hf_quantizer")
    whole.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    tf.LlamaModel.from_pretrained(tmp_path)


def test_other_names_of_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save_original_format must be True"):
        quantized("llama").save_pretrained(tmp_path, save_original_format=False)
