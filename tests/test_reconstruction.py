"""``solver="reconstruct"``: closer to the float model than gptq on new data, the same twice, and whole when it is done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tiny_models
from helpers import slow
from hf_catquant import CatQuantConfig, quantize, report
from hf_catquant.correction import corrections
from hf_catquant.fitting import Pairs
from hf_catquant.learned import LearnedLayer
from hf_catquant.packed_model import quantized_modules
from hf_catquant.reconstruction import Reconstruction
from hf_catquant.solvers.reconstruct import Options
from hf_catquant.training import set_apart

FEW = {"block_steps": 60, "model_steps": 40}


def request(name: str, count: int = 64, **fields: Any) -> CatQuantConfig:
    defaults = {"weights": "ternary", "group_size": 16, "correction": None, "batch_size": 4}
    return CatQuantConfig(**{**defaults, "dataset": tiny_models.samples(name, count), "num_samples": count, **fields})


def build(name: str) -> nn.Module:
    """A tiny model whose blocks do something: at their initial size they hardly change what passes through."""
    model = tiny_models.build(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight *= 5 if name != "resnet" else 1
    return model


def quantized(name: str, **fields: Any) -> nn.Module:
    return quantize(build(name), request(name, **fields))


def apart(name: str) -> list[dict[str, Tensor]]:
    """The 64 samples that are asked for by default: those that are learned from, and those that are kept."""
    rows = tiny_models.samples(name, 64)
    size = request(name).batch_size
    given = [
        {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in rows[0]}
        for start in range(0, 64, size)
    ]
    batches, kept = set_apart(given, 0)
    parts = batches[: kept.start], batches[kept.start :]
    return [{key: torch.cat([batch[key] for batch in part]) for key in part[0]} for part in parts]


@torch.no_grad()
def error(model: nn.Module, name: str) -> float:
    """Relative squared error of the answers to samples that were never seen."""
    rows = tiny_models.samples(name, 32, seed=9)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    expected, found = (tiny_models.main_output(m(**batch)) for m in (build(name), model))
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("name", [*slow("bert", "vit"), "llama"])
def test_closer_to_the_float_model_than_its_start(name):
    start, learned = start_and_learned(name, model_steps=160)
    assert learned < 0.95 * start


@pytest.mark.parametrize("name", ["t5", "wav2vec2", *slow("whisper", "gpt2", "clip", "mobilenet_v2")])
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
def test_runs_on_any_architecture(name, dtype):
    model = build(name).to(dtype)
    options = {"block_steps": 3, "model_steps": 3}
    quantize(model, request(name, count=32, solver="reconstruct", solver_options=options, correction="cat"))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_models.batch(name).items()}
    assert torch.isfinite(tiny_models.main_output(model(**inputs))).all()


@pytest.mark.parametrize("name", ["vit", *slow("resnet")])
def test_activations_of_few_bits(name):
    """On average: which samples a seed keeps from learning moves a single result by more than learning does."""
    pairs = [start_and_learned(name, weights="int4", activations="int3", seed=seed) for seed in range(4)]
    starts, learned = zip(*pairs, strict=True)
    assert sum(learned) < sum(starts)


def start_and_learned(name: str, model_steps: int = 80, **fields: Any) -> tuple[float, float]:
    """Errors of what the solver found, and of what was learned from there on the same batches."""
    more = {"block_steps": 160, "model_steps": model_steps, "code_rate": 0.01}
    none = {"block_steps": 0, "model_steps": 0}
    fields |= {"count": 256, "batch_size": 8, "solver": "reconstruct"}
    start, learned = (error(quantized(name, solver_options=options, **fields), name) for options in (none, more))
    return start, learned


def test_the_same_twice_and_packed_when_done():
    states = []
    for _ in range(2):
        model = quantized("bert", solver="reconstruct", solver_options={"block_steps": 12, "model_steps": 8})
        assert not any(isinstance(m, LearnedLayer) for m in model.modules())
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_parameters_can_still_be_trained_and_others_stay_frozen():
    model = tiny_models.build("bert")
    model.bert.encoder.layer[0].output.LayerNorm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    quantize(model, request("bert", solver="reconstruct", solver_options=FEW))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == {name: before[name] for name in after}
    assert all(p.grad is None for p in model.parameters())


def test_what_was_learned_is_told_and_stored():
    model = quantized("bert", solver="reconstruct", solver_options=FEW, correction="cat")
    learned = model.config.quantization_config.provenance["learned"]
    assert list(learned) == ["bert.encoder.layer.0", "bert.encoder.layer.1", ""]
    assert all(progress["held_out_after"] is not None for progress in learned.values())
    assert model.config.quantization_config.solver_options == FEW
    assert report(model).layers


def test_what_is_told_of_learning_is_what_batches_held_out_say():
    float_model, (_, batch) = build("llama"), apart("llama")

    @torch.no_grad()
    def divergence(model: nn.Module) -> float:
        wanted, found = (m(**batch).logits.log_softmax(-1) for m in (float_model, model))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    blocks = {"block_steps": 40, "code_rate": 0.01}
    start, model = (
        quantized("llama", solver="reconstruct", solver_options={**blocks, "model_steps": steps}) for steps in (0, 40)
    )
    learned = model.config.quantization_config.provenance["learned"]
    assert all(told["steps"] > 0 and told["held_out_after"] < told["held_out_before"] for told in learned.values())
    assert learned[""]["held_out_before"] == pytest.approx(divergence(start), rel=0.01)
    assert learned[""]["held_out_after"] == pytest.approx(divergence(model), rel=0.01)


@pytest.mark.parametrize("size", [4, 16])
def test_little_data_is_held_out_too(size):
    model = quantized("llama", count=16, batch_size=size, solver="reconstruct", solver_options=FEW)
    for told in model.config.quantization_config.provenance["learned"].values():
        assert told["held_out_before"] is not None


def test_half_of_the_input_quantization_is_dropped_while_blocks_learn(monkeypatch):
    kept: dict[bool, list[float]] = {True: [], False: []}
    quantized_input = LearnedLayer._quantized_input

    def noted(layer: LearnedLayer, x: Tensor) -> Tensor:
        x_hat = quantized_input(layer, x)
        if layer.scheme.activations == "int3":
            kept[torch.is_grad_enabled()].append(float((x_hat == x).float().mean()))
        return x_hat

    monkeypatch.setattr(LearnedLayer, "_quantized_input", noted)
    options = {"block_steps": 4, "model_steps": 0}
    quantized("vit", count=32, weights="int4", activations="int3", solver="reconstruct", solver_options=options)
    assert 0.4 < min(kept[True]) <= max(kept[True]) < 0.7
    assert max(kept[False]) < 0.2  # what judges sees all of it


def test_no_steps_is_gptq():
    none = {"block_steps": 0, "model_steps": 0}
    same = quantized("bert", count=64, solver="reconstruct", solver_options=none)
    learned, _ = apart("bert")  # the same samples: a solver that learns keeps some to judge by
    start = quantized("bert", dataset=[{key: value[row] for key, value in learned.items()} for row in range(48)])
    for name, layer in quantized_modules(same).items():
        assert torch.equal(layer.weight_packed, quantized_modules(start)[name].weight_packed)


def test_tied_weights_stay_tied():
    model = quantized("llama_tied", solver="reconstruct", solver_options=FEW, edge_weights=None)
    head, table = model.lm_head, model.model.embed_tokens
    assert head.weight_packed.data_ptr() == table.weight_packed.data_ptr()
    assert head.weight_scale.data_ptr() == table.weight_scale.data_ptr()


def test_reload_is_bit_exact(tmp_path):
    model = quantized("vit", solver="reconstruct", solver_options=FEW, correction="cat", weights="int3")
    model.save_pretrained(tmp_path)
    batch = tiny_models.batch("vit")
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_padding_does_not_matter():
    states = []
    for token in (5, 90):
        rows = copy.deepcopy(tiny_models.samples("bert", 32))
        for row in rows:
            row["input_ids"][7:], row["attention_mask"][7:] = token, 0
        model = quantized(
            "bert", dataset=rows, solver="reconstruct", solver_options={"block_steps": 4, "model_steps": 4}
        )
        states.append({k: v for k, v in model.state_dict().items() if "packed" in k and "embeddings" not in k})
    changed = [float((value != states[1][key]).float().mean()) for key, value in states[0].items()]
    assert max(changed) < 0.02  # the sums of a batch differ in their last bits


def test_logits_too_many_to_keep_are_a_note(monkeypatch, caplog):
    monkeypatch.setattr("hf_catquant.calibrate.MAX_TARGETS", 100)
    model = quantized("bert", solver="reconstruct", solver_options=FEW)
    assert "" not in model.config.quantization_config.provenance["learned"]
    assert any("the whole model did not learn" in note for note in report(model).notes)


def test_a_model_without_logits_learns_its_output():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_models.build("bert").bert

        def forward(self, input_ids: Tensor) -> tuple[Tensor, None]:
            return (self.inner(input_ids).last_hidden_state * 1.0, None)

    model = Encoder().eval()
    rows = [{"input_ids": row["input_ids"]} for row in tiny_models.samples("bert", 64)]
    quantize(model, request("bert", dataset=rows, solver="reconstruct", solver_options=FEW))
    learned = model.quantization_config.provenance["learned"]
    assert learned[""]["held_out_after"] < learned[""]["held_out_before"]


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("gptq", {"block_steps": 3}, "solver 'gptq' has no option block_steps; it has none"),
        ("reconstruct", {"steps": 3}, "solver 'reconstruct' has no option steps; it has block_steps, model_steps"),
        ("reconstruct", {"block_steps": -1}, "block_steps must be an integer of at least 0, got -1"),
        ("reconstruct", {"block_steps": 2.5}, "block_steps must be an integer of at least 0, got 2.5"),
        ("reconstruct", {"code_rate": float("nan")}, "code_rate must be a number of at least 0, got nan"),
        ("reconstruct", {"temperature": 0}, "temperature must be a number of at least 0.001, got 0"),
        ("reconstruct", {"temperature": 1e-300}, "temperature must be a number of at least 0.001, got 1e-300"),
        ("gptq", {1: 3, "z": 2}, "solver 'gptq' has no option 1, z; it has none"),
        ("reconstruct", {"code_rate": True}, "code_rate must be a number of at least 0, got True"),
    ],
)
def test_bad_options(solver, options, message):
    with pytest.raises(ValueError, match=message):
        CatQuantConfig(solver=solver, solver_options=options)


@pytest.mark.slow
def test_scales_alone_by_the_divergence_are_stage_one_of_cat():
    alone = {"block_steps": 0, "code_rate": 0, "float_rate": 0, "model_steps": 40, "model_rate": 1.0}
    none = {"block_steps": 0, "model_steps": 0}
    start = dict(quantized("llama", solver="reconstruct", solver_options=none).named_buffers())
    moves = []
    for pull in (0.0, 1e4):
        options = {**alone, "scale_pull": pull}
        buffers = dict(quantized("llama", solver="reconstruct", solver_options=options).named_buffers())
        same = {name for name in buffers if torch.equal(buffers[name], start[name])}
        assert {name for name in buffers if name.endswith("weight_packed")} <= same
        scales = [name for name in buffers if name.endswith("weight_scale") and "layer" in name]
        moves.append(sum(float((buffers[name] - start[name]).abs().sum()) for name in scales))
    assert moves[0] > 3 * moves[1]
    assert moves[0] > 0


def test_what_is_listed_does_not_learn():
    listed = ["classifier", "pooler"]
    start = build("bert").state_dict()
    model = quantized("bert", solver="reconstruct", solver_options=FEW, modules_to_not_convert=listed).state_dict()
    same = {name for name, value in model.items() if name in start and torch.equal(value, start[name])}
    assert {name for name in start if name.startswith(("classifier.", "bert.pooler."))} <= same
    assert "bert.embeddings.LayerNorm.weight" not in same


def test_blocks_do_not_learn_what_they_share():
    model = build("bert")
    first, second = model.bert.encoder.layer
    second.output.LayerNorm = first.output.LayerNorm
    weight = first.output.LayerNorm.weight
    kept, start = weight.detach().clone(), first.attention.output.LayerNorm.weight.detach().clone()
    options = {"block_steps": 20, "model_steps": 0}
    quantize(model, request("bert", solver="reconstruct", solver_options=options))
    assert torch.equal(weight, kept)
    assert not torch.equal(first.attention.output.LayerNorm.weight, start)


def test_classes_of_a_map_are_told_from_its_columns(monkeypatch):
    config = tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )
    model = tf.SegformerForSemanticSegmentation(config).eval()
    shapes = []
    divergence = Reconstruction._divergence

    def noted(self: Any, batch: int, site: str, found: Tensor, target: Tensor, kind: Any) -> Tensor:
        shapes.append((found.shape[-1], target.shape[-1]))
        return divergence(self, batch, site, found, target, kind)

    monkeypatch.setattr(Reconstruction, "_divergence", noted)
    images = [{"pixel_values": torch.randn(3, 32, 32)} for _ in range(8)]
    options = {"block_steps": 0, "model_steps": 2}
    fields = {"weights": "ternary", "group_size": 16, "correction": None, "solver_options": options}
    quantize(model, CatQuantConfig(solver="reconstruct", dataset=images, batch_size=2, **fields))
    assert set(shapes) == {(5, 5)}


@pytest.mark.parametrize("heat", [1.0, 4.0])
def test_the_divergence_has_a_temperature(heat, generator):
    found, target = (torch.randn(5, 7, generator=generator) for _ in range(2))
    learner = Reconstruction(Options(temperature=heat), None, [], [], 0, set())
    expected, other = ((t / heat).softmax(-1) for t in (target, found))
    wanted = heat**2 * (expected * (expected / other).log()).sum(-1).mean()
    torch.testing.assert_close(learner._divergence(0, "head", found, target), wanted)


def test_options_are_a_dict():
    with pytest.raises(TypeError, match="solver_options must be"):
        CatQuantConfig(solver="reconstruct", solver_options=[1])


@pytest.mark.parametrize("made_there", [True, False])
def test_inference_mode_is_refused_before_anything_is_done(made_there):
    """No gradient passes there, nor through what was made there."""
    model = None if made_there else build("bert")
    asked = request("bert", count=4)
    asked.solver = "reconstruct"
    with torch.inference_mode():
        model = build("bert") if model is None else model
        if not made_there:
            with pytest.raises(
                RuntimeError, match=r"which torch.inference_mode\(\) rules out, and it is on: load and"
            ):
                quantize(model, asked)
    if made_there:
        with pytest.raises(RuntimeError, match=r"it was on when bert\.\S+ of the model was made: load and"):
            quantize(model, asked)
    assert not quantized_modules(model)


def test_needs_data():
    with pytest.raises(ValueError, match='solver="reconstruct" needs calibration data'):
        quantize(tiny_models.build("bert"), CatQuantConfig(solver="reconstruct", correction=None))


def test_corrections_of_logits_and_blocks_come_after_the_whole_model_has_learned(monkeypatch):
    events: list[str] = []

    def noted(function: Any, event: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Reconstruction, "model", noted(Reconstruction.model, "model"))
    monkeypatch.setattr(Pairs, "fit_and_attach", noted(Pairs.fit_and_attach, "correction"))
    places = {"num_clusters": 1, "alpha": 0.5, "at": ("logits", "blocks")}
    model = quantized("bert", solver="reconstruct", solver_options=FEW, correction=places)
    assert events == ["model"] + 3 * ["correction"]
    assert list(corrections(model)) == ["bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"]
