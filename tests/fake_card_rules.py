"""What the Hub says of the metadata of a README.md, as far as it is known without asking it.

Its own rules are on its side; these are those that its documentation states, and ``huggingface_hub``'s own reading of a
``model-index``. Licences are a list there; here a word of the right form passes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

RELATIONS = ("adapter", "finetune", "merge", "quantized")
SDKS = ("docker", "gradio", "static", "streamlit")
COLORS = ("blue", "gray", "green", "indigo", "pink", "purple", "red", "yellow")


def complaints(content: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """(errors, warnings) for a README.md of a "model" or a "space"."""
    found = re.match(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", content, re.S)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be an object"], []
    rules = _SPACE if kind == "space" else _MODEL
    errors = [f'"{name}" {rule}' for name, (holds, rule) in rules.items() if name in data and not holds(data[name])]
    if kind == "space" and "sdk" not in data:
        errors.append('"sdk" is required')
    if "model-index" in data:
        errors += _of_results(data["model-index"])
    return errors, []


def _of_results(index: Any) -> list[str]:
    try:
        name, results = model_index_to_eval_results(index)
    except Exception as error:  # whatever is missing or of another kind
        return [f'"model-index" cannot be read: {type(error).__name__}: {error}']
    errors = [] if isinstance(name, str) and name else ['"model-index[0].name" must be a string']
    for result in results:
        texts = (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
        if not all(isinstance(text, str) and text for text in texts):
            errors.append('"model-index" must have strings as types and names of its results')
        if result.metric_value is None:
            errors.append('"model-index" must have a value for every metric')
    return errors


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _text_or_texts(value: Any) -> bool:
    return _is_text(value) or _texts(value)


def _licences(value: Any) -> bool:
    words = value if isinstance(value, list) else [value]
    return all(isinstance(word, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", word) for word in words)


def _ids(value: Any) -> bool:
    if not _text_or_texts(value):
        return False
    try:
        for name in value if isinstance(value, list) else [value]:
            validate_repo_id(name)
    except HFValidationError:
        return False
    return True


_MODEL = {
    "base_model": (_ids, "must be a model id or a list of them"),
    "base_model_relation": (lambda v: v in RELATIONS, f"must be one of {', '.join(RELATIONS)}"),
    "datasets": (_text_or_texts, "must be a string or a list of strings"),
    "language": (_text_or_texts, "must be a string or a list of strings"),
    "library_name": (_is_text, "must be a string"),
    "license": (_licences, "must be a licence's word or a list of them"),
    "metrics": (_texts, "must be a list of strings"),
    "pipeline_tag": (_is_text, "must be a string"),
    "tags": (_texts, "must be a list of strings"),
}
_SPACE = {
    "app_file": (_is_text, "must be a string"),
    "colorFrom": (lambda v: v in COLORS, f"must be one of {', '.join(COLORS)}"),
    "colorTo": (lambda v: v in COLORS, f"must be one of {', '.join(COLORS)}"),
    "license": (_licences, "must be a licence's word or a list of them"),
    "pinned": (lambda v: isinstance(v, bool), "must be true or false"),
    "sdk": (lambda v: v in SDKS, f"must be one of {', '.join(SDKS)}"),
    "sdk_version": (_is_text, "must be a string"),
    "tags": (_texts, "must be a list of strings"),
    "title": (_is_text, "must be a string"),
}
