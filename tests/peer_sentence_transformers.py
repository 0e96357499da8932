"""sentence-transformers: quantized while it loads, saved and loaded by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_catquant import CatQuantConfig
from hf_catquant.packed_model import quantized_modules
from tiny_models import TEXT

sentence_transformers = pytest.importorskip("sentence_transformers")
WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "red",
    "blue",
    "old",
    "new",
    "house",
    "river",
]
TEXTS = [f"the {a} {b} sat on a {c}" for a in WORDS[10:14] for b in WORDS[2:4] for c in WORDS[8:10]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    torch.manual_seed(0)
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # with mean pooling
    model.save(str(tmp_path / "float"))
    return tmp_path


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_round_trip(solver: str, folder: Path):
    config = CatQuantConfig(weights="int4", group_size=16, solver=solver, correction=None)
    if solver == "gptq":
        config.dataset, config.batch_size = TEXTS, 8
        config.processor = PreTrainedTokenizerFast.from_pretrained(folder / "bert")
    options = {"model_kwargs": {"quantization_config": config}, "device": "cpu"}
    model = sentence_transformers.SentenceTransformer(str(folder / "float"), **options)
    assert len(quantized_modules(model)) > 8
    plain = sentence_transformers.SentenceTransformer(str(folder / "float"), device="cpu")
    wanted, found = (torch.tensor(each.encode(TEXTS)) for each in (plain, model))
    assert float(torch.nn.functional.cosine_similarity(wanted, found).min()) > 0.95
    model.save(str(folder / "int4"))
    again = sentence_transformers.SentenceTransformer(str(folder / "int4"), device="cpu")
    assert quantized_modules(again).keys() == quantized_modules(model).keys()
    assert torch.equal(torch.tensor(again.encode(TEXTS)), found)
