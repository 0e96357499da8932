"""A quantized folder never loads wrongly: not without the package, not damaged, not incomplete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file

import tiny_models
from hf_catquant import CatQuantConfig
from hf_catquant.correction import corrections
from hf_catquant.resolve import resolve_corrections

CLOSED = ("bert", "llama_tied", "resnet", "whisper", "gpt2")
WITHOUT_IMPORT = """
import sys, transformers
for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, kind).from_pretrained(folder)
    except Exception as error:
        print(kind, "REFUSED", type(error).__name__)
    else:
        print(kind, "LOADED")
getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], ignore_mismatched_sizes=True)
print("RANDOM")
"""


def quantized(name: str, root: Path) -> Path:
    folder = root / name
    if not folder.exists():
        config = CatQuantConfig(weights="ternary", group_size=16, solver="rtn", correction=None)
        float_folder = tiny_models.folder_of(name, str(root / "float"))
        type(tiny_models.build(name)).from_pretrained(float_folder, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("closed")


def parts(root: Path) -> dict[str, str]:
    """Folders of a part of a quantized model, of one with a config of its own, and of a model around one; their classes."""
    text = tf.CLIPModel.from_pretrained(quantized("clip", root)).text_model
    pair = tf.BertConfig(**tiny_models.TEXT, is_decoder=True, add_cross_attention=True)
    encoder = tf.BertForSequenceClassification.from_pretrained(quantized("bert", root)).bert
    made = {
        "trunk": tf.LlamaForCausalLM.from_pretrained(quantized("llama_tied", root)).model,
        "text": text,
        "pair": tf.EncoderDecoderModel(encoder=encoder, decoder=tf.BertLMHeadModel(pair)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: type(model).__name__ for name, model in made.items()}


def test_without_the_package_loading_raises(root):
    """In one process of its own: most of the time is its start."""
    kinds = {name: type(tiny_models.build(name)).__name__ for name in CLOSED}
    kinds |= parts(root)
    command = [sys.executable, "-c", WITHOUT_IMPORT]
    for name, kind in kinds.items():
        command += [str(quantized(name, root)), kind]
    env = {**os.environ, "CATQUANT_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    said = done.stdout.splitlines()
    assert said[:-1] == [f"{kind} REFUSED RuntimeError" for kind in kinds.values()], done.stdout + done.stderr
    # SECURITY.md says what this option does to the first one: transformers' own doing.
    assert said[-1] == "RANDOM", "ignore_mismatched_sizes is harmless: say so in SECURITY.md"
    assert "MISMATCH" in done.stderr


@pytest.fixture
def folder(root, tmp_path) -> Path:
    return Path(shutil.copytree(quantized("bert", root), tmp_path / "bert"))


def load(folder: Path, **options):
    return type(tiny_models.build("bert")).from_pretrained(folder, **options)


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


CODES = "bert.encoder.layer.0.attention.self.query.weight_packed"


def test_a_flipped_bit_in_codes_is_named(folder):
    def flip(tensors):
        tensors[CODES][0, 0] ^= 1

    edit_tensors(folder, flip)
    with pytest.raises(ValueError, match=rf"tensor '{CODES}' are not those that were saved"):
        load(folder)


def test_a_flipped_bit_anywhere_in_the_file_is_noticed(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in (3, 100, start + 5, (start + len(data)) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|missing|unexpected|not those"):
            load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(Exception, match=r"truncated|damaged|HeaderToo|header|metadata"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(CODES))
    with pytest.raises(ValueError, match=f"missing tensors: {CODES}"):
        load(folder)


def test_an_extra_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="unexpected tensors: extra"):
        load(folder)


def test_another_shape_of_the_model_is_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] = 56
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"stores a weight of shape \[48, 32\], the model expects \[56, 32\]"):
        load(folder)


def test_mis_shaped_codes_with_matching_checksums_are_refused(folder):
    from hf_catquant.integrity import file_checksums

    edit_tensors(folder, lambda tensors: tensors.update({CODES: tensors[CODES][:, :-1].contiguous()}))
    resigned(folder, lambda config: config.update(checksums=file_checksums(folder / "model.safetensors")))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)


def test_bytes_that_no_code_packs_to_are_refused(folder):
    from hf_catquant.integrity import file_checksums

    def damage(tensors):
        tensors[CODES][0, 0] = 250

    edit_tensors(folder, damage)
    resigned(folder, lambda config: config.update(checksums=file_checksums(folder / "model.safetensors")))
    with pytest.raises(ValueError, match="packed ternary byte must be at most 242, got 250"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"colour": "red"}, "no field 'colour'"),
        ({"modules": None}, "no 'modules'"),
        ({"checksums": {}}, "checksums are not those that were saved"),
        ({"weights": "int5"}, "weights must be one of"),
    ],
)
def test_a_changed_config_is_refused(folder, change, message):
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        load(folder)


CHANGED = "modules, corrections and checksums are not those that were saved .* config.json was changed"
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "modules.*query'.: group_size must be -1 or a positive multiple of 8, got 0"),
        ({"group_size": "x"}, "group_size must be -1 or a positive multiple of 8, got 'x'"),
        ({"group_size": 32}, CHANGED),
        ({"weights": "int2"}, CHANGED),
        (
            {"tied_to": "classifier"},
            "tied_to must be one of null, another of its modules of the same shape; got 'clas",
        ),
        ({"tied_to": f"{QUERY[:-5]}key"}, CHANGED),
        ({"weights": "int5"}, "weights must be one of binary.* got 'int5'"),
        ({"activations": "int5"}, "activations must be one of null"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of float16, float32; got 'float64'"),
        ({"shape": [0, "a"]}, "shape must be one of two positive integers"),
        ({"tied_to": "nobody"}, "tied_to must be one of null, another of its modules of the same shape; got 'nobody'"),
        ({"colour": "red"}, "must have activations, .*, got activations, colour"),
    ],
)
def test_a_damaged_entry_is_named(folder, change, message):
    edit_config(folder, lambda config: config["modules"][QUERY].update(change))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": [1]}, r"modules must be \{name: entry\}, got \[1\]"),
        ({"modules": {}}, "modules is empty"),
        ({"entries_checksum": "x"}, "entries_checksum must be a CRC-32, got 'x'"),
        ({"checksums": [1]}, r"checksums must be \{tensor: CRC-32\}"),
        ({"corrections": [1]}, r"corrections must be \{name: entry\}"),
        ({"corrections": {"classifier": {"width": 2}}}, r"corrections\['classifier'\]: a stored correction must have"),
        (
            {"corrections": {"nobody": {"width": 2, "clusters": 1, "rank": None, "dim": -1}}},
            CHANGED,
        ),
    ],
)
def test_damaged_lists_are_refused(folder, change, message):
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("ignore", [False, True])
def test_an_entry_that_is_gone_is_missed(folder, ignore):
    edit_config(folder, lambda config: config["modules"].pop(QUERY))
    with pytest.raises(ValueError, match=CHANGED):
        load(folder, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_block_that_no_file_holds_is_missed(folder, ignore):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no tensor bert\.encoder\.layer\.\d\..* which this BertFor"):
        load(folder, ignore_mismatched_sizes=ignore)


def test_a_head_of_another_size_is_fresh_only_on_demand(folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder, num_labels=7)
    model = load(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert type(model.classifier) is torch.nn.Linear
    assert model.classifier.weight.shape[0] == 7
    assert model.classifier.weight.std() < 1  # of the initialisation, not memory as it was
    trunk, same = model.bert.state_dict(), load(folder).bert.state_dict()
    assert all(torch.equal(trunk[name], same[name]) for name in same)


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("bert", None), ("vit", "classifier")])
def test_the_correction_of_a_resized_head_is_left_out(name, head, root, tmp_path, caplog):
    cls = type(tiny_models.build(name))
    config = CatQuantConfig(
        group_size=16,
        correction={"num_clusters": 2, "alpha": 0.5},
        dataset=tiny_models.samples(name),
        batch_size=4,
        modules_to_not_convert=None if head is None else [head],
    )
    model = cls.from_pretrained(tiny_models.folder_of(name, str(root / "float")), quantization_config=config)
    assert list(corrections(model)) == ["classifier"]
    model.save_pretrained(tmp_path / "saved")
    caplog.set_level("WARNING", logger="hf_catquant")
    resized = cls.from_pretrained(tmp_path / "saved", num_labels=7, ignore_mismatched_sizes=True)
    assert not corrections(resized)
    assert "classifier: its correction is left out" in caplog.text
    assert tiny_models.main_output(resized(**tiny_models.batch(name))).shape[-1] == 7


def test_a_correction_that_does_not_fit_the_stored_head_is_refused():
    model = tiny_models.build("bert")
    wide = {"classifier": {"width": 7}}
    assert resolve_corrections(model, wide, filled=[], fresh=["classifier"]) == {}
    with pytest.raises(ValueError, match="the correction at classifier takes 7 features"):
        resolve_corrections(model, wide, filled=["classifier"], fresh=[])


def edit_field(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_same_bytes_as_another_dtype_are_another_tensor(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    changed = data.replace(b'"F16"', b'"I16"')
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="are not those that were saved"):
        load(folder)


def test_a_name_that_comes_twice_is_refused(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header = header[:-1] + b',"classifier.bias":' + json.dumps(json.loads(header)["classifier.bias"]).encode() + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(ValueError, match="a name is there twice"):
        load(folder)


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 0.5)])
def test_a_changed_field_that_changes_outputs_is_said(folder, caplog, field, value):
    edit_field(folder, **{field: value})
    caplog.set_level("WARNING", logger="hf_catquant")
    load(folder)
    assert f"{field} of config.json are not what was saved" in caplog.text


def test_fields_that_change_no_output_are_not_mentioned(folder, caplog):
    caplog.set_level("WARNING", logger="hf_catquant")
    edit_field(folder, use_cache=False, dtype="bfloat16")
    load(folder)
    assert "not what was saved" not in caplog.text
    names = {i: f"name {i}" for i in range(4)} | {4: "stage"}
    edit_field(folder, id2label=names, label2id={"stage": 10**6})  # the name of a class is no number of layers
    load(folder)
    assert "id2label, label2id of config.json are not what was saved" in caplog.text


def test_layers_without_end_are_refused_before_one_is_built(folder):
    edit_field(folder, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match=r"num_hidden_layers must be at most the \d+ tensors .* got 1000000000"):
        load(folder)


def test_more_classes_than_a_head_has_are_refused_before_a_module_is_built(folder, monkeypatch):
    """Whatever transformers then does with the table costs ten times as much as reading it did."""
    monkeypatch.setattr("hf_catquant.fields._MANY_LABELS", 50)
    load(folder, num_labels=90, ignore_mismatched_sizes=True)  # the largest layer has 96 rows
    kind = type(tiny_models.build("bert"))
    monkeypatch.setattr(kind, "__init__", None)
    with pytest.raises(ValueError, match=r"num_labels must be at most 96 for this checkpoint, got 97"):
        kind.from_pretrained(folder, num_labels=97)


def resigned(folder: Path, edit) -> None:
    """What an attacker does: change the entries, and make their checksum right again."""
    from hf_catquant.entries import entries_checksum

    def change(config):
        edit(config)
        config["entries_checksum"] = entries_checksum(config["modules"], config["corrections"], config["checksums"])

    edit_config(folder, change)


def test_entries_that_describe_more_than_the_files_hold_take_no_memory(folder):
    resigned(folder, lambda config: config["modules"][QUERY].update(low_rank=1 << 29))
    with pytest.raises(ValueError, match=r"describe 68,\d+,\d+,\d+ bytes, but the files of the checkpoint have"):
        load(folder)


def test_a_correction_larger_than_the_files_takes_no_memory(folder):
    huge = {"width": 5, "clusters": 1 << 24, "rank": 1 << 12, "dim": -1}
    resigned(folder, lambda config: config.update(corrections={"classifier": huge}))
    with pytest.raises(ValueError, match="but the files of the checkpoint have"):
        load(folder)


@pytest.mark.parametrize("tied", [["classifier"], "classifier"])
def test_a_weight_is_shared_by_its_like_only(folder, tied):
    resigned(folder, lambda config: config["modules"][QUERY].update(tied_to=tied))
    with pytest.raises(ValueError, match="tied_to must be one of null"):
        load(folder)


def test_a_weight_that_an_entry_does_without_is_missed(folder):
    resigned(folder, lambda config: config["modules"][QUERY].update(tied_to="bert.pooler.dense"))
    with pytest.raises(ValueError, match="checksums has 17 packed weights, modules describes 16"):
        load(folder)
