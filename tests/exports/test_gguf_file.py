"""GGUF files: read back tensor by tensor, and, where llama.cpp is there, run beside the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import fake_hub
import hf_catquant
from hf_catquant import CatQuantConfig, export
from hf_catquant.correction import ClusterAffine, attach

gguf = pytest.importorskip("gguf")
SIZES = {"vocab_size": 288, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 512, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "llama, tied": (tf.LlamaConfig, tf.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, biases": (tf.LlamaConfig, tf.LlamaForCausalLM, {"attention_bias": True}),
    "llama, long": (tf.LlamaConfig, tf.LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 32}),
}


def quantized(kind: str, centre: bool = False, **options: Any) -> Any:
    config, model, more = KINDS[kind]
    usual = {"weights": "ternary", "group_size": -1, "solver": "rtn", "correction": None, "rotation": None}
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **more})).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.dim() == 1:  # norms and biases that hide no mistakes
                value.add_(0.3 * torch.randn_like(value) * (1 if "norm" in name else 0.1))
    made = hf_catquant.quantize(made, CatQuantConfig(**{**usual, **options}))
    for module in made.modules():
        if centre and getattr(module, "weight_offset", None) is not None:
            module.weight_offset.zero_()
    return made


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, Any]]:
    """Tensors as float32, their types, and the fields of a file."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    return tensors, kinds, {name: field.contents() for name, field in reader.fields.items()}


def test_every_tensor_arrives(tmp_path):
    model = quantized("llama", centre=True)
    done = export(model, tmp_path / "m.gguf", "gguf", vocabulary=False)
    tensors, kinds, fields = read(tmp_path / "m.gguf")
    packed = {
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
    }
    for name, target in packed.items():
        assert np.array_equal(tensors[f"{target}.weight"], model.get_submodule(name).matrix(torch.float32).numpy())
    query = model.model.layers[0].self_attn.q_proj.matrix(torch.float32).view(4, 2, 32, 256)
    assert np.array_equal(tensors["blk.0.attn_q.weight"], query.transpose(1, 2).reshape(256, 256).numpy())
    assert np.array_equal(tensors["output_norm.weight"], model.model.norm.weight.detach().numpy())
    assert kinds["blk.0.attn_v.weight"] == "TQ2_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    assert len(tensors) == 2 * 9 + 3
    assert fields["llama.block_count"] == 2
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert done.notes == ["matrices: 2 Q8_0, 14 TQ2_0"]
    assert done.lost == []


def test_types_follow_the_groups(tmp_path):
    for options, expected in (
        ({"weights": "int4", "group_size": 32}, "Q4_1"),
        ({"weights": "int8", "group_size": 64}, "Q8_0"),
        ({"weights": "ternary", "group_size": 16}, "F32"),
    ):
        file = tmp_path / f"{expected}.gguf"
        export(quantized("llama", **options), file, "gguf", vocabulary=False)
        assert read(file)[1]["blk.0.ffn_up.weight"] == expected
    half = quantized("llama", modules_to_not_convert=["lm_head"]).to(torch.bfloat16)
    export(half, tmp_path / "b.gguf", "gguf", vocabulary=False)
    tensors, kinds, _ = read(tmp_path / "b.gguf")
    assert (kinds["output.weight"], kinds["output_norm.weight"]) == ("BF16", "F32")
    assert np.array_equal(tensors["output.weight"], half.lm_head.weight.detach().float().numpy())
    export(quantized("llama", centre=True), tmp_path / "t.gguf", "gguf", vocabulary=False, ternary="TQ1_0")
    assert read(tmp_path / "t.gguf")[1]["blk.0.ffn_up.weight"] == "TQ1_0"


