"""Whether corrections inside a model help it: its answers judge, as a block nearer to float may still lead further astray.

A correction of hidden features is fitted by mean squared error. It stays only if the divergence of the logits from those
of the float model falls, beyond what the paired bootstrap over samples leaves to chance, and they do not give up its
answers for that. These are the samples that it was
fitted on, by the logits, which it was not fitted to: the gain is a little better than it will be on others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .answers import agreement, answer_kind
from .held_out import interval, keeps_answers, losses
from .log import logger
from .site_rows import SiteRows

NOT_JUDGED = "not judged by the answers, as no module returns the model's logits"


class Judge:
    """The float model's logits on some batches, and how far another model's are from them.

    Args:
        seed: of the choice of rows, where there are very many.
        batches: how many there will be.
        problem: what the logits are for, as the model's config names it.
    """

    def __init__(self, seed: int, batches: int, problem: str | None = None) -> None:
        self.seed = seed
        self.problem = problem
        self._rows = SiteRows(seed, batches)

    def expect(self, teacher: Tensor, dim: int, mask: Tensor | None, count: int) -> None:
        """Add the float model's logits of one batch of ``count`` samples, as :meth:`SiteRows.expect` takes them."""
        self._rows.expect(teacher, dim, mask, count)

    def losses(self, outputs: Iterable[Tensor]) -> Tensor:
        """How far a model's logits are on the same batches, as ``answers.py`` measures it: (M, 2), the divergence and in
        how much the answer is another one."""
        found = []
        for batch, (logits, f) in enumerate(zip(outputs, self._rows.teacher, strict=True)):
            q, kind = self._rows.of(logits, batch), answer_kind(self.problem, f.shape[1])
            found.append(torch.stack([losses(q, f, kind), 1 - agreement(f, q, kind)], dim=1))
        return torch.cat(found)

    def helps(self, name: str, before: Tensor, after: Tensor, fit: dict[str, Any]) -> bool:
        """Whether the correction at ``name`` is worth its place, from the losses (M, 2) without and with it.

        ``fit``, the report of its fit, is told: the gain of the answers with its interval, and that it is off if so.
        """
        gain, low, high = interval((before - after)[:, 0], self._rows.samples, self.seed)
        fit.update(answers_gain=gain, answers_low=low, answers_high=high)
        keeps = keeps_answers((before - after)[:, 1], self._rows.samples)
        if low > 0 and keeps:
            return True
        was, now = before.mean(0).tolist(), after.mean(0).tolist()
        note = "off: nearer to float itself, but "
        note += f"the answers' divergence was {was[0]:.5f} without it and {now[0]:.5f} with it"
        if not keeps:
            note += f", and {100 * was[1]:.2f} and {100 * now[1]:.2f} % of them were not the float model's"
        logger.info("correction at %s: %s", name, note)
        fit.update(clusters=0, alpha=0.0, gamma="", notes=[*fit["notes"], note])
        return False
