"""Runs the CUDA kernels on the host: their sources compiled as C++ with ``kernels/emulator/emulator.h`` in the place of
the machine, behind the same ``launch`` that the package calls.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_catquant.kernels import cuda_compile, cuda_driver, cuda_trial
from hf_catquant.kernels.cuda_compile import Variant

HEADER = Path(__file__).parent / "kernels" / "emulator" / "emulator.h"
ARGUMENTS = {
    "product16": "Product",
    "product8": "Product",
    "split8": "Product",
    "gemm": "Product",
    "wgemm": "Product",
    "wdense": "Product",
    "arrange": "Arrangement",
    "sums": "XSums",
    "partials": "Partials",
    "rows": "Quantization",
    "weight": "Rows",
    "untile": "Product",
    "rotate": "Rotation",
    "cluster": "Correction",
}
PROCESSORS = 3  # of the device that is emulated: few, so that small matrices use every launch there is
OUTPUTS = {
    **dict.fromkeys(("product16", "product8", "split8", "gemm", "wgemm", "wdense", "untile"), (6,)),
    "arrange": (1, 2),
    "sums": (1,),
    "rotate": (1,),
    "partials": (3,),
    "rows": (1, 2),
    "weight": (4,),
    "cluster": (6,),
}


class Region(ctypes.Structure):
    """Memory that a kernel may read, or write too."""

    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("writable", ctypes.c_int))


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    named = os.environ.get("CXX")
    return named if named and shutil.which(named) else shutil.which("g++") or shutil.which("clang++")


@contextmanager
def emulated(
    folder: Path, sources: Path = cuda_compile.CSRC, warp_groups: bool = False, trial: bool = False
) -> Iterator[None]:
    """Every launch inside runs on the host; ``folder`` keeps what is compiled, ``sources`` has the kernels.

    ``warp_groups``: whether the device has products of warp groups; ``trial``: kernels are tried before they are used.
    """

    def launch(
        variant: Variant,
        device: torch.device,
        grid: tuple[int, int],
        block: tuple[int, int],
        form: struct.Struct,
        arguments: tuple[Any, ...],
        shared: int = 0,
    ) -> None:
        run_on_host(variant, grid, block, form, arguments, folder, sources, shared)

    with (
        mock.patch.object(cuda_driver, "launch", launch),
        mock.patch.object(cuda_driver, "processors", return_value=PROCESSORS),
        mock.patch.object(cuda_driver, "has_warp_groups", return_value=warp_groups),
        mock.patch.dict(os.environ, {} if trial else {cuda_trial.SWITCH: "0"}),
    ):
        yield


def run_on_host(
    variant: Variant,
    grid: tuple[int, int],
    block: tuple[int, int],
    form: struct.Struct,
    arguments: tuple[Any, ...],
    folder: Path,
    sources: Path,
    shared: int,
) -> None:
    """Run one launch.

    Raises:
        AssertionError: the kernel has more or less shared memory than the launch gives it.
        RuntimeError: a thread accessed memory it was not given, or the threads of a warp went apart.
    """
    tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    regions = (Region * len(tensors))(
        *[(t.data_ptr(), t.data_ptr() + t.nbytes, i in OUTPUTS[variant.source]) for i, t in tensors]
    )
    assert all(t.is_contiguous() for _, t in tensors)
    held = form.pack(*[a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments])
    library = load(str(build(variant, folder, sources)))
    wrong = library.run(*grid, *block, held, regions, len(regions))
    assert library.shared_bytes() == shared, f"{variant.source} has {library.shared_bytes()} bytes, not {shared}"
    if wrong:
        raise RuntimeError(f"{variant.source} {' '.join(variant.options)}: {wrong.decode()}")


@cache
def load(path: str) -> ctypes.CDLL:
    """A compiled kernel."""
    library = ctypes.CDLL(path)
    library.run.restype = ctypes.c_char_p
    library.shared_bytes.restype = ctypes.c_long
    library.run.argtypes = [*[ctypes.c_int] * 4, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    return library


def build(variant: Variant, folder: Path, sources: Path) -> Path:
    """The shared library of a kernel, compiled if ``folder`` does not have it."""
    files = (sources / f"{variant.source}.cu", *sorted(sources.glob("*.cuh")), *sorted(HEADER.parent.glob("*.h")))
    texts = [path.read_text(encoding="utf-8") for path in files]
    digest = hashlib.sha256("\0".join((*texts, *variant.options)).encode()).hexdigest()[:24]
    path = folder / f"{variant.source}-{digest}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    text = f'#include "emulator.h"\n#include "{variant.source}.cu"\nEMULATE({variant.source}, {ARGUMENTS[variant.source]})\n'
    beside = folder / f"{path.stem}.{os.getpid()}.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-DCATQUANT_EMULATED"]
    command = [compiler() or "g++", *options, *variant.options, f"-I{HEADER.parent}", f"-I{sources}", "-x", "c++", "-"]
    done = subprocess.run([*command, "-o", str(beside)], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile {variant.source}:\n{done.stderr}")
    beside.replace(path)
    return path
