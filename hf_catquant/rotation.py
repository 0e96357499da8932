"""Rotating the input of a layer, so that no single input decides the range of a group of weights or of a token.

    W x = (W R^T) (R x)        R = blockdiag(H_p, ..., H_p) diag(s),   orthogonal

with H_p the p x p Walsh-Hadamard matrix over sqrt(p), p the largest power of two that divides K, and fixed signs s. What is
rounded is W R^T; the layer rotates its input. A product with R costs K (a + b) multiplications a row, a b = p, a and b about
sqrt(p). (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ROTATIONS = ("hadamard",)


def block_size(columns: int) -> int:
    """The largest power of two that divides ``columns``."""
    return columns & -columns


def rotate(x: Tensor, inverse: bool) -> Tensor:
    """R x of each row x of (..., K), or R^T x; computed in float32, in the dtype of ``x``."""
    rows = x.float()
    factors = signs(x.shape[-1], x.device)
    out = _walsh(rows) * factors if inverse else _walsh(rows * factors)
    return out.to(x.dtype)


def _walsh(x: Tensor) -> Tensor:
    """H_p is symmetric, and the Kronecker product of two smaller ones."""
    size = block_size(x.shape[-1])
    left, right = walsh_factors(size, x.device)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, len(left), len(right))  # no -1: there may be no rows
    return (left @ (blocks @ right)).reshape(x.shape) * size**-0.5


def walsh_factors(size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Two matrices of +1 and -1, (a, a) and (b, b), whose Kronecker product is sqrt(size) H; a b = ``size``."""
    first = 1 << (size.bit_length() // 2)
    return _walsh_signs(first, torch.device(device)), _walsh_signs(size // first, torch.device(device))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is made in inference mode could not be used outside it
def _walsh_signs(size: int, device: torch.device) -> Tensor:
    """sqrt(size) H: entry (i, j) is (-1)^popcount(i & j)."""
    index = torch.arange(size, device=device)
    return 1.0 - 2.0 * _parity(index[:, None] & index)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def signs(columns: int, device: torch.device) -> Tensor:
    """s (K,): the same ones forever, part of the stored format; a multiplicative hash, so like no row of H."""
    hashed = (torch.arange(1, columns + 1, device=device) * 2654435761) & 0xFFFFFFFF
    hashed = ((hashed ^ (hashed >> 15)) * 2246822519) & 0xFFFFFFFF
    return 1.0 - 2.0 * _parity(hashed)


def _parity(values: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        values = values ^ (values >> shift)
    return (values & 1).float()
