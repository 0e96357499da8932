"""The transformers path around the round trip: classes, devices, dtypes, ties, heads, and what people do with a model."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import tiny_models
from helpers import global_rng_untouched, slow
from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.layers import QuantizedModule
from hf_catquant.layers.embedding import QuantizedEmbedding
from hf_catquant.layers.linear import QuantizedLinear
from hf_catquant.packed_model import quantized_modules

DATA_FREE = {"weights": "ternary", "group_size": 16, "solver": "rtn", "correction": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("float"))


def load(name: str, root: str, auto=None, **options):
    cls = auto or type(tiny_models.build(name))
    config = options.pop("quantization_config", None) or CatQuantConfig(**DATA_FREE)
    return cls.from_pretrained(tiny_models.folder_of(name, root), quantization_config=config, **options)


@torch.no_grad()
def output(model, name: str) -> torch.Tensor:
    return tiny_models.main_output(model(**tiny_models.batch(name)))


def calibrated(name: str, **fields) -> CatQuantConfig:
    defaults = {"weights": "ternary", "group_size": 16, "batch_size": 4, "dataset": tiny_models.samples(name)}
    return CatQuantConfig(**{**defaults, **fields})


def test_auto_class_dict_config_and_concrete_class_agree(root):
    outputs = [
        output(load("bert", root), "bert"),
        output(load("bert", root, auto=tf.AutoModelForSequenceClassification), "bert"),
        output(load("bert", root, quantization_config={"quant_method": "catquant", **DATA_FREE}), "bert"),
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_device_maps(device_map, root, tmp_path):
    model = load("bert", root, device_map=device_map)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(output(model, "bert"), output(reloaded, "bert"))


def test_quantizing_over_several_devices_is_refused(root):
    with pytest.raises(ValueError, match="whole model on one device"):
        load("bert", root, device_map={"bert": "cpu", "classifier": "disk"}, offload_folder=root)


def test_sharded_save(root, tmp_path):
    model = load("bert", root)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output(model, "bert"), output(type(model).from_pretrained(tmp_path), "bert"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, root, tmp_path):
    model = load("llama_tied", root, quantization_config=calibrated("llama_tied"), dtype=dtype)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.dtype == dtype
    assert torch.equal(output(model, "llama_tied"), output(reloaded, "llama_tied"))
    scales = {m.weight_scale.dtype for m in quantized_modules(reloaded).values()}
    assert scales <= {torch.float16, torch.float32}
    as_float = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    for name, module in quantized_modules(as_float).items():
        assert torch.equal(module.weight_scale, model.get_submodule(name).weight_scale)
        assert module.weight.dtype == torch.float32


def test_tied_head_is_stored_once(root, tmp_path):
    model = load("llama_tied", root)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    for m in (model, reloaded):
        assert m.lm_head.weight_packed.data_ptr() == m.model.embed_tokens.weight_packed.data_ptr()
    from hf_catquant.integrity import file_checksums

    assert not any("lm_head" in name for name in file_checksums(tmp_path / "model.safetensors"))
    assert isinstance(reloaded.model.embed_tokens, QuantizedEmbedding)


def test_a_task_model_from_a_base_gets_a_fresh_float_head(root, tmp_path):
    base = load("bert", root, auto=tf.BertModel)
    base.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(model.classifier) is nn.Linear
    assert 0.005 < float(model.classifier.weight.detach().std()) < 0.05
    ids = tiny_models.batch("bert")
    with torch.no_grad():
        assert torch.equal(model.bert(**ids)[0], base(**ids)[0])
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, QuantizedLinear)
    model.save_pretrained(tmp_path / "task")
    again = type(model).from_pretrained(tmp_path / "task")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, again(**ids).logits)


def test_a_base_model_from_a_task_model(root, tmp_path):
    model = load("bert", root)
    model.save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path)
    ids = tiny_models.batch("bert")
    with torch.no_grad():
        assert torch.equal(base(**ids)[0], model.bert(**ids)[0])


def test_skips_overrides_and_patterns(root):
    fields = {**DATA_FREE, "modules_to_not_convert": ["classifier"], "overrides": {r"layer\.1": {"weights": "int4"}}}
    model = load("bert", root, quantization_config=CatQuantConfig(**fields))
    assert type(model.classifier) is nn.Linear
    formats = {name: m.scheme.weights for name, m in quantized_modules(model).items()}
    assert formats["bert.encoder.layer.1.output.dense"] == "int4"
    assert formats["bert.encoder.layer.0.output.dense"] == "ternary"
    assert formats["bert.embeddings.word_embeddings"] == "int8"
    assert report(model).skipped["classifier"] == "listed in modules_to_not_convert"
    for field, value in (("modules_to_not_convert", ["nowhere"]), ("overrides", {"nowhere": {"weights": "int4"}})):
        with pytest.raises(ValueError, match=f"{field}: 'nowhere' matches no module"):
            load("bert", root, quantization_config=CatQuantConfig(**{**DATA_FREE, field: value}))
    with pytest.raises(ValueError, match=r"strict=True, but these would stay in float: .*position_embeddings"):
        load("vit", root, quantization_config=CatQuantConfig(**DATA_FREE, strict=True))


def test_a_module_that_is_skipped_is_skipped_with_all_it_holds(root):
    model = load("llama_tied", root, quantization_config=CatQuantConfig(**DATA_FREE, modules_to_not_convert=["mlp"]))
    skipped = report(model).skipped
    inside = [name for name, module in model.named_modules() if ".mlp." in name and isinstance(module, nn.Linear)]
    assert inside
    assert {name: skipped[name] for name in inside} == dict.fromkeys(inside, "listed in modules_to_not_convert")
    assert not any(".mlp." in layer.name for layer in report(model).layers)


def test_dequantize_keeps_the_outputs(root):
    for name in ("bert", "gpt2", "resnet", "llama_tied"):
        model = load(name, root)
        expected = output(model, name)
        plain = model.dequantize()
        assert not quantized_modules(plain)
        assert not getattr(plain.config, "quantization_config", None)
        torch.testing.assert_close(output(plain, name), expected, rtol=1e-5, atol=1e-5)


def test_dequantized_models_save_and_load_as_plain_ones(root, tmp_path):
    plain = load("llama_tied", root).dequantize()
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(output(plain, "llama_tied"), output(again, "llama_tied"))


def test_footprint_copies_and_pickles(root):
    model = load("bert", root)
    assert model.get_memory_footprint() < tiny_models.build("bert").get_memory_footprint() / 2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, "bert"), output(model, "bert"))


def test_generate(root):
    model = load("llama_tied", root)
    ids = tiny_models.batch("llama_tied")["input_ids"]
    torch.manual_seed(0)
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > ids.shape[1]


def test_pipeline_with_model_kwargs(root, tmp_path):
    folder = tiny_models.folder_of("vit", root)
    processor = tf.ViTImageProcessor(size={"height": 16, "width": 16})
    kwargs = {"quantization_config": CatQuantConfig(**DATA_FREE)}
    pipe = tf.pipeline("image-classification", model=folder, image_processor=processor, model_kwargs=kwargs)
    assert quantized_modules(pipe.model)
    from PIL import Image

    assert len(pipe(Image.new("RGB", (16, 16)))) == 5


def test_trainer_evaluates(root, tmp_path):
    model = load("bert", root)
    rows = [{**row, "labels": torch.tensor(i % 5)} for i, row in enumerate(tiny_models.samples("bert"))]
    arguments = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    scores = tf.Trainer(model, arguments, eval_dataset=rows).evaluate()
    assert scores["eval_loss"] > 0


def test_gradients_reach_inputs_and_biases(root):
    model = load("bert", root)
    batch = tiny_models.batch("bert")
    embedded = model.bert.embeddings(input_ids=batch["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits.sum().backward()
    assert float(embedded.grad.abs().sum()) > 0
    assert float(model.classifier.bias.grad.abs().sum()) > 0


def test_quantize_in_memory_saves_like_on_load(root, tmp_path):
    model = tiny_models.build("resnet").train()
    assert quantize(model, calibrated("resnet")) is model
    assert model.training
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(output(model, "resnet"), output(type(model).from_pretrained(tmp_path), "resnet"))
    on_load = load("resnet", root, quantization_config=calibrated("resnet"))
    assert torch.equal(output(model, "resnet"), output(on_load, "resnet"))
    with pytest.raises(ValueError, match="already quantized"):
        quantize(model, calibrated("resnet"))


def test_plain_torch_module():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    rows = [torch.randn(3, 8, 8) for _ in range(20)]
    quantize(model, CatQuantConfig(weights="int4", group_size=16, dataset=rows, batch_size=4))
    assert all(isinstance(model[i], QuantizedModule) for i in (0, 3))
    assert report(model).coverage == 100 * (216 + 2880) / (216 + 2880 + 18)


def test_the_request_and_the_global_generator_stay_as_they_are(root):
    def rows():
        yield from tiny_models.samples("bert")

    config = calibrated("bert", dataset=rows())
    before = config.to_dict()
    with global_rng_untouched():
        model = load("bert", root, auto=tf.AutoModelForSequenceClassification, quantization_config=config)
    assert config.to_dict() == before
    stored = model.config.quantization_config
    assert stored.dataset is None
    assert stored.provenance["calibration"]["num_samples"] == 12
    json.dumps(model.config.to_dict())
    assert "CatQuantConfig" in repr(stored)


def test_the_same_request_gives_the_same_file(root, tmp_path):
    for part in ("a", "b"):
        load("vit", root, quantization_config=calibrated("vit")).save_pretrained(tmp_path / part)
    first, second = (Path(tmp_path / part / "model.safetensors").read_bytes() for part in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("name", ["resnet", "vit", "wav2vec2"])
def test_activations(name, activations, root, tmp_path):
    model = load(name, root, quantization_config=calibrated(name, activations=activations, weights="int4"))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(model, name), output(type(model).from_pretrained(tmp_path), name))
    schemes = {
        m.scheme.activations for m in quantized_modules(model).values() if not isinstance(m, QuantizedEmbedding)
    }
    assert activations in schemes
    if name == "resnet":
        with pytest.raises(ValueError, match="have a calibrated range, but dataset is None"):
            load(name, root, quantization_config=CatQuantConfig(**{**DATA_FREE, "activations": activations}))


@pytest.mark.parametrize("name", ["vit", *slow("bert"), "llama_tied"])
def test_compile_and_export(name, root):
    model = load(name, root, quantization_config=calibrated(name, correction={"num_clusters": 2, "alpha": 0.5}))
    batch = tiny_models.batch(name)
    expected = output(model, name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tiny_models.main_output(compiled(**batch)), expected, rtol=1e-5, atol=1e-5)
        options = {"use_cache": False} if "llama" in name else {}
        exported = torch.export.export(model, (), {**batch, **options}, strict=False)
        actual = exported.module()(**batch, **options)
    assert any("catquant" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(tiny_models.main_output(actual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "resnet"])
@torch.no_grad()
def test_inductor(name, root):
    model = load(name, root, quantization_config=calibrated(name))
    compiled = torch.compile(model, fullgraph=True)
    actual = tiny_models.main_output(compiled(**tiny_models.batch(name)))
    torch.testing.assert_close(actual, output(model, name), rtol=1e-4, atol=1e-4)


def test_loading_without_modules_is_refused(root, tmp_path):
    folder = tiny_models.folder_of("bert", root)
    config = tf.AutoConfig.from_pretrained(folder)
    config.quantization_config = CatQuantConfig(**DATA_FREE).to_dict()
    with pytest.raises(ValueError, match="has no 'modules'"):
        tf.AutoModel.from_pretrained(folder, config=config)


@pytest.mark.parametrize("number", [10**12, 3e9])
def test_a_config_of_endless_classes_is_refused_before_their_names_are_written(root, tmp_path, number):
    model = quantize(tiny_models.build("bert"), CatQuantConfig(**DATA_FREE))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"num_labels": number}))
    for kind in (tf.AutoConfig, tf.AutoModelForSequenceClassification, tf.BertModel):
        with pytest.raises(ValueError, match=r"config.json: num_labels must be at most 131072 .*, got "):
            kind.from_pretrained(tmp_path)
    del fields["quantization_config"]
    path.write_text(json.dumps(fields | {"num_labels": 200_000}))  # of others nothing is asked
    assert tf.AutoConfig.from_pretrained(tmp_path).num_labels == 200_000


def test_register_twice_changes_nothing():
    from hf_catquant.registration import register

    read = vars(tf.PretrainedConfig)["get_config_dict"]
    register()
    assert vars(tf.PretrainedConfig)["get_config_dict"] is read
    assert tf.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["catquant"] is CatQuantConfig
