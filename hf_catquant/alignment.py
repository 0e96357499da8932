"""Where in memory tensors lie, which decides over the last bits of products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # bytes, of torch's own tensors


def align(model: nn.Module) -> None:
    """Move the tensors of ``model`` that lie on the CPU to where torch's own do: addresses that are multiples of 64.

    Loaders map files into memory, and a tensor then lies as it does in its file. Products of matrices add in another order
    there, so that the same weights would give other last bits than weights that were read.
    """
    moved: dict[Any, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_inference()
        if plain and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()  # what is one stays one
            if key not in moved:
                moved[key] = tensor.detach().clone()
            tensor.data = moved[key]
