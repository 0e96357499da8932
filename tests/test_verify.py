"""`catquant verify`: a whole folder passes, everything that is wrong is named, and nothing is raised or built on the way."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig

import hf_catquant
import tiny_models
from hf_catquant import CatQuantConfig
from hf_catquant.checkpoint import weight_files
from hf_catquant.cli import main
from hf_catquant.entries import entries_checksum, seal
from hf_catquant.integrity import file_checksums
from hf_catquant.plain import save_quantized
from hf_catquant.tasks import load_quantized
from hf_catquant.verify import verify

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


def saved(name: str, root: Path, **options) -> Path:
    folder = root / "-".join([name, *map(str, options.values())])
    if not folder.exists():
        config = CatQuantConfig(weights="ternary", group_size=16, solver="rtn", correction=None, low_rank=2)
        source = tiny_models.folder_of(name, str(root / "float"))
        model = type(tiny_models.build(name)).from_pretrained(source, quantization_config=config)
        model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def folder(root, tmp_path) -> Path:
    return Path(shutil.copytree(saved("bert", root), tmp_path / "bert"))


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, **tensors) -> None:
    """Change tensors and make their checksums right again, as an attacker would."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    for name, change in tensors.items():
        full = f"{QUERY}.{name}"
        held[full] = change(held[full])
        if held[full] is None:
            del held[full]
    save_file(held, path, metadata={"format": "pt"})
    edit_checksums(folder, file_checksums(path))


def edit_checksums(folder: Path, checksums: dict[str, int], signed: bool = True) -> None:
    """Other checksums of the tensors, and theirs with them if ``signed``."""
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored["checksums"] = checksums
    if signed:
        stored["entries_checksum"] = entries_checksum(stored["modules"], stored["corrections"], checksums)
    edit(folder, quantization_config=stored)


@pytest.mark.parametrize("name", ["bert", "vit", "wav2vec2", "llama_tied", "whisper"])
def test_what_was_saved_is_whole(name, root):
    found = verify(saved(name, root))
    assert found.is_whole, str(found)
    written = {"generation_config.json"} if (saved(name, root) / "generation_config.json").is_file() else set()
    assert len(found.remarks) == len(written)  # no report has its SHA-256
    assert set(found.files) == {"config.json", "model.safetensors", *written}
    assert found.modules
    assert found.provenance["solver"] == "rtn"


def test_a_tensor_that_is_gone_with_its_checksum_is_missed(folder):
    path, name = folder / "model.safetensors", "bert.pooler.dense.bias"
    with safe_open(path, framework="pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118  it is no dict
    save_file(held, path, metadata={"format": "pt"})
    edit_checksums(folder, file_checksums(path), signed=False)
    assert "checksums are not those that were saved" in verify(folder).problems[0]


def test_a_checksum_of_the_entries_alone_is_none(folder):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    entries = json.dumps([stored["modules"], stored["corrections"]], sort_keys=True).encode()
    edit(folder, quantization_config=stored | {"entries_checksum": zlib.crc32(entries)})
    assert "checksums are not those that were saved" in verify(folder).problems[0]


def test_shards_are_read_together(root):
    found = verify(saved("bert", root, max_shard_size="8KB"))
    assert found.is_whole, str(found)
    assert len(found.files) > 2


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "8KB"}])
def test_a_variant_is_whole_and_loads_where_there_is_no_other(root, tmp_path, shards):
    folder = Path(shutil.copytree(saved("bert", root, variant="fp16", **shards), tmp_path / "bert"))
    assert not (folder / "model.safetensors").exists()
    found = verify(folder)
    assert found.is_whole, str(found)
    assert found.remarks[0] == "the weights are the variant fp16: from_pretrained takes them with variant='fp16' only"
    assert len(found.files) > 2 if shards else "model.fp16.safetensors" in found.files
    assert load_quantized(str(folder)).num_parameters() == load_quantized(str(saved("bert", root))).num_parameters()
    shutil.copy(saved("bert", root) / "model.safetensors", folder / "model.b.f-32.safetensors")
    assert "as variants b.f-32, fp16 and none without a name: which is meant is not said" in verify(folder).problems[0]
    with pytest.raises(ValueError, match=r"as variants b\.f-32, fp16"):
        load_quantized(str(folder))
    shutil.copy(saved("bert", root) / "model.safetensors", folder)  # which transformers reads without being told
    found = verify(folder)
    assert found.is_whole, str(found)
    assert "model.b.f-32.safetensors is not part of the model" in found.remarks


