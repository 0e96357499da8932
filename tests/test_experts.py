"""Fused experts: opened, calibrated expert by expert, packed, stored, closed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_catquant
from helpers import random_case, sqnr
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.expert_rows import ExpertRows
from hf_catquant.formats import get_format
from hf_catquant.gather import Gather, Streams
from hf_catquant.layers.experts import ExpertLinear, Experts, Fused
from hf_catquant.modules import close_experts, open_experts
from hf_catquant.packed_model import quantized_modules
from hf_catquant.verify import verify
from hf_catquant.walk import Leaf
from test_fails_closed import WITHOUT_IMPORT
from tiny_models import LLAMA

SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, **SIZES)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**LLAMA, head_dim=16, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "gpt_oss: transposed, with biases and a gate of its own": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**LLAMA, **SIZES, head_dim=16, sliding_window=8)
    ),
    "nemotron_h: without a gate": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(
            **{name: value for name, value in LLAMA.items() if name != "num_hidden_layers"},
            layers_block_type=["moe", "attention", "moe"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
            head_dim=16,
        )
    ),
}
IDS = torch.arange(3, 27).view(2, 12)
RTN = {"weights": "int4", "group_size": 16, "solver": "rtn", "correction": None}


def build(name: str = "mixtral") -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            if not bool(parameter.any()):  # biases that start as zeros hide mistakes
                nn.init.normal_(parameter, std=0.1)
    return model


def texts(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([1] * 9 + [0] * 3)
    return [
        {"input_ids": torch.randint(3, 96, (12,), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_opening_and_closing_change_nothing(name):
    model = build(name)
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    open_experts(model, lambda name: True)
    assert sum(isinstance(module, Experts) for module in model.modules()) == 2
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    close_experts(model)
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    """Quantized without data, saved, loaded: bit-exact and the same file; dequantized: the module that it was."""
    model = build(name)
    kinds = [type(module) for module in model.modules() if Fused.of(module)]
    float_logits = logits(model)
    quantize(model, CatQuantConfig(**RTN))
    assert not any("experts" in skipped for skipped in hf_catquant.report(model).skipped)
    assert sqnr(float_logits, logits(model)) > 15
    model.save_pretrained(tmp_path / "first")
    assert verify(tmp_path / "first").is_whole
    again = type(model).from_pretrained(tmp_path / "first")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / part / "model.safetensors").read_bytes() for part in ("first", "second")]
    assert files[0] == files[1]
    again.dequantize()
    assert [type(module) for module in again.modules() if Fused.of(module)] == kinds
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "float")
    plain = type(model).from_pretrained(tmp_path / "float")
    assert not quantized_modules(plain)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_the_op_is_the_equation_expert_by_expert():
    case = random_case("ternary", 4 * 6, 33, 8)  # four experts of 6 rows
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(9, 33, generator=generator), torch.randn(4, 6, generator=generator)
    ends = torch.tensor([2, 2, 7, 8])  # the second has no rows, the last row belongs to nobody
    found = torch.ops.catquant.expert_linear(x, ends, *case.stored, bias, "ternary", 8, None)
    dense = case.dense.view(4, 6, 33)
    owners = [0, 0, 2, 2, 2, 2, 2, 3]
    wanted = torch.stack([dense[e] @ x[i].double() + bias[e].double() for i, e in enumerate(owners)])
    torch.testing.assert_close(found[:8].double(), wanted, rtol=1e-4, atol=1e-4)
    assert not bool(found[8].any())


def test_the_op_as_torch_sees_it():
    case = random_case("int4", 3 * 4, 16, 8)
    x, bias = torch.randn(5, 16, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    arguments = (x, torch.tensor([1, 1, 5]), *case.stored, bias, "int4", 8, None)
    torch.library.opcheck(torch.ops.catquant.expert_linear.default, arguments)
    grad = torch.randn(5, 4)
    torch.ops.catquant.expert_linear(*arguments).backward(grad)
    dense = case.dense.float().view(3, 4, 16)
    torch.testing.assert_close(x.grad, torch.stack([grad[0] @ dense[0], *(grad[1:] @ dense[2])]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, torch.stack([grad[0], torch.zeros(4), grad[1:].sum(0)]))


@pytest.mark.parametrize(
    ("x", "ends", "message"),
    [
        (torch.ones(2, 3, 16), torch.tensor([1, 1, 2]), r"x must be \(S, K\)"),
        (torch.ones(2, 16), torch.tensor([1.0, 2.0, 2.0]), r"ends must be \(E,\) int64"),
        (torch.ones(2, 16), torch.tensor([1, 1, 1, 1, 2]), "a multiple of the 5 experts as rows, got 12"),
    ],
)
def test_the_op_refuses(x, ends, message):
    case = random_case("int4", 12, 16, 8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.catquant.expert_linear(x, ends, *case.stored, None, "int4", 8, None)


class Routed(nn.Module):
    """Experts that are sent what the test says."""

    def __init__(self, experts: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.experts, self.index = experts, index

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, torch.full(self.index.shape, 0.5))


def rows_of(child: str, index: Tensor, mask: Tensor, seed: int = 0) -> tuple[ExpertRows, Experts, Tensor, Tensor]:
    """ExpertRows over one call of opened experts on two streams, and the hidden states of both."""
    generator = torch.Generator().manual_seed(seed)
    original = build().model.layers[0].mlp.experts
    live, other = (Routed(Experts(original, Fused.of(original)), index) for _ in range(2))
    other.index = index.flip(0)  # the float router sends tokens elsewhere, which must not matter
    x, y = torch.randn(2, len(index), 32, generator=generator)
    calls = [[((x,), {})]], [[((y,), {})]]
    gather = Gather(live, [{"attention_mask": mask.view(1, -1)}], range(1), seed=0)
    leaf = Leaf(f"experts.{child}", 0, calls=1)
    return ExpertRows(gather, f"experts.{child}", leaf, Streams(other, live, *calls)), live.experts, x, y


@pytest.mark.parametrize("child", ["up", "down"])
@torch.no_grad()
def test_moments_are_those_of_the_rows_that_an_expert_is_sent(child):
    """Real tokens only, the quantized stream's routes in both streams, and each expert's own matrix in between."""
    index = torch.arange(4).repeat(100).view(200, 2)  # experts 0 and 1, then 2 and 3, each 100 tokens
    mask = torch.ones(200, dtype=torch.bool)
    mask[150:] = False
    rows, experts, x, y = rows_of(child, index, mask)
    assert rows.note is None
    scheme = CatQuantConfig(**RTN).scheme_for("x", False)
    found = list(rows.moments(scheme))
    for expert, moments in enumerate(found):
        sent = [t for t in range(150) if expert in index[t].tolist()]
        f, q = x[sent], y[sent]
        if child == "down":
            gate_up = experts.up.weight[expert]
            f, q = (nn.functional.silu(h @ gate_up[:48].T) * (h @ gate_up[48:].T) for h in (f, q))
        assert moments.count == len(sent) == 75
        torch.testing.assert_close(moments.gram[0], q.T @ q / 75, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.cross[0], f.T @ q / 75, rtol=1e-4, atol=1e-6)


def test_an_expert_that_is_sent_few_rows_gets_others_and_it_is_said():
    index = torch.tensor([[0, 1]]).repeat(80, 1)
    index[:3] = torch.tensor([0, 2])  # expert 2 has three tokens, expert 3 none
    rows, *_ = rows_of("up", index, torch.ones(80, dtype=torch.bool))
    assert rows.note.startswith("experts.up: 2 of 4 experts were sent fewer than 32 rows (the least 0)")
    assert [moments.count for moments in rows.moments(CatQuantConfig(**RTN).scheme_for("x", False))] == [
        80,
        77,
        32,
        32,
    ]
    assert bool(rows.taken[0][:3, 2].all()), "its own come first"


def test_more_experts_than_fit_at_once_take_more_passes(monkeypatch):
    index = torch.arange(4).repeat(100).view(200, 2)
    rows, *_ = rows_of("up", index, torch.ones(200, dtype=torch.bool))
    scheme = CatQuantConfig(**RTN).scheme_for("x", False)
    whole = list(rows.moments(scheme))
    monkeypatch.setattr("hf_catquant.expert_rows._MOMENT_BYTES", 3 * 8 * 32**2)
    assert all(torch.equal(a.gram, b.gram) for a, b in zip(whole, rows.moments(scheme), strict=True))


def test_calibration_lowers_the_error_and_few_rows_are_in_the_report():
    errors = {}
    for solver, data in (("rtn", None), ("gptq", texts())):
        model = build()
        wanted = logits(model)
        quantize(model, CatQuantConfig(**{**RTN, "weights": "int2", "solver": solver}, dataset=data, batch_size=4))
        errors[solver] = sqnr(wanted, logits(model))
        notes = hf_catquant.report(model).notes
        assert any("experts were sent fewer than" in note for note in notes) == (solver == "gptq")
    assert errors["gptq"] > errors["rtn"] + 1


def test_one_expert_alone_is_calibrated(monkeypatch):
    one = {"num_local_experts": 1, "num_experts_per_tok": 1}
    monkeypatch.setitem(MODELS, "one", lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, **one)))
    model = build("one")
    wanted = logits(model)
    quantize(model, CatQuantConfig(**{**RTN, "solver": "gptq"}, dataset=texts(), batch_size=4))
    assert sqnr(wanted, logits(model)) > 15


def test_lists_and_overrides_reach_the_experts():
    model = build()
    listed = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts.up"]
    config = {**RTN, "modules_to_not_convert": listed, "overrides": {r"experts\.down": {"weights": "int8"}}}
    quantize(model, CatQuantConfig(**config))
    report = hf_catquant.report(model)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert isinstance(model.model.layers[1].mlp.experts.up, ExpertLinear)
    assert [layer.weights for layer in report.layers if "experts" in layer.name] == ["int8"]
    assert {name for name, reason in report.skipped.items() if "experts" in name and "listed" in reason} == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.up",
    }


def test_a_request_that_is_refused_leaves_the_experts_closed():
    model = build()
    with pytest.raises(ValueError, match="matches no module"):
        quantize(model, CatQuantConfig(**RTN, overrides={"nowhere": {"weights": "int8"}}))
    with pytest.raises(ValueError, match="strict=True"):
        quantize(model, CatQuantConfig(**RTN, strict=True))
    assert not any(isinstance(module, Experts) for module in model.modules())


def test_experts_that_do_something_else_stay_in_float():
    model = build()
    experts = model.model.layers[0].mlp.experts
    kind = type("TwiceTheExperts", (type(experts),), {"forward": lambda self, *a: 2 * type(experts).forward(self, *a)})
    experts.__class__ = kind
    quantize(model, CatQuantConfig(**RTN))
    assert model.model.layers[0].mlp.experts is experts
    assert isinstance(model.model.layers[1].mlp.experts, Experts)


def test_without_the_package_a_model_with_quantized_experts_only_does_not_load(tmp_path):
    model = build()
    others = ["self_attn", "model.embed_tokens", "lm_head"]
    listed = [name for name, _ in model.named_modules() if any(part in name for part in others)]
    quantize(model, CatQuantConfig(**RTN, modules_to_not_convert=listed))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    assert all("experts" in name for name in stored)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    command = [sys.executable, "-c", WITHOUT_IMPORT, str(tmp_path), "MixtralForCausalLM"]
    env = {**os.environ, "CATQUANT_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert "REFUSED RuntimeError" in done.stdout, done.stdout + done.stderr


def test_a_checkpoint_of_more_experts_is_refused(tmp_path: Path):
    model = build()
    quantize(model, CatQuantConfig(**RTN))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_local_experts"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts\.(up|down): the checkpoint stores a weight of shape"):
        type(model).from_pretrained(tmp_path)


def test_experts_learn():
    model = build()
    options = {"block_steps": 12, "model_steps": 0}
    config = {**RTN, "weights": "ternary", "solver": "reconstruct", "solver_options": options}
    quantize(model, CatQuantConfig(**config, dataset=texts(16), batch_size=2))
    learned = hf_catquant.report(model)
    assert all(error.error < 1 for error in learned.layers)
    assert get_format(model.model.layers[0].mlp.experts.up.scheme.weights).name == "ternary"
    progress = model.config.quantization_config.provenance["learned"]["model.layers.0"]
    assert progress["held_out_after"] < progress["held_out_before"]


@torch.no_grad()
def test_compile():
    model = build()
    quantize(model, CatQuantConfig(**RTN))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, logits(model), rtol=1e-5, atol=1e-5)
