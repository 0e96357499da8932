"""Corrections on whole models: where they sit, plain torch, our own models, and models that bitsandbytes quantized."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers as tf
from torch import nn

import tiny_models
from helpers import global_rng_untouched, slow
from hf_catquant import CatConfig, CatQuantConfig, fit_correction, load_correction, quantize, report, save_correction
from hf_catquant.correction import corrections, detach
from hf_catquant.fitting import correction_dim

FIXED = CatConfig(num_clusters=1, alpha=1.0, shrinkage=1.0)


def plain_pair() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[2].weight.mul_(0.4)
        model[2].bias.add_(torch.linspace(-1, 1, 5))
    return model, teacher, [torch.randn(6) for _ in range(200)]


def distance(model: nn.Module, teacher: nn.Module, rows: list[torch.Tensor]) -> float:
    with torch.no_grad():
        x = torch.stack(rows)
        return float((model(x) - teacher(x)).square().mean())


@pytest.mark.parametrize(
    ("module", "shape", "dim"),
    [
        (nn.Conv1d(4, 8, 1), (2, 8, 5), 1),
        (nn.Conv1d(4, 8, 1), (2, 8, 8), 1),
        (nn.Linear(4, 8), (2, 8, 8), -1),
        # A Conformer's block: as many steps as a convolution inside has channels are no map.
        (nn.Sequential(nn.Conv1d(8, 16, 1), nn.Linear(16, 8)), (2, 16, 8), -1),
        (nn.Sequential(nn.Conv1d(8, 16, 1), nn.Linear(16, 8)), (2, 5, 8), -1),
        # ConvNeXt's: linears inside, and a map as wide as they are.
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 16)), (2, 8, 16, 16), 1),
        (nn.Conv2d(4, 8, 1), (2, 8), -1),
    ],
)
def test_features_are_found_by_what_layers_return(module, shape, dim):
    assert correction_dim(module, torch.zeros(shape)) == dim


@pytest.mark.parametrize(
    ("name", "place", "solver"),
    [("llama", "model.norm", "gptq"), ("bert", "bert.encoder", "gptq"), ("bert", "blocks", "reconstruct")],
)
def test_a_correction_outside_finished_units_is_fitted_to_what_float_returns(name, place, solver):
    rows, test = tiny_models.samples(name, 32), tiny_models.samples(name, 16, seed=5)
    batch = {key: torch.stack([row[key] for row in test]) for key in test[0]}
    options = {"solver_options": {"block_steps": 0, "model_steps": 1}} if solver == "reconstruct" else {}
    fields = {"weights": "int4", "group_size": 16, "rotation": None, "dataset": rows, "batch_size": 8, **options}
    errors = []
    for correction in (None, CatConfig(num_clusters=1, alpha=1.0, at=place)):
        model = quantize(tiny_models.build(name), CatQuantConfig(solver=solver, correction=correction, **fields))
        with torch.no_grad():
            found, wanted = (tiny_models.main_output(m(**batch)) for m in (model, tiny_models.build(name)))
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert bool(corrections(model))
    assert errors[1] < 1.3 * errors[0]


def test_plain_torch_modules():
    model, teacher, rows = plain_pair()
    before = distance(model, teacher, rows[100:])
    report = fit_correction(model, teacher, rows[:100])
    assert list(report) == ["2"]
    assert report["2"]["gain_low"] > 0
    assert distance(model, teacher, rows[100:]) < 0.3 * before
    assert model.training
    assert teacher.training


def test_named_sites_and_unknown_ones():
    model, teacher, rows = plain_pair()
    report = fit_correction(model, teacher, rows, CatConfig(num_clusters=1, alpha=1.0, at=["0", "logits"]))
    assert list(report) == ["0", "2"]
    with pytest.raises(ValueError, match="CatConfig\\(at='nowhere'\\): no module has this name"):
        fit_correction(model, teacher, rows, CatConfig(at="nowhere"))
    with pytest.raises(
        ValueError, match=r"dataset is empty: pass samples$"
    ):  # nothing of solvers, which are not at work
        fit_correction(model, teacher, [])
    with pytest.raises(ValueError, match="Sequential has no repeated blocks"):
        fit_correction(model, teacher, rows, CatConfig(at="blocks"))


class Twice(nn.Module):
    """Runs its blocks twice in a forward, as ALBERT runs one many times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("solver", ["gptq", *slow("reconstruct")])
