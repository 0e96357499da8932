"""Calibration does what it promises: less error, kept means, kept batch norms, the same result every time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_models
from helpers import global_rng_untouched, sqnr
from hf_catquant import CatConfig, CatQuantConfig, quantize, report
from hf_catquant.formats import get_format
from hf_catquant.kernels.layout import held_bytes
from hf_catquant.layers import QuantizedModule
from hf_catquant.packed_model import quantized_modules
from hf_catquant.replay import Replay, hooked
from test_walk import lines
from toys import make, samples_of


def request(**fields: Any) -> CatQuantConfig:
    defaults = {"weights": "int2", "group_size": -1, "edge_weights": None, "correction": None, "batch_size": 8}
    return CatQuantConfig(**{**defaults, **fields})


def quantized(name: str, count: int = 8, **fields: Any) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    """(float model, quantized model, batches) of a toy."""
    model, batches = make(name, count=count, size=8)
    live = copy.deepcopy(model)
    quantize(live, request(dataset=samples_of(batches), **fields))
    return model, live, batches


def mean_outputs(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean output of every channel of the modules ``names``, all runs and rows counted alike."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        channel = 1 if len(getattr(module, "kernel_size", ())) else -1

        def keep(m: nn.Module, a: Any, k: Any, out: Tensor, name: str = name, channel: int = channel) -> None:
            found[name].append(out.movedim(channel, -1).reshape(-1, out.shape[channel]))

        with hooked(module, after=keep):
            for batch in batches:
                model(**batch)
    return {name: torch.cat(rows).mean(0) for name, rows in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "cnn", "deep"])
@pytest.mark.parametrize("weights", ["ternary", "int3"])
def test_gptq_beats_rounding(name, weights):
    signal, error = {}, {}
    for solver in ("rtn", "gptq"):
        model, live, batches = quantized(name, weights=weights, solver=solver, count=12)
        pairs = [(model(**b), live(**b)) for b in batches]
        signal[solver] = sqnr(*(torch.cat(side) for side in zip(*pairs, strict=True)))
        error[solver] = sum(layer.error for layer in report(live).layers)
    assert error["gptq"] < 0.9 * error["rtn"]
    # What a CNN's head reads, a mean over all positions, the bias correction keeps by itself.
    assert name == "cnn" or signal["gptq"] > signal["rtn"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "cnn", "deep", "towers"])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("activations", [None, "int4"])
def test_every_bias_keeps_the_mean_output(name, solver, activations):
    model, live, batches = quantized(name, solver=solver, activations=activations)
    names = [n for n, m in quantized_modules(live).items() if m.bias is not None]
    expected, actual = mean_outputs(model, names, batches), mean_outputs(live, names, batches)
    assert names
    for layer in names:
        torch.testing.assert_close(actual[layer], expected[layer], rtol=1e-2, atol=2e-3)


@torch.no_grad()
def test_batch_norms_put_out_what_they_put_out_in_float():
    model, live, batches = quantized("cnn")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = []
    for which in (model, live):
        caught: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            with hooked(which.get_submodule(name), after=lambda m, a, k, out, into=caught[name]: into.append(out)):
                for batch in batches:
                    which(**batch)
        # A following relu_ may write into what was caught: compare before it does.
        statistics.append({n: torch.cat([o.clone() for o in outs]) for n, outs in caught.items()})
    for name in names:
        if name.endswith("norm2"):
            f, q = (s[name].transpose(0, 1).flatten(1) for s in statistics)
            torch.testing.assert_close(q.mean(1), f.mean(1), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(q.std(1), f.std(1), rtol=2e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("activations", ["int8", "int4", "int2"])
def test_convolutions_store_the_range_that_they_use(activations):
    model, live, batches = quantized("cnn", weights="int8", activations=activations)
    fmt = get_format(activations)
    convs = {n: m for n, m in quantized_modules(live).items() if hasattr(m, "kernel_size")}
    assert len(convs) == 7
    for module in convs.values():
        assert float(module.input_scale) > 0
        assert (module.input_offset is None) == (not fmt.affine)
        again = type(module)(module.to_float(), module.scheme)
        again.load_state_dict(module.state_dict())
        x = torch.randn(2, module.in_channels, 8, 8)
        before = module(x)
        assert torch.equal(again(x), before)
        module.input_scale *= 2
        assert not torch.equal(module(x), before)
        module.input_scale /= 2
    pairs = [(model(**b), live(**b)) for b in batches]
    assert (
        sqnr(*(torch.cat(side) for side in zip(*pairs, strict=True)))
        > {"int8": 25, "int4": 5, "int2": -3}[activations]
    )


@pytest.mark.parametrize("activations", ["int8", "int4", "int2"])
def test_linears_need_no_data_for_activations(activations):
    model, _ = make("mlp")
    quantize(model, request(solver="rtn", activations=activations))
    assert all(
        m.input_scale is None and m.scheme.activations == activations for m in quantized_modules(model).values()
    )


def test_convolutions_need_data_for_activations():
    model, _ = make("cnn")
    with pytest.raises(
        ValueError, match=r"stem: the activations of a Conv2d have a calibrated range.*dataset=samples"
    ):
        quantize(model, request(solver="rtn", activations="int8"))
    assert not quantized_modules(model)


def test_an_unreached_convolution_with_activations_is_refused():
    model, batches = make("cnn")
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"spare: .*the calibration data does not reach it"):
        quantize(model, request(dataset=samples_of(batches), activations="int8"))
    assert not quantized_modules(model)


def test_an_unreached_layer_is_rounded_and_noted():
    _, live, _ = quantized("spare")
    assert isinstance(live.spare, QuantizedModule)
    assert "spare: not reached by the calibration data, rounded to nearest" in report(live).notes


@torch.no_grad()
def test_a_module_at_two_names_is_quantized_at_both():
    _, live, _ = quantized("shared")
    assert live.first is live.second
    assert isinstance(live.second, QuantizedModule)


def llama(tied: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    ).eval()


TEXTS = [{"input_ids": torch.arange(i, i + 6) % 40} for i in range(40)]


@torch.no_grad()
def test_tied_embeddings_stay_tied():
    model = llama()
    quantize(model, request(dataset=TEXTS, weights="int4"))
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    tied = {layer.name: layer.tied_to for layer in report(model).layers if layer.tied_to}
    assert tied == {"lm_head": "model.embed_tokens"}
    assert "lm_head.weight_packed" not in model.state_dict()


@torch.no_grad()
def test_the_same_seed_and_data_give_the_same_tensors():
    states = []
    for _ in range(2):
        model = llama(tied=False)
        quantize(model, request(dataset=TEXTS, correction="cat", weights="ternary", num_samples=32, seed=5))
        states.append((model.state_dict(), model.config.quantization_config.to_dict()))
    (a, config_a), (b, config_b) = states
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert config_a == config_b


@torch.no_grad()
def test_the_order_of_a_generator_hardly_matters():
    signals = []
    for order in (TEXTS, TEXTS[::-1]):
        model, teacher = llama(), llama()
        quantize(model, request(dataset=(text for text in order), weights="int4", num_samples=40))
        ids = torch.stack([text["input_ids"] for text in TEXTS])
        signals.append(sqnr(teacher(input_ids=ids).logits, model(input_ids=ids).logits))
    assert abs(signals[0] - signals[1]) < 1.5


def test_finished_layers_hold_nothing_for_kernels():
    model = llama(tied=False)
    quantize(model, request(dataset=TEXTS, weights="ternary"))
    assert {held_bytes(layer.weight_packed) for layer in quantized_modules(model).values()} == {0}


def test_one_line_of_progress_a_block():
    model, batches = make("cnn")
    with lines() as found:
        quantize(model, request(dataset=samples_of(batches)))
    assert [line.split(":")[0] for line in found] == [
        "[1/5] stem",
        "[2/5] blocks.0",
        "[3/5] blocks.1",
        "[4/5] blocks.2",
        "[5/5] head",
    ]
    assert "2 layers, int2, error 0." in found[1]


@pytest.mark.parametrize("correction", [None, "cat"])
def test_global_generators_are_not_touched(correction):
    model, batches = make("cnn", count=8)
    with global_rng_untouched():
        quantize(
            model, request(dataset=samples_of(batches), correction=correction, activations="int8", num_samples=24)
        )


def test_the_model_keeps_its_mode():
    for training in (True, False):
        model, batches = make("cnn")
        model.train(training)
        quantize(model, request(dataset=samples_of(batches)))
        assert all(module.training == training for module in model.modules())


def test_a_broken_weight_is_named_and_the_model_stays_whole():
    model, batches = make("cnn")
    with torch.no_grad():
        model.blocks[1].conv2.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.1\.conv2\.weight has values that are not finite"):
        quantize(model, request(dataset=samples_of(batches), solver="rtn"))
    assert not any(isinstance(module, Replay) for module in model.modules())
    assert type(model.blocks[1].conv2) is nn.Conv2d
    model(**batches[0])


@pytest.mark.parametrize("dataset", [True, False])
def test_a_float_model_of_nan_is_refused(dataset):
    model, batches = make("cnn")
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean[0] = float("nan")
    samples = {"dataset": samples_of(batches)} if dataset else {}
    with pytest.raises(ValueError, match=r"running_mean of the float model holds NaN"):
        quantize(model, request(**samples, solver="rtn"))
    assert type(model.blocks[1].conv2) is nn.Conv2d


def test_activations_that_overflow_name_the_layer():
    model, batches = make("mlp")
    with torch.no_grad():
        model.layers[0].weight.mul_(1e30)
    with pytest.raises(ValueError, match=r"layers\.2: moments\.gram must be finite"):
        quantize(model, request(dataset=samples_of(batches), solver="gptq", weights="int8"))
    assert not any(isinstance(module, Replay) for module in model.modules())
    assert type(model.layers[2]) is nn.Linear


@torch.no_grad()
def test_a_correction_inside_a_block_is_fitted_and_carried_on():
    _, live, batches = quantized("deep", count=32, weights="binary", correction=CatConfig(at="blocks"))
    fits = report(live).corrections
    assert list(fits) == [f"blocks.{i}" for i in range(8)]
    for name, fit in fits.items():
        assert hasattr(live.get_submodule(name), "correction") == bool(fit["clusters"])
    live(**batches[0])


@torch.no_grad()
def test_neighbours_with_other_activations_get_moments_of_their_own():
    a, b = (llama(tied=False) for _ in range(2))
    fields = {"weights": "int2", "dataset": TEXTS}
    quantize(a, request(**fields, overrides={"q_proj": {"activations": "int2"}}))
    quantize(b, request(**fields))
    key = "model.layers.0.self_attn.k_proj"
    assert torch.equal(a.get_submodule(key).weight_packed, b.get_submodule(key).weight_packed)
    query = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(a.get_submodule(query).weight, b.get_submodule(query).weight)


def test_too_few_samples_for_a_correction_are_a_note():
    rows = tiny_models.samples("bert", 6)
    config = CatQuantConfig(weights="int4", group_size=16, dataset=rows, batch_size=2)
    model = quantize(tiny_models.build("bert"), config)
    assert any(
        note == "correction at classifier: off, 6 rows of samples are fewer than 10" for note in report(model).notes
    )
    config = CatQuantConfig(weights="int4", group_size=16, dataset=rows, batch_size=2, strict=True)
    with pytest.raises(ValueError, match="strict=True, but"):
        quantize(tiny_models.build("bert"), config)


@pytest.mark.parametrize(
    ("count", "correction", "solver", "rows"),
    [
        (36, "cat", "reconstruct", 36),  # eight rows held out would be too few
        (48, "cat", "reconstruct", 12),
        (48, CatConfig.paper(), "reconstruct", 48),
        (48, "cat", "gptq", 48),
        (48, CatConfig.paper(), "gptq", 48),
        (12, "cat", "reconstruct", 12),
    ],
)
def test_a_correction_is_fitted_on_rows_that_nothing_was_learned_from(count, correction, solver, rows):
    """Where there are enough of them, and where there is something to choose; what is published takes all."""
    options = {"block_steps": 1, "model_steps": 1} if solver == "reconstruct" else {}
    config = CatQuantConfig(
        weights="int4",
        group_size=16,
        dataset=tiny_models.samples("bert", count),
        batch_size=4,
        solver=solver,
        solver_options=options,
        correction=correction,
    )
    model = quantize(tiny_models.build("bert"), config)
    assert report(model).corrections["classifier"]["rows"] == rows
