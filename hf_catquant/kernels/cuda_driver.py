"""Kernels on a CUDA device: load machine code and launch it, through the driver library that every GPU machine has.

Interface: https://docs.nvidia.com/cuda/cuda-driver-api. A kernel is loaded once a device, into the primary context,
which is the one torch uses; loading is not allowed while a CUDA graph is captured. Launches go to torch's current stream.

From compute capability 9.0 on a launch may begin while the one before it on its stream still runs (programmatic dependent
launch): every kernel of ``csrc/`` waits, by itself, before it touches what that one may have written.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from typing import Any

import torch

from . import cuda_table
from .cuda_compile import Unserved, Variant, library, machine_code, version

_lock = threading.Lock()
_functions: dict[tuple[Variant, int], tuple[int, int]] = {}  # (kernel, device) -> handles of context and function
_failures: dict[tuple[Variant, int], str] = {}
_shared: dict[int, int] = {}  # function -> bytes of shared memory that it has been allowed, beyond the usual
OLDEST = 80  # compute capability with bfloat16 and 8-bit tensor cores, and redux
OVERLAPPING = 90  # compute capability whose kernels wait for the launch before them by themselves
OVERLAPPING_DRIVER = 12030  # its CUDA version: from here on graphs hold such launches as well
USUAL_SHARED = 48 << 10  # bytes of shared memory that every kernel may have
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, and 64 bytes at a multiple of 8 of which it uses the first."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_OVERLAP = (_Attribute * 1)(_Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1))


def launch(
    variant: Variant,
    device: torch.device,
    grid: tuple[int, int],
    block: tuple[int, int],
    form: struct.Struct,
    arguments: tuple[Any, ...],
    shared: int = 0,
) -> None:
    """Run ``variant`` on torch's current stream of ``device``.

    Args:
        variant: the kernel; loaded, and compiled if no cache has it, at its first launch on a device.
        device: a CUDA device.
        grid: blocks along x and y.
        block: threads along x and y.
        form: how the kernel's one parameter, a struct, lies in memory.
        arguments: its fields: tensors on the device (None is a null pointer), then numbers.
        shared: bytes of shared memory of a block, besides those that the kernel names itself.

    Raises:
        Unserved: the kernel cannot be compiled or loaded here.
        RuntimeError: the driver refuses the launch.
    """
    index = _index(device)
    context, function = _functions.get((variant, index)) or _load(variant, index)
    driver = _driver()
    current = ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(current)))
    entered = current.value != context
    if entered:  # another device's, or none yet in this thread
        _check(driver.cuCtxPushCurrent_v2(context))
    try:
        held = form.pack(*[a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments])
        parameters = (ctypes.c_char_p * 1)(held)  # the driver copies what they point to before it returns
        stream = torch.cuda.current_stream(device).cuda_stream
        if shared > USUAL_SHARED:
            _allow(function, shared)
        if cuda_table.OVERLAP and _overlaps(index):
            config = _Config((*grid, 1), (*block, 1), shared, stream, _OVERLAP, 1)
            result = driver.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
        else:
            result = driver.cuLaunchKernel(function, *grid, 1, *block, 1, shared, stream, parameters, None)
        _check(result, variant)
    finally:
        if entered:
            driver.cuCtxPopCurrent_v2(ctypes.byref(current))


def _allow(function: int, shared: int) -> None:
    """Let the function be launched with so many bytes of shared memory; asked of the driver once a size."""
    if _shared.get(function, 0) < shared:
        result = _driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        if result:
            raise Unserved(f"a block cannot have {shared} bytes of shared memory: {_text(result)}")
        _shared[function] = shared


@cache
def _overlaps(index: int) -> bool:
    """Whether a launch may begin on the device while the one before it runs."""
    driver = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(driver)))
    return _arch(index) >= OVERLAPPING and driver.value >= OVERLAPPING_DRIVER


def require(device: torch.device) -> None:
    """Nothing, on a CUDA device that kernels can run on; asked before memory is spent on a layout for them.

    Raises:
        Unserved: the device is too old, or the driver or NVRTC is missing; found out once a device.
    """
    reason = _unfit(_index(device))
    if reason:
        raise Unserved(reason)


@cache
def _unfit(index: int) -> str:
    """Why no kernel can run on the device; empty if one can."""
    try:
        _check_arch(index)
        library()
        _driver()
    except Unserved as error:
        return str(error)
    return ""


def _check_arch(index: int) -> None:
    arch = _arch(index)
    if arch < OLDEST:
        raise Unserved(f"CUDA kernels need compute capability {OLDEST / 10} or newer, the device has {arch / 10}")


def _load(variant: Variant, index: int) -> tuple[int, int]:
    key = variant, index
    with _lock:
        if key in _functions:
            return _functions[key]
        if key in _failures:
            raise Unserved(_failures[key])
        if torch.cuda.is_current_stream_capturing():
            raise Unserved(f"{variant.source} is first used while a CUDA graph is captured: run it once before")
        try:
            _functions[key] = made = _context(index), _function(variant, index)
        except Unserved as error:
            _failures[key] = str(error)
            raise
        return made


def _function(variant: Variant, index: int) -> int:
    _check_arch(index)
    driver = _driver()
    image = machine_code(variant, _arch(index))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuCtxPushCurrent_v2(_context(index)))
    try:
        result = driver.cuModuleLoadData(ctypes.byref(module), image)
        if result:
            raise Unserved(f"the driver does not load {variant.source}: {_text(result)}")
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, variant.source.encode()))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    return function.value or 0


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_warp_groups(device: torch.device) -> bool:
    """Whether tensor-core products of warp groups (wgmma) can be used: compute capability 9.0 alone has them, and NVRTC
    compiles them from 12.0 on.
    """
    return _arch(_index(device)) == 90 and version() >= (12, 0)


@cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _context(index: int) -> int:
    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), index))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context.value or 0


@cache
def _driver() -> ctypes.PyDLL:
    try:
        # PyDLL keeps the interpreter's lock: a launch takes a few microseconds, less than handing the lock over.
        driver = ctypes.PyDLL("libcuda.so.1")
    except OSError as error:
        raise Unserved(f"CUDA kernels need NVIDIA's driver library libcuda.so.1: {error}") from error
    driver.cuLaunchKernel.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_uint] * 7,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_void_p,
    ]
    if hasattr(driver, "cuLaunchKernelEx"):  # not in drivers before CUDA 11.8
        driver.cuLaunchKernelEx.argtypes = [
            ctypes.POINTER(_Config),
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_void_p,
        ]
    driver.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    driver.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    driver.cuModuleLoadData.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    driver.cuModuleGetFunction.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    if driver.cuInit(0):
        raise Unserved("NVIDIA's driver does not start (cuInit failed): see nvidia-smi")
    return driver


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _check(result: int, variant: Variant | None = None) -> None:
    if result:
        where = "" if variant is None else f" in {variant.source} {' '.join(variant.options)}"
        raise RuntimeError(f"CUDA driver error {result}{where}: {_text(result)}")


def _text(result: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(result, ctypes.byref(text))
    return (text.value or b"unknown").decode()
