"""Linear layers of other libraries, for ``gpu.py``: each makes one of random weights, or raises where there is none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


def bitsandbytes_nf4(rows: int, columns: int, device: torch.device) -> Layer:
    """bitsandbytes: 4 bits, blocks of 64."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    return layer.to(torch.bfloat16).to(device)


def gemlite_two(rows: int, columns: int, device: torch.device, bits: int = 2) -> Layer:
    """GemLite: ``bits`` bits, groups of 128."""
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(
        bits, 128, columns, rows, input_dtype=DType.BF16, output_dtype=DType.BF16, scaled_activations=False
    )
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    scales, zeros = torch.rand(2, rows, columns // 128, device=device, dtype=torch.bfloat16)
    layer.pack(codes, scales, zeros, None)
    return layer


def gemlite_four(rows: int, columns: int, device: torch.device) -> Layer:
    """The same with 4 bits."""
    return gemlite_two(rows, columns, device, bits=4)


def torchao_int4(rows: int, columns: int, device: torch.device) -> Layer:
    """torchao: 4 bits, groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128))
    return layer


# The numbers of tokens that a peer is timed with, None for all: GemLite tries a dozen kernels for each, a second each.
PEERS: dict[Callable[[int, int, torch.device], Layer], tuple[int, ...] | None] = {
    bitsandbytes_nf4: None,
    gemlite_two: (1,),
    gemlite_four: (1,),
    torchao_int4: None,
}
