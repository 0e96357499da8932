"""Layouts: packed weights in the order that the CPU kernels read them, and where they live.

A layout holds the codes, scales and offsets of a weight once more, run after run of 16 rows (``csrc/catquant.h``). It
hangs on the storage of ``weight_packed``: so it is no part of a module's state, is neither copied nor saved with the
tensor, serves every tensor that shares the storage (a tied head, what ``torch.compile`` passes on), and goes when the
storage goes. It is built at the first product, straight from the packed bytes, and built again when one of the tensors
was written to, through a way that torch counts, or replaced. Of tensors made in inference mode torch counts nothing: a
``load_state_dict`` has theirs built again, and whoever writes into them by hand calls :func:`forget`.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import group_width
from ..op_checks import check_weight
from .native import FORMAT_NUMBERS, NO_MEMORY, library

LARGE_PAGE = 2 << 20  # CQ_LARGE_PAGE of csrc/catquant.h
SCALE_DTYPES = (torch.float16, torch.float32)
Source = tuple["weakref.ref[Any]", int, int]


class Layout(NamedTuple):
    """A weight in the order that products read it, and what it was built from.

    ``sources`` are scale and offset: a weak reference to the storage, the address, and the version of each. Nothing
    here keeps a tensor alive, least of all the one whose storage this hangs on.
    """

    address: int
    memory: Tensor
    nbytes: int
    version: int
    sources: tuple[Source, ...]


def layout_of(
    packed: Tensor, scale: Tensor, offset: Tensor | None, weights: str, group_size: int, columns: int
) -> int | None:
    """The address of a weight's layout, built if there is none; None where the kernels cannot read such tensors.

    Raises:
        RuntimeError: the tensors do not agree with the format, or there is no memory.
    """
    storage: Any = packed.untyped_storage()
    try:
        held = storage.catquant_layouts
    except AttributeError:
        held = storage.catquant_layouts = {}
    key = (packed.data_ptr(), packed.shape[0], columns, weights, group_size)
    layout = held.get(key)
    if layout is not None and _is_current(layout, packed, scale, offset):
        return layout.address
    held.pop(key, None)  # the old one goes before the new one comes
    check_weight(packed, scale, offset, weights, group_size, columns)
    if not readable(packed, scale, offset):
        return None
    held[key] = layout = _build(packed, scale, offset, weights, group_size, columns)
    return layout.address


def readable(packed: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether the library can read these tensors where they lie."""
    tensors = (packed, scale) if offset is None else (packed, scale, offset)
    same = offset is None or offset.dtype == scale.dtype
    there = all(t.is_cpu and t.numel() and t.is_contiguous() for t in tensors)
    return same and there and scale.dtype in SCALE_DTYPES


def forget(packed: Tensor) -> None:
    """Have the layouts that hang on the storage of ``packed`` built again at the next product."""
    getattr(packed.untyped_storage(), "catquant_layouts", {}).clear()


def held_bytes(packed: Tensor) -> int:
    """Bytes of the layouts that hang on the storage of ``packed``."""
    held = getattr(packed.untyped_storage(), "catquant_layouts", {})
    return sum(layout.nbytes for layout in held.values())


def check_state(state: int) -> None:
    """Refuse the state of a library call that found no memory.

    Raises:
        RuntimeError: it is NO_MEMORY.
    """
    if state == NO_MEMORY:
        raise RuntimeError("the CPU kernels found no memory for a weight or its input: use smaller batches")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count


def _is_current(layout: Layout, packed: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    if _version(packed) != layout.version:
        return False
    for tensor, (storage, address, version) in zip((scale, offset), layout.sources, strict=False):
        if tensor is None or tensor.data_ptr() != address or _version(tensor) != version:
            return False
        if storage() is not tensor.untyped_storage():
            return False
    return True


def _build(
    packed: Tensor, scale: Tensor, offset: Tensor | None, weights: str, group_size: int, columns: int
) -> Layout:
    native: Any = library()
    number, rows, width = FORMAT_NUMBERS[weights], packed.shape[0], group_width(columns, group_size)
    wide = int(scale.dtype == torch.float32)
    size = native.cq_layout_bytes(number, rows, columns, width, int(offset is not None), wide)
    align = LARGE_PAGE if size >= LARGE_PAGE else 64  # what is left out in front is never touched
    memory = torch.empty(size + align, dtype=torch.uint8)
    address = -(-memory.data_ptr() // align) * align
    tensors = (packed.data_ptr(), packed.shape[1], scale.data_ptr(), None if offset is None else offset.data_ptr())
    check_state(native.cq_layout_build(number, rows, columns, width, wide, *tensors, torch.get_num_threads(), address))
    sources = tuple(
        (weakref.ref(tensor.untyped_storage()), tensor.data_ptr(), _version(tensor))
        for tensor in (scale, offset)
        if tensor is not None
    )
    return Layout(address, memory, size, _version(packed), sources)