def test_a_tied_head_is_written_once(tmp_path):
    export(quantized("llama, tied"), tmp_path / "m.gguf", "gguf", vocabulary=False)
    assert "output.weight" not in read(tmp_path / "m.gguf")[0]


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path):
    bert = tf.BertForSequenceClassification(tf.BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=32))
    other = hf_catquant.quantize(bert, CatQuantConfig(solver="rtn", correction=None))
    windowed, corrected, wide = quantized("mistral"), quantized("llama"), quantized("llama")
    windowed.config.sliding_window = 16
    attach(corrected, "lm_head", ClusterAffine.of(None, torch.zeros(1, 288), torch.ones(1, 288), torch.ones(1, 288)))
    wide.config.hidden_act = "gelu"
    cases = (
        (quantized("llama", rotation="hadamard"), "no place for rotation='hadamard': quantize with rotation='none'"),
        (quantized("llama", low_rank=2), "no place for low_rank=2"),
        (quantized("llama", activations="int8"), "inputs rounded to int8"),
        (other, "takes causal language models of llama, mistral, qwen2, qwen3, got BertFor"),
        (windowed, "attention within a window of 16 tokens"),
        (corrected, "has no bias there"),
        (wide, "hidden_act must be silu"),
    )
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "m.gguf", "gguf", vocabulary=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
        export(quantized("llama"), tmp_path / "m.gguf", "gguf")
    with pytest.raises(ValueError, match="ternary must be TQ2_0 or TQ1_0"):
        export(quantized("llama"), tmp_path / "m.gguf", "gguf", ternary="Q2_K")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"hf-catquant\[gguf\]"):
        export(quantized("llama"), tmp_path / "m.gguf", "gguf")


def characters() -> Tokenizer:
    """Llama 2's kind of tokenizer: merges of characters, bytes where there is no character."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = ["<unk>", "<s>", "</s>", *bytes_, *"▁abcdefghijklmno", "▁a", "bc", "▁abc", "de"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("d", "e")]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def byte_level() -> Tokenizer:
    """GPT-2's kind: merges of bytes, text split before."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet, "ab", "abc", "Ġa"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("a", "b"), ("ab", "c"), ("Ġ", "a")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    return made


def saved(model: Any, tokenizer: Tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_vocabulary_arrives(tmp_path):
    export(saved(quantized("llama"), characters(), tmp_path / "a"), tmp_path / "a.gguf", "gguf")
    fields = read(tmp_path / "a.gguf")[2]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"][259] == "▁"
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert fields["tokenizer.ggml.token_type"][-1] == 5  # beyond what the tokenizer has
    assert fields["tokenizer.ggml.scores"][275:279] == [0, -1, -2, -3]
    assert fields["tokenizer.ggml.add_bos_token"]
    export(saved(quantized("llama"), byte_level(), tmp_path / "b"), tmp_path / "b.gguf", "gguf")
    fields = read(tmp_path / "b.gguf")[2]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.merges"] == ["a b", "ab c", "Ġ a"]
    assert not fields["tokenizer.ggml.add_bos_token"]


def test_an_unknown_tokenizer_is_refused(tmp_path):
    folder = saved(quantized("llama"), byte_level(), tmp_path / "a")
    file = folder / "tokenizer.json"
    parsed = json.loads(file.read_text())
    for change, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by"),
        ({"model": {"type": "Unigram", "vocab": []}}, "its model is Unigram"),
    ):
        file.write_text(json.dumps({**parsed, **change}))
        with pytest.raises(ValueError, match=f"{message}.*--no-vocabulary"):
            export(folder, tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(quantized("llama"), characters(), tmp_path_factory.mktemp("chat") / "in")


@pytest.fixture
def chat(made, tmp_path) -> Path:
    """A folder with a quantized model and its tokenizer."""
    return Path(shutil.copytree(made, tmp_path / "in"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


TEMPLATE = "{{ bos_token }}{% for message in messages %}<|user|>{{ message['content'] }}\n{% endfor %}"


def jinja(folder: Path, text: str = TEMPLATE) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def configured(folder: Path, held: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))


def more(folder: Path) -> None:
    jinja(folder)
    configured(folder, "not this one")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool-use.jinja").write_text("ü tools")


@pytest.mark.parametrize(
    ("put", "others"),
    [
        (jinja, {}),
        (lambda folder: configured(folder, TEMPLATE), {}),
        (lambda folder: (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE})), {}),
        (more, {"tool_use": "ü tools"}),
        (
            lambda folder: configured(
                folder, [{"name": "rag", "template": "r"}, {"name": "default", "template": TEMPLATE}]
            ),
            {"rag": "r"},
        ),
    ],
)
def test_chat_templates_arrive(chat, tmp_path, put, others):
    put(chat)
    export(chat, tmp_path / "m.gguf", "gguf")
    fields = read(tmp_path / "m.gguf")[2]
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert {name: fields[f"tokenizer.chat_template.{name}"] for name in others} == others
    assert fields.get("tokenizer.chat_templates", []) == list(others)


