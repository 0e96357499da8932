"""The command line as its users meet it: what it writes, what it prints, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import tiny_models
from hf_catquant.cli import main
from hf_catquant.cli.quantize import _without_folder
from hf_catquant.demo import run_demo

WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, a tiny speech model without, and rows for both."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("cli")
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("llama_tied", "bert"):
        tiny_models.build(name).save_pretrained(root / name)
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_max_length=64).save_pretrained(
            root / name
        )
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (24, 8), generator=generator).tolist()
    rows = {"text": [" ".join(WORDS[i] for i in row) for row in picks], "label": [i % 5 for i in range(24)]}
    pd.DataFrame(rows).to_parquet(root / "rows.parquet")
    pd.DataFrame(rows | {"label": [f"class {i % 5}" for i in range(24)]}).to_csv(root / "rows.csv")
    return root


def command(folder: Path, out: Path, *more: str, model: str = "bert") -> list[str]:
    base = ["quantize", str(folder / model), str(out), "--group-size", "16", "--batch-size", "4", "--column", "text"]
    return [*base, "--dataset", str(folder / "rows.parquet"), *more]


def test_quantize_inspect_and_eval_of_a_classifier(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(folder, out)) == 0
    assert "parameters quantized" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["coverage"] > 90
    assert (out / "tokenizer.json").exists()
    assert main(["inspect", str(out)]) == 0
    assert "bert.encoder.layer.0.attention.self.query" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    test = [
        "eval",
        str(out),
        "--float",
        str(folder / "bert"),
        "--dataset",
        str(folder / "rows.csv"),
        "--column",
        "text",
    ]
    assert main([*test, "--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["n"] == 24
    assert (tmp_path / "t.md").read_text().startswith("| model | accuracy |")
    assert main([*test, "--discrimination", str(tmp_path / "layers.png"), "--json", str(tmp_path / "t.json")]) == 0
    assert re.search(r"bert\.encoder\.layer\.1( +0\.\d{4}){2}", capsys.readouterr().out)
    assert json.loads((tmp_path / "t.json").read_text())["by_layer"]["layers"][-1] == "head"
    assert (tmp_path / "layers.png").stat().st_size > 5000


def test_quantize_and_eval_of_a_language_model(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(folder, out, "--weights", "int4", model="llama_tied")) == 0
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.weight_packed is not None
    test = ["eval", str(out), "--float", str(folder / "llama_tied"), "--dataset", str(folder / "rows.parquet")]
    assert main([*test, "--column", "text", "--limit", "10"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main([*test, "--discrimination", str(tmp_path / "layers.png")]) == 1
    assert "--discrimination needs classes" in capsys.readouterr().err
    assert main([*test, "--discrimination", str(tmp_path / "layers.jpg")]) == 1
    assert "--discrimination must end in .png, .pdf, .svg, got" in capsys.readouterr().err


@pytest.mark.parametrize("data", [True, False])
def test_calibrated_on_texts_that_the_model_writes(folder, tmp_path, data):
    out = tmp_path / "out"
    base = ["quantize", str(folder / "llama_tied"), str(out), "--group-size", "16", "--generate", "12"]
    rows = ["--dataset", str(folder / "rows.parquet"), "--column", "text"] if data else []
    assert main([*base, *rows]) == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["calibration"]["num_samples"] == 12 + 24 * data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--generate", "4"], "BertForSequenceClassification does not write text from nothing"),
        (["--solver", "rtn", "--dataset", "nowhere.parquet"], "there is no file nowhere.parquet"),
        (["--dataset", "pyproject.toml"], "must end in .parquet"),
        (["--column", "nowhere"], "has no column 'nowhere'"),
        (
            ["--solver", "reconstruct", "--solver-options", "steps"],
            "--solver-options must be OPTION=NUMBER, got 'steps'",
        ),
        (["--solver-options", "block_steps=3"], "solver 'gptq' has no option block_steps"),
        (["--group-size", "20"], "group_size must be -1 or a positive multiple of 8, got 20"),
        (["--low-rank", "100000"], "low_rank must be at most 32, the smaller side of the largest layer"),
        (["--average-bits", "100"], "average_bits must be None or a number above 0 and below 100, got 100.0"),
        (["--skip", "nowhere"], "'nowhere' matches no module"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, words, message):
    status = main(command(folder, tmp_path / "out", *words))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("catquant")]
    assert status == 1
    assert len(err) == 1
    assert message in err[0]


@pytest.mark.parametrize(("name", "content"), [("empty.csv", b"text,label\n"), ("broken.parquet", b"PAR1 cut")])
def test_a_file_without_rows_is_named(folder, tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert main(command(folder, tmp_path / "out", "--dataset", str(tmp_path / name))) == 1
    assert f"{name} has no rows" in capsys.readouterr().err


def test_what_is_quantized_already_is_refused(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "one", "--solver", "rtn", "--correction", "none")) == 0
    again = ["quantize", str(tmp_path / "one"), str(tmp_path / "two"), "--weights", "int8", "--solver", "rtn"]
    assert main([*again, "--correction", "none"]) == 1
    assert "is quantized already" in capsys.readouterr().err
    assert main(["plan", *again[1:2], "--solver", "rtn", "--correction", "none"]) == 1
    assert "is quantized already" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_the_column_of_labels_is_no_input(folder, tmp_path, capsys):
    rows = pd.read_csv(folder / "rows.csv").rename(columns={"text": "review", "label": "sentiment"})
    rows.to_csv(tmp_path / "pair.csv", index=False)
    both = []
    assert main(command(folder, tmp_path / "out", "--solver", "rtn", "--correction", "none")) == 0
    for more in ([], ["--column", "review"]):
        test = [
            "eval",
            str(tmp_path / "out"),
            "--float",
            str(folder / "bert"),
            "--dataset",
            str(tmp_path / "pair.csv"),
        ]
        assert main([*test, "--label-column", "sentiment", "--json", str(tmp_path / "t.json"), *more]) == 0
        both.append(json.loads((tmp_path / "t.json").read_text())["rows"])
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("--dataset=/home/alice/secret/train.jsonl", "--dataset=train.jsonl"),
        ("--data=~/secret/train.jsonl", "--data=train.jsonl"),
        ("~alice/secret/train.jsonl", "train.jsonl"),
        ("~alice", "~"),
        ("/", "."),
        ("../secret/train.jsonl", "train.jsonl"),
        ("secret/of/alice/train.jsonl", "train.jsonl"),
        ("--dataset=C:\\Users\\alice\\train.jsonl", "--dataset=train.jsonl"),
        ("C:/Users/alice/train.jsonl", "train.jsonl"),
        ("\\\\server\\alice\\train.jsonl", "train.jsonl"),
        ("--dataset=file:///home/alice/train.jsonl", "--dataset=train.jsonl"),
        ("--weights=int8", "--weights=int8"),
        ("block_steps=20", "block_steps=20"),
        ("--skip=lm_head", "--skip=lm_head"),
        ("org/model-7b", "org/model-7b"),
        ("--correction", "--correction"),
    ],
)
def test_where_files_lie_is_not_told(word, kept):
    assert _without_folder(word) == kept


def test_no_file_of_the_output_names_a_folder_of_this_machine(folder, tmp_path):
    private, out = tmp_path / "alice-secret", tmp_path / "out"
    private.mkdir()
    shutil.copy(folder / "rows.csv", private / "rows.csv")
    words = ["--group-size=16", "--solver=rtn", "--correction=none", f"--dataset={private}/rows.csv", "--column=text"]
    assert main(["quantize", str(folder / "bert"), str(out), *words]) == 0
    assert "--dataset=rows.csv" in json.loads((out / "report.json").read_text())["command"]
    for path in (path for path in out.rglob("*") if path.is_file()):
        for secret in (str(tmp_path), str(folder)):
            assert secret.encode() not in path.read_bytes(), path.name


@pytest.fixture(scope="module")
def rounded(folder, tmp_path_factory) -> Path:
    """A BERT classifier rounded to nearest."""
    out = tmp_path_factory.mktemp("rounded") / "bert"
    assert main(command(folder, out, "--solver", "rtn", "--correction", "none")) == 0
    return out


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5] * 24, "row 0 of 'label' must be a whole number or the name of a class, got 0.5"),
        ([1, None] * 12, "row 1 of 'label' must be a whole number or the name of a class, got None"),
        (["class 0", "dog"] * 12, "row 1 of 'label' is 'dog', a class that the model does not know; it knows class 0"),
        ([7] * 24, "labels must be in 0 ... 4, got 7 ... 7"),
    ],
)
def test_labels_that_are_none(folder, rounded, tmp_path, capsys, labels, message):
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.assign(label=pd.array(labels)).to_parquet(tmp_path / "rows.parquet")
    test = ["eval", str(rounded), "--float", str(folder / "bert"), "--dataset", str(tmp_path / "rows.parquet")]
    assert main([*test, "--column", "text"]) == 1
    assert message in capsys.readouterr().err


def test_whole_labels_in_floats(folder, rounded, tmp_path):
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.assign(label=rows["label"].astype(float)).to_parquet(tmp_path / "rows.parquet")
    test = ["eval", str(rounded), "--float", str(folder / "bert"), "--dataset", str(tmp_path / "rows.parquet")]
    assert main([*test, "--column", "text"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "1"], "an evaluation needs at least 2 rows, --dataset and --limit leave 1"),
        (["--json", "/nowhere/t.json"], "/nowhere/t.json cannot be written"),
        (["--float", "nowhere"], "there is no folder nowhere"),
        (
            ["--label-offset", "5"],
            "the label offset must be in 0 ... 4, as BertForSequenceClassification has 5 outputs",
        ),
        (["--float", "LM"], "eval measures classifiers .* LM is a BertForMaskedLM"),
    ],
)
def test_a_mistake_in_eval_is_one_line(folder, rounded, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    BertForMaskedLM(BertConfig(**tiny_models.TEXT)).save_pretrained("LM")
    test = ["eval", str(rounded), "--float", str(folder / "bert"), "--dataset", str(folder / "rows.parquet")]
    assert main([*test, "--column", "text", *words]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_eval_compares_a_model_with_the_float_model_that_it_was_made_from(folder, rounded, tmp_path, capsys):
    """Nothing else: no head is made up for the sake of a table."""
    torso = shutil.copytree(folder / "bert", tmp_path / "torso")
    tensors = load_file(torso / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n.startswith("bert.")}, torso / "model.safetensors", {"format": "pt"}
    )
    for other, message in (
        (
            folder / "llama_tied",
            "bert is a BertForSequenceClassification and .*llama_tied a LlamaForCausalLM: --float",
        ),
        (rounded, "is quantized already: name the float model"),
        (torso, "torso has no tensor classifier.bias, classifier.weight, which BertForSequenceClassification reads"),
    ):
        test = ["eval", str(rounded), "--float", str(other), "--dataset", str(folder / "rows.parquet")]
        assert main([*test, "--column", "text", "--limit", "3"]) == 1
        assert re.search(message, capsys.readouterr().err), message


def test_a_float_model_is_not_called_quantized(folder, capsys):
    test = ["eval", str(folder / "bert"), "--float", str(folder / "bert"), "--dataset", str(folder / "rows.parquet")]
    assert main([*test, "--column", "text"]) == 1
    assert "is not quantized: the first model is the quantized one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "a", "--float", "b", "--dataset", "c", "--limit", "0"],
        ["demo", "--epochs", "0"],
        ["demo", "--seed", "-1"],
        ["demo", "--weights", "foo"],
        ["quantize", "a", "b", "--batch-size", "x"],
        ["quantize", "a", "b", "--generate", "-4"],
        ["eval", "a", "--float", "b", "--dataset", "c", "--label-offset", "-1"],
    ],
)
def test_a_number_that_cannot_be_is_refused_at_once(capsys, words):
    with pytest.raises(SystemExit):
        main(words)
    assert f"argument {words[-2]}:" in capsys.readouterr().err


def test_rows_of_token_ids_need_no_tokenizer(folder, tmp_path):
    tiny_models.build("bert").save_pretrained(tmp_path / "bert")
    ids = [list(range(i, i + 6)) for i in range(24)]
    pd.DataFrame({"input_ids": ids, "label": [0] * 24}).to_parquet(tmp_path / "ids.parquet")
    words = ["quantize", str(tmp_path / "bert"), str(tmp_path / "out"), "--group-size", "16"]
    assert main([*words, "--dataset", str(tmp_path / "ids.parquet")]) == 0


def test_more_bits_where_they_pay(folder, tmp_path):
    out = tmp_path / "out"
    assert main(command(folder, out, "--low-rank", "2", "--average-bits", "9")) == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    inside = [entry for name, entry in config["modules"].items() if ".layer." in name]
    assert {entry["low_rank"] for entry in inside} == {2}
    assert len({entry["weights"] for entry in inside}) > 1
    assert any("mixed formats" in note for note in json.loads((out / "report.json").read_text())["notes"])


def test_two_columns_of_text_are_not_guessed_at(folder, tmp_path, capsys):
    rows = pd.read_parquet(folder / "rows.parquet").rename(columns={"text": "review"})
    rows.assign(category="w1").to_parquet(tmp_path / "two.parquet")
    words = ["quantize", str(folder / "bert"), str(tmp_path / "out"), "--dataset", str(tmp_path / "two.parquet")]
    assert main(words) == 1
    assert "has the text columns ['review', 'category']: keep the one to read" in capsys.readouterr().err


def test_nothing_saved_is_lost(folder, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert main(command(folder, tmp_path)) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["inspect", str(folder / "bert")]) == 1
    assert "no layer quantized by hf_catquant" in capsys.readouterr().err
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_data_is_needed_unless_rounding(folder, tmp_path, capsys):
    words = ["quantize", str(folder / "bert"), str(tmp_path / "out"), "--group-size", "16"]
    assert main(words) == 1
    assert "need calibration data" in capsys.readouterr().err
    assert main([*words, "--solver", "rtn", "--correction", "none"]) == 0


def test_help_of_every_verb(capsys):
    for verb in ("demo", "quantize", "inspect", "eval", "verify", "push"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert "--" in capsys.readouterr().out


def test_demo_from_start_to_end(tmp_path, capsys):
    page = run_demo(tmp_path, epochs=2)
    printed = capsys.readouterr().out
    assert "reload: bit-exact" in printed
    assert page.read_text().count("<img") == 3
    for name in ("accuracy", "errors", "logits"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_optimum_hands_over(monkeypatch):
    import runpy

    register = runpy.run_path(str(Path(__file__).parents[2] / "optimum/commands/register/register_catquant.py"))
    (verb,) = register["REGISTER_COMMANDS"]
    assert verb.COMMAND.name == "catquant"
    seen = []
    monkeypatch.setattr("hf_catquant.cli.main", lambda words: seen.append(words) or 0)
    instance = object.__new__(verb)
    instance.args = type("Args", (), {"words": ["inspect", "folder"]})()
    with pytest.raises(SystemExit):
        instance.run()
    assert seen == [["inspect", "folder"]]
