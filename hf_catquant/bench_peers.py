"""What ``catquant bench`` compares with: torch's float products, and llama.cpp's low-bit ones where it is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # x (M, K) to (M, N)

# llama.cpp's formats of one, two and four bits with their numbers; an installed version that has others is asked by name.
GGML_FORMATS = {"q1_0": 41, "tq1_0": 34, "tq2_0": 35, "q4_0": 2}
_OVERHEAD = 1 << 20


def torch_products(dtype: torch.dtype, weight: Tensor, copies: int) -> tuple[list[Product], int]:
    """``copies`` of torch's product with ``weight`` (N, K) in ``dtype``, and the bytes of one."""
    weights = [weight.to(dtype, copy=True) for _ in range(copies)]
    return [partial(torch.nn.functional.linear, weight=w) for w in weights], weights[0].nbytes


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def ggml() -> Any | None:
    """The functions of the llama.cpp that llama-cpp-python brings, None where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"
    if folder is None or not (folder / "libggml-cpu.so").is_file():
        return None
    base: Any = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_init", pointer, (_Parameters,)),
        ("ggml_free", None, (pointer,)),
        ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, number, number)),
        ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
        ("ggml_new_graph", pointer, (pointer,)),
        ("ggml_build_forward_expand", None, (pointer, pointer)),
        ("ggml_get_data", pointer, (pointer,)),
        ("ggml_row_size", size, (ctypes.c_int, number)),
        ("ggml_type_name", ctypes.c_char_p, (ctypes.c_int,)),
        ("ggml_quantize_chunk", size, (ctypes.c_int, pointer, pointer, number, number, number, pointer)),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_graph_compute_with_ctx.argtypes = (pointer, pointer, ctypes.c_int)
    cpu.ggml_cpu_init()
    base.compute = cpu.ggml_graph_compute_with_ctx
    return base


def ggml_formats() -> Iterator[tuple[str, int]]:
    """(name, number) of the formats of :data:`GGML_FORMATS` that the installed llama.cpp has."""
    base = ggml()
    if base is not None:
        yield from ((name, n) for name, n in GGML_FORMATS.items() if base.ggml_type_name(n) == name.encode())


class GgmlProduct:
    """llama.cpp's product of one weight (N, K) with M rows; :meth:`compute` copies neither x nor the result."""

    def __init__(self, number: int, weight: Tensor, count: int, threads: int, packed: bytes | None = None) -> None:
        base: Any = ggml()
        rows, columns = weight.shape
        self.threads, self.shape = threads, (count, rows)
        self.nbytes = base.ggml_row_size(number, columns) * rows
        need = self.nbytes + 4 * count * (rows + columns) + count * columns * 8 + _OVERHEAD
        self.context = base.ggml_init(_Parameters(need, None, False))
        matrix = base.ggml_new_tensor_2d(self.context, number, columns, rows)
        if packed is None:
            values = weight.float().contiguous()
            base.ggml_quantize_chunk(number, values.data_ptr(), base.ggml_get_data(matrix), 0, rows, columns, None)
        else:
            ctypes.memmove(base.ggml_get_data(matrix), packed, self.nbytes)
        self.packed = packed or ctypes.string_at(base.ggml_get_data(matrix), self.nbytes)
        self.x = base.ggml_new_tensor_2d(self.context, 0, columns, count)
        self.out = base.ggml_mul_mat(self.context, matrix, self.x)
        self.graph = base.ggml_new_graph(self.context)
        base.ggml_build_forward_expand(self.graph, self.out)

    def load(self, x: Tensor) -> None:
        """Set the rows (M, K) that are multiplied."""
        base: Any = ggml()
        ctypes.memmove(base.ggml_get_data(self.x), x.float().contiguous().data_ptr(), 4 * x.numel())

    def compute(self) -> None:
        """Multiply."""
        base: Any = ggml()
        base.compute(self.context, self.graph, self.threads)

    def result(self) -> Tensor:
        """(M, N) float32 of the last :meth:`compute`."""
        base: Any = ggml()
        out = torch.empty(self.shape)
        ctypes.memmove(out.data_ptr(), base.ggml_get_data(self.out), out.nbytes)
        return out

    def free(self) -> None:
        """Give the memory back."""
        base: Any = ggml()
        base.ggml_free(self.context)