def test_a_variant_that_transformers_would_not_read_is_none(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert weight_files(folder) == [folder / "model.fp16.safetensors"]
    (folder / "pytorch_model.bin").touch()
    assert weight_files(folder) == []
    assert "there is neither model.safetensors nor" in verify(folder).problems[0]
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.fp16.safetensors").rename(folder / "model.fp16-00001-of-00002.safetensors")
    assert "model.safetensors.index.fp16.json: there is no such file" in verify(folder).problems[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight_packed": lambda t: t.clone().fill_(250)}, "packed ternary byte must be at most 242, got 250"),
        ({"weight_scale": lambda t: t * float("nan")}, "weight_scale has values that are not finite"),
        ({"weight_scale": lambda t: t.float()}, "its tensors are .*F32.*, but its entry says .*F16"),
        ({"weight_packed": lambda t: t[:, 1:].contiguous()}, "its tensors are .*, but its entry says"),
        ({"low_rank_in": lambda t: None}, "its tensors are .*, but its entry says"),
        ({"weight_packed": lambda t: None}, "checksums has 16 packed weights, modules describes 17"),
        ({"weight": lambda t: None}, "there is no tensor of one byte under the name of the float weight"),
        (
            {"weight": lambda t: torch.zeros(32, 32)},
            r"query.weight is F32 of shape \(32, 32\), but .* its name has one byte",
        ),
        ({"weight": lambda t: t[None]}, r"query.weight is U8 of shape \(1, 1\), but"),
        ({"bias": lambda t: t * float("nan")}, "query.bias has values that are not finite"),
    ],
)
def test_tensors_that_cannot_be_are_named(folder, tensors, message):
    edit_tensors(folder, **tensors)
    found = verify(folder)
    assert len(found.problems) == 1
    assert re.search(message, found.problems[0]), found.problems


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act of config.json are not what was saved"),
        ({"dtype": "float16"}, "dtype of config.json are not what was saved"),
        ({"dtype": "float8_e4m3fn"}, "dtype must be one of float32"),
        ({"architectures": ["BertForMaskedLM"]}, "architectures of config.json are not what was saved"),
        (
            {"id2label": {str(i): f"class {4 - i}" for i in range(5)}, "label2id": {}},
            "id2label, label2id of config.json are not what was saved",
        ),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers must be at most"),
        ({"num_labels": 10**12}, "num_labels must be at most"),  # transformers would write a table of them
        ({"num_labels": 2000}, "num_labels must be at most 1024 for this checkpoint, got 2000"),
        ({"text_config": {"num_labels": 1e300}}, "num_labels must be at most"),
        ({"quantization_config": None}, "not a quantized model"),
        ({"quantization_config": {"quant_method": "catquant"}}, "it is a request, not a quantized model"),
    ],
)
def test_a_config_that_was_changed_is_named(folder, fields, message):
    edit(folder, **fields)
    found = verify(folder)
    assert any(message in problem for problem in found.problems), str(found)


def loaded(folder: Path, caplog) -> str:
    """What loading says."""
    caplog.clear()
    logging.getLogger("hf_catquant").addHandler(caplog.handler)
    type(tiny_models.build("bert")).from_pretrained(folder)
    logging.getLogger("hf_catquant").removeHandler(caplog.handler)
    return caplog.text


def test_labels_that_were_swapped_are_named_when_they_are_loaded(folder, caplog):
    assert loaded(folder, caplog) == ""
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    edit(folder, id2label={**labels, "0": labels["1"], "1": labels["0"]}, dtype="float16")
    assert "id2label of config.json are not what was saved" in loaded(folder, caplog)  # its dtype may be asked for


def test_a_config_without_its_checksums_is_not_whole(folder, caplog):
    """They are all that sees a changed field: with them gone, every field may be another one."""
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    fields = stored["provenance"].pop("fields")
    edit(folder, quantization_config=stored, layer_norm_eps=0.5)
    assert "provenance has no fields" in verify(folder).problems[0]
    assert "provenance of config.json has no fields" in loaded(folder, caplog)
    del fields["layer_norm_eps"], fields["id2label"]
    stored["provenance"]["fields"] = fields
    edit(folder, quantization_config=stored)
    absent = "layer_norm_eps of config.json have no checksum, which every save writes"
    assert f"id2label, {absent}" in verify(folder).problems[0]
    assert absent in loaded(folder, caplog)


