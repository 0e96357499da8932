"""The compiled library of CPU kernels: where it is, which of its paths this process takes, and its functions.

The library has a C ABI and knows neither Python nor torch; ``csrc/catquant.h`` says what it computes. ``setup.py``
compiles it when the package is installed; without a compiler there is none, and the reference runs.

The environment variable ``CATQUANT_CPU`` picks a path: ``reference``, ``scalar``, ``avx2``, ``avx512``, ``amx`` or
``neon``. Unset, it is the fastest one that the processor has.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..formats import FORMATS
from ..log import logger

# The numbers of csrc/catquant.h.
PATHS = {"scalar": 0, "avx2": 1, "avx512": 2, "amx": 3, "neon": 4}
FASTEST_FIRST = ("amx", "avx512", "avx2", "neon", "scalar")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# As in catquant.h: a number for each codebook in its storage word; whether there are offsets is no part of it.
_CODEBOOKS = list(dict.fromkeys((fmt.levels, fmt.digits, fmt.nbytes) for fmt in FORMATS.values()))
FORMAT_NUMBERS = {name: _CODEBOOKS.index((fmt.levels, fmt.digits, fmt.nbytes)) for name, fmt in FORMATS.items()}
OK, NOT_FINITE, NO_MEMORY = 0, 1, 2

# Rows of x, times digits, from which float products of dequantized weights are faster: where sums of integers have an
# instruction of their own, or the library float products, never.
_DENSE_FROM = {"amx": 1 << 62, "avx512": 1 << 62, "avx2": 1 << 62, "neon": 64, "scalar": 12, "reference": 0}


class ConvCosts(NamedTuple):
    """What a convolution takes on one thread, in nanoseconds: measured with the layers of ResNet-50.

    In integers a position costs ``pack[digits - 1]`` a column, ``place`` a place of the kernel, ``store`` an out channel
    beyond what floats take, and ``product`` a digit and a value of the weight. With float weights it costs ``floats`` a
    value of the weight (float32, and bfloat16); every value of the weight is dequantized and put in oneDNN's order for
    ``dequantize``, and every value of the input quantized for ``quantize`` beyond what integers take, where that is asked.
    Processors differ by a factor that all costs have in common, and by less in their ratios.
    """

    pack: tuple[float, float, float]
    place: float
    store: float
    product: float
    floats: tuple[float, float]
    dequantize: float
    quantize: float


# Paths on whose processors oneDNN has instructions for products of 16-bit floats; elsewhere its convolutions of them take 30
# times as long as those of float32.
_HALF_CONVOLUTIONS = ("avx512", "amx", "neon")

_CONV_COSTS = {
    "avx512": ConvCosts((0.14, 0.35, 0.45), 2.2, 0.3, 0.0031, (0.0095, 0.0055), 0.65, 0.3),
    "avx2": ConvCosts((0.9, 3.2, 4.2), 10.0, 3.5, 0.017, (0.037, 0.037), 2.0, 1.1),
}

LIBRARY = "libcatquant_cpu"
SOURCES = Path(__file__).parent / "csrc"
VARIABLE = "CATQUANT_CPU"


class Window(ctypes.Structure):
    """``cq_window``: where the rows of a convolution lie in its input."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width"),
            *("stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x"),
        )
    )


class Activation(ctypes.Structure):
    """``cq_activation``: how rows of x become digits."""

    _fields_ = (
        ("parts", ctypes.c_int),
        ("quantized", ctypes.c_int),
        ("affine", ctypes.c_int),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("offset", ctypes.c_float),
    )


