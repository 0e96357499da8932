"""Solvers: find codes, scales and offsets for one matrix. The folder is the registry.

Every module here whose name does not start with ``_`` is a solver and offers

    NEEDS_MOMENTS: bool
    solve(weight: Tensor (N, K), fmt: Format, group_size: int, moments: Moments | None) -> QuantizedWeight

and, if it goes on to learn blocks from there, a dataclass ``Options`` of how.

A solver is a pure function: it changes none of its arguments and gives the same result for the same input.
"""

from __future__ import annotations

import pkgutil
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any

from ._common import AT_ONCE, SLICE, Moments, output_distance, output_energies, output_error, row_slices
from ._low_rank import solve_with_product

__all__ = [
    "AT_ONCE",
    "SLICE",
    "Moments",
    "get",
    "names",
    "options",
    "output_distance",
    "output_energies",
    "output_error",
    "row_slices",
    "solve_with_product",
]


def names() -> list[str]:
    """Names of the solvers, sorted; none of them is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def options(name: str, values: dict[str, Any]) -> Any:
    """The ``Options`` of the solver called ``name`` with ``values`` set; None if it has none.

    Raises:
        ValueError: there is no such option, or a value breaks its rule.
    """
    kind = getattr(get(name), "Options", None)
    known = [] if kind is None else [field.name for field in fields(kind)]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"solver {name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return None if kind is None else kind(**values)


def get(name: str) -> ModuleType:
    """The solver module called ``name``.

    Raises:
        ValueError: there is no such solver.
    """
    if name not in names():
        raise ValueError(f"solver must be one of {', '.join(names())}, got {name!r}")
    return import_module(f".{name}", __name__)
