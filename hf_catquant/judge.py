"""Whether corrections inside a model help it: its answers judge, as a block nearer to float may still lead further astray.

A correction of hidden features is fitted by mean squared error. It stays only if the divergence of the logits from those
of the float model falls, beyond what the paired bootstrap over samples leaves to chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .held_out import interval, losses
from .log import logger

MAX_VALUES = 1 << 26  # floats of a stream that are looked at


def rows_of(output: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (n, D) float32 of an output with its D features at ``dim``, and the sample (n,) of the batch each is of."""
    rows = output.movedim(dim, -1).reshape(-1, output.shape[dim]).float()
    count = sample_count(output)
    sample = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // max(count, 1))
    if mask is None:
        return rows, sample
    mask = mask.to(rows.device)  # that of the float model may be another one
    return rows[mask], sample[mask]


def sample_count(output: Tensor) -> int:
    """Samples of a batch that an output is of."""
    return len(output) if output.dim() > 1 else 1


def quota(width: int, batches: int) -> int:
    """Rows of ``width`` floats of each of ``batches`` that are looked at."""
    return max(1, MAX_VALUES // (width * batches))


class Judge:
    """The float model's logits on some batches, and how far another model's are from them.

    Args:
        seed: of the choice of rows, where there are very many.
        batches: how many there will be.
    """

    def __init__(self, seed: int, batches: int) -> None:
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._batches = batches
        self._wanted: list[Tensor] = []
        self._how: list[tuple[int, Tensor | None, Tensor]] = []
        self._samples: list[Tensor] = []
        self._count = 0

    def expect(self, teacher: Tensor, dim: int, mask: Tensor | None) -> None:
        """Add the float model's logits of one batch, with their classes at ``dim``; ``mask`` picks rows."""
        rows, sample = rows_of(teacher, dim, mask)
        chosen = torch.randperm(len(rows), generator=self._generator)[: quota(rows.shape[1], self._batches)]
        chosen = chosen.sort().values  # on the CPU, which picks rows on any device
        self._how.append((dim, mask, chosen))
        self._wanted.append(rows[chosen].cpu())
        self._samples.append(sample[chosen].cpu() + self._count)
        self._count += sample_count(teacher)

    def losses(self, outputs: Iterable[Tensor]) -> Tensor:
        """Divergence (M,) of a model's logits on the same batches, nats."""
        found = []
        for output, wanted, (dim, mask, chosen) in zip(outputs, self._wanted, self._how, strict=True):
            found.append(losses(rows_of(output, dim, mask)[0][chosen].cpu(), wanted, "logits"))
        return torch.cat(found)

    def helps(self, name: str, before: Tensor, after: Tensor, fit: dict[str, Any]) -> bool:
        """Whether the correction at ``name`` is worth its place, from the losses (M,) without and with it.

        ``fit``, the report of its fit, is told: the gain of the answers with its interval, and that it is off if so.
        """
        gain, low, high = interval(before - after, torch.cat(self._samples), self.seed)
        fit.update(answers_gain=gain, answers_low=low, answers_high=high)
        if low > 0:
            return True
        note = (
            f"off: nearer to float itself, but the answers' divergence was {float(before.mean()):.5f} without it and "
        )
        note += f"{float(after.mean()):.5f} with it"
        logger.info("correction at %s: %s", name, note)
        fit.update(clusters=0, alpha=0.0, gamma="", notes=[*fit["notes"], note])
        return False
