"""ONNX: what a file computes from the packed bytes that it holds is what the model computes, or the export refuses."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_catquant
import tiny_models
from helpers import ALL_FORMATS, SHAPES, random_case
from hf_catquant import CatQuantConfig, quantize
from hf_catquant.cli import main
from hf_catquant.correction import ClusterAffine, attach
from hf_catquant.exports import export_onnx, onnx, onnx_functions
from hf_catquant.formats import ACTIVATION_FORMATS, get_format
from hf_catquant.kernels import reference
from hf_catquant.packed_model import dequantize_modules, quantized_modules
from hf_catquant.rotation import rotate
from hf_catquant.tasks import read_rows
from hf_catquant.weight import fit_static_range, quantize_activation


@pytest.fixture(scope="module")
def evaluator() -> Any:
    """onnx's own implementation of its operators, in numpy."""
    for package in ("onnxscript", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'hf-catquant[onnx]'")
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator


def call(evaluator: Any, text: onnx_functions.Text, *given: Tensor | None) -> Tensor:
    """A function of a file, alone."""
    inputs = [value.numpy() for value in given if value is not None]
    function = evaluator(onnx_functions.as_proto(text, onnx.LEAST_OPSET))
    return torch.from_numpy(function.run(None, dict(zip(text.inputs, inputs, strict=True)), {})[0])


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_packed_rows_are_decoded(evaluator, name, rows, columns, group_size):
    case = random_case(name, rows, columns, group_size)
    found = call(evaluator, onnx_functions.dequantize(case.fmt, columns, group_size), *case.stored)
    assert torch.equal(found, reference.dequantize(*case.stored, name, group_size, columns, torch.float32))
    torch.testing.assert_close(found.double(), case.dense, rtol=1e-6, atol=1e-6)
    at = torch.tensor([[0, rows - 1, 0], [rows - 1, rows - 1, 0]])
    looked_up = call(evaluator, onnx_functions.embedding(case.fmt, columns, group_size), at, *case.stored)
    assert torch.equal(looked_up, found[at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [1, 3, 48, 64])
def test_rotations(evaluator, columns, dtype, generator):
    x = torch.randn(2, 3, columns, generator=generator).to(dtype)
    for inverse in (False, True):
        found = call(evaluator, onnx_functions.rotate(columns, inverse), x)
        torch.testing.assert_close(found, rotate(x, inverse))


@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_rounded_inputs(evaluator, name, generator):
    x, fmt = torch.randn(3, 4, 20, generator=generator), get_format(name)
    x[0, 0] = 0  # has no range
    assert torch.equal(call(evaluator, onnx_functions.round_input(fmt, False), x), quantize_activation(x, fmt))
    given = fit_static_range(x, fmt)
    assert torch.equal(
        call(evaluator, onnx_functions.round_input(fmt, True), x, *given), quantize_activation(x, fmt, *given)
    )


@pytest.mark.parametrize("rank", [None, 3])
def test_corrections(evaluator, rank, generator):
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    basis = None if rank is None else draw(7, rank)
    given = (draw(2, 5, 7), basis, draw(4, rank or 7), draw(4, 7), draw(4, 7))
    found = call(evaluator, onnx_functions.cluster_affine(rank is not None), *given)
    torch.testing.assert_close(found, reference.cluster_affine(*given))


class EveryFormat(nn.Module):
    """An embedding, a linear and a grouped convolution in each format, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(11, 20) for _ in ALL_FORMATS)
        self.linears = nn.ModuleList(nn.Linear(20, 12) for _ in ALL_FORMATS)
        self.convs = nn.ModuleList(nn.Conv1d(12, 6, 3, 2, 1, 1, 2, bias=False) for _ in ALL_FORMATS)

    def forward(self, ids: Tensor) -> list[Tensor]:
        parts = zip(self.embeddings, self.linears, self.convs, strict=True)
        return [conv(linear(embedding(ids)).mT) for embedding, linear, conv in parts]


def run(evaluator: Any, file: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The answers of onnx's evaluator to a file."""
    found = evaluator(str(file)).run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(np.asarray(answer)) for answer in found]


def names_of(evaluator: Any, file: Path) -> tuple[list[str], list[str]]:
    """What a file calls its inputs and outputs."""
    there = evaluator(str(file))
    return there.input_names, there.output_names


def initializers(file: Path) -> dict[str, np.ndarray]:
    """What a file holds, by name."""
    import onnx as library

    return {held.name: library.numpy_helper.to_array(held) for held in library.load(file).graph.initializer}


def test_every_format_in_every_layer(evaluator, tmp_path):
    torch.manual_seed(0)
    formats = {rf"\.{i}$": {"weights": name} for i, name in enumerate(ALL_FORMATS)}
    config = CatQuantConfig(group_size=8, solver="rtn", correction=None, edge_weights=None, overrides=formats)
    model = quantize(EveryFormat(), config)
    assert {layer.scheme.weights for layer in quantized_modules(model).values()} == set(ALL_FORMATS)
    ids = torch.arange(22).view(2, 11) % 11
    model.train()
    done = export_onnx(model, tmp_path / "all.onnx", (ids,), opset_version=18)
    assert model.training
    assert "21 packed weights" in done.notes[0]
    assert "onnxruntime" in done.notes[-1]
    assert done.size == (tmp_path / "all.onnx").stat().st_size
    with torch.no_grad():
        wanted = model(ids)
    for expected, found in zip(wanted, run(evaluator, done.path, {"ids": ids}), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    held = initializers(done.path)
    for name, layer in quantized_modules(model).items():
        assert np.array_equal(held[f"{name}.weight_packed"], layer.weight_packed.numpy())


def quantized(name: str, **options: Any) -> Any:
    usual = {"weights": "ternary", "group_size": 16, "solver": "rtn", "correction": None}
    return hf_catquant.quantize(tiny_models.build(name), CatQuantConfig(**{**usual, **options}))


def correct(model: Any, name: str, width: int) -> None:
    shapes = ((width, 2), (3, 2), (3, width), (3, width))  # drawn with the seed that every test starts at
    attach(model, name, ClusterAffine.of(*(torch.randn(shape) for shape in shapes)))


def test_a_folder_of_texts_by_the_command_line(evaluator, tmp_path, capsys):
    """Rotation, low rank and a correction; another number of texts, of another length, padded."""
    model = quantized("bert", low_rank=2)
    correct(model, "classifier", 5)
    model.save_pretrained(tmp_path / "in")
    main(["export", str(tmp_path / "in"), str(tmp_path / "bert.onnx"), "--to", "onnx"])
    assert "17 packed weights" in capsys.readouterr().out
    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[2:, 4:] = 0
    batch = {"input_ids": torch.arange(35).view(5, 7) + 3, "attention_mask": mask}
    batch["token_type_ids"] = torch.zeros_like(mask)
    loaded = type(model).from_pretrained(tmp_path / "in")
    with torch.no_grad():
        wanted = loaded(**batch).logits
    (found,) = run(evaluator, tmp_path / "bert.onnx", batch)
    assert names_of(evaluator, tmp_path / "bert.onnx") == (list(batch), ["logits"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    held = initializers(tmp_path / "bert.onnx")
    stored = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert sum(array.nbytes for array in held.values()) < 1.05 * stored + 1000
    assert {array.dtype for name, array in held.items() if "low_rank" in name} == {np.dtype("float16")}
    text = (tmp_path / "bert.onnx").read_bytes()
    assert str(Path(hf_catquant.__file__).parent).encode() not in text  # traces of calls


def test_images_with_rounded_inputs(evaluator, tmp_path):
    model = quantized("resnet", weights="int4", activations="int8", dataset=tiny_models.samples("resnet"))
    batch = tiny_models.batch("resnet")
    done = export_onnx(model, tmp_path / "resnet.onnx", kwargs=batch, output_names=["scores"])
    assert names_of(evaluator, done.path)[1] == ["scores"]
    with torch.no_grad():
        wanted = model(**batch).logits
    torch.testing.assert_close(run(evaluator, done.path, batch)[0], wanted, rtol=1e-4, atol=1e-4)


class Answers(nn.Module):
    """A model that answers with keys; one tensor is two of its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        states = self.linear(x), self.linear(x).relu()
        return {"last_hidden_state": states[-1], "hidden_states": states, "loss": None, "pooled": states[-1].mean(1)}


def test_outputs_have_the_names_that_the_model_gives_them(evaluator, tmp_path, generator):
    model = quantize(Answers(), CatQuantConfig(group_size=8, solver="rtn", correction=None)).eval()
    x = torch.randn(1, 3, 16, generator=generator)
    export_onnx(model, tmp_path / "model.onnx", (x,))
    keys = ["last_hidden_state", "hidden_states.0", "hidden_states.1", "pooled"]
    assert names_of(evaluator, tmp_path / "model.onnx") == (["x"], keys)
    with torch.no_grad():
        last, states, _, pooled = model(x).values()
    for wanted, found in zip((last, *states, pooled), run(evaluator, tmp_path / "model.onnx", {"x": x}), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_optimizer_does_not_fold_what_its_evaluator_fails_at(evaluator, tmp_path, caplog):
    """BERT without ``token_type_ids`` gathers them itself; "Evaluation failed" would read as if the export had."""
    export_onnx(quantized("bert"), tmp_path / "bert.onnx", kwargs={"input_ids": torch.arange(16).view(2, 8) + 3})
    assert "Evaluation failed" not in caplog.text
    assert names_of(evaluator, tmp_path / "bert.onnx") == (["input_ids"], ["logits"])


@pytest.fixture
def pair(generator) -> tuple[nn.Module, nn.Module, Tensor]:
    """A quantized model, the float one with its weights, and an input."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    quantize(model, CatQuantConfig(group_size=8, solver="rtn", correction=None))
    plain = copy.deepcopy(model)
    dequantize_modules(plain)
    return model.eval(), plain.eval(), torch.randn(3, 16, generator=generator)


def test_only_the_dequantized_model_is_made_of_operators_of_torch(pair):
    """Why the export has a translation of its own."""
    *models, x = pair
    graphs = [torch.export.export(model, (x,)).graph for model in models]
    spaces = [{node.target.namespace for node in g.nodes if node.op == "call_function"} for g in graphs]
    assert spaces == [{"catquant", "aten"}, {"aten"}]


def test_onnxruntime_is_asked_and_a_wrong_file_is_refused(evaluator, pair, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, _, x = pair
    right = onnx_functions.dequantize

    def wrong(*given: Any) -> onnx_functions.Text:
        text = right(*given)
        text.lines[-1] = text.lines[-1].replace("Identity", "Neg")
        return text

    monkeypatch.setattr(onnx_functions, "dequantize", wrong)
    with pytest.raises(ValueError, match="does not compute what the model does"):
        export_onnx(model, tmp_path / "wrong.onnx", (x,))
    assert not list(tmp_path.iterdir())


def test_a_language_model_by_the_command_line_has_no_cache(evaluator, tmp_path):
    model = quantized("llama").eval()
    model.save_pretrained(tmp_path / "in")
    main(["export", str(tmp_path / "in"), str(tmp_path / "llama.onnx"), "--to", "onnx"])
    ids = torch.arange(35).view(5, 7) + 3
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (found,) = run(evaluator, tmp_path / "llama.onnx", batch)
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_refusals(evaluator, pair, tmp_path, monkeypatch):
    model, plain, x = pair
    file = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="Sequential is not quantized"):
        export_onnx(plain, file, (x,))
    with pytest.raises(ValueError, match="opset_version must be at least 18, got 17"):
        export_onnx(model, file, (x,), opset_version=17)
    mixtral = tf.MixtralForCausalLM(tf.MixtralConfig(**tiny_models.LLAMA, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ValueError, match=r"mlp\.experts\.up holds fused experts"):
        export_onnx(quantize(mixtral, CatQuantConfig(solver="rtn", correction=None)), file)
    with pytest.raises(ValueError, match="must be on the CPU to be exported, got tensors on meta"):
        export_onnx(copy.deepcopy(model).to("meta"), file, (x,))
    llama = quantized("llama")
    with pytest.raises(ValueError, match="'use_cache': False"):
        export_onnx(llama, file, kwargs=tiny_models.batch("llama"))
    with pytest.raises(ValueError, match="several inputs"):
        hf_catquant.export(quantized("t5"), file, "onnx")
    file.write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        export_onnx(model, file, (x,))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript: pip install 'hf-catquant\[onnx\]'"):
        export_onnx(model, tmp_path / "other.onnx", (x,))
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.slow
@pytest.mark.realdata
def test_real_sentences_are_classified_the_same(evaluator, realdata, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = realdata / "models" / "minilm-l6-sst2"
    float_model = tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model = quantize(float_model, CatQuantConfig(weights="int4", group_size=32, solver="rtn", correction=None))
    file = hf_catquant.export(model, tmp_path / "minilm.onnx", "onnx").path
    session = runtime.InferenceSession(str(file))
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = read_rows(str(realdata / "data" / "sst2" / "validation.parquet"))
    for start in range(0, len(rows), 64):
        batch = tokenizer(rows["sentence"][start : start + 64], padding=True, return_tensors="pt")
        with torch.no_grad():
            wanted = model(**batch).logits
        names = [given.name for given in session.get_inputs()]
        found = torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))
