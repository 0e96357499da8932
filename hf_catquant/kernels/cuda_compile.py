"""CUDA source to machine code, with the NVRTC library that comes with torch: no nvcc and no compiler at the user's.

A :class:`Variant` is a kernel of ``csrc/`` with its compile-time constants. Its machine code is kept on disk, in
``$CATQUANT_CACHE``, else in ``$XDG_CACHE_HOME/hf_catquant`` or ``~/.cache/hf_catquant``, under a name that holds a digest
of everything it depends on. Files are written beside and renamed, and carry a digest of their content, so that processes
may share the folder and a damaged file is compiled again.

NVRTC's interface: https://docs.nvidia.com/cuda/nvrtc. Nothing is loaded before the first kernel is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

CSRC = Path(__file__).with_name("csrc")
OF_ONE_ARCHITECTURE = ("wgemm", "wdense")
_DIGEST = hashlib.sha256().digest_size


class Unserved(RuntimeError):
    """This machine, device or case has no kernel; the reference serves it."""


class Variant(NamedTuple):
    """A kernel and its compile-time constants.

    Attributes:
        source: the file in ``csrc/``, without its ending; the kernel in it has the same name.
        constants: (name, value) of every macro that the source wants.
    """

    source: str
    constants: tuple[tuple[str, int], ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Macro definitions as every compiler takes them."""
        return tuple(f"-D{name}={value}" for name, value in self.constants)


class MachineCode(NamedTuple):
    """What NVRTC made: a cubin, or PTX where it does not know the device yet, and what ptxas said about it."""

    image: bytes
    log: str


def machine_code(variant: Variant, arch: int) -> bytes:
    """The image of ``variant`` for compute capability ``arch`` (90 for sm_90), from the cache if it is there.

    Raises:
        Unserved: NVRTC is missing or refuses the source.
    """
    target = _target(variant, arch)
    source, headers = _sources(variant)
    text = "\0".join((source, *headers.values(), *variant.options, target, *map(str, version())))
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    folder = cache_folder()
    if folder is None:
        return compile_variant(variant, arch).image
    path = folder / f"{variant.source}-{target}-{digest}.bin"
    with contextlib.suppress(OSError):
        held = path.read_bytes()
        if hashlib.sha256(held[_DIGEST:]).digest() == held[:_DIGEST]:
            return held[_DIGEST:]
    image = compile_variant(variant, arch).image
    _store(path, hashlib.sha256(image).digest() + image)
    return image