def test_a_chat_template_that_is_none_is_refused(chat, tmp_path):
    export(chat, tmp_path / "plain.gguf", "gguf")
    assert "tokenizer.chat_template" not in read(tmp_path / "plain.gguf")[2]
    for held in (3, [{"name": "x"}], {"default": None}):
        configured(chat, held)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be a text, or a list"):
            export(chat, tmp_path / "m.gguf", "gguf")
    configured(chat, {"a-b": "x", "a_b": "y"})
    with pytest.raises(ValueError, match="two of these names are one"):
        export(chat, tmp_path / "m.gguf", "gguf")


ENDS = {"</s>": 2, "<|eot_id|>": 279, "<|eom_id|>": 280, "<stop>": 281, "<|im_end|>": 282}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, 2, {"eos": 2}),
        ([2, 280, 279], [2, 280, 279], {"eos": 2, "eot": 279, "eom": 280}),
        (282, [282, 2], {"eos": 282, "eom": 2}),
        (2, [2, 279, 280, 281], {"eos": 2, "eot": 279, "eom": 280}),
    ],
)
def test_the_ends_of_an_answer_arrive_or_are_lost(chat, tmp_path, config, generation, expected):
    tokenizer = Tokenizer.from_file(str(chat / "tokenizer.json"))
    tokenizer.add_special_tokens(list(ENDS))
    assert [tokenizer.token_to_id(word) for word in ENDS] == list(ENDS.values())
    tokenizer.save(str(chat / "tokenizer.json"))
    edit(chat / "config.json", eos_token_id=config)
    edit(chat / "generation_config.json", eos_token_id=generation)
    lost = []
    if 281 in (generation if isinstance(generation, list) else []):
        lost = ["the end of an answer at token 281 (<stop>): a GGUF file names three such tokens"]
        with pytest.raises(ValueError, match=r"would lose: the end of an answer at token 281 \(<stop>\)"):
            export(chat, tmp_path / "m.gguf", "gguf")
    assert export(chat, tmp_path / "m.gguf", "gguf", lossy=True).lost == lost
    fields = read(tmp_path / "m.gguf")[2]
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")}
    assert {name: fields[key] for name, key in keys.items() if key in fields} == expected


def test_a_special_token_that_the_model_does_not_have_is_refused(chat, tmp_path):
    edit(chat / "config.json", pad_token_id=-1)
    export(chat, tmp_path / "m.gguf", "gguf")
    assert "tokenizer.ggml.padding_token_id" not in read(tmp_path / "m.gguf")[2]
    edit(chat / "config.json", bos_token_id=288)
    with pytest.raises(ValueError, match="bos_token_id is 288, beyond the 288 tokens of the model"):
        export(chat, tmp_path / "n.gguf", "gguf")


def test_a_model_of_the_hub_has_its_vocabulary(chat, tmp_path, monkeypatch):
    more(chat)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    with fake_hub.running() as hub:
        settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}
        settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        files = {path.relative_to(chat).as_posix(): path.read_bytes() for path in chat.rglob("*") if path.is_file()}
        hub.repos["me/chat"] = fake_hub.Repo(files, commits=1)
        assert export("me/chat", tmp_path / "m.gguf", "gguf").lost == []
    fields = read(tmp_path / "m.gguf")[2]
    assert fields["tokenizer.ggml.tokens"][259] == "▁"
    assert fields["tokenizer.chat_template.tool_use"] == "ü tools"


def opened(file: Path) -> tuple[Any, Any]:
    """llama.cpp with a file, from the package that has it compiled: the library and the model."""
    # llama-cpp-python is compiled where it is installed, which takes minutes: cyllama has wheels.
    why = "llama.cpp is not installed: pip install cyllama"
    library = pytest.importorskip("cyllama.llama.llama_cpp", reason=why)
    library.disable_logging()

    class Model(library.LlamaModel):
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which its own get_logits_ith asks for

    return library, Model(str(file), library.LlamaModelParams())


