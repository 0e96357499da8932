"""The compiled products: every path of this processor against float64, over rows, tails, formats and ranges."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from helpers import ALL_FORMATS, assert_product, random_case
from hf_catquant.formats import FORMATS
from hf_catquant.kernels import cpu, cpu_linear, direct, native, reference
from hf_catquant.weight import fit_static_range, quantize_activation

PATHS = native.available_paths()
TASKS = Path("/proc/self/task")  # a folder for every thread
ROWS = (*range(1, 10), 13, 16, 17, 64, 65)
# (N, K, group_size): odd sides, a narrower last group, more columns than a block, groups of 32, 64, 128 and whole rows
WEIGHTS = [(37, 300, 32), (64, 256, 128), (17, 200, 64), (33, 1101, -1), (1, 7, 8), (50, 130, 24)]

pytestmark = pytest.mark.skipif(not PATHS, reason="the library was not built: there is no C compiler")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every path, taken for any number of rows."""
    monkeypatch.setattr(native, "path_number", native.PATHS[request.param])
    monkeypatch.setattr(native, "dense_from", 1 << 62)
    return request.param


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(case, x, bias, name, activations=None, scale=None, offset=None):
    out = cpu_linear._library_linear(x, *case.stored, scale, offset, bias, name, case.group_size, activations)
    assert out is not None
    assert out.dtype == x.dtype
    x_hat = x.float() if activations is None else quantize_activation(x.float(), FORMATS[activations], scale, offset)
    x_hat, shift = x_hat.double(), None if bias is None else bias.double()
    expected = F.linear(x_hat, case.dense_fast, shift)
    assert_product(out, expected, F.linear(x_hat.abs(), case.dense_fast.abs(), None if shift is None else shift.abs()))


class Weight:
    """A random case whose dense weight is computed once."""

    def __init__(self, name, rows, columns, group_size, dtype=torch.float32):
        case = random_case(name, rows, columns, group_size)
        scale, offset = (None if t is None else t.to(dtype) for t in (case.scale, case.offset))
        self.group_size, self.stored = group_size, (case.packed, scale, offset)
        self.dense_fast = reference.dequantize(*self.stored, name, group_size, columns, torch.float32).double()


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_number_of_rows(path, name):
    for (rows, columns, group_size), half in itertools.product(WEIGHTS, (False, True)):
        case = Weight(name, rows, columns, group_size, torch.float16 if half else torch.float32)
        bias = randn(rows)
        for count in ROWS:
            check(case, randn(count, columns), bias if count % 2 else None, name)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_dtype_and_activation(path, name):
    for rows, columns, group_size in WEIGHTS:
        case = Weight(name, rows, columns, group_size)
        for dtype, count in itertools.product((torch.float32, torch.float16, torch.bfloat16), (1, 5, 18)):
            x, bias = randn(count, columns, dtype=dtype), randn(rows, dtype=dtype)
            check(case, x, bias, name)
            for activations in ("int8", "int4", "int2"):
                check(case, x, bias, name, activations)
                check(case, x, bias, name, activations, *fit_static_range(x, FORMATS[activations]))


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_products_of_integers_are_exact(path, name):
    """Where every sum fits in a float32 nothing is rounded, whatever the path and the number of rows."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, group_size in WEIGHTS[:4]:
        case = random_case(name, rows, columns, group_size)
        scale = torch.ones_like(case.scale)
        offset = None if case.offset is None else torch.randint(-3, 4, scale.shape, generator=generator).float()
        x = torch.randint(-127, 128, (19, columns), generator=generator).float()
        x[:, 0] = 127  # the range of a row is then 127, and its scale 1
        dense = reference.dequantize(case.packed, scale, offset, name, group_size, columns, torch.float32)
        for count in (1, 3, 19):
            weight = (case.packed, scale, offset)
            out = cpu_linear._library_linear(x[:count], *weight, None, None, None, name, group_size, "int8")
            assert torch.equal(out, F.linear(x[:count].double(), dense.double()).float())


def test_rows_far_apart_in_size(path):
    """Digits are relative to the largest value of a row: a row of 1e30 takes nothing from a row of 1e-20."""
    case = Weight("int4", 33, 300, 64)
    x = randn(6, 300) * torch.tensor([1e30, 1e-20, 1.0, 1e-30, 0.0, 1e5])[:, None]
    out = cpu_linear._library_linear(x, *case.stored, None, None, None, "int4", 64, None)
    expected = F.linear(x.double(), case.dense_fast)
    assert bool(((out - expected).abs() <= 1e-6 * F.linear(x.double().abs(), case.dense_fast.abs()) + 1e-36).all())
    assert out[4].tolist() == [0.0] * 33


@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_a_row_alone_gives_what_it_gives_among_others(path, name):
    """Bit for bit: sums are of integers, and become floats in one way. A binary row alone is looked up in tables."""
    for rows, columns, group_size in [*WEIGHTS, (100, 200, 64), (130, 1101, 128)]:  # runs of 16 rows, by 4, 2 and 1
        for half, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
            case = Weight(name, rows, columns, group_size, torch.float16 if half else torch.float32)
            x, stored = randn(3, columns, dtype=dtype), (*case.stored, None, None, None, name, group_size, None)
            together = cpu_linear._library_linear(x, *stored)
            assert torch.equal(together, torch.cat([cpu_linear._library_linear(row[None], *stored) for row in x]))


@pytest.mark.parametrize("activations", [None, "int8"])
def test_results_do_not_depend_on_threads(path, activations):
    case, before = Weight("ternary", 1000, 1100, 128), torch.get_num_threads()
    try:
        for count in (1, 40):
            x, found = randn(count, 1100), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(
                    cpu_linear._library_linear(x, *case.stored, None, None, None, "ternary", 128, activations)
                )
            assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [1, 40])
def test_values_that_are_not_finite_give_what_torch_gives(path, value, count):
    case = Weight("int2", 40, 100, 32)
    x = randn(count, 100)
    x[-1, 5] = value
    arguments = (x, *case.stored, None, None, None, "int2", 32, None)
    as_floats = path == "avx2" and count >= 24  # by the library; no digits are of a value like these
    assert (cpu_linear._library_linear(*arguments) is None) is not as_floats
    expected = reference.linear(*arguments)
    torch.testing.assert_close(cpu.linear(*arguments), expected, equal_nan=True)


def test_ranges_between_levels_are_left_to_float_products(path):
    case, x = Weight("int2", 5, 40, 8), randn(3, 40)
    for scale, offset in ((0.1, 0.03), (0.001, 1.0), (0.0, 0.0)):
        arguments = (torch.tensor(scale), torch.tensor(offset), None, "int2", 8, "int4")
        assert cpu_linear._library_linear(x, *case.stored, *arguments) is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_unpacked_weights_are_those_of_the_reference(path, name, monkeypatch):
    monkeypatch.setattr(native, "path_number", native.PATHS[path])
    for (rows, columns, group_size), scales in itertools.product(WEIGHTS, (torch.float16, torch.float32)):
        stored = Weight(name, rows, columns, group_size, scales).stored
        indices = torch.tensor([[rows - 1, 0], [0, rows // 2]])
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            arguments = (*stored, name, group_size, columns, dtype)
            assert torch.equal(cpu.dequantize(*arguments), reference.dequantize(*arguments))
            assert torch.equal(cpu.embedding(indices, *arguments), reference.embedding(indices, *arguments))
        arguments = (stored[0], name, group_size, columns)
        assert torch.equal(cpu.unpack(*arguments), reference.unpack(*arguments))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_after_fork_has_threads_of_its_own():
    case, x = Weight("ternary", 2000, 1100, 128), randn(4, 1100)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = cpu_linear._library_linear(x, *case.stored, None, None, None, "ternary", 128, None)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                again = cpu_linear._library_linear(x, *case.stored, None, None, None, "ternary", 128, None)
                code = 0 if torch.equal(again, expected) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(native._parallel_region() is None, reason="torch's OpenMP library was not found")
def test_the_threads_are_those_that_torch_has():
    case, x, before = Weight("ternary", 2000, 1100, 128), randn(4, 1100), torch.get_num_threads()
    try:
        torch.set_num_threads(11)  # more than any other test here
        torch.ones(1 << 20).exp()  # starts torch's own
        threads = len(list(TASKS.iterdir()))
        cpu_linear._library_linear(x, *case.stored, None, None, None, "ternary", 128, None)
        assert len(list(TASKS.iterdir())) == threads
    finally:
        torch.set_num_threads(before)


class Threads(torch.utils.data.Dataset):
    """What a worker's product leaves behind: threads of the process, more than there were before."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        case, before = Weight("ternary", 2000, 1100, 128), len(list(TASKS.iterdir()))
        cpu_linear._library_linear(randn(4, 1100), *case.stored, None, None, None, "ternary", 128, None)
        return len(list(TASKS.iterdir())) - before


