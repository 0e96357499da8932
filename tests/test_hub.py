"""Push, load by id and `pipeline` by id against a Hub in memory; the model card and its metadata."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoModelForAudioClassification, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import fake_hub
import hf_catquant
import tiny_models
from hf_catquant import CatQuantConfig
from hf_catquant.card import model_card
from hf_catquant.card_usage import task_of
from hf_catquant.card_usage import usage as usage_of
from hf_catquant.cli import main
from hf_catquant.describing import describe
from hf_catquant.hub import push
from hf_catquant.identity import identity
from hf_catquant.integrity import sha256
from hf_catquant.tasks import auto_class
from hf_catquant.verify import verify

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of texts, quantized and evaluated as users do it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("hub")
    known = {word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_models.build("bert").save_pretrained(root / "float")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_max_length=64)
    tokenizer.save_pretrained(root / "float")
    picks = torch.randint(len(WORDS), (24, 8), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(WORDS[i] for i in row) for row in picks]
    pd.DataFrame({"text": texts, "label": [i % 5 for i in range(24)]}).to_parquet(root / "rows.parquet")
    out, rows = str(root / "out"), ["--dataset", str(root / "rows.parquet"), "--column", "text"]
    assert main(["quantize", str(root / "float"), out, "--group-size", "16", "--batch-size", "4", *rows]) == 0
    evaluate = ["eval", out, "--float", str(root / "float"), *rows, "--dataset-name", "twenty-four rows"]
    assert main([*evaluate, "--json", f"{out}/evaluation.json"]) == 0
    return root / "out"


@pytest.fixture
def undrawn(monkeypatch):
    """Plots that are not looked at are not drawn, which takes a second."""
    for name in ("draw_errors", "draw_sizes"):
        monkeypatch.setattr(f"hf_catquant.describing.{name}", lambda content, path: path.write_bytes(b"drawn"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_card_says_what_was_measured(copy):
    assert main(["push", str(copy), "me/tiny", "--dry-run", "--base-model", "you/float", "--license", "mit"]) == 0
    card = ModelCard.load(copy / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("you/float", "quantized")
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-classification"
    assert data["license"] == "mit"
    assert {"catquant", "ternary"} <= set(data["tags"])
    results = data["model-index"][0]["results"][0]
    assert results["dataset"]["name"] == "twenty-four rows (24 rows)"
    table = json.loads((copy / "evaluation.json").read_text())
    assert [m["value"] for m in results["metrics"]] == [round(r["metric"] / 100, 4) for r in table["rows"]]
    assert all("95 % interval" in metric["name"] for metric in results["metrics"])
    report = json.loads((copy / "report.json").read_text())
    config = json.loads((copy / "config.json").read_text())["quantization_config"]
    for text in (
        f"{report['coverage']:.2f} %",
        f"{report['bits_per_parameter']:.3f}",
        config["provenance"]["calibration"]["fingerprint"],
        "catquant quantize float out --group-size 16",
        'pipeline("text-classification", model="me/tiny")',
        "![accuracy](accuracy.png)",
        "## Limits",
    ):
        assert text in card.content
    assert str(copy.parent) not in card.content
    assert (copy / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_not_measured_is_said(copy):
    (copy / "evaluation.json").unlink()
    card = model_card(copy)
    assert "It was not evaluated" in card.content
    assert "Its quality was not measured" in card.content
    assert not {"model-index", "base_model"} & card.data.to_dict().keys()


@pytest.fixture
def bare(tmp_path):
    """A folder of a tiny model that was quantized without data."""

    def make(name: str) -> Path:
        config = CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None)
        model = hf_catquant.quantize(tiny_models.build(name), config)
        model.save_pretrained(tmp_path / name)
        report = {**hf_catquant.report(model).to_dict(), **identity(model)}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        return tmp_path / name

    return make


def usage(folder: Path) -> str:
    """The Python of a card that says how to load the model from this very folder."""
    return re.search(r"```python\n(from transformers.*?)```", model_card(folder, str(folder)).content, re.S)[1]


def test_a_card_of_a_model_without_data_speaks_of_none(bare):
    content = model_card(bare("bert")).content
    assert "from the float model alone, without data." in content
    assert "relative squared error of their weight:" in content
    assert "No calibration data was used." in content
    assert not re.search("samples|on the calibration data", content)


@pytest.mark.parametrize("name", ["bert", "ast", "clip", "t5"])
def test_the_usage_of_a_card_can_be_followed(bare, name):
    """No tokenizer and no processor: the class, with its head."""
    folder, found = bare(name), {}
    exec(usage(folder), found)
    assert type(found["model"]) is type(tiny_models.build(name))


def test_the_usage_of_a_card_with_a_tokenizer_is_a_pipeline(copy):
    found: dict = {}
    exec(usage(copy), found)
    assert found["run"]("w1 w2")[0]["label"].startswith("class ")


def test_a_pipeline_is_offered_where_there_is_one(copy, tmp_path):
    config = {"architectures": ["BertForQuestionAnswering"]}
    assert "BertForQuestionAnswering.from_pretrained" in usage_of(copy, config, "question-answering", "me/x")
    custom = {"architectures": ["KWT"], "auto_map": {"AutoConfig": "k.C", "AutoModelForAudioClassification": "k.KWT"}}
    said = usage_of(tmp_path, custom, "audio-classification", "me/x")
    assert 'AutoModelForAudioClassification.from_pretrained("me/x", trust_remote_code=True)' in said
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert 'pipeline("audio-classification"' in usage_of(tmp_path, custom, "audio-classification", "me/x")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("bytes_after", lambda report: report.update(bytes_after=1)),
        ("bytes_before", lambda report: report.update(bytes_before=10 * report["bytes_before"])),
        ("bits of", lambda report: report["layers"][0].update(bits=1.0)),
        ("error of", lambda report: report["layers"][0].update(error=0.0)),
        ("layer ", lambda report: report["layers"][0].update(weights="binary")),
        ("layers", lambda report: report["layers"].pop()),
        ("notes", lambda report: report.update(notes=["all is well"])),
        ("quantized_parameters", lambda report: report.update(quantized_parameters=1)),
    ],
)
def test_a_report_that_the_checkpoint_contradicts_is_refused(copy, field, change):
    edit(copy / "report.json", change)
    with pytest.raises(ValueError, match=rf"report\.json is not a report of this checkpoint: {field}"):
        model_card(copy)


def test_a_card_does_not_print_a_request_that_was_changed(copy):
    assert "cannot be told" not in model_card(copy).content
    assert "`tokenizer.json`, `tokenizer_config.json` with the SHA-256" in model_card(copy).content
    edit(copy / "config.json", lambda config: config["quantization_config"].update(weights="binary", group_size=-1))
    with pytest.raises(ValueError, match=r"the request .* is not what was saved"):
        model_card(copy)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_is_missing_is_made_from_the_model(copy):
    before = json.loads((copy / "report.json").read_text())
    (copy / "report.json").unlink()
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 0
    after = json.loads((copy / "report.json").read_text())
    assert after == {name: value for name, value in before.items() if name not in ("model", "command")}
    assert "catquant quantize" not in ModelCard.load(copy / "README.md").content


@pytest.fixture
def other(folder, tmp_path) -> Path:
    """The same model in the same format and bytes, of other weights, saved over a folder that was evaluated."""
    out = tmp_path / "other"
    shutil.copytree(folder, out)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    model.classifier.bias.data += 1
    model.save_pretrained(out)
    return out


@pytest.mark.usefixtures("undrawn")
def test_what_speaks_of_another_checkpoint_is_not_on_the_card(other, copy, capsys):
    dry = ["push", str(other), "me/tiny", "--dry-run"]
    remarks = [f"{name} speaks of another checkpoint" for name in ("report.json", "evaluation.json")]
    remarks.append(
        "tokenizer.json, tokenizer_config.json were not checked: no report.json of this checkpoint has their SHA-256"
    )
    assert verify(other).remarks == remarks
    said = {"evaluation": "evaluate again, catquant eval", "report": "is the report of another checkpoint"}
    for name, message in said.items():
        before = sorted(path.name for path in other.iterdir())
        assert main(dry) == 1
        printed = capsys.readouterr().err
        assert f"{name}.json" in printed
        assert message in printed
        assert sorted(path.name for path in other.iterdir()) == before
        (other / f"{name}.json").unlink()
    assert main([*dry, "--evaluation", str(copy / "evaluation.json")]) == 1
    assert not (other / "evaluation.json").exists()
    assert main(dry) == 0
    assert "It was not evaluated" in (other / "README.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_file_that_does_not_say_its_checkpoint(copy, other, capsys):
    """What this package wrote before: a report is told by its layers and errors, an evaluation by nothing."""
    for folder in (copy, other):
        for name in ("report.json", "evaluation.json"):
            edit(folder / name, lambda content: content.pop("entries_checksum"))
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 1
    assert "it has no entries_checksum" in capsys.readouterr().err
    (copy / "evaluation.json").unlink()
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 0
    edit(copy / "report.json", lambda report: report["layers"][0].update(error=0.5))
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 1
    assert "is the report of another checkpoint (it has no entries_checksum" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_an_overwritten_folder_keeps_no_evaluation_of_what_was_there(copy, folder, caplog):
    caplog.set_level("WARNING", logger="hf_catquant")
    words = [
        "quantize",
        str(folder.parent / "float"),
        str(copy),
        "--overwrite",
        "--solver",
        "rtn",
        "--correction",
        "none",
    ]
    (copy / "accuracy.png").write_bytes(b"of the old one")
    assert main(words) == 0
    assert not {"evaluation.json", "accuracy.png"} & {path.name for path in copy.iterdir()}
    assert "evaluation.json is removed: it speaks of the model that was in this folder before" in caplog.text
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 0
    checksum = json.loads((copy / "config.json").read_text())["quantization_config"]["entries_checksum"]
    (copy / "evaluation.json").write_text(json.dumps({"entries_checksum": checksum}))
    assert main(words) == 0  # the same weights again
    assert (copy / "evaluation.json").is_file()


def test_a_command_that_reads_and_writes_folders_of_one_name_can_be_followed(folder, tmp_path):
    words = ["--weights", "int4", "--solver", "rtn", "--correction", "none"]
    assert main(["quantize", str(folder.parent / "float"), str(tmp_path / "float"), *words]) == 0
    command = json.loads((tmp_path / "float" / "report.json").read_text())["command"]
    assert command == "catquant quantize float float-int4 --weights int4 --solver rtn --correction none"


@pytest.mark.usefixtures("undrawn")
def test_a_card_says_where_the_float_model_comes_from(copy):
    words = ["--base-model", "you/parent", "--relation", "finetune", "--origin", "It was fine-tuned on rows."]
    assert main(["push", str(copy), "me/tiny", "--dry-run", *words]) == 0
    card = ModelCard.load(copy / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("you/parent", "finetune")
    assert "of a fine-tune of [you/parent]" in card.content
    assert card.content.count("It was fine-tuned on rows.") == 1
    assert "# float, ternary" in card.content


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["noslash", "a/b/c", "no//id", "a/.b", "a/b--c", ""])
def test_a_name_that_the_hub_would_not_take_is_refused_before_anything_is_written(copy, capsys, name):
    assert main(["push", str(copy), name, "--dry-run"]) == 1
    assert f"repo must be a Hub id like owner/name, got {name!r}" in capsys.readouterr().err
    assert not (copy / "README.md").exists()


@pytest.fixture
def hub(monkeypatch):
    """A Hub for this very process."""
    with fake_hub.running() as hub:
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_nothing")
        yield hub


@pytest.mark.usefixtures("undrawn")
def test_a_variant_is_pushed_and_taken_away(copy, tmp_path, hub, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_catquant"), "propagate", True)
    model, folders = AutoModelForSequenceClassification.from_pretrained(copy), {"whole": copy}
    for name, options in (("one", {}), ("parts", {"max_shard_size": "8KB"})):
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name], variant="fp16", **options)
    for at, name in enumerate(("whole", "parts", "one", "whole")):
        caplog.clear()
        push(folders[name], "me/tiny")  # which makes the report that is missing
        assert ("loads with variant='fp16' only" in caplog.text) == (name != "whole")
        assert ('variant="fp16"' in (folders[name] / "README.md").read_text()) == (name != "whole")
        repo = hub.repos["me/tiny"]
        here = {path.name for path in folders[name].iterdir() if "safetensors" in path.name}
        assert {file for file in repo.files if "safetensors" in file} == here
        assert verify(hub.write("me/tiny", tmp_path / f"clone{at}")).is_whole


@pytest.mark.usefixtures("undrawn")
def test_a_push_leaves_no_weights_of_another_checkpoint(copy, tmp_path, hub):
    """Parts over whole, fewer parts over more, whole over parts: what loads is what was pushed, and the rest stays."""
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(copy)
    others = {"notes.md": b"x", "onnx/model.safetensors": b"x", "other.safetensors": b"x"}
    for at, size in enumerate((None, "8KB", "30KB", None)):
        pushed = copy
        if size is not None:
            pushed = tmp_path / size
            model.save_pretrained(pushed, max_shard_size=size)
            shutil.copy(copy / "report.json", pushed)
        push(pushed, "me/tiny")
        repo = hub.repos["me/tiny"]
        assert repo.commits == at + 1
        there = hub.write("me/tiny", tmp_path / f"clone{at}")
        weights = {name for name in repo.files if "safetensors" in name} - others.keys()
        assert weights == {path.name for path in pushed.iterdir() if "safetensors" in path.name}
        found = verify(there)
        assert found.is_whole, str(found)
        assert torch.equal(kind.from_pretrained(there).classifier.bias, model.classifier.bias)
        if at:
            assert others.items() <= repo.files.items()
        repo.files |= others
        repo.files["pytorch_model.bin"] = b"x"
    assert not any(name.startswith("model-") for name in repo.files)


@pytest.mark.usefixtures("undrawn")
def test_weights_that_an_older_save_left_in_the_folder_are_not_pushed(copy, hub):
    (copy / "model.safetensors.index.json").write_text("{}")
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"x")
    push(copy, "me/tiny")
    assert [name for name in hub.repos["me/tiny"].files if "safetensors" in name] == ["model.safetensors"]


SECRETS = [
    *[
        "x.joblib",
        "y.npy",
        "a.pth.tar",
        "b.PKL",
        "model.PT",
        "c.h5",
        "d.dill",
        "train.parquet",
        "notes.txt",
        "data.json",
    ],
    *["token.json", "api_tokens.json", "wandb_config.json", "train.py", "keys.model"],
    *[
        "other.safetensors",
        "checkpoint-1/model.safetensors",
        "checkpoint-1/optimizer.pt",
        "checkpoint-1/tokenizer.json",
        "1_Pooling/credentials_map.json",
        "my_tokenizer_backup/tokenizer.json",
    ],
]


@pytest.mark.usefixtures("undrawn")
def test_what_is_no_part_of_the_model_stays_here_and_is_named(copy, tmp_path, hub, caplog):
    caplog.set_level("WARNING", logger="hf_catquant")
    (tmp_path / "id_rsa").write_text("secret")
    (copy / "id_rsa").symlink_to(tmp_path / "id_rsa")
    (copy / "1_Linked").symlink_to(tmp_path)
    for name in (
        *SECRETS,
        "additional_chat_templates/rag.jinja",
        "1_Pooling/config.json",
        "source.spm",
        "modeling_x.py",
    ):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"{}")
    edit(copy / "config.json", lambda config: config.update(auto_map={"AutoModel": "modeling_x.X"}))
    (copy / "modeling_x.py").write_text("from .helper_x import Y")
    (copy / "helper_x.py").write_text("Y = 1")
    push(copy, "me/tiny")
    files = hub.repos["me/tiny"].files
    own = {
        "config.json",
        "model.safetensors",
        "README.md",
        "accuracy.png",
        "errors.png",
        "evaluation.json",
        "report.json",
    }
    beside = {
        "tokenizer.json",
        "tokenizer_config.json",
        "source.spm",
        "modeling_x.py",
        "helper_x.py",
        "1_Pooling/config.json",
    }
    assert files.keys() == own | beside | {"additional_chat_templates/rag.jinja"}
    said = next(record.getMessage() for record in caplog.records if "not uploaded" in record.getMessage())
    assert all(name in said for name in ("1_Linked/", "a.pth.tar", "b.PKL", "data.json", "id_rsa"))
    assert said.endswith("and 11 more")  # of twenty-one; the folder counts once
    (copy / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ValueError, match=r"vocab\.txt is a link out of the folder"):
        push(copy, "me/tiny")
    assert hub.repos["me/tiny"].commits == 1


@pytest.mark.usefixtures("undrawn")
def test_a_push_leaves_no_tokenizer_of_another_model(copy, hub, caplog):
    push(copy, "me/tiny")
    hub.repos["me/tiny"].files |= {
        "source.spm": b"x",
        "1_Pooling/config.json": b"{}",
        "notes.md": b"x",
        "data.csv": b"x",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "evaluation.json"):
        (copy / name).unlink()
    caplog.set_level("WARNING", logger="hf_catquant")
    push(copy, "me/tiny")
    files = hub.repos["me/tiny"].files
    gone = {"tokenizer.json", "tokenizer_config.json", "evaluation.json", "source.spm", "1_Pooling/config.json"}
    assert not gone & files.keys()
    assert {"notes.md", "data.csv"} <= files.keys()
    assert all(name in caplog.text for name in gone)
    assert hub.repos["me/tiny"].commits == 2


def test_a_tokenizer_that_was_changed_is_named(copy):
    assert verify(copy).is_whole
    assert not verify(copy).remarks
    edit(copy / "tokenizer.json", lambda content: content["model"]["vocab"].update(w1=4, w2=3))
    assert verify(copy).problems[0].startswith("tokenizer.json: not what was written, by the SHA-256 in report.json")
    (copy / "tokenizer.json").unlink()
    (copy / "source.spm").write_bytes(b"of another model")
    found = verify(copy)
    assert found.is_whole
    assert found.remarks == [
        "tokenizer.json: gone, report.json has its SHA-256",
        "source.spm came after report.json was written, which has no SHA-256 of it: it may be another model's",
    ]


def test_a_push_that_cannot_ask_is_a_runtime_error(copy, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (copy / "README.md").write_text("# Mine\n")
    with pytest.raises(RuntimeError, match="the Hub did not take me/tiny"):
        push(copy, "me/tiny", keep_card=True)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("license: mit", "license: [1]"), '"license" must be'),
        (("base_model_relation: quantized", "base_model_relation: smaller"), '"base_model_relation" must be one of'),
        (("base_model: you/float", "base_model: you//float"), '"base_model" must be a model id'),
        (("library_name: transformers", "library_name: [transformers"), "bad YAML"),
        (("tags:", "tags: catquant\nmore:"), '"tags" must be a list of strings'),
        (("  - type: accuracy", "  - kind: accuracy"), '"model-index" cannot be read'),
    ],
)
def test_a_card_that_the_hub_does_not_take_is_said(copy, hub, capsys, change, message):
    assert main(["push", str(copy), "me/tiny", "--dry-run", "--base-model", "you/float", "--license", "mit"]) == 0
    card = copy / "README.md"
    text = card.read_text()
    assert change[0] in text
    assert fake_hub.complaints(text) == ([], [])
    card.write_text(text.replace(*change, 1))
    assert main(["push", str(copy), "me/tiny", "--keep-card"]) == 1
    assert message in capsys.readouterr().err
    assert not hub.repos["me/tiny"].files


@pytest.mark.usefixtures("undrawn")
def test_a_kept_card_of_another_checkpoint_is_refused(copy, hub, capsys):
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(copy)
    model.classifier.bias.data += 1
    model.save_pretrained(copy)
    assert main(["push", str(copy), "me/tiny", "--keep-card"]) == 1
    assert "is the card of another checkpoint" in capsys.readouterr().err
    assert "README.md is the card of another checkpoint" in verify(copy).remarks
    (copy / "README.md").write_text("# Mine\n")
    assert main(["push", str(copy), "me/tiny", "--keep-card"]) == 0


@pytest.mark.parametrize(
    ("damage", "words", "message"),
    [
        (lambda f: edit(f / "report.json", lambda r: r.pop("layers")), [], "the report is not one that this version"),
        (
            lambda f: edit(f / "evaluation.json", lambda t: t.pop("n")),
            [],
            "the evaluation is not one that this version",
        ),
        (lambda f: None, ["--base-model", "nothing"], "base_model must be a Hub id like owner/name, got 'nothing'"),
        (lambda f: None, ["--evaluation", "nowhere.json"], "--evaluation: there is no file nowhere.json"),
    ],
)
def test_a_card_that_cannot_be_made_is_one_line(copy, capsys, damage, words, message):
    damage(copy)
    assert main(["push", str(copy), "me/tiny", "--dry-run", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (copy / "README.md").exists()


def test_a_damaged_folder_is_not_pushed(copy, capsys):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert main(["push", str(copy), "me/tiny"]) == 1
    assert "is not pushed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wav2vec2", "bert", "ast"])
def test_the_task_of_a_sound_classifier_is_not_that_of_a_text(name):
    architecture = type(tiny_models.build(name)).__name__
    sound = name != "bert"
    assert task_of(architecture) == ("audio-classification" if sound else "text-classification")
    config = tiny_models.build(name).config
    config.architectures = [architecture]
    auto = AutoModelForAudioClassification if sound else AutoModelForSequenceClassification
    assert auto_class(config) is auto


def test_the_cards_of_the_repository_are_of_this_template():
    assert (ROOT / "model_cards" / "TEMPLATE.md").read_text() == (
        ROOT / "hf_catquant" / "card_template.md"
    ).read_text()
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    assert len(cards) >= 4
    for path in cards:
        card = ModelCard.load(path)
        assert card.data.library_name == "transformers"
        assert {"catquant", "quantized"} <= set(card.data.tags)
        assert {metric["value"] for metric in card.data.to_dict()["model-index"][0]["results"][0]["metrics"]}
        assert all((path.parent / f"{plot}.png").is_file() for plot in ("accuracy", "errors"))
        assert all(f"## {part}" in card.content for part in ("Use", "What it cost", "How it was made", "Limits"))


def test_the_next_cards_say_where_their_float_models_come_from(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cards = importlib.import_module("cards")
    assert cards.FACTS.keys() == {case.model for case in (*cards.CASES, cards.DIGITS)}
    assert all(facts.base_model or facts.origin for facts in cards.FACTS.values())
    assert all(facts.origin for facts in cards.FACTS.values() if facts.relation != "quantized")


PUSH = """
import sys, json
from pathlib import Path
from transformers import AutoModelForSequenceClassification as Auto
import hf_catquant
from hf_catquant.cli import main
from hf_catquant.tasks import auto_class
folder, shards = sys.argv[1:]
assert main(["push", folder, "me/tiny", "--base-model", "you/float"]) == 0
model = Auto.from_pretrained(folder)
model.push_to_hub("me/tiny", tags=["later"])
model.push_to_hub("me/bare")
model.save_pretrained(shards, max_shard_size="8KB")
(Path(shards) / "report.json").write_bytes((Path(folder) / "report.json").read_bytes())
assert main(["push", shards, "me/sharded"]) == 0
assert main(["verify", "me/sharded"]) == 0
assert main(["push", folder, "no//id"]) == 1
"""
LOAD = f"""
import site, sys; site.addsitedir({str(ROOT)!r})
from transformers import AutoModelForSequenceClassification as Auto, pipeline
import json
for repo in ("me/tiny", "me/bare", "me/sharded"):
    try:
        if repo == "me/tiny":
            print(json.dumps(pipeline("text-classification", repo)("w1 w2 w3 w4")))
        else:
            print(type(Auto.from_pretrained(repo).classifier).__name__)
    except Exception as error:
        print("REFUSED", type(error).__name__)
