"""Embeddings: only the rows that are looked up are unpacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import QuantizedModule, Window


class QuantizedEmbedding(QuantizedModule):
    """``nn.Embedding`` with packed rows; only the rows that are looked up are unpacked."""

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

    def forward(self, indices: Tensor) -> Tensor:
        """indices (...) to (..., K) in the layer's compute dtype."""
        scheme = self.scheme
        return torch.ops.catquant.embedding(
            indices, *self._packed(), scheme.weights, scheme.group_size, self.columns, self.dtype
        )

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> None:
        """None: indices select rows, they do not multiply."""
        return None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """``max_norm`` rewrites the float weight at every look-up, which packed rows cannot follow."""
        return None if module.max_norm is None else "nn.Embedding with max_norm changes its weight in forward"

    def to_float(self) -> nn.Module:
        """An ``nn.Embedding``."""
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        return self._float_state(module)
