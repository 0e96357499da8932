"""Quantized models on a GPU: the same answers as on the CPU, the same files, and whatever else a model does there.

Where there is no GPU all of it is skipped. ``CATQUANT_TEST_DEVICE=cpu`` runs the tests on the CPU, to find slips in them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.kernels import cuda
from hf_catquant.packed_model import quantized_modules

DEVICE = torch.device(os.environ.get("CATQUANT_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
]

# Relative to the norm of the answer. Kernels and the CPU round elsewhere, at each of a few layers.
ALLOWED = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.04}
DTYPE = pytest.mark.parametrize("dtype", ALLOWED, ids=str)
# Linears alone, with embeddings and a cache, with convolutions in groups and without; each with something else besides.
FIELDS: dict[str, dict[str, object]] = {
    "bert": {"weights": "ternary", "activations": "int8"},
    "llama": {"weights": "ternary", "rotation": "hadamard"},
    "gpt2": {"weights": "binary", "low_rank": 4},
    "vit": {"weights": "int3", "group_size": 8},
    "resnet": {"weights": "int4"},
    "whisper": {"weights": "int2", "group_size": -1},
    "wav2vec2": {"weights": "int8"},
}
MODEL = pytest.mark.parametrize("name", FIELDS)
A_LEVEL = 0.01  # allowed at least where inputs are rounded to levels: a hair in front of a tie is a level behind it
FEW = {"block_steps": 4, "model_steps": 4}


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    """What has no kernel raises, instead of running on the reference."""
    monkeypatch.setenv(cuda.SWITCH, "cuda")


def config(**fields: object) -> CatQuantConfig:
    return CatQuantConfig(**{"group_size": 16, "solver": "rtn", "correction": None, **fields})


@cache
def _quantized(name: str) -> nn.Module:
    return quantize(tiny_models.build(name), config(**FIELDS[name]))


def quantized(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the test's own, on the CPU."""
    return copy.deepcopy(_quantized(name)).to(dtype)


def answer(model: nn.Module, name: str, device: torch.device | str = DEVICE, **more: object) -> Tensor:
    """Its main output for a batch, computed on ``device`` and brought home."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in tiny_models.batch(name).items()}
    with torch.no_grad():
        return tiny_models.main_output(model(**batch, **more)).cpu()


def assert_near(found: Tensor, expected: Tensor, allowed: float) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert distance <= allowed, f"{distance:.3g} away, {allowed} is allowed"


def digest(model: nn.Module) -> str:
    """Of every name, type and bit of its state."""
    made = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_on(model: nn.Module, device: torch.device) -> bool:
    return all(tensor.device.type == device.type for tensor in model.state_dict().values())


@DTYPE
@MODEL
def test_answers_are_those_of_the_cpu_and_nothing_changes_on_the_way(name, dtype):
    model = quantized(name, dtype)
    allowed = max(ALLOWED[dtype], A_LEVEL if "activations" in FIELDS[name] else 0)
    before, expected = digest(model), answer(model, name, "cpu")
    model.to(DEVICE)
    assert all_on(model, DEVICE)
    first = answer(model, name)
    for _ in range(2):  # from tiles; convolutions take theirs at the second use
        found = answer(model, name)
        assert_near(found, expected, allowed)
    assert torch.equal(answer(model, name), found)
    assert_near(first, expected, allowed)
    assert digest(model) == before
    model.to("cpu")
    assert digest(model) == before
    assert torch.equal(answer(model, name, "cpu"), expected)


@MODEL
def test_the_same_files_are_saved_from_everywhere(name, tmp_path):
    model = quantized(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "cpu")
    model.to(DEVICE)
    answer(model, name)
    model.save_pretrained(tmp_path / "gpu")
    assert files(tmp_path / "gpu") == files(tmp_path / "cpu")


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_loaded_onto_the_device(name, tmp_path):
    pytest.importorskip("accelerate")
    model = quantized(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=str(DEVICE))
    assert all_on(loaded, DEVICE)
    assert digest(loaded) == digest(model)
    expected = answer(model, name, "cpu")
    for _ in range(3):  # layouts are built at the second use
        assert_near(answer(loaded, name), expected, ALLOWED[torch.float32])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_writes_what_it_writes_on_the_cpu(name):
    model, prompt = quantized(name), torch.tensor([[5, 17, 31, 8]])
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    model.to(DEVICE)
    there = prompt.to(DEVICE)
    found = model.generate(there, attention_mask=torch.ones_like(there), **settings)
    assert found.tolist() == expected.tolist()
    model.to(torch.bfloat16)
    first, again = (model.generate(there, attention_mask=torch.ones_like(there), **settings) for _ in range(2))
    assert first.tolist() == again.tolist()


def distance_to_float(model: nn.Module, name: str) -> float:
    expected, found = answer(tiny_models.build(name), name, "cpu"), answer(model, name)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert", {"solver": "gptq", "correction": {"num_clusters": 2, "alpha": 0.5}}),
        ("llama", {"solver": "gptq", "weights": "int2", "rotation": "hadamard"}),
        ("resnet", {"solver": "gptq", "weights": "int4", "activations": "int8"}),
        ("vit", {"solver": "reconstruct", "solver_options": FEW, "correction": "cat"}),
    ],
    ids=str,
)
def test_quantized_on_the_device(name, fields):
    asked = {"dataset": tiny_models.samples(name, 16), "batch_size": 4, **fields}
    here, there = tiny_models.build(name), tiny_models.build(name).to(DEVICE)
    quantize(here, config(**asked))
    quantize(there, config(**asked))
    assert all_on(there, DEVICE)
    assert len(quantized_modules(there)) == len(quantized_modules(here)) > 0
    expected = answer(there, name)
    wanted = distance_to_float(here.to(DEVICE), name)
    assert distance_to_float(there, name) <= 1.3 * wanted + 0.01
    there.to("cpu")
    assert_near(answer(there, name, "cpu"), expected, A_LEVEL)


def test_quantized_while_it_is_loaded_onto_the_device(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_models.build("bert")
    model.save_pretrained(tmp_path / "float")
    asked = config(weights="int4", solver="gptq", dataset=tiny_models.samples("bert"), batch_size=4)
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=asked, device_map=str(DEVICE))
    assert all_on(loaded, DEVICE)
    expected = answer(loaded, "bert")
    loaded.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert_near(answer(again, "bert", "cpu"), expected, ALLOWED[torch.float32])


def backend() -> str:
    """inductor where it can compile for the device: it writes Triton, whose launchers a C compiler makes."""
    compilers = any(map(shutil.which, ("gcc", "cc", "clang")))
    return "inductor" if importlib.util.find_spec("triton") and compilers and ON_GPU else "aot_eager"


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_compiled(name):
    torch._dynamo.reset()
    model = quantized(name, torch.bfloat16).to(DEVICE)
    more = {"use_cache": False} if name == "llama" else {}
    expected = [answer(model, name, **more) for _ in range(2)][1]
    compiled = torch.compile(model, backend=backend())
    for _ in range(2):
        assert_near(answer(compiled, name, **more), expected, ALLOWED[torch.bfloat16])


def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A graph of one call: what replays it, and where its result is written."""
    if not ON_GPU:
        held = call()
        return lambda: held.copy_(call()), held
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    return graph.replay, held