def test_what_runs_several_times_has_no_correction(solver):
    """A fit sees one run, and the correction would act on all of them."""
    torch.manual_seed(0)
    teacher, rows = Twice().eval(), list(torch.randn(64, 8))
    fields = {"weights": "int2", "group_size": 8, "solver": solver, "dataset": [{"x": row} for row in rows]}
    fields["solver_options"] = {"block_steps": 1, "model_steps": 1} if solver == "reconstruct" else {}
    both = CatConfig(1, alpha=1.0, at=("blocks", "logits"))
    model = quantize(copy.deepcopy(teacher), CatQuantConfig(correction=both, **fields))
    assert list(corrections(model)) == ["head"]
    notes = [
        note for note in report(model).notes if note.startswith("correction at layers.1: off, the model runs it 2 ")
    ]
    assert len(notes) == 1
    with pytest.raises(ValueError, match=r"strict=True, but correction at layers\.0: off, the model runs it 2 times"):
        quantize(copy.deepcopy(teacher), CatQuantConfig(correction=both, strict=True, **fields))
    named = CatConfig(1, alpha=1.0, at="layers.0.1")
    with pytest.raises(ValueError, match=r"no correction at layers\.0\.1: the model runs it 2 times in a forward"):
        quantize(copy.deepcopy(teacher), CatQuantConfig(correction=named, **fields))
    with pytest.raises(ValueError, match=r"no correction at layers\.0\.1: the model runs it 2 times in a forward"):
        fit_correction(model, teacher, rows, named)
    assert list(corrections(model)) == ["head"]


def test_a_module_that_never_runs_is_refused_before_anything_is_quantized(caplog):
    """A list of layers holds modules that run and is none: it used to end in an IndexError after all layers were solved."""
    torch.manual_seed(0)
    teacher, rows = Twice().eval(), list(torch.randn(16, 8))
    named = CatConfig(1, alpha=1.0, at="layers")
    config = CatQuantConfig("int2", 8, dataset=[{"x": row} for row in rows], correction=named)
    with pytest.raises(ValueError, match=r"CatConfig\(at='layers'\): the model does not run this module on the cal"):
        quantize(copy.deepcopy(teacher), config)
    assert "layers.0" not in caplog.text
    with pytest.raises(ValueError, match=r"CatConfig\(at='layers'\): the model does not run this module on the cal"):
        fit_correction(copy.deepcopy(teacher), teacher, rows, named)


def test_counts_of_samples_are_integers():
    model, teacher, rows = plain_pair()
    with pytest.raises(ValueError, match=r"num_samples must be an integer of at least 2, got '5'"):
        fit_correction(model, teacher, rows, FIXED, num_samples="5")
    with pytest.raises(ValueError, match=r"batch_size must be an integer of at least 1, got 2\.5"):
        fit_correction(model, teacher, rows, FIXED, batch_size=2.5)


def test_a_seed_has_32_bits():
    model, teacher, rows = plain_pair()
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*32 - 1, got 18446744073709551616"):
        fit_correction(model, teacher, rows, FIXED, seed=1 << 64)


def test_modules_keep_their_own_mode_and_no_global_generator_moves():
    model, teacher, rows = plain_pair()
    model[1].eval()
    teacher.eval()
    with global_rng_untouched():
        fit_correction(model, teacher, rows, FIXED)
    assert [model.training, model[0].training, model[1].training, teacher.training] == [True, True, False, False]


