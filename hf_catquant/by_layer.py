"""Discrimination layer by layer: where in a model classes come apart, and where quantization costs it.

D of the features that every repeated block returns, and of those that enter the head, for float, quantized, and quantized
with correction, on the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .evaluation import mean_discrimination, variants
from .extract import BLOCKS, HEAD, Place, catch, places
from .model import stacks

COLORS = ("#4c566a", "#d08770", "#2e8b57")


@dataclass(frozen=True)
class LayerDiscrimination:
    """D by layer and model.

    Attributes:
        n: rows that D is of: those of classes with two or more.
        layers: names of the blocks in order, then "head".
        values: {"float", "quantized", "quantized + CAT": D of every layer}.
    """

    n: int
    layers: tuple[str, ...]
    values: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean."""
        return asdict(self)

    def __str__(self) -> str:
        table = [["discrimination of", *self.values]]
        table += [
            [layer, *(f"{values[i]:.4f}" for values in self.values.values())] for i, layer in enumerate(self.layers)
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in table]
        return "\n".join([*("  ".join(line) for line in lines), f"n = {self.n} rows, mean over pairs of classes"])

    def draw(self, path: str | Path) -> None:
        """Write a plot of D over the layers."""
        figure = Figure(figsize=(max(5.0, 0.45 * len(self.layers) + 2), 4), layout="constrained")
        axis = figure.subplots()
        styles = ("o-", "s--", "^:")
        for (name, values), color, style in zip(self.values.items(), COLORS, styles, strict=False):
            axis.plot(range(len(values)), values, style, color=color, label=name, markersize=5)
        axis.axhline(0.5, color="0.7", linewidth=1)
        axis.set_xticks(range(len(self.layers)), [_short(layer) for layer in self.layers], rotation=60, ha="right")
        axis.set_ylabel("discrimination D (0.5: classes not apart)")
        axis.set_title(f"features layer by layer, {self.n} rows")
        axis.legend()
        figure.savefig(path, dpi=110)


@torch.no_grad()
def discrimination_by_layer(
    teacher: nn.Module, model: nn.Module, batches: Sequence[dict[str, Tensor]], labels: Sequence[int]
) -> LayerDiscrimination:
    """Measure D at every block and before the head; sequences are averaged over their steps, maps over their places.

    Args:
        teacher, model: float and quantized, their modules named alike.
        batches: of test rows.
        labels: class of every row; classes of a single row are left out.

    Raises:
        ValueError: there are not two classes of two rows.
    """
    wanted = torch.as_tensor(labels)
    at = [*([BLOCKS] if stacks(teacher) else []), HEAD]
    sites = places(teacher, at, batches[0])
    found = {"float": _measure(teacher, sites, batches, wanted)}
    for name, values, _ in variants(model, lambda: _measure(model, sites, batches, wanted)):
        found[name] = values
    counts = wanted.unique(return_counts=True)[1]
    return LayerDiscrimination(int(counts[counts >= 2].sum()), tuple(site.name for site in sites), found)


def _measure(
    model: nn.Module, sites: Sequence[Place], batches: Sequence[dict[str, Tensor]], labels: Tensor
) -> tuple[float, ...]:
    parts: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for batch in batches:
        for name, features in catch(model, sites, batch, "mean")[1].items():
            parts[name].append(features)
    values = []
    for name, found in parts.items():
        value = mean_discrimination(torch.cat(found), labels) if found else None
        if value is None:
            raise ValueError(f"discrimination at {name!r} needs a vector a row, and two classes of two rows or more")
        values.append(value)
    return tuple(values)


def _short(layer: str) -> str:
    """The parts of a name that tell blocks apart: the numbers, or the last part."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return ".".join(numbers) or layer.split(".")[-1]