@pytest.mark.parametrize("name", ["vit", "llama"])
@torch.no_grad()
def test_replayed_from_a_graph(name):
    model = quantized(name, torch.bfloat16).to(DEVICE)
    key = "pixel_values" if name == "vit" else "input_ids"
    x = tiny_models.batch(name)[key].to(DEVICE)
    x = x.bfloat16() if x.is_floating_point() else x
    more = {"use_cache": False} if name == "llama" else {}

    def call() -> Tensor:
        return tiny_models.main_output(model(**{key: x}, **more))

    replay, held = captured(call)
    replay()
    before = held.clone()
    x.copy_(x.flip(0))
    replay()
    assert torch.equal(held, call())
    assert not torch.equal(held, before)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_under_autocast(name):
    model = quantized(name)
    expected = answer(model, name, "cpu")
    model.to(DEVICE)
    for _ in range(2):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found = answer(model, name)
        assert_near(found, expected, ALLOWED[torch.bfloat16])


@pytest.mark.skipif(not ON_GPU, reason="streams are the GPU's")
@torch.no_grad()
def test_two_streams_at_once():
    model = quantized("llama", torch.bfloat16).to(DEVICE)
    inputs = [torch.randint(3, 96, (count, 12), device=DEVICE) for count in (1, 7)]
    for x in inputs:
        model(x)
    expected = [model(x).logits for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(model(x).logits)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_weights_are_loaded_in_place():
    model = quantized("llama", torch.bfloat16).to(DEVICE)
    answer(model, "llama")
    other = tiny_models.build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-2)
    quantize(other, config(**FIELDS["llama"]))
    other.to(torch.bfloat16)
    expected = answer(other, "llama", "cpu")
    model.load_state_dict(other.state_dict())
    for _ in range(2):
        assert_near(answer(model, "llama"), expected, ALLOWED[torch.bfloat16])
    assert torch.equal(answer(copy.deepcopy(model), "llama"), answer(model, "llama"))


def test_gradients_of_inputs_are_those_of_the_cpu():
    grads = []
    for device in ("cpu", DEVICE):
        model = quantized("bert").to(device)
        rows = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        for _ in range(2):  # the second from tiles
            rows.grad = None
            model(inputs_embeds=rows).logits.square().sum().backward()
        grads.append(rows.grad.cpu())
    assert_near(grads[1], grads[0], 1e-3)


def test_adapters_are_trained():
    peft = pytest.importorskip("peft")
    from hf_catquant.lora import get_peft_model

    batch = tiny_models.batch("llama")
    losses: dict[str, list[float]] = {}
    for device in ("cpu", str(DEVICE)):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(quantized("llama"), settings).to(device)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        there = {key: value.to(device) for key, value in batch.items()}
        losses[device] = []
        for _ in range(8):
            loss = model(**there, labels=there["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    found = losses[str(DEVICE)]
    assert found[-1] < found[0]
    assert found == pytest.approx(losses["cpu"], rel=0.01)
