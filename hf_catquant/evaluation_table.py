"""The table of an evaluation: a row a model, as text and as Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model on the test rows.

    Attributes:
        name: "float", "quantized" or "quantized + CAT".
        metric, low, high: accuracy in percent, or perplexity, with its 95 % interval.
        agreement: percent of rows (tokens) with the float model's first choice.
        lost, won: rows that the float model has right and this one wrong, and the reverse; None for language models.
        kl: mean divergence to the float model, nats.
        discrimination: of the features that enter the head; None for language models.
        bytes, bits_per_parameter: of the stored model.
    """

    name: str
    metric: float
    low: float
    high: float
    agreement: float
    lost: int | None
    won: int | None
    kl: float
    discrimination: float | None
    bytes: int
    bits_per_parameter: float


@dataclass(frozen=True)
class Evaluation:
    """The table. ``gain`` is what the correction adds to the metric (accuracy points, or perplexity saved), paired.

    ``significantly_worse`` says that the 95 % interval of the gain lies below zero. None without a correction.
    """

    metric: str
    n: int
    rows: tuple[Row, ...]
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None

    @property
    def significantly_worse(self) -> bool | None:
        """Whether the correction does harm beyond chance."""
        return None if self.gain_high is None else self.gain_high < 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean."""
        return {**asdict(self), "significantly_worse": self.significantly_worse}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """Inverse of :meth:`to_dict`; what else ``values`` holds is left out.

        Raises:
            ValueError: a field is missing or of another kind.
        """
        try:
            chosen = {field.name: values[field.name] for field in fields(cls)}
            return cls(**{**chosen, "rows": tuple(Row(**row) for row in chosen["rows"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the evaluation is not one that this version writes: {error}") from error

    def to_markdown(self) -> str:
        """A table for a README."""
        head = [
            self.metric,
            "95 % interval",
            "agreement %",
            "lost",
            "won",
            "KL",
            "discrimination",
            "bytes",
            "bits/param",
        ]
        lines = ["| model | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in self.rows]
        return "\n".join([*lines, "", self._footer()])

    def __str__(self) -> str:
        head = [
            "model",
            self.metric,
            "95 % interval",
            "agree %",
            "lost",
            "won",
            "KL",
            "discrim.",
            "bytes",
            "bits/param",
        ]
        table = [head, *[_cells(row) for row in self.rows]]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        return "\n".join([*lines, self._footer()])

    def _footer(self) -> str:
        text = f"n = {self.n} rows"
        if self.gain is not None:
            unit = "points" if self.metric == "accuracy" else "perplexity"
            text += (
                f"; the correction gains {self.gain:+.2f} {unit} [{self.gain_low:+.2f}, {self.gain_high:+.2f}], paired"
            )
        return text


def _cells(row: Row) -> list[str]:
    flips = ["-" if value is None else str(value) for value in (row.lost, row.won)]
    discrimination = "-" if row.discrimination is None else f"{row.discrimination:.4f}"
    return [
        row.name,
        f"{row.metric:.2f}",
        f"{row.low:.2f} to {row.high:.2f}",
        f"{row.agreement:.2f}",
        *flips,
        f"{row.kl:.4f}",
        discrimination,
        f"{row.bytes:,}",
        f"{row.bits_per_parameter:.2f}",
    ]
