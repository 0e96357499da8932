"""Push, load by id and `pipeline` by id against a Hub in memory; the model card and its metadata."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForAudioClassification, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import fake_hub
import tiny_models
from hf_catquant.card import _task, model_card
from hf_catquant.cli import main
from hf_catquant.tasks import auto_class

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


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_report_that_is_missing_is_made_from_the_model(copy):
    before = json.loads((copy / "report.json").read_text())
    (copy / "report.json").unlink()
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 0
    after = json.loads((copy / "report.json").read_text())
    assert after == {name: value for name, value in before.items() if name not in ("model", "command")}
    assert "catquant quantize" not in ModelCard.load(copy / "README.md").content


def test_an_evaluation_of_another_model_is_refused(copy, capsys):
    edit(copy / "evaluation.json", lambda table: table["rows"][-1].update(bytes=1))
    assert main(["push", str(copy), "me/tiny", "--dry-run"]) == 1
    assert "evaluation.json is of another model: it has 1 bytes" in capsys.readouterr().err


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
    assert _task(architecture) == ("audio-classification" if sound else "text-classification")
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
        name = "model.safetensors"
        hub.repos["me/tiny"].files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        code = "import sys; from hf_catquant.cli import main; sys.exit(1 - main(['verify', 'me/tiny']))"
        assert "are not those that were saved" in process(code, **hub.environment(str(tmp_path / "third")))