class Columns(ctypes.Structure):
    """``cq_columns``: a block of columns of a matrix whose levels are being chosen."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "offset", "square")),
        *((name, ctypes.c_int64) for name in ("columns", "rows", "first", "last", "down", "across")),
        *((name, ctypes.c_float) for name in ("lowest", "step", "most")),
    )


_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "cq_has_path": (_INT, (_INT,)),
    "cq_layout_bytes": (_LONG, (_INT, _LONG, _LONG, _LONG, _INT, _INT)),
    "cq_layout_build": (
        _INT,
        (_INT, _LONG, _LONG, _LONG, _INT, _POINTER, _LONG, _POINTER, _POINTER, _INT, _POINTER),
    ),
    "cq_linear": (
        _INT,
        (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _INT, _POINTER, _INT, _INT),
    ),
    "cq_dequantize": (
        _INT,
        (_INT, _POINTER, _LONG, _POINTER, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT, _INT, _INT),
    ),
    "cq_conv": (
        _INT,
        (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT),
    ),
    "cq_use_openmp": (None, (_POINTER,)),
    "cq_rotate": (_INT, (_POINTER, _INT, _LONG, _LONG, _POINTER, _INT, _POINTER, _INT, _INT)),
    "cq_cluster_affine": (
        _INT,
        (
            *(_POINTER, _INT, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG),
            *(_POINTER, _POINTER, _POINTER, _INT, _INT),
        ),
    ),
    "cq_measure_read": (ctypes.c_uint64, (_POINTER, _LONG, _INT)),
    "cq_measure_products": (_LONG, (_INT, _LONG, _INT)),
    "cq_bits_scores": (None, (_INT, _POINTER, _LONG, _LONG, _INT, _INT, _POINTER, _LONG, _POINTER, _INT)),
    "cq_bits_best": (
        None,
        (_INT, _POINTER, _LONG, _LONG, _INT, _INT, _POINTER, _LONG, _POINTER, _LONG, _LONG, _INT),
    ),
    "cq_descend": (None, (_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT)),
    "cq_feed_back": (None, (_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT)),
    "cq_unpack": (None, (_INT, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _INT)),
}


@cache
def library() -> ctypes.CDLL | None:
    """The library, None where it was not built."""
    found = sorted(Path(__file__).parent.glob(f"{LIBRARY}.*"))
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    if not _is_of_these_sources(loaded):
        logger.warning(
            "%s was built from other sources than those beside it, so plain torch runs instead, slower: "
            "install the package again (pip install -e .)",
            found[0],
        )
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.cq_use_openmp(_parallel_region())
    return loaded


def _is_of_these_sources(loaded: ctypes.CDLL) -> bool:
    """Whether the library says so: in a checkout that was updated and not installed again it is an older one."""
    try:
        says = loaded.cq_sources
    except AttributeError:
        return False
    says.restype = ctypes.c_char_p
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    return says().decode() == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _parallel_region() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP library that torch has loaded, None where there is none to be found.

    Its threads wait awake for a while after each of torch's own ops: others would have to share the cores with them.
    """
    folder, maps = str(Path(torch.__file__).parent), Path("/proc/self/maps")
    if not torch.backends.openmp.is_available() or not maps.is_file():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    names = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    inside = [name for name in names if name.startswith(folder)] or (names if len(names) == 1 else [])
    try:
        return ctypes.cast(ctypes.CDLL(inside[0]).GOMP_parallel, ctypes.c_void_p).value
    except (IndexError, OSError, AttributeError):
        return None


def available_paths() -> tuple[str, ...]:
    """The paths that this build and this processor have, the fastest first; none without the library."""
    loaded = library()
    return () if loaded is None else tuple(name for name in FASTEST_FIRST if loaded.cq_has_path(PATHS[name]))


def chosen_path() -> str:
    """The path that ops take: what ``CATQUANT_CPU`` says, else the fastest; "reference" without the library.

    Raises:
        ValueError: ``CATQUANT_CPU`` names a path that there is not, or not here.
    """
    paths = (*available_paths(), "reference")
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return paths[0]
    if asked not in paths:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(paths)} on this machine, got {asked!r}")
    return asked


def loaded() -> Any:
    """The library, where a path of it was chosen."""
    return library()


PATH = chosen_path()
path_number = PATHS.get(PATH, -1)
dense_from = _DENSE_FROM[PATH]
conv_costs = _CONV_COSTS.get(PATH)
has_half_convolutions = PATH in _HALF_CONVOLUTIONS
