"""What this process holds in memory, as the system counts it: resident pages, those of libraries and mapped files included.

The peak of a run is the high-water mark of the same count. Linux can set the mark back; elsewhere it only grows.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import sys
from pathlib import Path

_LARGE, _MMAP_THRESHOLD = 2 << 20, -3  # bytes; the GNU C library's name for the option
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
    """Give memory that was freed back to the system, where the C library can."""
    gc.collect()
    name = ctypes.util.find_library("c") if os.name == "posix" else None
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)


def map_large_blocks() -> bool:
    """Let every large block of this process be mapped by itself, so that it goes back to the system when it is freed.

    Left alone, the GNU C library takes blocks of up to 32 MiB from a heap that small blocks among them keep from shrinking.
    torch is asked for pages of 2 MiB, if it has allocated nothing yet: touching fresh small ones would take as long as the
    work on convolutions does. False where the C library has no such thing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    name = ctypes.util.find_library("c") if os.name == "posix" else None
    set_option = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    return set_option is not None and set_option(_MMAP_THRESHOLD, _LARGE) == 1


def _field(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
