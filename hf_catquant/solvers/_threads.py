"""The same bits with another number of threads, as far as it is in our hands.

Products of matrices, solutions with a triangle and sums along a dimension came out the same with one thread and with two,
at every size that was tried. Factorizations do not: LAPACK splits a matrix by the number of threads, and a solver that
chooses levels one after the other turns a last bit into other codes. So they run on one, which costs little beside the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
