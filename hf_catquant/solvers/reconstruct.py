"""GPTQ as the start, then block reconstruction: the layers of a block learn together, and at the end the whole model.

A matrix is solved as :mod:`.gptq` solves it; what happens to blocks and to the model is in ``reconstruction.py``. Minutes to
an hour on a CPU; by far the best for transformers below three bits, and with low-bit activations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .gptq import solve

__all__ = ["NEEDS_MOMENTS", "Options", "solve"]

NEEDS_MOMENTS = True
LEAST_TEMPERATURE = 0.001  # with less, the square of logits / T leaves float32


@dataclass(frozen=True)
class Options:
    """How much and how fast to learn.

    Attributes:
        block_steps: batches that every block learns from; 0: blocks stay as solved. More gain more, for their time:
            docs/autoround.md has a text encoder learned with 160 and with 800.
        model_steps: batches that the whole model learns from at the end; 0: none.
        code_rate: learning rate of the codes, in steps of the grid.
        scale_rate: that of scales and offsets, relative to their mean size.
        float_rate: that of biases, norms and what else is float in a block.
        model_rate: what these rates are multiplied by at the end.
        temperature: T of the divergence at the end, between softmax(logits / T), times T^2 (PD-Quant, arXiv 2212.07048).
        scale_pull: weight of the mean squared change of scales and offsets, relative to their mean size, that is added to
            the divergence. With code_rate=0, float_rate=0 and block_steps=0 that is the first stage of CAT
            (arXiv 2509.26277).

    Raises:
        ValueError: a value breaks its rule.
    """

    block_steps: int = 160
    model_steps: int = 400
    code_rate: float = 0.02
    scale_rate: float = 0.01
    float_rate: float = 0.001
    model_rate: float = 0.1
    temperature: float = 1.0
    scale_pull: float = 0.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            whole = entry.name.endswith("steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 <= value < 1e9:
                rule = "an integer of at least 0" if whole else "a number of at least 0"
                raise ValueError(f"solver_options: {entry.name} must be {rule}, got {value!r}")
        if self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"solver_options: temperature must be a number of at least {LEAST_TEMPERATURE}, got {self.temperature!r}"
            )