def compile_variant(variant: Variant, arch: int) -> MachineCode:
    """Compile ``variant`` for compute capability ``arch``, past the cache.

    Raises:
        Unserved: NVRTC is missing or refuses the source, with its log.
    """
    source, headers = _sources(variant)
    target = _target(variant, arch)
    options = [f"--gpu-architecture={target}", "--std=c++17", "--ptxas-options=-v", *variant.options]
    program = ctypes.c_void_p()
    nvrtc = library()
    texts = _strings(headers.values())
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{variant.source}.cu".encode(), len(headers), texts, _strings(headers)
    )
    _check(created)
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if result:
            raise Unserved(f"NVRTC {version()} refuses {variant.source}.cu for {target}: {_error(result)}\n{log}")
        kind = "CUBIN" if target.startswith("sm_") else "PTX"
        get_size, get = (getattr(nvrtc, f"nvrtcGet{kind}{end}") for end in ("Size", ""))
        return MachineCode(_text(get_size, get, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def budget(log: str) -> tuple[int, int]:
    """(registers a thread, spilled bytes) that ptxas reports in the log of a compilation.

    Raises:
        ValueError: the log does not say.
    """
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        raise ValueError(f"the log of NVRTC names no registers and spills: {log!r}")
    return max(map(int, registers)), sum(map(int, spills))


@cache
def library() -> ctypes.CDLL:
    """NVRTC.

    Raises:
        Unserved: it is not found, or too old to make cubins.
    """
    tried = list(_candidates())
    for path in tried:
        try:
            _load_builtins(Path(path))
            nvrtc = ctypes.CDLL(path)
            _ = nvrtc.nvrtcGetCUBIN, nvrtc.nvrtcGetSupportedArchs
        except (OSError, AttributeError):
            continue
        return nvrtc
    looked = ", ".join(tried) or "nothing"
    raise Unserved(f"NVRTC 11.2 or newer is needed to compile CUDA kernels, found {looked}: install torch with CUDA")


def _load_builtins(nvrtc: Path) -> None:
    """Load the library that NVRTC opens by its bare name: NVRTC before 13.1 does not look for it in its own folder."""
    for path in sorted(nvrtc.parent.glob("libnvrtc-builtins*.so*")) if nvrtc.is_absolute() else ():
        if ".alt." not in path.name:
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@cache
def version() -> tuple[int, int]:
    """NVRTC's (major, minor)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@cache
def supported() -> tuple[int, ...]:
    """Compute capabilities that this NVRTC compiles for, ascending."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    held = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(held))
    return tuple(sorted(held))


def cache_folder() -> Path | None:
    """Where machine code is kept; None for a user without a home, who compiles in every process."""
    named, shared = os.environ.get("CATQUANT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path(shared or Path.home() / ".cache") / "hf_catquant"
    except RuntimeError:  # a container's user that no passwd entry names
        return None


def _target(variant: Variant, arch: int) -> str:
    """``sm_90``; for a device newer than NVRTC, the newest ``compute_`` below it, which the driver finishes.

    Products of warp groups are instructions that one architecture alone has: ``sm_90a``.
    """
    if arch in supported():
        return f"sm_{arch}a" if variant.source in OF_ONE_ARCHITECTURE else f"sm_{arch}"
    below = [known for known in supported() if known < arch]
    if not below:
        raise Unserved(f"NVRTC {version()} does not compile for compute capability {arch / 10}")
    return f"compute_{below[-1]}"


def _sources(variant: Variant) -> tuple[str, dict[str, str]]:
    """The text of the kernel, and of every header that it may include, which NVRTC is handed in memory."""
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(CSRC.glob("*.cuh"))}
    return (CSRC / f"{variant.source}.cu").read_text(encoding="utf-8"), headers


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _store(path: Path, content: bytes) -> None:
    """Write beside and rename. A folder that cannot be written to only costs compiling again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(beside, path)  # noqa: PTH105  the one that says it replaces
        except OSError:
            os.unlink(beside)  # noqa: PTH108


def _candidates() -> Iterator[str]:
    """Places of NVRTC, torch's own first: its wheel, the pip packages that torch brings along, the system."""
    wanted = (torch.version.cuda or "").split(".")[0]
    bundled = sorted(map(str, Path(torch.__file__).parent.glob("lib/libnvrtc*.so*")))
    packaged = [
        str(file)
        for folder in dict.fromkeys(map(Path, sys.path))
        for file in sorted(folder.glob("nvidia/*/lib/libnvrtc.so*"), reverse=True)
    ]
    # The version that torch was built with, then the newest.
    packaged.sort(key=lambda name: not (wanted and name.endswith(f".so.{wanted}")))
    yield from (name for name in (*bundled, *packaged) if "builtins" not in name)
    if wanted:
        yield f"libnvrtc.so.{wanted}"  # wherever the dynamic linker looks, as torch itself does
    system = ctypes.util.find_library("nvrtc")
    if system:
        yield system


def _text(get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    held = ctypes.create_string_buffer(size.value)
    _check(get(program, held))
    return held.raw


def _error(result: int) -> str:
    nvrtc = library()
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc.nvrtcGetErrorString(result).decode()


def _check(result: int) -> None:
    if result:
        raise Unserved(f"NVRTC failed: {_error(result)}")