@pytest.mark.skipif(not TASKS.is_dir(), reason="needs Linux")
def test_workers_of_a_data_loader_start_no_threads():
    assert torch.cat(list(torch.utils.data.DataLoader(Threads(), num_workers=2))).tolist() == [0, 0]


@pytest.mark.parametrize("moved", ["packed", "scale", "offset", "bias", "all"])
@pytest.mark.parametrize("op", ["linear", "conv", "expert_linear", "embedding", "dequantize"])
def test_what_is_not_where_the_input_is_is_refused(op, moved):
    """A tensor on meta has no memory that a kernel could read."""
    case, x = random_case("int4", 4, 24, 8), randn(2, 24)
    tensors = {"packed": case.packed, "scale": case.scale, "offset": case.offset, "bias": randn(4)}
    if op in ("embedding", "dequantize") and moved in ("bias", "all"):
        pytest.skip("there is no bias, or all of it is on meta and so is the result")
    for name in tensors if moved == "all" else (moved,):
        tensors[name] = tensors[name].to("meta")
    packed, scale, offset, bias = tensors.values()
    stored, more = (packed, scale, offset), ("int4", 8)
    ops, unset = torch.ops.catquant, (None, None)
    calls = {
        "linear": lambda f: f.linear(x, *stored, *unset, bias, *more, None),
        "conv": lambda f: f.conv(
            x.view(2, 6, 2, 2), *stored, *unset, bias, *more, None, [2, 2], *[[1, 1], [0, 0], [1, 1]], 1
        ),
        "expert_linear": lambda f: f.expert_linear(
            x, torch.tensor([2]), *stored, None if bias is None else bias[None], *more, None
        ),
        "embedding": lambda f: f.embedding(torch.tensor([1]), *stored, *more, 24, torch.float32),
        "dequantize": lambda f: f.dequantize(*stored, *more, 24, torch.float32),
    }
    for functions in (ops, direct) if op in ("linear", "conv") else (ops,):
        with pytest.raises(RuntimeError, match="must be on one device, got"):
            calls[op](functions)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_what_a_convolution_returns_can_be_written_into(kernel):
    columns = 6 * kernel[0] * kernel[1]
    case = random_case("ternary", 4, columns, 8)
    x = torch.randn(1, 6, 3, 3, requires_grad=True)
    geometry = (list(kernel), [1, 1], [0, 0], [1, 1], 1)
    out = torch.ops.catquant.conv(x, *case.stored, None, None, None, "ternary", 8, None, *geometry)
    out += 1
    out.sum().backward()
    assert x.grad is not None