def logits_of(file: Path, ids: list[int]) -> np.ndarray:
    """What llama.cpp returns for every position."""
    library, model = opened(file)
    params = library.LlamaContextParams()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    context, batch = library.LlamaContext(model, params), library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for at, token in enumerate(ids):
        batch.add(token, at, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(at) for at in range(len(ids))])


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind, tmp_path):
    model = quantized(kind, centre=True, weights="ternary" if kind == "llama" else "int8")
    export(model, tmp_path / "m.gguf", "gguf", vocabulary=False)
    ids = torch.randint(3, 288, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    found = logits_of(tmp_path / "m.gguf", ids[0].tolist())
    # llama.cpp rounds every input to 8 bits: one or two parts in 100.
    assert np.linalg.norm(found - wanted) < 0.022 * np.linalg.norm(wanted)


@pytest.mark.parametrize("make", [characters, byte_level])
def test_llama_cpp_splits_text_alike(make, tmp_path):
    tokenizer = make()
    export(saved(quantized("llama"), tokenizer, tmp_path / "in"), tmp_path / "m.gguf", "gguf")
    _, loaded = opened(tmp_path / "m.gguf")  # its vocabulary does not outlive it
    vocabulary = loaded.get_vocab()
    for text in ("abc de", "a abc  bcde \u00e9", "de\nab"):
        ids = vocabulary.tokenize(text, add_special=True, parse_special=False)
        assert list(ids) == tokenizer.encode(text).ids, text


@pytest.mark.realdata
@pytest.mark.slow
def test_a_real_story_teller_in_llama_cpp(realdata, tmp_path):
    model = tf.AutoModelForCausalLM.from_pretrained(realdata / "models" / "stories260K")
    config = CatQuantConfig(weights="int4", group_size=32, solver="rtn", correction=None, rotation=None)
    hf_catquant.quantize(model, config).save_pretrained(tmp_path / "in")
    tokenizer = tf.AutoTokenizer.from_pretrained(realdata / "models" / "stories260K")
    tokenizer.save_pretrained(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "m.gguf", "gguf")
    _, loaded = opened(tmp_path / "m.gguf")  # its vocabulary does not outlive it
    vocabulary = loaded.get_vocab()
    text = "Once upon a time, there was a little girl named Lily. She had 3 cats!\n"
    ids = tokenizer(text).input_ids
    assert list(vocabulary.tokenize(text, add_special=True, parse_special=False)) == ids
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    found = logits_of(tmp_path / "m.gguf", ids)
    assert np.linalg.norm(found - wanted) < 0.022 * np.linalg.norm(wanted)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.9


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path, monkeypatch):
    honest = gguf.GGUFWriter.write_tensors_to_file

    def damaged(self, *args, **kwargs):
        held = next(iter(self.tensors[0].values()))
        held.tensor = held.tensor.copy()
        held.tensor.reshape(-1)[0] += 1
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", damaged)
    with pytest.raises(ValueError, match="does not give back what was written: "):
        export(quantized("llama"), tmp_path / "x.gguf", to="gguf", vocabulary=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.ggml.scores", "llama.rope.freq_base"])
def test_a_field_that_is_not_what_was_written_is_refused(chat, tmp_path, monkeypatch, key):
    honest = gguf.GGUFWriter.write_kv_data_to_file

    def damaged(self):
        held = self.kv_data[0][key]
        right = held.value
        held.value = (
            right + "." if isinstance(right, str) else [*right[:-1], 7.0] if isinstance(right, list) else right + 1
        )
        honest(self)
        held.value = right

    jinja(chat)
    monkeypatch.setattr(gguf.GGUFWriter, "write_kv_data_to_file", damaged)
    with pytest.raises(ValueError, match=f"does not give back what was written: {key}"):
        export(chat, tmp_path / "x.gguf", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_llama_cpp_knows_the_template_and_the_ends(chat, tmp_path):
    more(chat)
    edit(chat / "config.json", eos_token_id=[2, 278, 277])  # words that say nothing
    export(chat, tmp_path / "m.gguf", "gguf")
    _, loaded = opened(tmp_path / "m.gguf")
    vocabulary = loaded.get_vocab()
    assert [vocabulary.is_eog(token) for token in (1, 2, 276, 277, 278)] == [False, True, False, True, True]
    assert loaded.get_default_chat_template() == TEMPLATE
    assert loaded.get_default_chat_template_by_name("tool_use") == "ü tools"
