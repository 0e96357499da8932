"""Run the notebooks beside this file, cell after cell, and store what they print in them.

    python examples/notebooks.py [text speech vision]
    CATQUANT_DATA=FOLDER python examples/notebooks.py --show     # on real models: prints, stores nothing

Cells are plain Python, so that no notebook server is needed; they run as well in one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = ("text", "speech", "vision")


def execute(path: Path) -> list[str]:
    """Run the code cells of a notebook in one namespace; returns what each printed.

    Raises:
        Exception: whatever a cell raises.
    """
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for at, source in enumerate(code_of(path)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, f"{path.name}, cell {at + 1}", "exec"), names)
        printed.append(out.getvalue())
    return printed


def code_of(path: Path) -> list[str]:
    """The code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def store(path: Path, printed: list[str]) -> None:
    """Put what the cells printed into the notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for at, (cell, text) in enumerate(zip(cells, printed, strict=True)):
        cell["execution_count"] = at + 1
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="notebooks")
    parser.add_argument("--show", action="store_true", help="print instead of storing")
    args = parser.parse_args()
    for name in args.names or NAMES:
        path = HERE / f"{name}.ipynb"
        printed = execute(path)
        if args.show:
            print("\n".join(printed))
        else:
            store(path, printed)


if __name__ == "__main__":
    main()