"""


def process(code: str, *words: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=400, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_push_then_load_and_pipeline_by_id(copy, tmp_path):
    (copy / "pytorch_model.bin").write_bytes(b"never uploaded")
    # A tokenizer with code of its own writes files under names that nobody knows: the report has them.
    (copy / "ice_text.model").write_bytes(b"words")
    edit(copy / "report.json", lambda said: said["files"].update({"ice_text.model": sha256(copy / "ice_text.model")}))
    with fake_hub.running() as hub:
        there = hub.environment(str(tmp_path / "cache"))
        process(PUSH, str(copy), str(tmp_path / "shards"), **there)
        files = hub.repos["me/tiny"].files
        assert {"README.md", "config.json", "model.safetensors", "report.json", "evaluation.json"} <= files.keys()
        assert {"tokenizer.json", "accuracy.png", "errors.png"} <= files.keys()
        assert "pytorch_model.bin" not in files
        card = ModelCard(files["README.md"].decode())
        assert card.data.base_model == "you/float"  # still ours, after model.push_to_hub
        assert {"catquant", "later"} <= set(card.data.tags)
        assert "POST /api/validate-yaml" in hub.requests
        assert sum(name.endswith(".safetensors") for name in hub.repos["me/sharded"].files) > 2
        fresh = hub.environment(str(tmp_path / "fresh"))
        (scores, *types) = process(LOAD, **fresh, CATQUANT_AUTOLOAD="1").splitlines()
        assert types == ["QuantizedLinear", "QuantizedLinear"]
        assert json.loads(scores)[0]["label"].startswith("class ")
        refused = process(LOAD, **fresh, CATQUANT_AUTOLOAD="0").splitlines()
        assert refused == [
            "REFUSED ValueError",
            "REFUSED RuntimeError",
            "REFUSED RuntimeError",
        ]  # pipeline wraps its own
        assert "catquant" in ModelCard(hub.repos["me/bare"].files["README.md"].decode()).data.tags
        assert files["ice_text.model"] == b"words"
        code = "import sys; from hf_catquant.cli import main; sys.exit(main(['verify', 'me/tiny']))"
        said = process(code, **hub.environment(str(tmp_path / "second")))
        assert "  ice_text.model" in said
        assert "gone" not in said
        name = "model.safetensors"
        hub.repos["me/tiny"].files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        code = "import sys; from hf_catquant.cli import main; sys.exit(1 - main(['verify', 'me/tiny']))"
        assert "are not those that were saved" in process(code, **hub.environment(str(tmp_path / "third")))


@pytest.mark.usefixtures("undrawn")
def test_an_adapter_in_the_repository_would_be_loaded_instead(copy, hub):
    push(copy, "me/tiny")
    hub.repos["me/tiny"].files["adapter_config.json"] = b"{}"
    with pytest.raises(ValueError, match=r"me/tiny has adapter_config\.json: .* delete it there, or push to another"):
        push(copy, "me/tiny")


@pytest.mark.usefixtures("undrawn")
def test_a_card_of_ones_own_is_not_replaced(copy, hub):
    (copy / "README.md").write_text("# mine")
    with pytest.raises(ValueError, match=r"README\.md was not made here, .*--keep-card"):
        push(copy, "me/tiny")
    assert (copy / "README.md").read_text() == "# mine"


@pytest.mark.usefixtures("undrawn")
def test_a_disk_that_is_full_leaves_the_report_as_it_was(copy, monkeypatch):
    """The one file that knows the command, the errors and the digests: cut, it would be no JSON any more."""
    before = (copy / "report.json").read_bytes()
    (copy / "merges.txt").write_text("a b")  # one more file that the report is to name
    write = Path.write_text

    def full(path: Path, text: str, **options: object) -> int:
        write(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"cannot write .*report\.json: the disk is full: free some space$"):
        describe(copy, "me/tiny")
    assert (copy / "report.json").read_bytes() == before
    assert not [path for path in copy.iterdir() if path.name.startswith(".report")]


def test_a_hub_that_is_not_there_is_a_runtime_error(copy, monkeypatch):
    def gone(*args: object, **kwargs: object) -> None:
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "create_repo", gone)
    with pytest.raises(RuntimeError, match=r"the Hub at http.* cannot be reached to take me/tiny: \[Errno -2\]"):
        push(copy, "me/tiny")


@pytest.mark.usefixtures("undrawn")
def test_files_that_only_the_user_knows_of_go_along_when_they_are_named(copy, hub, capsys):
    (copy / "own_words.lst").write_bytes(b"words")
    (copy / "custom_st.py").write_text("class Transformer: pass")
    (copy / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}]')
    (copy / "query_0_Transformer").mkdir()
    (copy / "query_0_Transformer" / "config.json").write_text("{}")
    assert main(["push", str(copy), "me/tiny", "--also", "own_words.lst"]) == 0
    assert {"own_words.lst", "custom_st.py", "modules.json", "query_0_Transformer/config.json"} <= hub.repos[
        "me/tiny"
    ].files.keys()
    push(copy, "me/tiny")  # the report knows it now
    assert "own_words.lst" in hub.repos["me/tiny"].files
    assert main(["push", str(copy), "me/tiny", "--also", "gone.txt"]) == 1
    assert "also must name files in" in capsys.readouterr().err
