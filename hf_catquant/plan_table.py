"""What quantizing will take, as it is told: fields, and the table that is printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What quantizing will take. ``print(plan)`` shows it; ``to_dict()`` is JSON-clean.

    Attributes:
        peak_ram: bytes resident at most, libraries and mapped files included.
        peak_vram: bytes on the accelerator at most.
        disk: bytes that the journal and the output take beside each other.
        seconds: the sum of ``phases``. Reading the data, corrections of the whole model and writing are not counted.
        base: bytes resident with the libraries, the model's small parameters and the data.
        packed: bytes of the packed layers, which stay in memory.
        largest: name of the unit with the most float weights.
        largest_float: their bytes.
        streams: bytes of the outputs and inputs of units that are kept, in both streams; 0 without data.
        work: bytes that a solver and its matrices take at most.
        phase: what the peak is expected in.
        units: units in all.
        phases: seconds of each phase that is counted: "formats" (trying every layer in every format, if there is a budget),
            "units", "whole model" (the steps of all of it at the end, if the solver learns).
        drafts: bytes on the disk, beside ``disk``, of the drafts that the whole model's learning writes where there is room.
    """

    peak_ram: int
    peak_vram: int
    disk: int
    seconds: float
    base: int
    packed: int
    largest: str
    largest_float: int
    streams: int
    work: int
    phase: str
    units: int
    phases: dict[str, float] = field(default_factory=dict)
    drafts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        notes = {
            "formats": "every layer in every format, as long as one that was tried",
            "units": f"{self.units} units, at the speed of those that were tried",
            "whole model": "its steps at the end, at the speed of a block that learned",
        }
        rows = (
            ("peak RAM", _size(self.peak_ram), f"while {self.phase}"),
            ("peak VRAM", _size(self.peak_vram), "quantizing runs where the model is: on the CPU"),
            ("disk", _size(self.disk), "the journal and the output, until the journal is dropped"),
            *(
                (("  drafts", _size(self.drafts), "of the whole model's learning, where there is room"),)
                if self.drafts
                else ()
            ),
            ("time", _time(self.seconds), "without reading the data, corrections of the whole model and writing"),
            *((f"  {name}", _time(seconds), notes[name]) for name, seconds in self.phases.items()),
            ("", "", "of the peak:"),
            ("  base", _size(self.base), "libraries, small parameters, data"),
            ("  packed", _size(self.packed), "all finished layers"),
            ("  float", _size(self.largest_float), f"{self.largest}, the largest unit"),
            ("  streams", _size(self.streams), "inputs and outputs of units, float and quantized"),
            ("  solver", _size(self.work), "statistics and what is derived from them"),
        )
        return "\n".join(f"{name:<13} {value:>10}  {note}".rstrip() for name, value, note in rows)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
