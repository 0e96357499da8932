"""Calibration data of every form gives the same kind of batches, or an error that says what to do."""

from __future__ import annotations

import io
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import global_rng_untouched
from hf_catquant.samples import Batches, collect, padding_mask

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "slept"]
TEXTS = ["the cat", "the cat sat on a mat", "a mat", "and then the cat slept on a mat", "cat", "then the mat sat"]
TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
RATE = 16000


def tokenizer(pads: bool = True, **kwargs: Any) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "[UNK]", "[PAD]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    pad = {"pad_token": "[PAD]"} if pads else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **pad, **kwargs)


def tokenizer_for_bert() -> transformers.PreTrainedTokenizerFast:
    return tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=12, pad_token_id=3, **TINY)
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **TINY))


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def speech_model(norm: str = "layer", kind: type = transformers.Wav2Vec2ForSequenceClassification) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        conv_dim=[8, 8], conv_kernel=[10, 4], conv_stride=[5, 2], num_feat_extract_layers=2, feat_extract_norm=norm,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8, vocab_size=20, **TINY,
    )  # fmt: skip
    return kind(config)


def whisper(kind: type = transformers.WhisperModel) -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=8, max_source_positions=50,
        max_target_positions=40, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=4,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return kind(config)


def image_processor() -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})


def images(count: int = 4, size: int = 10) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def encoded_image(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def waves(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(length).astype(np.float32) for length in lengths]


def id_rows(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(1, length + 1))} for length in lengths]


def rows_of(data: Batches, key: str) -> list[Tensor]:
    return [row for batch in data.batches for row in batch[key]]


def runs(data: Batches, model: nn.Module) -> None:
    with torch.no_grad():
        for batch in data.batches:
            model(**batch)