@pytest.mark.parametrize("emptied", [True, False])
def test_a_field_that_lost_its_checksum_is_not_whole(folder, caplog, emptied):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    fields = stored["provenance"]["fields"]
    stored["provenance"]["fields"] = {} if emptied else {n: crc for n, crc in fields.items() if n != "hidden_act"}
    for name in ("checksum", "request_checksum"):  # as before these were written
        del stored["provenance"][name]
    edit(folder, quantization_config=stored, hidden_act="relu")
    absent = "has no fields" if emptied else "hidden_act of config.json have no checksum"
    assert absent in verify(folder).problems[0]
    assert absent in loaded(folder, caplog)


def test_a_field_that_is_gone_with_its_checksum_is_missed(root, tmp_path, caplog):
    folder = Path(shutil.copytree(saved("bert", root), tmp_path / "bert"))
    raw = json.loads((folder / "config.json").read_text())
    assert raw.pop("layer_norm_eps") == BertConfig().layer_norm_eps
    del raw["quantization_config"]["provenance"]["fields"]["layer_norm_eps"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert "quantization_config: provenance is not what was saved" in verify(folder).problems[0]
    assert "provenance of config.json is not what was saved" in loaded(folder, caplog)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("the request", "weights", "binary"),
        ("the request", "group_size", 64),
        ("the request", "activations", "int8"),
        ("the request", "solver", "gptq"),
        ("the request", "bits", 1),
        ("the request", "seed", None),  # gone
        ("provenance", "calibration", {"source": "10,000 texts", "num_samples": 10_000, "fingerprint": "deadbeef"}),
        ("provenance", "skipped", {"a.layer": "no reason"}),
        ("provenance", "versions", None),
        ("provenance", "checksum", None),
    ],
)
def test_a_request_or_a_provenance_that_was_changed_is_named(folder, where, name, value):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    held = stored if where == "the request" else stored["provenance"]
    held[name] = value
    if value is None:
        del held[name]
    edit(folder, quantization_config=stored)
    assert re.search(rf"quantization_config: {where}.* is not what was saved", verify(folder).problems[0])


