"""Imports point down: a file imports only from rows above its own in ROWS, and from its own folder."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hf_catquant"

# Lowest first. A name is a file or a folder of the package; names of one row do not import each other, so those of the
# first row stand alone.
ROWS = [
    "metrics",
    "answers formats discrimination version log integrity fields evaluation_table bench_peers memory disk threads",
    "checkpoint units",
    "journal_place inventory",
    "rotation outputs journal shelf alignment hub_id whole source_files row_files",
    "packing request_checks theory",
    "weight",
    "op_checks",
    "ops",
    "kernels",
    "solvers bench similarity",
    "moments bench_plot",
    "correction",
    "correction_file cluster_space cluster_sums held_out site_rows",
    "cluster_fit judge",
    "layers",
    "lora_merge lora_targets",
    "lora_layer offloaded",
    "entries lora modules sentinels",
    "config",
    "packed_model resolve",
    "model as_built",
    "generate model_inputs padding load_checks streaming sizes float_parameters saving ties written",
    "collate",
    "decoder_inputs processors",
    "raw_samples",
    "replay activations",
    "logits",
    "probe swap",
    "samples walk steps",
    "fitting features gather",
    "copies",
    "expert_rows correcting stages plugin",
    "extract learned training mixed",
    "reconstruction",
    "calibrate",
    "pipeline planning_time plan_table",
    "planning",
    "report stored_tensors",
    "plain identity parts",
    "quantizer",
    "registration",
    "evaluation tasks verify installing report_checks",
    "card_usage card_making",
    "by_layer report_page card exports folder",
    "describing",
    "hub",
    "demo",
    "cli",
    "__init__",
]
# Parts of transformers that change without notice, and the files that follow them: the quantizer, and the model's one
# question what modules_to_not_convert means.
INTERNALS = ("transformers.quantizers", "transformers.core_model_loading", "transformers.modeling_utils")
FOLLOWERS = {"quantizer", "registration", "model", "streaming", "written"}

ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}


def owner(file: Path, package: Path) -> str:
    """The name in ROWS that ``file`` belongs to."""
    return file.relative_to(package).parts[0].removesuffix(".py")


def imported_modules(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, with relative ones spelled out; ``from a import b`` gives ``a.b``."""
    folder = [package.name, *file.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_owners(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, name in ROWS) of every import from the package itself."""
    for line, name in imported_modules(file, package):
        root, *rest = name.split(".")
        if root == package.name:
            target = rest[0] if rest else "__init__"
            known = target in ROW_OF or (package / target).is_dir() or (package / f"{target}.py").is_file()
            yield line, target if known else "__init__"  # what is no module is a name of the package itself


def violations(package: Path) -> list[str]:
    """One line for every file that is not in ROWS and every import that points up or sideways."""
    found = []
    for file in sorted(package.rglob("*.py")):
        name, place = owner(file, package), file.relative_to(package.parent)
        if name not in ROW_OF:
            found.append(f"{place}: add {name!r} to ROWS in tests/test_layering.py, below everything that it imports")
            continue
        for line, target in imported_owners(file, package):
            if target == name and (package / name).is_dir():
                continue
            if target not in ROW_OF or ROW_OF[target] >= ROW_OF[name]:
                found.append(f"{place}:{line}: {name} must not import {target}, which is not in a row above it")
    return found


def test_imports_point_down():
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_formats_import_the_standard_library_only():
    roots = {name.split(".")[0] for _, name in imported_modules(PACKAGE / "formats.py", PACKAGE)}
    assert roots <= sys.stdlib_module_names


def test_few_files_touch_the_internals_of_transformers():
    found = {
        owner(file, PACKAGE)
        for file in PACKAGE.rglob("*.py")
        for _, name in imported_modules(file, PACKAGE)
        if name.startswith(INTERNALS)
    }
    assert found <= FOLLOWERS


def test_every_kind_of_violation_is_seen(tmp_path):
    package = tmp_path / "hf_catquant"
    files = {
        "__init__.py": "from .config import CatQuantConfig",
        "formats.py": "import math",
        "weight.py": "from .packing import unpack\nfrom .formats import Format",
        "packing.py": "from . import formats\ndef f():\n    from .weight import dequantize",
        "walk.py": "from hf_catquant.samples import batches",
        "samples.py": "import hf_catquant.ops",
        "ops.py": "from . import __version__",
        "newcomer.py": "",
        "kernels/__init__.py": "from . import reference",
        "kernels/reference.py": "from ..formats import get_format\nfrom ..layers import Scheme",
        "layers.py": "",
        "config.py": "",
        "discrimination.py": "from .formats import FORMATS",
    }
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert violations(package) == [
        "hf_catquant/discrimination.py:1: discrimination must not import formats, which is not in a row above it",
        "hf_catquant/kernels/reference.py:2: kernels must not import layers, which is not in a row above it",
        "hf_catquant/newcomer.py: add 'newcomer' to ROWS in tests/test_layering.py, below everything that it imports",
        "hf_catquant/ops.py:1: ops must not import __init__, which is not in a row above it",
        "hf_catquant/packing.py:3: packing must not import weight, which is not in a row above it",
        "hf_catquant/walk.py:1: walk must not import samples, which is not in a row above it",
    ]
