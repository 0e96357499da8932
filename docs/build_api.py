"""Build ``docs/api.md`` from the docstrings of everything that users import.

    python docs/build_api.py

A test fails while the page is not what the docstrings give.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "api.md"
# Module, and the names that users import from it; None: its __all__.
PARTS: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("hf_catquant", None),
    ("hf_catquant.solvers.reconstruct", ("Options",)),
    ("hf_catquant.correction", ("ClusterAffine", "attach", "detach", "corrections")),
    ("hf_catquant.exports", ("Exported",)),
    ("hf_catquant.describing", ("describe",)),
    ("hf_catquant.hub", ("push", "verify_repo")),
    ("hf_catquant.verify", ("verify", "Verification")),
    ("hf_catquant.evaluation", ("evaluate_classifier", "evaluate_language_model")),
    ("hf_catquant.similarity", ("PackedIndex",)),
    ("hf_catquant.theory", None),
)
_SECTION = re.compile(r"^(Args|Parameters|Attributes|Raises|Returns):$")
_ITEM = re.compile(r"^([\w, *]+): (.*)$")


def page() -> str:
    """The text of the page."""
    lines = [
        "# API reference",
        "",
        "Built from the docstrings by `python docs/build_api.py`. Letters: N out features, K in features, M rows of x,",
        "G groups a row, C clusters, D corrected width, P projection rank.",
    ]
    for module_name, names in PARTS:
        module = import_module(module_name)
        lines += ["", f"## `{module_name}`", "", *_summary(module)]
        for name in sorted(names or _public(module), key=str.lower):
            lines += ["", *entry(f"{module_name}.{name}", getattr(module, name))]
    return "\n".join(lines) + "\n"


def entry(path: str, thing: Any) -> list[str]:
    """Heading, signature and docstring of one name, and of a class its own public methods."""
    name = path.rpartition(".")[2]
    lines = [f"### `{name}`", ""]
    if not callable(thing):
        return [*lines, f"`{name}`, a {type(thing).__name__}."]
    lines += ["```", *signature(name, thing), "```", "", *body(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        for method, value in sorted(vars(thing).items()):
            if method.startswith("_") or not (inspect.isfunction(value) or isinstance(value, classmethod | property)):
                continue
            found = value.fget if isinstance(value, property) else getattr(thing, method)
            call = method if isinstance(value, property) else " ".join(signature(method, found))
            lines += ["", f"`{' '.join(call.split())}`", "", *body(inspect.getdoc(found) or "")]
    return lines


def signature(name: str, thing: Any) -> list[str]:
    """The call, one argument a line where it is long; of ``CatQuantConfig`` what a user asks for."""
    found = inspect.signature(thing)
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    if name == "CatQuantConfig":  # the other half is what a checkpoint stores
        parameters = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    parts = [_argument(p) for p in parameters]
    star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        parts.insert(star, "*")
    result = found.return_annotation
    tail = "" if inspect.isclass(thing) or result in (inspect.Signature.empty, "None") else f" -> {_plain(result)}"
    line = f"{name}({', '.join(parts)}){tail}"
    return [line] if len(line) <= 110 else [f"{name}(", *[f"    {part}," for part in parts], f"){tail}"]


def _argument(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {_plain(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}{kind}{default}"


def body(doc: str) -> list[str]:
    """A docstring as Markdown: its sections as lists."""
    lines: list[str] = []
    section = ""
    doc = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", doc).replace("``", "`")
    for line in doc.splitlines():
        found = _SECTION.match(line)
        if found:
            section = found.group(1)
            lines += [f"**{section}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            item = _ITEM.match(line.strip())
            lines.append(f"- `{item.group(1)}`: {item.group(2)}" if item else f"  {line.strip()}")
        elif section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            section = "" if line.strip() else section
            lines.append(line)
    return lines


def _summary(module: Any) -> Iterator[str]:
    yield from body((inspect.getdoc(module) or "").split("\n\n")[0])


def _public(module: Any) -> tuple[str, ...]:
    own = getattr(module, "__all__", None)
    if own is not None:
        return tuple(name for name in own if not name.startswith("__"))
    return tuple(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and inspect.getmodule(value) is module
        and (inspect.isfunction(value) or inspect.isclass(value))
    )


def _plain(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
