"""Rows of floats on the CPU: ``rotate`` and ``cluster_affine``, each one pass over its rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..op_checks import check_cluster_affine, check_rotate
from ..rotation import signs
from . import native, reference
from .layout import check_state
from .native import DTYPES


def rotate(x: Tensor, inverse: bool) -> Tensor:
    """R x of the rows of x (..., K), or R^T x."""
    check_rotate(x)
    dtype, columns = DTYPES.get(x.dtype), x.shape[-1]
    if dtype is None or not x.numel():
        return reference.rotate(x, inverse)
    x = x.contiguous()
    out = torch.empty_like(x)
    sizes = (x.numel() // columns, columns, _signs(columns).data_ptr())
    threads = torch.get_num_threads()
    check_state(
        native.loaded().cq_rotate(x.data_ptr(), dtype, *sizes, inverse, out.data_ptr(), native.path_number, threads)
    )
    return out


@lru_cache(maxsize=64)
def _signs(columns: int) -> Tensor:
    """Those of the rotation, held here: the library reads them where they lie."""
    return signs(columns, torch.device("cpu")).contiguous()


def cluster_affine(y: Tensor, basis: Tensor | None, centroids: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """gamma[c] * y + beta[c], c the nearest of the centroids (C, P) to y (..., D) @ basis (D, P)."""
    check_cluster_affine(y, basis, centroids, gamma, beta)
    dtype, width = DTYPES.get(y.dtype), y.shape[-1]
    tables = tuple(None if t is None else t.float().contiguous() for t in (basis, centroids, gamma, beta))
    if dtype is None or not y.numel() or not centroids.numel():
        return reference.cluster_affine(y, basis, centroids, gamma, beta)
    y = y.contiguous()
    out = torch.empty_like(y)
    addresses = [None if t is None else t.data_ptr() for t in tables]
    state = native.loaded().cq_cluster_affine(
        y.data_ptr(),
        dtype,
        y.numel() // width,
        width,
        addresses[0],
        centroids.shape[1],
        addresses[1],
        centroids.shape[0],
        *addresses[2:],
        out.data_ptr(),
        native.path_number,
        torch.get_num_threads(),
    )
    check_state(state)
    return out
