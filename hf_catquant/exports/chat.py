"""What a GGUF file says of conversations: chat templates, and the tokens at which an answer ends.

A file has any number of templates, and room for three such tokens: the end of a text, of a turn, and of a message.
llama.cpp stops at each of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..checkpoint import read_object

KEY, NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
DEFAULT = "default"
# What llama.cpp itself takes for the end of a turn where a file does not say it.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of the tokenizer in ``folder`` by name, as transformers reads them; empty if it has none.

    Files (``chat_template.jinja`` is the default one, ``additional_chat_templates/NAME.jinja``) go before what
    ``tokenizer_config.json`` has. ``chat_template.json``, which processors had, is read where there is nothing else.

    Raises:
        ValueError: a file is damaged, or has something else in the place of a template.
    """
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        held = read_object(path).get("chat_template") if not found and path.is_file() else None
        found |= _named(held, path)
    return found


def _named(held: Any, path: Path) -> dict[str, str]:
    """Templates by name, of one or of a list of them."""
    if held is None:
        return {}
    try:
        if isinstance(held, list):
            held = {each["name"]: each["template"] for each in held}
        named = held if isinstance(held, dict) else {DEFAULT: held}
        if not all(isinstance(text, str) for text in (*named, *named.values())):
            raise TypeError(f"got {held!r:.100}")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: chat_template must be a text, or a list of objects with name and template: {error}"
        ) from error
    return named


def template_fields(templates: dict[str, str]) -> dict[str, Any]:
    """Fields of a GGUF file that hold the templates: the default one, and others by names of letters and digits.

    Raises:
        ValueError: two names become one.
    """
    others = {name: f"{KEY}.{re.sub('[^A-Za-z0-9]', '_', name)}" for name in sorted(templates) if name != DEFAULT}
    if len(set(others.values())) < len(others):
        raise ValueError(
            f"chat templates {', '.join(others)}: in a GGUF file two of these names are one: rename a file"
        )
    fields: dict[str, Any] = {key: templates[name] for name, key in others.items()}
    if others:
        fields[NAMES] = sorted(key.removeprefix(f"{KEY}.") for key in others.values())
    return fields | ({KEY: templates[DEFAULT]} if DEFAULT in templates else {})


def stop_tokens(model: Any) -> list[int]:
    """Tokens at which generation stops: of the model's config, then of its generation config."""
    held = (model.config.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    found = [token for value in held for token in (value if isinstance(value, list | tuple) else [value])]
    return [token for token in dict.fromkeys(found) if token is not None and token >= 0]


def end_fields(stops: list[int], words: list[str]) -> tuple[dict[str, int], list[str]]:
    """Where GGUF keeps the tokens that end an answer, and what it has no place for.

    Args:
        stops: the first is the end of a text.
        words: every token of the vocabulary.
    """
    ends, lost = {"eos": stops[0]} if stops else {}, []
    for token in stops[1:]:
        places = ("eot", "eom") if words[token] in _TURN_ENDS else ("eom", "eot")
        free = next((place for place in places if place not in ends), None)
        if free is None:
            lost.append(f"the end of an answer at token {token} ({words[token]}): a GGUF file names three such tokens")
        else:
            ends[free] = token
    return ends, lost