class Net(nn.Module):
    """A plain torch model: no configuration, one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


# --- every form of text gives the same batches ----------------------------------------------------------------------


def text_forms() -> dict[str, Any]:
    rows = [{"text": text, "label": i} for i, text in enumerate(TEXTS)]
    dataset = datasets.Dataset.from_list(rows)
    tokens = tokenizer_for_bert()
    return {
        "list of str": TEXTS,
        "dataset": dataset,
        "column of a dataset": dataset["text"],
        "iterable dataset": dataset.to_iterable_dataset(),
        "generator": (text for text in TEXTS),
        "tuple": tuple(TEXTS),
        "list of rows": rows,
        "torch dataset of (text, label)": list(zip(TEXTS, range(6), strict=True)),
        "tokenized": [dict(tokens(text)) for text in TEXTS],
        "tokenized with a batch dimension": [tokens(text, return_tensors="pt") for text in TEXTS],
        "tokenized dataset": dataset.map(lambda row: tokens(row["text"]), remove_columns=["text"]),
        "tokenized dataset of tensors": dataset.map(lambda r: tokens(r["text"]), remove_columns="text").with_format(
            "torch"
        ),
        "one padded batch": [tokens(TEXTS, padding=True, return_tensors="pt")],
    }


@pytest.mark.parametrize("form", list(text_forms()))
def test_every_form_of_text_gives_the_same_batches(bert: nn.Module, form: str) -> None:
    expected = tokenizer_for_bert()(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    data = collect(text_forms()[form], bert, processor=tokenizer_for_bert(), batch_size=6)
    (batch,) = data.batches
    assert data.num_samples == 6
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    for key in batch:
        assert torch.equal(batch[key], expected[key]), key
        assert batch[key].dtype == torch.long
    runs(data, bert)


def test_same_data_has_the_same_fingerprint_in_every_form(bert: nn.Module) -> None:
    prints = {
        name: collect(form, bert, processor=tokenizer_for_bert(), batch_size=6).fingerprint
        for name, form in text_forms().items()
    }
    assert len(set(prints.values())) == 1, prints
    changed = collect(["cat", *TEXTS[1:]], bert, processor=tokenizer_for_bert(), batch_size=6)
    assert changed.fingerprint not in prints.values()
    assert len(changed.fingerprint) == 16
    int(changed.fingerprint, 16)


def test_fingerprint_sees_key_shape_and_dtype() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor | None = None, b: Tensor | None = None) -> None: ...

    values = torch.arange(8)
    forms = [{"a": values}, {"b": values}, {"a": values.view(2, 4)}, {"a": values.float()}]
    prints = {collect([form, form], Two()).fingerprint for form in forms}
    assert len(prints) == 4
    pairs = [{"a": values, "b": values + 1}, {"b": values + 1, "a": values}]
    assert len({collect([pair, pair], Two()).fingerprint for pair in pairs}) == 1


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"premise": "the cat", "hypothesis": "a mat", "label": 0}, ("the cat", "a mat")),
        ({"question": "a mat", "sentence": "the cat", "idx": 0}, ("a mat", "the cat")),
        ({"title": "a mat", "text": "the cat", "number": 3}, ("the cat",)),
        ({"id": "sat", "review": "the cat"}, ("the cat",)),
    ],
)
def test_columns_of_text_are_found(bert: nn.Module, columns: dict[str, Any], expected: tuple[str, ...]) -> None:
    tokens = tokenizer_for_bert()
    data = collect(datasets.Dataset.from_list([columns] * 2), bert, processor=tokens)
    assert rows_of(data, "input_ids")[0].tolist() == tokens(*expected)["input_ids"]
    assert rows_of(data, "token_type_ids")[0].tolist() == tokens(*expected)["token_type_ids"]


def test_pairs_of_text(bert: nn.Module) -> None:
    tokens = tokenizer_for_bert()
    data = collect([("the cat", "a mat"), ("cat", "the mat sat")], bert, processor=tokens)
    assert rows_of(data, "input_ids")[1].tolist() == tokens("cat", "the mat sat")["input_ids"]


def test_text_is_cut_to_the_positions_of_the_model(bert: nn.Module) -> None:
    data = collect(["cat " * 50, "mat"], bert, processor=tokenizer_for_bert())
    assert data.batches[0]["input_ids"].shape == (2, 12)
    data = collect(["cat " * 50, "mat"], bert, processor=tokenizer(model_max_length=7))
    assert data.batches[0]["input_ids"].shape == (2, 7)


def test_text_is_cut_to_what_the_position_table_of_roberta_holds() -> None:
    config = transformers.RobertaConfig(vocab_size=20, max_position_embeddings=12, pad_token_id=3, **TINY)
    model = transformers.RobertaModel(config)
    data = collect(["cat " * 50, "mat"], model, processor=tokenizer())
    assert data.batches[0]["input_ids"].shape == (2, 8)
    runs(data, model)


def test_text_is_cut_to_512_tokens() -> None:
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    data = collect(["cat " * 2000, "mat"], transformers.T5EncoderModel(config), processor=tokenizer())
    assert data.batches[0]["input_ids"].shape == (2, 512)


def test_padding_needs_no_pad_token(gpt2: nn.Module) -> None:
    data = collect(TEXTS, gpt2, processor=tokenizer(pads=False), batch_size=6)
    lengths = [len(tokenizer()(text)["input_ids"]) for text in TEXTS]
    assert data.batches[0]["attention_mask"].sum(1).tolist() == lengths
    assert (data.batches[0]["input_ids"][0, lengths[0] :] == 0).all()
    runs(data, gpt2)


def test_processor_outputs_the_model_does_not_take_are_dropped() -> None:
    config = transformers.DistilBertConfig(vocab_size=20, dim=8, hidden_dim=8, n_layers=1, n_heads=2)
    data = collect(TEXTS, transformers.DistilBertModel(config), processor=tokenizer_for_bert())
    assert data.batches[0].keys() == {"input_ids", "attention_mask"}


# --- which samples, in which order ----------------------------------------------------------------------------------


def test_map_style_data_gives_a_random_subset_of_its_seed(bert: nn.Module) -> None:
    rows = datasets.Dataset.from_list([{"input_ids": [i % 20, i // 20]} for i in range(200)])

    def chosen(seed: int) -> list[int]:
        with global_rng_untouched():
            data = collect(rows, bert, num_samples=40, seed=seed)
        assert data.num_samples == 40
        return [int(row[0] + 20 * row[1]) for row in rows_of(data, "input_ids")]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(set(chosen(0))) == 40
    assert max(chosen(0)) > 100  # not only the first ones


def test_streams_give_their_first_samples_and_lose_no_more(bert: nn.Module) -> None:
    pulled = []

    def stream() -> Iterator[dict[str, list[int]]]:
        for i in range(100):
            pulled.append(i)
            yield {"input_ids": [i % 20]}

    data = collect(stream(), bert, num_samples=5, batch_size=2)
    assert pulled == [0, 1, 2, 3, 4]
    assert [len(batch["input_ids"]) for batch in data.batches] == [2, 2, 1]
    assert torch.cat(rows_of(data, "input_ids")).tolist() == pulled


def test_streams_of_batches_and_of_raw_samples_lose_no_more(bert: nn.Module) -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(5):
            assert i < 2, "pulled a batch too many"
            yield {"input_ids": torch.full((3, 2), i)}

    data = collect(batches(), bert, num_samples=5)
    assert torch.stack(rows_of(data, "input_ids"))[:, 0].tolist() == [0, 0, 0, 1, 1]

    def texts() -> Iterator[str]:
        yield from TEXTS[:4]
        raise AssertionError("pulled a text too many")

    assert collect(texts(), bert, processor=tokenizer(), num_samples=4, batch_size=3).num_samples == 4


def test_fewer_samples_than_asked_for_are_all_taken_in_order(bert: nn.Module) -> None:
    data = collect(id_rows(3, 1, 2), bert, num_samples=256, batch_size=2)
    assert data.num_samples == 3
    assert data.batches[0]["attention_mask"].sum(1).tolist() == [3, 1]
    assert data.source == "list, 3 rows"


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (lambda rows: datasets.Dataset.from_list(rows), "datasets.Dataset, 4 of 9 rows"),
        (
            lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
            "datasets.IterableDataset, first 4 rows",
        ),
        (lambda rows: rows, "list, 4 of 9 rows"),
        (lambda rows: (row for row in rows), "generator, first 4 rows"),
        (lambda rows: DataLoader([{"input_ids": torch.ones(2).long()}] * 9), "torch.DataLoader, first 4 rows"),
    ],
)
def test_source_says_what_was_read(bert: nn.Module, make: Any, source: str) -> None:
    rows = [{"input_ids": [1, 2]}] * 9
    assert collect(make(rows), bert, num_samples=4).source == source


# --- DataLoader -----------------------------------------------------------------------------------------------------


def test_loader_batches_stay_and_the_last_is_cut(bert: nn.Module) -> None:
    rows = [{"input_ids": torch.tensor([i, 1]), "labels": torch.tensor(i)} for i in range(12)]
    with global_rng_untouched():
        data = collect(DataLoader(rows, batch_size=4), bert, num_samples=10, batch_size=3)  # type: ignore[arg-type]
    assert [len(batch["input_ids"]) for batch in data.batches] == [4, 4, 2]
    assert torch.stack(rows_of(data, "input_ids"))[:, 0].tolist() == list(range(10))
    assert data.batches[0].keys() == {"input_ids"}
    assert data.num_samples == 10


def test_loader_that_shuffles_is_repeatable_and_leaves_the_generator_alone(bert: nn.Module) -> None:
    rows = [{"input_ids": torch.tensor([i])} for i in range(20)]
    loader = DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    with global_rng_untouched():
        prints = [collect(loader, bert, num_samples=8, seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_loader_of_the_usual_collators(bert: nn.Module) -> None:
    tokens = tokenizer_for_bert()
    rows = [dict(tokens(text)) | {"label": 1} for text in TEXTS]
    loader = DataLoader(rows, batch_size=3, collate_fn=transformers.DataCollatorWithPadding(tokens))  # type: ignore[arg-type]
    data = collect(loader, bert)
    assert [sorted(batch) for batch in data.batches] == [["attention_mask", "input_ids", "token_type_ids"]] * 2
    runs(data, bert)


@pytest.mark.parametrize("form", ["tensor", "pair", "named", "single"])
def test_loader_for_plain_torch_models(form: str) -> None:
    x, model = torch.randn(6, 3, 8, 8), Net()
    rows: Any = {
        "tensor": list(x),
        "pair": list(zip(x, range(6), strict=True)),
        "named": [{"image": image} for image in x],
        "single": torch.utils.data.TensorDataset(x),
    }[form]
    data = collect(DataLoader(rows, batch_size=4), model)
    assert [tuple(batch["image"].shape) for batch in data.batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert torch.equal(torch.stack(rows_of(data, "image")), x)
    runs(data, model)


def test_loader_of_something_else_is_refused() -> None:
    x = torch.randn(6, 3, 8, 8)
    loader = DataLoader(torch.utils.data.TensorDataset(x, x, x), batch_size=2)
    with pytest.raises(
        ValueError, match=r"a DataLoader must yield .* got a list of 3: name the tensors in its collate_fn"
    ):
        collect(loader, Net())


def test_loader_of_mixed_leading_dimensions_is_refused(bert: nn.Module) -> None:
    batch = {"input_ids": torch.ones(4, 2).long(), "attention_mask": torch.ones(3, 2).long()}
    with pytest.raises(ValueError, match=r"one leading dimension, got \{'input_ids': 4, 'attention_mask': 3\}"):
        collect(DataLoader([batch], batch_size=None), bert)  # type: ignore[arg-type]


# --- samples of tensors: ranks and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensors", "batches", "arrays", "dicts", "pairs"])
def test_tensors_for_plain_torch_models(form: str) -> None:
    x, model = torch.randn(4, 3, 8, 8), Net()
    samples: Any = {
        "tensors": list(x),
        "batches": [x[:3], x[3:]],
        "arrays": [image.double().numpy() for image in x],
        "dicts": [{"image": image} for image in x],
        "pairs": [(image, torch.tensor(1)) for image in x],
    }[form]
    data = collect(samples, model, batch_size=4)
    assert torch.equal(data.batches[0]["image"], x)
    runs(data, model)


def test_a_function_can_be_the_processor() -> None:
    def transform(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    data = collect(list(zip(images(), range(4), strict=True)), Net(), processor=transform)
    assert data.batches[0]["image"].shape == (4, 3, 10, 10)
    with pytest.raises(ValueError, match=r"sample 1: transform cannot read a str: "):
        collect([images()[0], "the cat"], Net(), processor=transform)


def test_samples_with_and_without_a_batch_dimension(vit: nn.Module) -> None:
    x = torch.randn(3, 3, 8, 8)
    apart = collect([{"pixel_values": image} for image in x], vit)
    batched = collect([{"pixel_values": image[None]} for image in x], vit)
    assert apart.fingerprint == batched.fingerprint
    assert apart.batches[0]["pixel_values"].shape == (3, 3, 8, 8)


def test_rank_of_waveforms_spectrograms_and_videos() -> None:
    wave = torch.randn(400)
    model = speech_model()
    forms = [wave, wave[None]]
    assert len({collect([{"input_values": form}] * 2, model).fingerprint for form in forms}) == 1

    config = transformers.ASTConfig(num_mel_bins=16, max_length=24, **TINY)
    ast, frames = transformers.ASTForAudioClassification(config), torch.randn(24, 16)
    data = [collect([{"input_values": form}] * 2, ast) for form in (frames, frames[None])]
    assert data[0].fingerprint == data[1].fingerprint
    assert data[0].batches[0]["input_values"].shape == (2, 24, 16)
    runs(data[0], ast)

    mel = torch.randn(8, 100)
    assert len({collect([{"input_features": m}] * 2, whisper()).fingerprint for m in (mel, mel[None])}) == 1

    video = transformers.VideoMAEConfig(image_size=8, patch_size=4, num_frames=2, **TINY)
    frames = torch.randn(2, 3, 8, 8)
    data = [collect([{"pixel_values": f}] * 2, transformers.VideoMAEModel(video)) for f in (frames, frames[None])]
    assert data[0].fingerprint == data[1].fingerprint
    assert data[0].batches[0]["pixel_values"].shape == (2, 2, 3, 8, 8)


def test_given_masks_and_type_ids_are_padded_with_zero(bert: nn.Module) -> None:
    samples = [
        {"input_ids": [5, 6], "token_type_ids": [1, 1], "attention_mask": [0, 1]},
        {"input_ids": [7, 8, 9], "token_type_ids": [1, 1, 1], "attention_mask": [1, 1, 1]},
    ]
    (batch,) = collect(samples, bert).batches
    assert batch["input_ids"].tolist() == [[5, 6, 3], [7, 8, 9]]  # the model's own pad_token_id
    assert batch["token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[0, 1, 0], [1, 1, 1]]


def test_no_mask_is_made_where_nothing_is_padded(bert: nn.Module) -> None:
    assert collect(id_rows(4, 4), bert).batches[0].keys() == {"input_ids"}
    assert collect(id_rows(4, 2), bert).batches[0].keys() == {"input_ids", "attention_mask"}


def test_waveforms_are_padded_with_a_mask() -> None:
    samples = [{"input_values": wave} for wave in waves(400, 300)]
    (batch,) = collect(samples, speech_model()).batches
    assert batch["attention_mask"].sum(1).tolist() == [400, 300]
    assert not batch["input_values"][1, 300:].any()
    # Models with a group norm were trained on zeros without a mask.
    assert collect(samples, speech_model("group")).batches[0].keys() == {"input_values"}


def test_labels_stay_for_an_encoder_decoder_only(t5: nn.Module, bert: nn.Module) -> None:
    samples = [{"input_ids": [5, 6], "labels": [7, 8, 1]}, {"input_ids": [5, 7], "labels": [9]}]
    (batch,) = collect(samples, t5).batches
    assert batch["labels"].tolist() == [[7, 8, 1], [9, -100, -100]]
    assert "decoder_input_ids" not in batch
    assert "attention_mask" not in batch
    runs(collect(samples, t5), t5)
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    assert torch.equal(collect(loader, t5).batches[0]["labels"], batch["labels"])
    assert collect(samples, bert).batches[0].keys() == {"input_ids"}


def test_float_dtype_is_float32_and_integers_are_int64(vit: nn.Module, bert: nn.Module) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        data = collect([{"pixel_values": torch.ones(3, 8, 8, dtype=dtype)}] * 2, vit)
        assert data.batches[0]["pixel_values"].dtype == torch.float32
    ids = np.ones(4, dtype=np.int32)
    assert collect([{"input_ids": ids}] * 2, bert).batches[0]["input_ids"].dtype == torch.long


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pil", "array", "tensor", "encoded", "dataset", "iterable", "parquet", "rows"])
def test_every_form_of_image_gives_the_same_batches(vit: nn.Module, form: str) -> None:
    pictures, processor = images(), image_processor()
    dataset = datasets.Dataset.from_dict({"label": [0, 1, 2, 3], "picture": pictures})
    samples: Any = {
        "pil": pictures,
        "array": [np.array(picture) for picture in pictures],
        "tensor": [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures],
        "encoded": [encoded_image(picture) for picture in pictures],
        "dataset": dataset,
        "iterable": dataset.to_iterable_dataset(),
        "parquet": dataset.cast_column("picture", datasets.Image(decode=False)),
        "rows": [{"img": encoded_image(picture), "labels": 3, "text": "the cat"} for picture in pictures],
    }[form]
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    data = collect(samples, vit, processor=processor, batch_size=4)
    assert torch.equal(data.batches[0]["pixel_values"], expected)
    runs(data, vit)


def test_grey_and_transparent_images_become_rgb(vit: nn.Module) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    samples = [images(1)[0].convert("RGBA"), Image.fromarray(grey), grey, grey[:, :, None]]
    data = collect(samples, vit, processor=image_processor())
    assert data.batches[0]["pixel_values"].shape == (4, 3, 8, 8)
    assert torch.equal(*rows_of(data, "pixel_values")[1:3])


# --- audio ----------------------------------------------------------------------------------------------------------


class Decoder:
    """What a decoded audio column of datasets holds."""

    def __init__(self, wave: np.ndarray) -> None:
        self.values = {"array": wave, "sampling_rate": RATE}

    def get_all_samples(self) -> None: ...

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


@pytest.mark.parametrize("form", ["arrays", "tensors", "lists", "dicts", "decoders", "rows", "dataset", "column"])
def test_every_form_of_audio_gives_the_same_batches(form: str) -> None:
    sounds = waves(400, 300, 350)
    dicts = [{"array": wave, "sampling_rate": RATE, "path": None} for wave in sounds]
    samples: Any = {
        "arrays": sounds,
        "tensors": [torch.from_numpy(wave) for wave in sounds],
        "lists": [wave.tolist() for wave in sounds],
        "dicts": dicts,
        "decoders": [Decoder(wave) for wave in sounds],
        "rows": [{"file": "a.wav", "audio": audio, "text": "the cat", "label": 1} for audio in dicts],
        "dataset": datasets.Dataset.from_list([{"label": 1, "sound": audio} for audio in dicts]),
        "column": datasets.Dataset.from_list([{"speech": wave.tolist(), "label": 1} for wave in sounds]),
    }[form]
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    expected = extractor(sounds, sampling_rate=RATE, padding=True, return_tensors="pt")
    data = collect(samples, speech_model(), processor=extractor)
    assert torch.equal(data.batches[0]["input_values"], expected["input_values"])
    assert torch.equal(data.batches[0]["attention_mask"], expected["attention_mask"].long())
    runs(data, speech_model())


@pytest.mark.parametrize("form", ["array", "list", "rows"])
def test_integers_of_16_bit_are_scaled(form: str) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    wave = np.full(300, -16384, dtype=np.int16)
    rows = [{"audio": wave, "sampling_rate": RATE, "digit": 3, "speaker": "a"}] * 2
    samples = {"array": [wave] * 2, "list": [wave.tolist()] * 2, "rows": datasets.Dataset.from_list(rows)}[form]
    data = collect(samples, speech_model(), processor=extractor)
    assert (data.batches[0]["input_values"] == -0.5).all()


def test_text_beside_audio_is_its_transcript() -> None:
    class Both(nn.Module):
        def forward(self, input_ids: Any = None, input_values: Any = None, attention_mask: Any = None) -> None: ...

    processor = transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer())
    rows = [{"text": "the cat", "audio": {"array": wave, "sampling_rate": RATE}} for wave in waves(300, 400)]
    assert collect(rows, Both(), processor=processor).batches[0].keys() == {"input_values"}


def test_whisper_features_keep_their_length() -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    data = collect(waves(4000, 3000), whisper(), processor=extractor)
    assert data.batches[0]["input_features"].shape == (2, 8, 100)
    runs(data, whisper())


# --- text with images -----------------------------------------------------------------------------------------------


def clip() -> nn.Module:
    text = transformers.CLIPTextConfig(vocab_size=20, max_position_embeddings=10, eos_token_id=1, **TINY)
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **TINY)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def clip_processor() -> Any:
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return transformers.CLIPProcessor(processor, tokenizer())


@pytest.mark.parametrize("form", ["dicts", "tuples", "reversed", "dataset"])
def test_images_with_texts(form: str) -> None:
    pairs = list(zip(images(), TEXTS[:4], strict=True))
    rows = [{"text": text, "image": image} for image, text in pairs]
    samples: Any = {
        "dicts": rows,
        "tuples": pairs,
        "reversed": [(text, image) for image, text in pairs],
        "dataset": datasets.Dataset.from_list(rows),
    }[form]
    model, processor = clip(), clip_processor()
    expected = processor(
        text=TEXTS[:4], images=images(), padding=True, truncation=True, max_length=10, return_tensors="pt"
    )
    data = collect(samples, model, processor=processor)
    assert data.batches[0].keys() == {"input_ids", "attention_mask", "pixel_values"}
    for key, tensor in data.batches[0].items():
        assert torch.equal(tensor, expected[key]), key
    runs(data, model)


def test_a_joint_processor_reads_what_its_model_takes(vit: nn.Module, bert: nn.Module) -> None:
    rows = [{"image": image, "text": text} for image, text in zip(images(), TEXTS, strict=False)]
    assert collect(rows, vit, processor=clip_processor()).batches[0].keys() == {"pixel_values"}
    assert collect(rows, bert, processor=clip_processor()).batches[0].keys() == {"input_ids", "attention_mask"}


# --- decoder inputs -------------------------------------------------------------------------------------------------


def test_encoder_decoder_gets_its_own_continuation(t5: nn.Module) -> None:
    t5.train()
    t5.encoder.eval()
    modes = [module.training for module in t5.modules()]
    with global_rng_untouched():
        (batch,) = collect(id_rows(5, 3), t5).batches
    assert [module.training for module in t5.modules()] == modes
    with torch.no_grad():
        expected = t5.eval().generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=32)
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert batch["decoder_input_ids"].shape[1] > 1
    runs(collect(id_rows(5, 3), t5), t5)


def test_speech_encoder_decoder_gets_its_own_continuation() -> None:
    model = whisper(transformers.WhisperForConditionalGeneration).to(torch.bfloat16)
    samples = [{"input_features": torch.randn(8, 100)}] * 2
    (batch,) = collect(samples, model).batches
    assert batch["input_features"].dtype == torch.float32
    assert batch["decoder_input_ids"].shape[1] > 2
    assert (batch["decoder_input_ids"][:, 0] == 4).all()  # Whisper's generate cuts it off


def test_decoder_start_token_alone_where_nothing_is_generated(
    t5: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = id_rows(5, 3)
    bare = transformers.T5Model(t5.config)
    assert collect(samples, bare).batches[0]["decoder_input_ids"].tolist() == [[0], [0]]

    def fails(**_: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(t5, "generate", fails)
    monkeypatch.setattr(logging.getLogger("hf_catquant"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        data = collect(samples, t5)
    assert data.batches[0]["decoder_input_ids"].tolist() == [[0], [0]]
    assert "T5ForConditionalGeneration.generate failed" in caplog.text
    assert "out of order" in caplog.text


def test_models_that_make_their_decoder_inputs_keep_doing_so() -> None:
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.BartForSequenceClassification(config)
    data = collect([{"input_ids": [4, 5, 2], "labels": 1}, {"input_ids": [4, 2]}], model)
    assert data.batches[0].keys() == {"input_ids", "attention_mask"}
    runs(data, model)
    loader = DataLoader([data.batches[0] | {"labels": torch.ones(2).long()}], batch_size=None)  # type: ignore[arg-type]
    assert "labels" not in collect(loader, model).batches[0]


def test_given_decoder_inputs_stay(t5: nn.Module) -> None:
    samples = [{"input_ids": [5, 6], "decoder_input_ids": [0, 7, 8]}, {"input_ids": [5, 6], "decoder_input_ids": [0]}]
    (batch,) = collect(samples, t5).batches
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, r"got None: pass samples$"),
        ("imdb", r"got the str 'imdb': load it first, with datasets\.load_dataset"),
        ({"input_ids": [1]}, r"got a single dict: pass a list of samples"),
        (transformers.BatchEncoding({"input_ids": [1]}), r"got a single BatchEncoding: pass a list"),
        (torch.ones(3), r"got a single Tensor: pass a list"),
        (np.ones(3), r"got a single ndarray: pass a list"),
        (3, r"dataset must be a Dataset, .* got int"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])}),
            r"got the splits \['train'\]: pass one, e\.g\. dataset\['train'\]",
        ),
    ],
)
def test_what_is_no_collection_of_samples_is_refused(bert: nn.Module, dataset: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        collect(dataset, bert)


def test_a_data_frame_is_refused(bert: nn.Module) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"got a DataFrame: pass dataset\.to_dict\('records'\)"):
        collect(pandas.DataFrame({"text": TEXTS}), bert, processor=tokenizer())


@pytest.mark.parametrize(
    "empty", [[], iter(()), datasets.Dataset.from_list([]), DataLoader([]), DataLoader([{"input_ids": []}][:0])]
)
def test_no_samples_are_refused(bert: nn.Module, empty: Any) -> None:
    with pytest.raises(ValueError, match=r"dataset is empty.*: pass samples, or rounding, which needs no samples$"):
        collect(empty, bert, otherwise="rounding")


def test_a_spent_generator_is_named(bert: nn.Module) -> None:
    generator = (row for row in id_rows(3, 4))
    collect(generator, bert)
    with pytest.raises(ValueError, match=r"dataset is empty \(a generator can be read once\)"):
        collect(generator, bert)


@pytest.mark.parametrize("make", [list, iter, lambda rows: DataLoader(rows, batch_size=None)])
def test_one_sample_is_refused(bert: nn.Module, make: Any) -> None:
    rows = [{"input_ids": torch.ones(1, 2).long()}]
    with pytest.raises(ValueError, match=r"at least 2 samples, got 1: pass more$"):
        collect(make(rows), bert)


def test_bad_arguments(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        collect(id_rows(2, 2), bert, num_samples=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        collect(id_rows(2, 2), bert, batch_size=0)
    with pytest.raises(TypeError, match=r"processor must be a tokenizer.* got str"):
        collect(TEXTS, bert, processor="bert-base-uncased")


@pytest.mark.parametrize(
    "sample", ["the cat", ("the cat", "a mat"), {"text": "the cat"}, images(1)[0], np.zeros((8, 8, 3), np.uint8)]
)
def test_raw_samples_without_a_processor_are_refused(bert: nn.Module, sample: Any) -> None:
    with pytest.raises(
        ValueError, match=r"processor missing: .*BertForSequenceClassification\.forward.*pass processor="
    ):
        collect([sample, sample], bert)


def test_keys_the_model_does_not_take_are_refused(bert: nn.Module) -> None:
    rows = [{"input_ids": [1, 2], "text": "the cat"}] * 2
    message = (
        r"sample 0 has the key 'text', which BertForSequenceClassification\.forward does not take; it takes "
        r"\['input_ids', 'attention_mask', .*dataset\.remove_columns\(\['text'\]\)"
    )
    with pytest.raises(ValueError, match=message):
        collect(rows, bert)
    with pytest.raises(ValueError, match=message):
        collect(rows, bert, processor=tokenizer())
    with pytest.raises(ValueError, match=r"sample 0 has the key 'image', which Bert"):
        collect(DataLoader([{"image": torch.ones(2)}] * 2), bert)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sample 0 has no input for Bert"):
        collect([{"label": 3}] * 2, bert)


def test_outputs_the_model_takes_none_of_are_refused(vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"gives \['input_ids', .*none; it takes \['pixel_values'"):
        collect(TEXTS, vit, processor=tokenizer())
    with pytest.raises(
        ValueError, match=r"gives \['pixel_values'\], .*none; it takes \['image'\]: pass ready tensors, or"
    ):
        collect(images(), Net(), processor=image_processor())


def test_samples_the_processor_does_not_read_are_refused(bert: nn.Module, vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"sample 1: TokenizersBackend reads text, got .*Image"):
        collect(["the cat", images(1)[0]], bert, processor=tokenizer())
    with pytest.raises(
        ValueError, match=r"sample 0: ViTImageProcessorPil reads image, got ndarray \(8, 8, 3\) float64"
    ):
        collect([np.zeros((8, 8, 3))] * 2, vit, processor=image_processor())
    with pytest.raises(ValueError, match=r"sample 0: cannot identify image file"):
        collect([{"bytes": b"no image", "path": None}] * 2, vit, processor=image_processor())
    with pytest.raises(ValueError, match=r"sample 0 has no image for the processor; it has \{'text': 'str'\}: rename"):
        collect([{"text": "the cat"}] * 2, vit, processor=image_processor())
    with pytest.raises(ValueError, match=r"samples 0 to 1: .*some are one text, others a pair"):
        collect(["the cat", ("a", "mat")], bert, processor=tokenizer())
    with pytest.raises(ValueError, match=r"samples 0 to 1 mix text, images and audio"):
        collect(["the cat", images(1)[0]], clip(), processor=clip_processor())


def test_columns_that_do_not_say_which_is_the_text_are_refused(bert: nn.Module) -> None:
    rows = [{"a": "the", "b": "cat"}] * 2
    with pytest.raises(ValueError, match=r"the text columns \['a', 'b'\]: keep the one to read"):
        collect(rows, bert, processor=tokenizer())


def test_missing_and_empty_texts_are_refused(bert: nn.Module, gpt2: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"sample 1 has no value in column 'text': filter such rows"):
        collect([{"text": "the cat"}, {"text": None}], bert, processor=tokenizer())
    with pytest.raises(ValueError, match=r"sample 1: 'input_ids' is empty: filter empty samples"):
        collect([{"input_ids": [1, 2]}, {"input_ids": np.array([], dtype=np.int64)}], gpt2)


def test_audio_errors() -> None:
    extractor, model, wave = transformers.Wav2Vec2FeatureExtractor(), speech_model(), waves(300)[0]
    samples = [{"array": wave, "sampling_rate": RATE}, {"array": wave, "sampling_rate": 8000}]
    with pytest.raises(ValueError, match=r"sample 1: sampling_rate must be 16000, .* got 8000: resample"):
        collect(samples, model, processor=extractor)
    with pytest.raises(ValueError, match=r"sample 0: a waveform must be mono, .* got shape \(2, 300\)"):
        collect([{"array": np.stack((wave, wave)), "sampling_rate": RATE}] * 2, model, processor=extractor)
    with pytest.raises(
        ValueError, match=r"sample 0: a waveform must be float, or integers of 16 bit, got int64 up to 40000"
    ):
        collect([[1, 2, 40000]] * 2, model, processor=extractor)
    with pytest.raises(ValueError, match=r"sample 0: sampling_rate must be 16000, .* got 8000"):
        collect([{"audio": wave, "sampling_rate": 8000}] * 2, model, processor=extractor)
    with pytest.raises(ValueError, match=r"sample 0 is an undecoded sound file: .*Audio\(sampling_rate=16000\)"):
        collect([{"audio": {"bytes": b"RIFF", "path": None}}] * 2, model, processor=extractor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(vit: nn.Module, bad: float) -> None:
    pixels = torch.zeros(40, 3, 8, 8)
    pixels[37, 1, 2, 3] = bad
    message = r"sample 37: 'pixel_values' has NaN or infinite values"
    with pytest.raises(ValueError, match=message):
        collect([{"pixel_values": image} for image in pixels], vit)
    with pytest.raises(ValueError, match=message):
        collect(DataLoader([{"pixel_values": image} for image in pixels], batch_size=16), vit)  # type: ignore[arg-type]
    wave = waves(300)[0]
    broken = np.where(np.arange(300) == 7, bad, wave)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    with pytest.raises(ValueError, match=r"sample 1: 'input_values' has NaN"):
        collect([wave, broken, wave], speech_model(), processor=extractor)


def test_nan_names_the_row_of_the_dataset(vit: nn.Module) -> None:
    pixels = np.zeros((100, 3, 8, 8))
    pixels[60:] = np.nan
    with pytest.raises(ValueError, match=r"sample (6|7|8|9)\d: "):
        collect(list(pixels), vit, num_samples=30)


@pytest.mark.parametrize("token", [20, -1])
def test_tokens_outside_the_vocabulary_are_refused(bert: nn.Module, token: int) -> None:
    message = (
        rf"sample 1: input_ids must be in \[0, 20\), the vocab_size of BertForSequenceClassification, got {token}: "
    )
    with pytest.raises(ValueError, match=message):
        collect([{"input_ids": [1, 2]}, {"input_ids": [1, token]}], bert)


def test_shapes_that_padding_cannot_bring_together_are_refused(vit: nn.Module, bert: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"'pixel_values' of shape \(3, 8, 8\), sample 1 of \(3, 9, 8\): bring them to one"
    ):
        collect([{"pixel_values": torch.ones(3, 8, 8)}, {"pixel_values": torch.ones(3, 9, 8)}], vit)
    plain = nn.Sequential(OrderedDict(linear=nn.Linear(4, 2)))
    message = r"'input' of shape \(300,\), sample 1 of \(200,\), and Sequential\.forward takes no attention_mask"
    with pytest.raises(ValueError, match=message):
        collect(waves(300, 200), plain)
    with pytest.raises(ValueError, match=r"sample 1 has the keys \['attention_mask', 'input_ids'\], sample 0 has"):
        collect([{"input_ids": [1]}, {"input_ids": [1], "attention_mask": [1]}], bert)


def test_integers_where_the_model_takes_floats_are_refused(vit: nn.Module) -> None:
    message = r"sample 0: 'pixel_values' must be floats as the processor gives them, got torch.uint8"
    with pytest.raises(ValueError, match=message):
        collect([{"pixel_values": torch.ones(3, 8, 8, dtype=torch.uint8)}] * 2, vit)
    with pytest.raises(ValueError, match=r"sample 0: 'input_values' must be floats as .* got torch.int64"):
        collect([np.ones(300, dtype=np.int16)] * 2, speech_model())


def test_values_that_are_no_arrays_are_refused(bert: nn.Module) -> None:
    for value in ([[1], [1, 2]], "the cat", [None]):
        with pytest.raises(ValueError, match=r"sample 0: 'input_ids' must be a regular array of numbers"):
            collect([{"input_ids": value}] * 2, bert)


# --- padding_mask ---------------------------------------------------------------------------------------------------


def test_mask_of_a_text_model(bert: nn.Module) -> None:
    (batch,) = collect(id_rows(2, 4), bert).batches
    real = torch.tensor([[True, True, False, False], [True] * 4])
    site = "bert.encoder.layer.0.output.dense"
    for hidden, expected in (
        (torch.randn(2, 4, 8), real),
        (torch.randn(2, 4, 2, 8), real),
        (torch.randn(8, 8), real.flatten()),
        (torch.randn(2, 8), None),  # pooled
        (torch.randn(2, 5, 8), None),
        (torch.randn(1, 4, 8), None),  # positions
        (torch.randn(3, 8), None),  # some of the tokens
    ):
        mask = padding_mask(batch, bert, site, hidden)
        assert (mask is None) if expected is None else torch.equal(mask, expected), hidden.shape


def test_nothing_to_mask_is_none(bert: nn.Module, vit: nn.Module) -> None:
    ones = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    assert padding_mask(ones, bert, "bert", torch.randn(2, 4, 8)) is None
    assert padding_mask({"pixel_values": torch.ones(2, 3, 8, 8)}, vit, "vit", torch.randn(2, 5, 8)) is None
    four = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.zeros(2, 1, 4, 4)}
    assert padding_mask(four, bert, "bert", torch.randn(2, 4, 8)) is None


def test_mask_of_an_encoder_decoder(t5: nn.Module) -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "decoder_input_ids": torch.tensor([[0, 0, 7, 0, 0], [0, 0, 0, 0, 0]]),
    }
    encoder = torch.tensor([[True, True, False], [True, True, True]])
    decoder = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    of_encoder, of_decoder = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    cross = "decoder.block.0.layer.1.EncDecAttention"
    for site, hidden, expected in (
        ("encoder.block.0.layer.0.SelfAttention.q", of_encoder, encoder),
        ("decoder.block.0.layer.0.SelfAttention.q", of_decoder, decoder),
        (f"{cross}.k", of_encoder, encoder),
        (f"{cross}.q", of_decoder, decoder),
        ("lm_head", of_decoder, decoder),
        ("shared", of_encoder, encoder),
        ("shared", of_decoder, decoder),
    ):
        mask = padding_mask(batch, t5, site, hidden)
        assert mask is not None
        assert torch.equal(mask, expected), site


def test_mask_of_an_encoder_decoder_of_equal_lengths_goes_by_the_site(t5: nn.Module) -> None:
    labels = torch.tensor([[7, -100, -100], [7, 8, 9]])
    batch = {"input_ids": labels, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "labels": labels}
    hidden, encoder, decoder = torch.randn(2, 3, 8), [True, True, False], [True, False, False]
    for site, expected in (
        ("encoder.block.0.layer.1.DenseReluDense.wi", encoder),
        ("decoder.block.0.layer.1.EncDecAttention.v", encoder),
        ("decoder.block.0.layer.1.EncDecAttention.o", decoder),
        ("decoder.block.0.layer.0.SelfAttention.k", decoder),
        ("decoder.block.0.layer.2.DenseReluDense.wo", decoder),
        ("lm_head", decoder),
    ):
        mask = padding_mask(batch, t5, site, hidden)
        assert mask is not None
        assert mask[0].tolist() == expected, site


def test_given_decoder_mask_is_used(t5: nn.Module) -> None:
    samples = [
        {"input_ids": [5, 6], "decoder_input_ids": [0, 7, 8]},
        {"input_ids": [5, 6], "decoder_input_ids": [0, 9]},
    ]
    (batch,) = collect(samples, t5).batches
    mask = padding_mask(batch, t5, "decoder.final_layer_norm", torch.randn(2, 3, 8))
    assert mask is not None
    assert mask.tolist() == [[True] * 3, [True, True, False]]


def test_decoder_only_models_under_the_name_decoder() -> None:
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    model = transformers.OPTForCausalLM(config)
    (batch,) = collect(id_rows(2, 3), model).batches
    mask = padding_mask(batch, model, "model.decoder.layers.0.fc1", torch.randn(6, 8))
    assert mask is not None
    assert mask.tolist() == [True, True, False, True, True, True]


def test_mask_of_speech_follows_the_subsampling() -> None:
    model = speech_model().eval()
    (batch,) = collect([{"input_values": wave} for wave in waves(400, 200)], model).batches
    seen: dict[str, Tensor] = {}
    sites = {
        "first": "wav2vec2.feature_extractor.conv_layers.0.conv",
        "last": "wav2vec2.feature_projection.projection",
    }
    for name, site in sites.items():
        model.get_submodule(site).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    runs(Batches([batch], 2, "", ""), model)

    last = padding_mask(batch, model, sites["last"], seen["last"])
    expected = model.wav2vec2._get_feature_vector_attention_mask(seen["last"].shape[1], batch["attention_mask"])
    assert last is not None
    assert torch.equal(last, expected)
    assert 0 < last[1].sum() < last[0].sum()
    flat = padding_mask(batch, model, sites["last"], seen["last"].flatten(0, 1))
    assert flat is not None
    assert torch.equal(flat, expected.flatten())

    # The model's own rule is about its last convolution; an earlier one has more steps, half of them real here.
    first = padding_mask(batch, model, sites["first"], seen["first"].transpose(1, 2))
    assert first is not None
    assert first[0].all()
    assert abs(int(first[1].sum()) - first.shape[1] // 2) <= 1
    assert first[1].int().diff().max() <= 0  # real first, then padding

    assert padding_mask(batch, model, "classifier", torch.randn(2, 8)) is None
    assert padding_mask(batch, model, "projector", torch.randn(79, 8)) is None
    assert padding_mask(batch, model, "projector", torch.randn(1, 39, 8)) is None


def test_mask_of_a_speech_encoder_decoder() -> None:
    model = whisper()
    mask = torch.ones(2, 100).long()
    mask[1, 60:] = 0
    batch = {
        "input_features": torch.randn(2, 8, 100),
        "attention_mask": mask,
        "decoder_input_ids": torch.tensor([[4, 5, 6], [4, 5, 1]]),
    }
    encoder, decoder = torch.randn(2, 50, 8), torch.randn(2, 3, 8)
    for site, hidden, real in (
        ("encoder.layers.0.fc1", encoder, 30),
        ("encoder.layers.0.fc1", encoder.flatten(0, 1), 30),
        ("decoder.layers.0.encoder_attn.k_proj", encoder, 30),
        ("decoder.layers.0.encoder_attn.q_proj", decoder, 2),
        ("decoder.layers.0.fc1", decoder, 2),
    ):
        found = padding_mask(batch, model, site, hidden)
        assert found is not None
        assert int(found.view(2, -1)[1].sum()) == real, site
        assert found.view(2, -1)[0].all()
    assert padding_mask(batch, model, "decoder.layers.0.fc1", torch.randn(2, 7, 8)) is None


def test_text_mask_is_not_about_the_image_tower() -> None:
    model = clip()
    (batch,) = collect(list(zip(images(2), TEXTS[:2], strict=True)), model, processor=clip_processor()).batches
    length = batch["attention_mask"].shape[1]
    assert padding_mask(batch, model, "text_model.encoder.layers.0.mlp.fc1", torch.randn(2, length, 8)) is not None
    assert padding_mask(batch, model, "vision_model.encoder.layers.0.mlp.fc1", torch.randn(2, length, 8)) is None
    assert padding_mask(batch, model, "text_model.encoder.layers.0.mlp.fc1", torch.randn(2, length - 1, 8)) is None
