"""The rows of an output that a correction is fitted on and judged by: the same ones of the float and the quantized model.

Of very many rows (language model logits) an equal random share of every batch is kept, and an output is let go as soon as
its rows are taken, so that 150,000 classes cost no more memory than a thousand.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VALUES = 1 << 26  # floats of a stream that are kept


class SiteRows:
    """Rows of one module's output, batch by batch.

    Args:
        seed: of the choice of rows, where there are very many.
        batches: how many there will be.
    """

    def __init__(self, seed: int, batches: int) -> None:
        self.dim = -1  # the dimension of features in the outputs
        self._teacher: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._picked: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._batches = batches
        self._count = 0

    def expect(self, teacher: Tensor, dim: int, mask: Tensor | None, count: int) -> None:
        """Take rows of what the float model puts out on the next batch, of ``count`` samples.

        ``dim`` is the dimension of features; ``mask`` picks rows, in the order of the output without that dimension.
        """
        self.dim = dim
        rows = _rows(teacher, dim)
        picked = torch.arange(len(rows)) if mask is None else mask.nonzero().flatten().cpu()
        most = max(1, MAX_VALUES // (rows.shape[1] * self._batches))
        if len(picked) > most:
            picked = picked[torch.randperm(len(picked), generator=self._generator)[:most].sort().values]
        self._picked.append(picked)
        self._teacher.append(_take(rows, picked))
        each = len(rows) // count if len(rows) % count == 0 else 1  # packed rows are witnesses of their own
        self._samples.append(picked // each + self._count)
        self._count += len(rows) // each

    def of(self, output: Tensor, batch: int) -> Tensor:
        """The same rows (n, D) float32, on the CPU, of another model's output on the batch of this number."""
        return _take(_rows(output, self.dim), self._picked[batch])

    @property
    def count(self) -> int:
        """Rows so far."""
        return sum(map(len, self._teacher))

    @property
    def teacher(self) -> list[Tensor]:
        """Rows (n, D) float32 of the float model, by batch."""
        return self._teacher

    @property
    def samples(self) -> Tensor:
        """The sample (M,) int64 that each row is of."""
        return torch.cat(self._samples)


def _rows(output: Tensor, dim: int) -> Tensor:
    """Rows (n, D) of an output with its D features at ``dim``."""
    return output.movedim(dim, -1).reshape(-1, output.shape[dim])


def _take(rows: Tensor, picked: Tensor) -> Tensor:
    return rows[picked.to(rows.device)].float().cpu()
