"""The tokenizer in a GGUF file: tokens, scores or merges, the kinds of text that are split before merging, chat templates.

llama.cpp has its own tokenizers and chooses one by name. Two kinds are known here: byte-pair merges over characters with
bytes as a last resort, as in Llama 2 ("llama"), and over bytes, as in GPT-2, Llama 3 and Qwen ("gpt2"); anything else is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .chat import chat_templates, end_fields, stop_tokens, template_fields

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF

# The expression that splits text before merging, and llama.cpp's name for it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    None: "gpt-2",
    _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}" + _REST: "qwen2",
}


def vocabulary_fields(folder: Path | None, model: Any) -> dict[str, Any]:
    """What a GGUF file says of the tokenizer in ``folder``; "lost" is what it cannot say.

    Raises:
        ValueError: there is none, llama.cpp has no tokenizer like it, or its chat template is none.
    """
    file = None if folder is None else folder / "tokenizer.json"
    if folder is None or file is None or not file.is_file():
        raise ValueError(
            f"there is no tokenizer.json in {folder or 'a model in memory'}: save one with the model, or pass "
            "vocabulary=False (--no-vocabulary)"
        )
    config = model.config
    parsed = json.loads(file.read_text(encoding="utf-8"))
    found = parsed["model"]
    if found.get("type") != "BPE":
        raise ValueError(_unknown(f"its model is {found.get('type')}"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["merges"]]
    tokens = {**found["vocab"], **{token["content"]: token["id"] for token in parsed.get("added_tokens", ())}}
    added = {token["id"]: CONTROL if token["special"] else USER for token in parsed.get("added_tokens", ())}
    words: list[str] = [f"[unused{index}]" for index in range(config.vocab_size)]
    for word, index in tokens.items():
        if index >= config.vocab_size:
            raise ValueError(_unknown(f"token {index} is beyond the {config.vocab_size} of the model"))
        words[index] = word
    unused = set(range(config.vocab_size)) - set(tokens.values())
    fields: dict[str, Any] = {"tokens": words, **_special_ids(model, words, tokens, found), **_ends(parsed)}
    fields["chat"] = template_fields(chat_templates(folder))
    types = [added.get(at, UNUSED if at in unused else NORMAL) for at in range(len(words))]
    if found.get("byte_fallback"):
        return fields | _characters(parsed, found, merges, words, types)
    return fields | {"model": "gpt2", "pre": _split(parsed), "merges": merges, "types": types}


def write_fields(writer: Any, fields: dict[str, Any] | None) -> None:
    """Write what :func:`vocabulary_fields` found, or that there is no vocabulary."""
    if fields is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    if "scores" in fields:
        writer.add_token_scores(fields["scores"])
        writer.add_add_space_prefix(fields["space_prefix"])
    else:
        writer.add_token_merges(fields["merges"])
    writer.add_add_bos_token(fields["bos_first"])
    writer.add_add_eos_token(fields["eos_last"])
    for name, add in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("eot", "eot"),
        ("eom", "eom"),
        ("unk", "unknown"),
        ("pad", "padding"),
    ):
        if fields[name] is not None:
            writer.add_uint32(f"tokenizer.ggml.{add}_token_id", fields[name])
    for key, value in fields["chat"].items():
        (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)


def _characters(parsed: Any, found: Any, merges: list[str], words: list[str], types: list[int]) -> dict[str, Any]:
    """Llama 2's kind: llama.cpp merges the pair of the best score, which is here the rank of the merge that makes it."""
    rank: dict[str, int] = {}
    for at, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), at)
    splits = _flat(parsed.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("type") != "Metaspace" for step in splits):
        raise ValueError(_unknown(f"it splits text by {[step.get('type') for step in splits]}"))
    prepends = any(step.get("type") == "Prepend" for step in _flat(parsed.get("normalizer"), "normalizers"))
    prepends |= any(step.get("prepend_scheme", "always") != "never" for step in splits)
    unknown = found.get("unk_token")
    types = [
        UNKNOWN if word == unknown else BYTE if _is_byte(word) else kind
        for word, kind in zip(words, types, strict=True)
    ]
    return {
        "model": "llama",
        "pre": "default",
        "scores": [-float(rank.get(word, len(merges))) for word in words],
        "types": types,
        "space_prefix": prepends,
    }


def _split(parsed: Any) -> str:
    """llama.cpp's name for how text is split before merging."""
    steps = _flat(parsed.get("pre_tokenizer"), "pretokenizers")
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if (
        len(byte_level) != 1
        or len(patterns) > 1
        or len(steps) != 1 + len(patterns)
        or byte_level[0].get("add_prefix_space")
    ):
        raise ValueError(_unknown(f"it splits text by {[step.get('type') for step in steps]}"))
    pattern = patterns[0] if patterns else None
    if pattern not in _SPLITS or (pattern is None) != bool(byte_level[0].get("use_regex", True)):
        raise ValueError(_unknown(f"it splits text by {pattern!r}"))
    return _SPLITS[pattern]


def _flat(step: Any, inside: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, which may be none, one, or a sequence."""
    if step is None:
        return []
    return list(step[inside]) if step.get("type") == "Sequence" else [step]


def _special_ids(model: Any, words: list[str], tokens: dict[str, int], found: Any) -> dict[str, Any]:
    """Tokens with a meaning of their own, None where there is none, and which of them GGUF has no place for."""
    config, stops = model.config, stop_tokens(model)
    ids = {"bos": config.bos_token_id, "pad": config.pad_token_id, "unk": tokens.get(found.get("unk_token") or "")}
    held = {name: value[0] if isinstance(value, list) and value else value for name, value in ids.items()}
    held = {name: None if value is None or value < 0 else value for name, value in held.items()}
    for name, value in (*held.items(), *(("eos", stop) for stop in stops)):
        if value is not None and value >= len(words):
            raise ValueError(
                f"{name}_token_id is {value}, beyond the {len(words)} tokens of the model: correct its config"
            )
    ends, lost = end_fields(stops, words)
    return {**dict.fromkeys(("eos", "eot", "eom")), **held, **ends, "lost": lost}


def _ends(parsed: Any) -> dict[str, bool]:
    """Whether the tokenizer puts a token before and after a text."""
    steps = _flat(parsed.get("post_processor"), "processors")
    template: list[Any] = next((step["single"] for step in steps if step.get("type") == "TemplateProcessing"), [])
    places = [next(iter(piece)) for piece in template]
    texts = [at for at, kind in enumerate(places) if kind == "Sequence"]
    return {
        "bos_first": bool(texts) and texts[0] > 0,
        "eos_last": bool(texts) and texts[-1] < len(places) - 1,
    }


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _unknown(what: str) -> str:
    return (
        f"llama.cpp has no tokenizer like this one: {what}. Pass vocabulary=False (--no-vocabulary), and give it token "
        "numbers instead of text"
    )
