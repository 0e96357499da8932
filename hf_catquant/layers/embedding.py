"""Embeddings: only the rows that are looked up are unpacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import QuantizedModule, Scheme, Window


class QuantizedEmbedding(QuantizedModule):
    """``nn.Embedding`` with packed rows, or a subclass of it that multiplies them by its ``embed_scale``."""

    wraps = nn.Embedding
    keeps = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        """As every layer, with the type of ``original`` and its scale."""
        super().__init__(original, scheme)
        self.float_type = type(original)
        self.embed_scale = _embed_scale(original)
        # A scale held as a tensor is cast to the dtype of the weight before it is used.
        self.scale_is_cast = hasattr(original, "scalar_embed_scale")

    def forward(self, indices: Tensor) -> Tensor:
        """indices (...) to (..., K) in the layer's compute dtype."""
        scheme = self.scheme
        rows = torch.ops.catquant.embedding(
            indices, *self._packed(), scheme.weights, scheme.group_size, self.columns, self.dtype
        )
        product = self.product(self.dtype)
        if product is not None:
            rows = rows + product[0][indices] @ product[1]
        return self._scaled(rows)

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None, *where: Tensor) -> Tensor:
        """Indices x (...) to (..., K)."""
        return self._scaled(nn.functional.embedding(x, matrix))

    def _scaled(self, rows: Tensor) -> Tensor:
        if self.embed_scale is None:
            return rows
        return rows * (rows.new_full((), self.embed_scale) if self.scale_is_cast else self.embed_scale)

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> None:
        """None: indices select rows, they do not multiply."""
        return None

    @classmethod
    def example(cls, module: nn.Module) -> Tensor:
        """The first and the last index, and the one of padding."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        padding: Any = module.padding_idx
        indices = [0, len(weight) - 1, 0 if padding is None else padding]
        return torch.tensor([indices], device=weight.device)

    @classmethod
    def plain_forward(cls, module: nn.Module, x: Tensor) -> Tensor:
        """The rows, times the scale if ``module`` has one."""
        scale = _embed_scale(module)
        rows = super().plain_forward(module, x)
        return rows if scale is None else rows * scale

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """``max_norm`` rewrites the float weight at every look-up, which packed rows cannot follow."""
        return None if module.max_norm is None else "nn.Embedding with max_norm changes its weight in forward"

    def to_float(self) -> nn.Module:
        """An ``nn.Embedding``, or the scaled one that this was."""
        sizes = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        if self.embed_scale is None:
            return self._float_state(nn.Embedding(*sizes, device="meta"))
        with torch.device("meta"):
            module = self.float_type(*sizes, embed_scale=self.embed_scale)
        if "embed_scale" in module._buffers:
            device = self.weight_packed.device
            module._buffers["embed_scale"] = torch.tensor(self.embed_scale, dtype=self.dtype, device=device)
        return self._float_state(module)


def _embed_scale(module: nn.Module) -> float | None:
    """The number that a subclass of ``nn.Embedding`` multiplies its rows by, None if it has none."""
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return float(scale) if isinstance(scale, int | float) else None
