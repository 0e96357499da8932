"""The float model that an export writes computes what the quantized one does, or the export refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import hf_catquant
import tiny_models
from hf_catquant import CatQuantConfig, export
from hf_catquant.cli import main
from hf_catquant.correction import ClusterAffine, attach, corrections
from hf_catquant.packed_model import quantized_modules


def quantized(name: str, **options: Any) -> Any:
    usual = {"weights": "ternary", "group_size": 16, "solver": "rtn", "correction": None}
    return hf_catquant.quantize(tiny_models.build(name), CatQuantConfig(**{**usual, **options}))


def correct(model: Any, name: str, width: int, clusters: int = 1, shift: float = 0.5) -> None:
    draw = torch.Generator().manual_seed(0)
    gamma, beta = (1 + 0.2 * torch.randn(clusters, width, generator=draw), torch.full((clusters, width), shift))
    attach(model, name, ClusterAffine.of(None, torch.randn(clusters, width, generator=draw), gamma, beta))


@torch.no_grad()
def outputs(model: Any, name: str) -> torch.Tensor:
    return tiny_models.main_output(model(**tiny_models.batch(name)))


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=1e-5 * float(first.abs().max()))


# A tied head, transposed linears, grouped and weight-normalised convolutions, batch norms; all linears rotated.
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "resnet", "wav2vec2"])
def test_the_float_model_computes_the_same(name, tmp_path):
    model = quantized(name)
    wanted = outputs(model, name)
    if name == "wav2vec2":  # from a folder, as the class of a sound classifier is not what its name says
        model.save_pretrained(tmp_path / "in")
    done = export(tmp_path / "in" if name == "wav2vec2" else model, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert close(wanted, outputs(loaded, name))
    assert not quantized_modules(loaded)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert done.lost == []
    assert done.size == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert quantized_modules(model)  # the one in memory stays as it was
    assert torch.equal(outputs(model, name), wanted)


def test_a_correction_of_one_cluster_folds_into_the_head(tmp_path):
    model = quantized("bert")
    before = outputs(model, "bert")
    correct(model, "classifier", 5)
    wanted = outputs(model, "bert")
    assert not close(before, wanted)
    model.save_pretrained(tmp_path / "quantized")
    done = export(tmp_path / "quantized", tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert close(wanted, outputs(loaded, "bert"))
    assert not corrections(loaded)
    assert not done.lost


@pytest.mark.parametrize(
    ("name", "site", "width", "clusters", "shift", "reason"),
    [
        ("bert", "classifier", 5, 2, 0.5, "it has 2 clusters"),
        ("llama", "lm_head", 96, 1, 0.5, "has no bias there"),
        ("llama_tied", "lm_head", 96, 1, 0.0, "tied to another"),
        ("bert", "bert.pooler.activation", 32, 1, 0.5, "sits on a Tanh"),
    ],
)
def test_what_does_not_fold_is_refused_or_said(name, site, width, clusters, shift, reason, tmp_path):
    model = quantized(name)
    plain = outputs(model, name)
    correct(model, site, width, clusters, shift)
    with pytest.raises(ValueError, match=f"would lose: the correction at {site}: .*{reason}.*lossy=True"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = export(model, tmp_path / "out", lossy=True)
    assert [reason in line for line in done.lost] == [True]
    assert "LOST: " in str(done)
    assert close(plain, outputs(type(model).from_pretrained(tmp_path / "out"), name))


def test_a_slope_without_a_shift_folds_where_there_is_no_bias(tmp_path):
    model = quantized("llama")
    correct(model, "lm_head", 96, shift=0.0)
    wanted = outputs(model, "llama")
    export(model, tmp_path / "out")
    assert close(wanted, outputs(type(model).from_pretrained(tmp_path / "out"), "llama"))


def test_rounded_inputs_are_refused_or_said(tmp_path):
    model = quantized("bert", activations="int8")
    with pytest.raises(ValueError, match="inputs rounded to int8"):
        export(model, tmp_path / "out")
    assert export(model, tmp_path / "out", lossy=True).lost == ["inputs rounded to int8: they stay in float"]


def test_weights_may_be_written_in_another_dtype(tmp_path):
    model = quantized("bert")
    export(model, tmp_path / "out", dtype="bfloat16")
    assert type(model).from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype .* got 'int8'"):
        export(model, tmp_path / "other", dtype="int8")


def test_a_weight_beyond_a_dtype_is_refused_and_rounding_once_more_is_said(tmp_path, capsys):
    model = tiny_models.build("bert")
    with torch.no_grad():
        model.classifier.weight[1] *= 1e8
    model = hf_catquant.quantize(model, CatQuantConfig(solver="rtn", correction=None, group_size=16))
    model.save_pretrained(tmp_path / "in")
    words = ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype"]
    assert main([*words, "float16"]) == 1
    said = capsys.readouterr().err
    assert "classifier.weight: " in said
    assert (
        "is beyond float16, whose largest value is 65504: export (--dtype) with dtype='bfloat16' or 'float32'" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert main([*words, "bfloat16"]) == 0
    assert "note: rounded once more, from float32 to bfloat16: " in capsys.readouterr().out
    notes = export(tmp_path / "in", tmp_path / "same", dtype="float32").notes
    assert notes == []
    with pytest.raises(ValueError, match=r"^classifier\.weight: .* is beyond float16, .*: load the model with dtype="):
        export(model.to(torch.float16), tmp_path / "half")


def test_values_that_a_dtype_makes_zero_are_counted(tmp_path):
    model = quantized("bert")
    with torch.no_grad():
        model.bert.pooler.dense.bias.fill_(1e-12)
    assert export(model, tmp_path / "out", dtype="float16").notes[0].endswith(" values, 32 of them to 0")


def test_the_tokenizer_goes_along(tmp_path):
    quantized("bert").save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "in" / "report.json").write_text("{}")
    export(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]


def test_the_verb(tmp_path, capsys):
    model = quantized("bert")
    correct(model, "classifier", 5, clusters=2)
    model.save_pretrained(tmp_path / "in")
    words = ["export", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(words) == 1
    assert (
        "catquant export: an export to safetensors would lose: the correction at classifier" in capsys.readouterr().err
    )
    assert main([*words, "--lossy", "--dtype", "bfloat16"]) == 0
    assert "LOST: the correction at classifier: it has 2 clusters" in capsys.readouterr().out
    assert main(words) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_bad_requests_are_refused(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    cases = (
        ({"model": tiny_models.build("bert"), "out": tmp_path / "a"}, "is not quantized"),
        ({"model": torch.nn.Linear(2, 2), "out": tmp_path / "a"}, "a folder, a Hub id or a transformers model"),
        ({"model": "x", "out": tmp_path / "there"}, "exists and is not an empty folder"),
        ({"model": "x", "out": tmp_path / "a", "to": "openvino"}, "to must be one of safetensors, gguf"),
        (
            {"model": "x", "out": tmp_path / "a", "ternary": "TQ1_0"},
            "safetensors has no option 'ternary'; it has dtype",
        ),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            export(**options)
    assert not (tmp_path / "a").exists()


def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch):
    model = quantized("bert")
    monkeypatch.setattr("hf_catquant.exports.plain._check", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_give_the_weights_back_is_no_export(tmp_path, monkeypatch):
    model = quantized("llama")
    monkeypatch.setattr("hf_catquant.exports.plain.fold_corrections", lambda model: _add_bias(model.lm_head))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not load its own float weights back: lm_head\.bias"):
        export(model, tmp_path / "out")


def _add_bias(head: Any) -> list[str]:
    head.bias = torch.nn.Parameter(torch.ones(96), requires_grad=False)
    return []


def test_what_came_with_the_model_goes_along_and_the_rest_is_named(tmp_path):
    folder = tmp_path / "in"
    quantized("bert").save_pretrained(folder)
    beside = [
        "source.spm",
        "target.spm",
        "normalizer.json",
        "bpe.codes",
        "entity_vocab.json",
        "modules.json",
        "vocab.json",
    ]
    beside += ["1_Pooling/config.json", "additional_chat_templates/rag.jinja", "LICENSE", "modeling_x.py"]
    for name in (*beside, "report.json", "README.md", "optimizer.pt", "rows.parquet", "checkpoint-1/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    (folder / "train.py").write_text("key = 1")  # no part of the model, whatever lies beside it
    done = export(folder, tmp_path / "out")
    there = {path.relative_to(done.path).as_posix() for path in done.path.rglob("*") if path.is_file()}
    assert there == {*beside, "config.json", "model.safetensors"}
    assert done.notes == [
        "not copied, as they are no part of the model: optimizer.pt, rows.parquet, train.py, checkpoint-1/"
    ]


@pytest.mark.parametrize("verb", [["export", "{folder}", "{folder}-out"], ["push", "{folder}", "me/x", "--dry-run"]])
def test_code_of_the_model_runs_only_when_it_is_trusted(tmp_path, verb):
    model = quantized("bert")
    folder = tmp_path / "in"
    model.save_pretrained(folder)
    code = "from transformers import BertConfig, BertForSequenceClassification\n\n\n"
    code += "class OwnConfig(BertConfig):\n    model_type = 'own'\n\n\n"
    code += "class OwnForSequenceClassification(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    (folder / "modeling_own.py").write_text(code)
    raw = json.loads((folder / "config.json").read_text())
    remote = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
    }
    own = {"model_type": "own", "auto_map": remote, "architectures": ["OwnForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps({**raw, **own}))
    words = [word.format(folder=folder) for word in verb]
    assert main(words) == 1
    assert main([*words, "--trust-remote-code"]) == 0