def test_a_second_fit_replaces_the_first():
    model, teacher, rows = plain_pair()
    fit_correction(model, teacher, rows, FIXED)
    once = copy.deepcopy(model)
    fit_correction(model, teacher, rows, FIXED)
    x = torch.stack(rows)
    assert distance(model, teacher, rows) < 1e-4
    assert torch.equal(model(x), once(x))  # and not the correction of what the first one left


def test_a_fit_that_fails_leaves_the_model_as_it_was():
    model, teacher, rows = plain_pair()
    fit_correction(model, teacher, rows, FIXED)
    expected = model(torch.stack(rows))
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken[2].bias[0] = float("nan")
    both = CatConfig(num_clusters=1, alpha=1.0, at=("0", "2"))
    with pytest.raises(ValueError, match="the teacher outputs have values that are not finite"):
        fit_correction(model, broken, rows, both)
    assert list(corrections(model)) == ["2"]
    assert torch.equal(model(torch.stack(rows)), expected)


class Wrapped(nn.Module):
    """A model whose modules have other names than the teacher's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_modules_of_model_and_teacher_are_named_alike():
    model, teacher, rows = plain_pair()
    with pytest.raises(ValueError, match="Wrapped has no module '2', which its float model has"):
        fit_correction(Wrapped(model), teacher, rows)
    with pytest.raises(ValueError, match=r"the teacher Sequential has no module 'inner\.2'"):
        fit_correction(Wrapped(model), teacher, rows, CatConfig(at="inner.2"))


def test_a_model_without_a_parameter_left():
    teacher = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False))
    model = copy.deepcopy(teacher)
    everything = {".*": {"weights": "ternary"}}
    quantize(
        model, CatQuantConfig(weights="ternary", group_size=8, solver="rtn", correction=None, overrides=everything)
    )
    assert not list(model.parameters())
    rows = [torch.randn(16) for _ in range(200)]
    before = distance(model, teacher, rows)
    fit_correction(model, teacher, rows, FIXED)
    assert distance(model, teacher, rows) < before


@pytest.mark.parametrize("place", ["logits", "blocks", "bert.pooler"])
def test_our_own_quantized_model(place):
    """A correction fitted afterwards, on a model that was quantized without one: closer to the teacher on new rows."""
    teacher, model = tiny_models.build("bert"), tiny_models.build("bert")
    quantize(model, CatQuantConfig(weights="int2", group_size=16, solver="rtn", correction=None))
    new = {key: torch.stack([row[key] for row in tiny_models.samples("bert", 64, seed=7)]) for key in ("input_ids",)}

    def error() -> float:
        with torch.no_grad():
            return float((model(**new).logits - teacher(**new).logits).square().mean())

    before = error()
    config = CatConfig(num_clusters=1, alpha=1.0, at=place)
    report = fit_correction(model, teacher, tiny_models.samples("bert", 128), config)
    expected = {"logits": ["classifier"], "blocks": [f"bert.encoder.layer.{i}" for i in (0, 1)]}
    assert list(report) == list(corrections(model)) == expected.get(place, [place])
    assert error() < before


@pytest.mark.parametrize(("name", "count", "dim"), [("bert", 2, -1), ("resnet", 4, 1), ("vit", 2, -1)])
def test_every_block(name, count, dim):
    model = tiny_models.build(name)
    config = CatConfig(num_clusters=1, alpha=1.0, at="blocks")
    request = CatQuantConfig(weights="ternary", group_size=16, correction=config, dataset=tiny_models.samples(name))
    quantize(model, request)
    found = corrections(model)
    assert len(found) == count
    assert {correction.dim for correction in found.values()} == {dim}


@pytest.mark.parametrize(("name", "place"), [("bert", "bert.encoder.layer.1"), ("llama", "logits")])
def test_padding_does_not_change_a_fit(name, place):
    teacher = tiny_models.build(name)
    rows = tiny_models.samples(name, 24)
    hit = {"bert": "bert.encoder.layer.0.output.dense", "llama": "model.layers.0.mlp.down_proj"}[name]
    found = []
    for token in (5, 90):  # what stands in the padded places must not matter
        padded = []
        for row in rows:
            ids, mask = row["input_ids"].clone(), row["attention_mask"].clone()
            ids[7:], mask[7:] = token, 0
            padded.append({"input_ids": ids, "attention_mask": mask})
        model = tiny_models.build(name)
        with torch.no_grad():
            model.get_submodule(hit).weight.mul_(0.5)
        report = fit_correction(model, teacher, padded, CatConfig(num_clusters=1, alpha=1.0, shrinkage=1.0, at=place))
        assert [fitted["rows"] for fitted in report.values()] == [24 * 7]
        (correction,) = corrections(model).values()
        found.append(correction)
    torch.testing.assert_close(found[0].beta, found[1].beta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0].gamma, found[1].gamma, rtol=1e-4, atol=1e-5)


@cache
def why_no_bnb(kind: str) -> str | None:
    """Why bitsandbytes' own layer does not run on this CPU, asked of it alone; None if it runs."""
    bnb = pytest.importorskip("bitsandbytes")
    layer: nn.Module = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    try:
        with torch.no_grad():
            layer.to("cpu")(torch.ones(2, 64))
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        return f"bitsandbytes {bnb.__version__} does not run {kind} on this CPU: {error}"
    return None


