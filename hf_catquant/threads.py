"""The same bits with another number of threads, as far as it is in our hands.

Torch's float operations split some sums by the number of threads: convolutions, the gradient of a layer norm, and products
of matrices whose sides are odd or short. A solver that chooses levels one after the other turns such a last bit into other
codes. Factorizations, which LAPACK splits at every size, run on one thread, which costs little beside the rest, and so does
all of a small model, where more threads gain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL = 1 << 20  # parameters


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch for the time of a ``with``."""
    count = torch.get_num_threads()
    if count == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def one_if_small(model: nn.Module) -> Iterator[None]:
    """One thread for the time of a ``with`` if ``model`` has at most `SMALL` parameters."""
    if sum(parameter.numel() for parameter in model.parameters()) > SMALL:
        yield
        return
    with one_thread():
        yield
