"""The units of a walk, the layers inside them, and who reads whose outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Leaf:
    """A layer inside a unit.

    Attributes:
        name: its name relative to the unit, "" if it is the unit.
        source: stands for the tensor that it reads; leaves with one source read the same tensor.
        calls: how often one run of the unit runs it.
    """

    name: str
    source: int
    calls: int = 0


@dataclass
class Unit:
    """A part of the model that is quantized in one go.

    Attributes:
        name: its name in the model.
        leaves: the layers to treat inside, in the order the model runs them.
        calls: how often one forward runs the unit.
        reads: indices of the earlier units whose outputs its inputs depend on.
    """

    name: str
    leaves: list[Leaf] = field(default_factory=list)
    calls: int = 0
    reads: set[int] = field(default_factory=set)


@dataclass
class Plan:
    """The units in the order the model runs them; what its output reads; where its logits come from.

    ``watched`` is what modules read that are looked at when all units are done; ``runs`` how often one forward runs each
    module, by name.
    """

    units: list[Unit]
    final_reads: set[int]
    logits_site: str | None
    watched: set[int] = field(default_factory=set)
    runs: Mapping[str, int] = field(default_factory=dict)

    def last_reads(self, *, watched: bool) -> list[int]:
        """Index of the last unit that reads each unit's outputs, itself if none does; past the end: the model's output.

        ``watched``: what watched modules read is read past the end, too.
        """
        final = self.final_reads | self.watched if watched else self.final_reads
        readers = [*enumerate(unit.reads for unit in self.units), (len(self.units), final)]
        return [max([r for r, reads in readers if i in reads], default=i) for i in range(len(self.units))]