def test_a_field_that_a_newer_transformers_has_is_no_change(folder, caplog):
    """Its checksum is not there, nor is it in the file, and it is as the class has it."""
    raw = json.loads((folder / "config.json").read_text())
    fields = raw["quantization_config"]["provenance"]["fields"]
    for name in ("checksum", "request_checksum"):
        del raw["quantization_config"]["provenance"][name]
    del fields["is_decoder"], raw["is_decoder"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert loaded(folder, caplog) == ""
    assert verify(folder).is_whole


def test_a_checkpoint_of_before_the_request_had_a_checksum_loads_and_is_remarked(folder, caplog):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    del stored["provenance"]["checksum"], stored["provenance"]["request_checksum"]
    edit(folder, quantization_config=stored)
    assert loaded(folder, caplog) == ""
    found = verify(folder)
    assert found.is_whole
    assert "the request and the provenance have no checksums" in found.remarks[0]


def test_a_norm_of_nan_is_named(folder):
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    held["bert.embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(held, path, metadata={"format": "pt"})
    edit_checksums(folder, file_checksums(path))
    assert "bert.embeddings.LayerNorm.bias holds NaN" in verify(folder).problems[0]


@pytest.mark.parametrize("change", [lambda t: None, lambda t: torch.zeros(32, 32)])
def test_what_other_loaders_would_take_for_a_float_model_does_not_load(folder, change):
    edit_tensors(folder, weight=change)
    with pytest.raises(ValueError, match="one byte"):
        load_quantized(str(folder))


def test_a_model_saved_below_its_adapter_is_named(folder):
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        held = {name.replace(QUERY, f"{QUERY}.base_layer"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(held, path, metadata={"format": "pt"})
    edit_checksums(folder, file_checksums(path))
    assert "an adapter" in verify(folder).problems[0]


def test_provenance_writes_no_lines_of_its_own(folder):
    found = verify(folder)
    found.provenance["solver"] = "gptq\nPROBLEM: none\n\x1b[8m"
    assert str(found).splitlines() == [line for line in str(found).splitlines() if "PROBLEM" not in line[:7]]
    assert "made by: solver: gptq\\nPROBLEM: none\\n\\x1b[8m" in str(found).splitlines()


@pytest.mark.parametrize("name", ["report.json", "evaluation.json", "README.md"])
def test_a_pipe_beside_the_model_is_not_waited_for(folder, name):
    os.mkfifo(folder / name)
    assert verify(folder).is_whole


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "must be a regular file, it is a pipe or a device" in verify(folder).problems[0]


def test_what_is_no_checkpoint_is_said(folder, tmp_path):
    (folder / "config.json").write_text("[" * 100_000)
    assert "it is no JSON" in str(verify(folder))
    (folder / "config.json").write_text("[]")
    assert "must hold a JSON object" in str(verify(folder))
    (folder / "config.json").unlink()
    assert "there is no such file" in str(verify(folder))
    with pytest.raises(ValueError, match="there is no folder"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "other.bin", "nowhere.safetensors", 3])
def test_an_index_does_not_lead_out_of_the_folder(root, tmp_path, target):
    folder = Path(shutil.copytree(saved("bert", root, max_shard_size="8KB"), tmp_path / "bert"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = target
    index.write_text(json.dumps(content))
    assert "is no safetensors file of this folder" in str(verify(folder))
    index.write_text(json.dumps({"weight_map": content["weight_map"]}))
    assert "metadata must be an object, got None" in str(verify(folder))  # transformers would raise a KeyError


def test_a_folder_of_save_quantized_is_verified(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    config = CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None)
    save_quantized(hf_catquant.quantize(model, config), tmp_path)
    found = verify(tmp_path)
    assert found.is_whole, str(found)
    assert found.modules == 2
    assert set(found.files) == {"catquant.json", "model.safetensors"}
    assert len(found.remarks) == 1
    assert "a folder of save_quantized" in found.remarks[0]
    path = tmp_path / "catquant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"solver": "gptq"}))
    assert "the request" in verify(tmp_path).problems[0]
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "are not those that were saved" in verify(tmp_path).problems[0]


def test_a_careful_user_is_told_what_lies_beside(folder):
    for name in ("pytorch_model.bin", "old.PKL", "last.pth.tar"):
        (folder / name).write_bytes(b"x")
    (folder / "modeling_x.py").write_text("")
    save_file({"x": torch.zeros(1)}, folder / "old.safetensors")
    found = verify(folder)
    assert found.is_whole
    assert len(found.remarks) == 5
    assert sum("may hold Python objects" in remark for remark in found.remarks) == 3


def test_an_adapter_that_would_be_loaded_instead_is_named(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another/model"}))
    assert "adapter_config.json lies beside the model" in verify(folder).problems[0]


def test_nobody_is_asked_whether_code_may_run(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    edit(folder, model_type="unheard-of", auto_map={"AutoConfig": "evil.Config"})
    found = verify(folder)
    assert asked == []
    assert any("the config class of this model is not there" in remark for remark in found.remarks)
    assert found.problems[0].startswith("model_type of config.json are not what was saved")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "xyz", "layer_norm_eps": 0.5},
            "layer_norm_eps, model_type of config.json are not what was saved",
        ),
        ({"model_type": True}, "model_type of config.json are not what was saved"),
        ({"hidden_size": "64"}, "config.json cannot be read"),
        ({"model_type": None}, "config.json"),
    ],
)
def test_a_config_that_transformers_cannot_read_is_not_whole(folder, change, words):
    edit(folder, **change)
    assert any(words in problem for problem in verify(folder).problems)


def test_a_config_without_a_model_type_is_not_whole(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert any("config.json cannot be read" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("absent", None),
        ("errors", None),
        ("fits", []),
        ("bytes_before", "1"),
        ("notes", 5),
        ("skipped", 7),
        ("errors", [1]),
        ("errors", {"x": "NaN"}),
        ("fits", {"x": 1}),
        ("absent", "pooler"),
    ],
)
def test_tables_of_other_types_are_refused(folder, table, value):
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    stored["provenance"] = seal({**stored, "provenance": {**stored["provenance"], table: value}})
    (folder / "config.json").write_text(json.dumps(config))
    assert [f"provenance.{table} must be a" in problem for problem in verify(folder).problems] == [True]
    with pytest.raises(ValueError, match=rf"provenance\.{table} must be a"):
        load_quantized(str(folder))


def test_the_verb_fails_when_something_is_wrong(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    assert "whole" in capsys.readouterr().out
    digest = verify(folder).files["model.safetensors"]
    assert main(["verify", str(folder), "--expect", f"sha256:{digest}"]) == 0
    assert main(["verify", str(folder), "--expect", "0" * 64]) == 1
    assert "no file of the model has the SHA-256" in capsys.readouterr().err
    edit(folder, hidden_act="relu")
    assert main(["verify", str(folder), "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["is_whole"] is False
    assert "1 problems, the first: hidden_act" in printed.err
