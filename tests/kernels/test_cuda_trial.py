"""Kernels are tried on the device before they are used; here it is the emulator."""

from __future__ import annotations

import pytest
import torch

from cuda_emulator import compiler, emulated
from helpers import assert_product, random_case, slow
from hf_catquant.kernels import cuda_launch, cuda_layout, cuda_products, cuda_table, cuda_trial
from hf_catquant.kernels.cuda_compile import Unserved

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler: g++ or clang++")
BF16, F16 = torch.bfloat16, torch.float16
CASES = {  # kernel: format, group, rows of x, activations, dtype, whether the device has warp groups
    "split8": ("ternary", 128, 1, None, BF16, False),
    "product16": ("int4", 64, 6, None, F16, False),
    "product8": ("binary", 128, 3, "int8", BF16, False),
    "gemm": ("int8", -1, 20, None, BF16, False),
    "gemm of codes": ("ternary", 32, 70, "int8", BF16, False),
    "wgemm": ("int4", 256, 12, None, F16, True),
    "wgemm of codes": ("ternary", 128, 70, "int8", torch.float32, True),
    "wdense": ("ternary", 128, 70, None, BF16, True),
}
ALWAYS = ("split8", "wgemm", "wdense")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(cuda_trial, "_found", {})
    monkeypatch.setattr(cuda_trial, "_passed", {})


def product(name, group_size, rows, activations, dtype, folder, warp_groups=False):
    case = random_case(name, 40, 512, group_size)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    layout = cuda_layout.build(*case.stored, name, group_size, 512)
    with emulated(folder, warp_groups=warp_groups, trial=True):
        return cuda_products.multiply(x, layout, None, activations), x, case


@pytest.mark.parametrize("kernel", [*ALWAYS, *slow(*(name for name in CASES if name not in ALWAYS))])
def test_right_kernels_pass(kernel, folder):
    name, group_size, rows, activations, dtype, warp_groups = CASES[kernel]
    product(name, group_size, rows, activations, dtype, folder, warp_groups)
    ((tried, *_),) = cuda_trial._found
    assert tried.source == kernel.split()[0]
    assert set(cuda_trial._found.values()) == {""}


def test_a_kernel_that_answers_wrongly_is_not_used(folder, monkeypatch, caplog):
    cuda_products._say.cache_clear()
    run = cuda_products.run

    def slips(plan, x, layout, bias, activations, out):
        run(plan, x, layout, bias, activations, out)
        if plan.variant.source == "wgemm":
            out[-1, -1] += 1

    monkeypatch.setattr(cuda_products, "run", slips)
    out, x, case = product("ternary", 128, 12, None, BF16, folder, warp_groups=True)
    # By the kernel without warp groups.
    assert_product(out, x.double() @ case.dense.T, x.double().abs() @ case.dense.abs().T)
    assert "wgemm" in caplog.text
    assert "answers wrongly on cpu" in caplog.text
    assert sorted(key[0].source for key, wrong in cuda_trial._found.items() if wrong) == ["wgemm"]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_one_lost_column_is_found(dtype, folder, monkeypatch):
    run = cuda_products.run

    def loses(plan, x, *rest):
        run(plan, x * (torch.arange(x.shape[1]) != 300), *rest)

    monkeypatch.setattr(cuda_products, "run", loses)
    with pytest.raises(Unserved, match="answers wrongly"):
        product("ternary", 128, 1, None, dtype, folder)


def test_a_wrong_kernel_without_another_is_refused(folder, monkeypatch):
    run = cuda_products.run
    monkeypatch.setattr(cuda_products, "run", lambda *a: (run(*a), a[-1].zero_()))
    with pytest.raises(Unserved, match=r"split8 .* answers wrongly on cpu, .* times what rounding allows"):
        product("ternary", 128, 1, None, BF16, folder)


def test_each_kernel_is_tried_once(folder, monkeypatch):
    count = []
    run = cuda_trial._try
    monkeypatch.setattr(cuda_trial, "_try", lambda *a: count.append(1) or run(*a))
    for _ in range(2):
        product("ternary", 128, 1, None, BF16, folder)
    product("ternary", 128, 2, None, BF16, folder)
    assert len(count) == 2


def test_a_full_card_is_no_reason_to_refuse(folder, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_trial, "_try", full)
    product("ternary", 128, 1, None, BF16, folder)
    assert not cuda_trial._found


def test_the_random_state_and_defaults_stay_as_they_were(folder):
    layout = cuda_layout.build(*random_case("ternary", 40, 512, 128).stored, "ternary", 128, 512)
    plan, before = cuda_table.product(layout, 1, 0, False, 132), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            small, _ = cuda_trial._problem(plan, layout, torch.Generator("cpu").manual_seed(0))
            weight = cuda_trial.weight_of(small)
    finally:
        torch.set_default_dtype(torch.float32)
    assert small.tiles.device.type == small.scales.device.type == weight.device.type == "cpu"
    assert small.scales.dtype == layout.scales.dtype
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["binary", "ternary", "int3", "int4", "int8"])
@pytest.mark.parametrize("group_size", [128, 32, -1])
def test_weights_are_read_back_from_tiles(name, group_size):
    case = random_case(name, 40, 384, group_size)
    layout = cuda_layout.build(*case.stored, name, group_size, 384)
    torch.testing.assert_close(cuda_trial.weight_of(layout)[:, :384], case.dense, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 2, 5, 12, 40, 70, 300])
@pytest.mark.parametrize("warp_groups", [False, True])
def test_the_problem_has_ends_of_blocks_inside(tokens, warp_groups):
    case = random_case("ternary", 300, 1024, 128)
    layout = cuda_layout.build(*case.stored, "ternary", 128, 1024)
    plan = cuda_table.product(layout, tokens, 0, False, 132, () if warp_groups else cuda_table.WARP_GROUPS)
    small, rows = cuda_trial._problem(plan, layout, torch.Generator())
    again = cuda_launch.launch(plan.variant, small.tiles.shape[0], small.chunks, rows)
    assert again.shared == plan.shared
    assert again.grid[0] * again.grid[1] >= 2
    assert small.rows % 16


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    case = random_case("ternary", 40, 256, 128)
    layout = cuda_layout.build(*case.stored, "ternary", 128, 256)
    plan = cuda_table.product(layout, 1, 0, False, 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Unserved, match="first used while a CUDA graph is captured"):
        cuda_trial.require(plan, layout, BF16, None, torch.device("cuda"), cuda_products.run)
