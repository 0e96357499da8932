"""Linear layers: ``nn.Linear`` and GPT-2's ``Conv1D``; activations get a range for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransposedLinear

from ..kernels import cuda, direct
from .base import QuantizedModule, Window, autocast, waves
from .float16_factors import LARGEST, balanced, fits_float16


class QuantizedLinear(QuantizedModule):
    """``nn.Linear`` with a packed weight; activations get a range for every token."""

    wraps: ClassVar[type[nn.Module]] = nn.Linear
    keeps = ("in_features", "out_features")
    rotates = True
    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        scheme = self.scheme
        x = self.rotated(autocast(x))
        out = direct.linear(
            x, *self._packed(), None, None, self.bias, scheme.weights, scheme.group_size, scheme.activations
        )
        product = self.product(x.dtype)
        if product is None:
            return out
        return out + nn.functional.linear(nn.functional.linear(x, product[1]), product[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        cuda.place(*self._packed(), self.scheme.weights, self.scheme.group_size, self.columns)
        return self

    @torch.no_grad()
    def add_product(self, out: Tensor, into: Tensor) -> None:
        """Add ``out`` (N, r) times ``into`` (r, K) to the weight: as columns and rows of its float16 product.

        Raises:
            ValueError: as :meth:`product_refusal` says; nothing is changed.
        """
        refusal = self.product_refusal(out, into)
        if refusal is not None:
            raise ValueError(refusal)
        factors = balanced(out.detach().float(), self.rotated(into.detach().float()))
        held = self.product(torch.float32)
        if held is not None:
            factors = torch.cat((held[0], factors[0]), 1), torch.cat((held[1], factors[1]))
        self.scheme = replace(self.scheme, low_rank=factors[1].shape[0])
        self.fill_low_rank(*factors)

    @torch.no_grad()
    def product_refusal(self, out: Tensor, into: Tensor) -> str | None:
        """Why ``out`` (N, r) times ``into`` (r, K) cannot be added to the weight; None if it can."""
        if self.owner is not None or self.is_shared:
            return "its weight is tied to that of another one: nothing can be added to one of them"
        out, into = out.detach().float(), self.rotated(into.detach().float())
        if not bool(torch.isfinite(out).all() & torch.isfinite(into).all()):
            return "what is to be added to its weight has values that are not finite"
        if not fits_float16(out, into):
            largest = float((out.abs().amax(0) * into.abs().amax(1)).max())
            return (
                f"what is to be added to its weight is a product of factors in float16, which end at {LARGEST:.0f}, and a "
                f"value of one times one of the other is {largest:.3g}"
            )
        return None

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None, *where: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        return nn.functional.linear(x, matrix, bias)

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> Tensor:
        """x (..., K) as (1, M, K)."""
        return x.reshape(1, -1, x.shape[-1])

    @classmethod
    def example(cls, module: nn.Module) -> Tensor:
        """Three rows."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return waves(weight, (3, cls.matrix_shape(module)[1]))

    def to_float(self) -> nn.Module:
        """An ``nn.Linear``."""
        module = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return self._float_state(module)


class QuantizedTransposedLinear(QuantizedLinear):
    """GPT-2's ``Conv1D``: a linear whose float weight is stored (K, N)."""

    wraps = TransposedLinear
    keeps = ("nf", "nx")
    nf: int
    nx: int

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """(N, K)."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[1], weight.shape[0]

    @classmethod
    def to_matrix(cls, weight: Tensor) -> Tensor:
        """(K, N) to (N, K)."""
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """(N, K) to (K, N)."""
        return matrix.T

    def to_float(self) -> nn.Module:
        """A ``Conv1D``."""
        with torch.device("meta"):
            module = TransposedLinear(self.nf, self.nx)
        return self._float_state(module)
