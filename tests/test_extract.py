"""Features of every architecture at head and blocks, against what the models say of themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import nn

import tiny_models
import toys
from hf_catquant import CatQuantConfig, extract_features, quantize
from hf_catquant.by_layer import discrimination_by_layer
from hf_catquant.correction import ClusterAffine, attach
from hf_catquant.discrimination import feature_discrimination


def texts(lengths):
    """Token samples of several lengths."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 96, (n,), generator=generator)} for n in lengths]


@pytest.mark.parametrize("name", [n for n in tiny_models.NAMES if n != "clip"])
def test_head_and_blocks_of_every_architecture_in_one_pass(name):
    model, samples = tiny_models.build(name), tiny_models.samples(name, 5)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(0))
    found = extract_features(model, samples, at=["head", "blocks"], batch_size=3)
    assert len(runs) <= 2 + 1  # two batches, and one look for the logits
    assert len(found) >= 3
    assert next(iter(found)) == "head"
    for features in found.values():
        assert features.dtype == torch.float32
        assert features.dim() == 2
        assert len(features) == 5
        assert features.isfinite().all()
    assert any(not torch.equal(features[0], features[1]) for features in found.values())


def test_text_is_averaged_over_what_is_no_padding():
    model, samples = tiny_models.build("bert"), texts([4, 9, 6, 12])
    found = {
        p: extract_features(model, samples, at="bert.encoder.layer.0", pooling=p) for p in ("mean", "cls", "last")
    }
    with torch.no_grad():
        for i, sample in enumerate(samples):
            hidden = model.bert(sample["input_ids"][None], output_hidden_states=True).hidden_states[1][0]
            for pooling, expected in (("mean", hidden.mean(0)), ("cls", hidden[0]), ("last", hidden[-1])):
                torch.testing.assert_close(found[pooling][i], expected)
    torch.testing.assert_close(
        extract_features(model, samples, at="bert.encoder.layer.0", batch_size=1), found["mean"]
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_side_of_the_padding_does_not_matter(pooling):
    model, places = tiny_models.build("bert"), ["bert.embeddings.word_embeddings", "bert.encoder.layer.0"]
    found = {}
    for side in ("left", "right"):
        samples = []
        for sample in texts([4, 9, 6, 12]):
            ids, pads = sample["input_ids"], (0, 12 - len(sample["input_ids"]))
            pads = pads[::-1] if side == "left" else pads
            mask = nn.functional.pad(torch.ones_like(ids), pads)
            row = {"input_ids": nn.functional.pad(ids, pads), "attention_mask": mask}
            row["position_ids"] = (mask.cumsum(0) - 1).clamp(min=0)
            samples.append(row)
        found[side] = extract_features(model, samples, at=places, pooling=pooling)
    for place in places:
        torch.testing.assert_close(found["left"][place], found["right"][place])


class Chooses(nn.Module):
    """Classifies every step and keeps the first, whatever it is."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.body(input_ids))[:, 0]}


def test_a_head_that_keeps_the_first_step_is_entered_there():
    model = Chooses()
    rows = [{"input_ids": torch.tensor([0, 5, 7 + i]), "attention_mask": torch.tensor([0, 1, 1])} for i in range(3)]
    torch.testing.assert_close(extract_features(model, rows), model.body.weight[0].expand(3, 4).detach())


def test_images_are_averaged_over_their_places():
    model, samples = tiny_models.build("resnet"), tiny_models.samples("resnet", 4)
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    with torch.no_grad():
        output = model.resnet(pixels, output_hidden_states=True)
    last = "resnet.encoder.stages.1.layers.1"
    found = extract_features(model, samples, at=[last, "head"])
    torch.testing.assert_close(found[last], output.last_hidden_state.mean((2, 3)))
    torch.testing.assert_close(found["head"], output.pooler_output.flatten(1))
    vit = tiny_models.build("vit")
    with torch.no_grad():
        hidden = vit.vit(pixels).last_hidden_state
    torch.testing.assert_close(extract_features(vit, samples), hidden[:, 0])  # the model's own pooling


def test_speech_and_models_without_logits():
    model, samples = tiny_models.build("wav2vec2"), tiny_models.samples("wav2vec2", 4)
    waves = torch.stack([sample["input_values"] for sample in samples])
    with torch.no_grad():
        hidden = model.wav2vec2(waves).last_hidden_state
    torch.testing.assert_close(extract_features(model.wav2vec2, samples), hidden.mean(1), rtol=1e-4, atol=1e-5)
    assert extract_features(model, samples).shape == (4, 24)
    torch.testing.assert_close(extract_features(model, samples, at=""), model(waves).logits.detach())


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_of_speech_is_left_out_where_steps_come_last(pooling):
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    model = tf.Wav2Vec2ForSequenceClassification(config)
    processor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    waves = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in (403, 1210)]
    extractor = "wav2vec2.feature_extractor"
    layer = f"{extractor}.conv_layers.0"
    places = [extractor, layer, f"{layer}.conv", f"{layer}.activation", "wav2vec2.feature_projection", "wav2vec2"]
    together = extract_features(model, waves, processor, at=places, pooling=pooling, batch_size=2)
    alone = extract_features(model, waves, processor, at=places, pooling=pooling, batch_size=1)
    for place in places:
        assert together[place].shape == (2, 8 if place.startswith(extractor) else 16)
        torch.testing.assert_close(together[place], alone[place], rtol=1e-4, atol=1e-5)
    wave = torch.tensor((waves[0] - waves[0].mean()) / np.sqrt(waves[0].var() + 1e-7))
    with torch.no_grad():
        steps = model.wav2vec2.feature_extractor(wave[None])[0]
    expected = {"mean": steps.mean(1), "cls": steps[:, 0], "last": steps[:, -1]}[pooling]
    torch.testing.assert_close(together[extractor][0], expected, rtol=1e-4, atol=1e-5)


def test_raw_samples_go_through_the_processor():
    model = tiny_models.build("vit").train()
    processor = tf.ViTImageProcessor(size={"height": 16, "width": 16})
    rows = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    images = [Image.fromarray(row) for row in rows]
    found = extract_features(model, images, processor, batch_size=2)
    assert model.training
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, model.eval().vit(pixels).last_hidden_state[:, 0])
    torch.testing.assert_close(extract_features(model, iter(images), processor), found)


@pytest.mark.parametrize("name", ["bert", "resnet", "wav2vec2"])
def test_quantized_models_give_features_with_their_corrections(name):
    model, samples = tiny_models.build(name), tiny_models.samples(name, 8)
    plain = extract_features(model, samples, at=["blocks", "head"])
    quantize(model, CatQuantConfig(weights="int8", solver="rtn", correction=None, group_size=8))
    found = extract_features(model, samples, at=["blocks", "head"])
    assert found.keys() == plain.keys()
    for key in plain:
        assert 0 < (found[key] - plain[key]).norm() < 0.1 * plain[key].norm()
    block = next(iter(plain))
    width = plain[block].shape[1]
    correction = ClusterAffine.of(None, torch.zeros(1, width), 2 * torch.ones(1, width), torch.zeros(1, width))
    if name == "resnet":
        correction.dim = 1
    attach(model, block, correction)
    torch.testing.assert_close(extract_features(model, samples, at=block), 2 * found[block])


def test_plain_torch_models():
    model, batches = toys.make("mlp")
    samples = toys.samples_of(batches)
    rows = torch.stack([sample["x"] for sample in samples])
    torch.testing.assert_close(extract_features(model, samples, at="layers.0"), model.layers[0](rows).detach())
    torch.testing.assert_close(extract_features(model, samples), model.layers[:4](rows).detach())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_head_of_decoders_that_classify_is_entered_at_the_step_they_keep(kind, side):
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    if kind == "gpt2":
        model = tf.GPT2ForSequenceClassification(tf.GPT2Config(**sizes, pad_token_id=0)).eval()
    else:
        model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**sizes, intermediate_size=24, pad_token_id=0)).eval()
    samples = []
    for sample in texts([4, 9, 6, 12, 7, 5]):
        ids, rest = sample["input_ids"], 12 - len(sample["input_ids"])
        pads = (rest, 0) if side == "left" else (0, rest)
        mask = nn.functional.pad(torch.ones_like(ids), pads)
        samples.append({"input_ids": nn.functional.pad(ids, pads), "attention_mask": mask})
    found = extract_features(model, samples, batch_size=3)
    assert found.shape == (6, 16)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    with torch.no_grad():
        torch.testing.assert_close(model.score(found), model(**batch).logits)


class Answers(nn.Module):
    """Returns its logits by name; ``scale`` 1 leaves them what the head returned."""

    def __init__(self, scale):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), scale

    def forward(self, x):
        logits = self.head(self.body(x))
        return {"logits": logits if self.scale == 1 else self.scale * logits}


def test_logits_in_a_mapping_are_those_of_a_head_or_refused():
    rows = torch.randn(4, 3)
    samples = [{"x": row} for row in rows]
    model = Answers(1)
    torch.testing.assert_close(extract_features(model, samples), model.body(rows).detach())
    with pytest.raises(ValueError, match=r"no module of Answers returns its logits \(4, 2\).*: name a module"):
        extract_features(Answers(2), samples)


class Flattens(nn.Module):
    """A layer that sees all steps in one list, one that returns no vector a sample, and one that is not run."""

    def __init__(self):
        super().__init__()
        self.steps, self.spare, self.total = nn.Linear(3, 4), nn.Linear(3, 3), nn.Identity()

    def forward(self, x):
        hidden = self.steps(x.flatten(0, 1))
        return self.total(hidden.sum(0, keepdim=True)[:, :1].expand(5, 1)).sum() + hidden


def test_steps_in_one_list_are_put_back():
    model, rows = Flattens(), torch.randn(4, 6, 3)
    found = extract_features(model, [{"x": row} for row in rows], at="steps")
    torch.testing.assert_close(found, model.steps(rows).mean(1).detach())


@pytest.mark.parametrize(
    ("at", "pooling", "message"),
    [
        ("spare", "mean", "Flattens does not run the module 'spare'"),
        ("total", "mean", r"'total' gives \(5, 1\) for 4 samples, not a vector a sample"),
        ("nothing", "mean", r"at='nothing': no module of Flattens has this name; names look like steps, spare, total"),
        (["steps", "totl"], "mean", r"at='totl': no module of Flattens has this name; names look like total$"),
        ([], "mean", r'at must name a place or several, "head", "blocks" or modules, got \[\]'),
        (None, "mean", r'at must be "head", "blocks", a module\'s name or a list of these, got None'),
        (["steps", 1], "mean", r"a list of these, got 1"),
        ("blocks", "mean", "Flattens has no repeated blocks"),
        ("steps", "max", "pooling must be one of mean, cls, last, got 'max'"),
    ],
)
def test_bad_places_are_named(at, pooling, message):
    samples = [{"x": row} for row in torch.randn(4, 6, 3)]
    with pytest.raises(ValueError, match=message):
        extract_features(Flattens(), samples, at=at, pooling=pooling)


def test_one_sample_is_enough():
    model, samples = Flattens(), [{"x": row} for row in torch.randn(4, 6, 3)]
    whole = extract_features(model, samples, at="steps")
    torch.testing.assert_close(extract_features(model, samples[2:3], at="steps"), whole[2:3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bert"}, TypeError, "model must be a torch module, got str: load it first"),
        ({"samples": []}, ValueError, "dataset is empty: pass samples$"),
        ({"batch_size": 1.5}, ValueError, "batch_size must be an integer of at least 1, got 1.5"),
        ({"batch_size": None}, ValueError, "batch_size must be an integer of at least 1, got None"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"model": Flattens(), "samples": [{"x": row} for row in torch.randn(4, 6, 3)], **change}
    with pytest.raises(error, match=message):
        extract_features(at="steps", **arguments)


def test_what_depends_on_the_batch_is_no_feature():
    clip, samples = tiny_models.build("clip"), tiny_models.samples("clip", 5)
    for size in (3, 5):
        with pytest.raises(ValueError, match="CLIPModel returns logits_per_image and no logits of classes: name the"):
            extract_features(clip, samples, batch_size=size)
    with pytest.raises(ValueError, match="'' gives vectors of 2 and of 3 numbers, as the batch is"):
        extract_features(clip, samples, at="", batch_size=3)
    assert extract_features(clip, samples, at="visual_projection", batch_size=3).shape == (5, 24)


class Silent(nn.Module):
    """Returns nothing."""

    def forward(self, x):
        return None


def test_a_module_without_a_tensor_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].register_module("log", Silent())
    model[0].register_forward_hook(lambda module, args, output: module.log(output))
    with pytest.raises(ValueError, match=r"'0.log' gives NoneType, and no tensor: name another module"):
        extract_features(model, [torch.randn(3) for _ in range(4)], at="0.log")


def test_a_wrong_name_is_said_before_samples_are_read():
    def samples():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match="no module of Flattens has this name"):
        extract_features(Flattens(), samples(), at="layer.7")


def test_discrimination_layer_by_layer(tmp_path):
    teacher, model = tiny_models.build("bert"), tiny_models.build("bert")
    samples, labels = tiny_models.samples("bert", 24), [i % 3 for i in range(23)] + [7]
    config = CatQuantConfig(weights="binary", correction="cat", group_size=8, dataset=samples, num_samples=24)
    quantize(model, config)
    width = 5
    attach(
        model, "classifier", ClusterAffine.of(None, torch.zeros(1, width), torch.ones(1, width), torch.zeros(1, width))
    )
    batches = [{key: torch.stack([s[key] for s in samples[i : i + 8]]) for key in samples[0]} for i in (0, 8, 16)]
    table = discrimination_by_layer(teacher, model, batches, labels)
    assert table.layers == ("bert.encoder.layer.0", "bert.encoder.layer.1", "head")
    assert list(table.values) == ["float", "quantized", "quantized + CAT"]
    features = extract_features(teacher, samples, at=["blocks", "head"])
    expected = [feature_discrimination(x[:23], labels[:23])["discrimination"] for x in features.values()]
    assert table.values["float"] == pytest.approx(expected, rel=1e-6)
    assert table.values["quantized"] != table.values["float"]
    assert "bert.encoder.layer.1" in str(table)
    assert "n = 23 rows" in str(table)  # a class of one row has no D
    table.draw(tmp_path / "layers.png")
    with Image.open(tmp_path / "layers.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(ValueError, match="two classes of two rows"):
        discrimination_by_layer(teacher, model, batches, list(range(24)))
