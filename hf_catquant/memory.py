"""What this process holds in memory, as the system counts it: resident pages, those of libraries and mapped files included.

The peak of a run is the high-water mark of the same count. Linux can set the mark back; elsewhere it only grows.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_LARGE, _SMALL, _MMAP_THRESHOLD = 2 << 20, 1 << 17, -3  # bytes, bytes; the GNU C library's name for the option
_maps = False  # whether this process maps large blocks
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes in memory now."""
    return _field("VmRSS") or peak()


def peak() -> int:
    """Most bytes in memory since the process began, or since :func:`reset_peak`."""
    found = _field("VmHWM")
    if found:
        return found
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> bool:
    """Let the peak begin at what is in memory now; False where the system has no such thing."""
    release()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def release() -> None:
    """Give memory that nobody uses back to the system: what waits for the garbage collector, and then :func:`trim`."""
    gc.collect()
    trim()


def trim() -> None:
    """Give what was freed in the heap back to the system, where the C library can; takes milliseconds.

    Small blocks among those that were freed keep it there otherwise, hundreds of megabytes after a forward with a graph.
    """
    give_back = getattr(_c_library(), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def map_large_blocks() -> bool:
    """Let every large block of this process be mapped by itself, so that it goes back to the system when it is freed.

    Left alone, the GNU C library takes blocks of up to 32 MiB from a heap that small blocks among them keep from shrinking.
    torch is asked for pages of 2 MiB, if it has allocated nothing yet: touching fresh small ones would take as long as the
    work on convolutions does. False where the C library has no such thing.
    """
    global _maps
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _maps = _map_from(_LARGE)
    return _maps


@contextmanager
def small_blocks_mapped() -> Iterator[None]:
    """Blocks of 128 KiB and more are mapped, too, for the time of a ``with`` that takes many of them once.

    The heap would grow by all of them, and what is taken later would lie scattered over it. Does nothing in a process that
    has not asked to :func:`map_large_blocks`.
    """
    if not _maps:
        yield
        return
    _map_from(_SMALL)
    try:
        yield
    finally:
        _map_from(_LARGE)


def _map_from(size: int) -> bool:
    set_option = getattr(_c_library(), "mallopt", None)
    return set_option is not None and set_option(_MMAP_THRESHOLD, size) == 1


@cache
def _c_library() -> ctypes.CDLL | None:
    """None where there is none to ask; finding it starts a process."""
    name = ctypes.util.find_library("c") if os.name == "posix" else None
    return ctypes.CDLL(name) if name else None


def _field(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