def bnb_config(kind: str):
    from transformers import BitsAndBytesConfig

    reason = why_no_bnb(kind)
    if reason is not None:
        pytest.skip(reason)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "lm_head"],  # its CPU kernel wants whole blocks of outputs, too
    )


def wide(name: str) -> tf.PreTrainedModel:
    """bitsandbytes' CPU kernel wants whole blocks of 64 columns."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny_models.LLAMA, **sizes})).eval()
        return tf.BertForSequenceClassification(tf.BertConfig(**{**tiny_models.TEXT, **sizes})).eval()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bitsandbytes_models(name, kind, tmp_path):
    teacher = wide(name)
    teacher.save_pretrained(tmp_path / "float")

    def quantized() -> nn.Module:
        options = {"quantization_config": bnb_config(kind), "device_map": "cpu", "dtype": torch.float32}
        return type(teacher).from_pretrained(tmp_path / "float", **options)

    model = quantized()
    layer = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]
    assert (
        sum(type(module).__name__ == layer for module in model.modules()) >= 12
    )  # six or seven in each of two blocks
    report = fit_correction(model, teacher, tiny_models.samples(name, 40), FIXED)
    (site,) = report
    batch = tiny_models.batch(name)
    with torch.no_grad():
        corrected = model(**batch).logits
        save_correction(model, tmp_path)
        again = quantized()
        load_correction(again, tmp_path)
        assert torch.equal(again(**batch).logits, corrected)
        detach(model, site)
        assert not torch.equal(model(**batch).logits, corrected)


def test_a_correction_of_a_later_day_is_saved(tmp_path):
    """Fitted, fitted again with other sizes, and taken off after quantizing: a save holds what sits on the model."""
    teacher, model = tiny_models.build("bert"), tiny_models.build("bert")
    quantize(model, CatQuantConfig(weights="int2", group_size=16, solver="rtn", correction=None))
    batch = tiny_models.batch("bert")
    for step, clusters in enumerate((2, 3, None)):
        if clusters is None:
            detach(model, "classifier")
        else:
            config = CatConfig(num_clusters=clusters, alpha=1.0, shrinkage=1.0)
            fit_correction(model, teacher, tiny_models.samples("bert", 64), config)
        model.save_pretrained(tmp_path / str(step))
        again = type(model).from_pretrained(tmp_path / str(step))
        assert list(corrections(again)) == list(corrections(model)) == ([] if clusters is None else ["classifier"])
        assert torch.equal(again(**batch).logits, model(**batch).logits)
