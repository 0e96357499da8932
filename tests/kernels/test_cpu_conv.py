"""Convolutions in integers, as products of patches and with float weights: all are the reference's."""

from __future__ import annotations

import pytest
import torch

from helpers import random_case
from hf_catquant.formats import FORMATS
from hf_catquant.kernels import cpu_conv, native, reference
from hf_catquant.weight import fit_static_range

pytestmark = pytest.mark.skipif(not native.available_paths(), reason="the library was not built")

# (spatial sizes, channels in, channels out, kernel_size, stride, padding, dilation)
GEOMETRIES = [
    ((11,), 3, 20, (3,), (2,), (1,), (1,)),
    ((7, 6), 5, 18, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((7, 6), 5, 18, (1, 1), (2, 1), (0, 0), (1, 1)),
    ((9, 8), 2, 4, (3, 2), (2, 1), (0, 1), (2, 3)),
    ((5, 5), 4, 6, (1, 1), (1, 1), (1, 1), (1, 1)),
    ((6, 7), 12, 33, (3, 3), (1, 1), (2, 2), (2, 2)),
]


@pytest.mark.parametrize("path", native.available_paths())
@pytest.mark.parametrize("activations", [None, "int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_integers_give_what_the_reference_gives(dtype, activations, path, monkeypatch, generator):
    monkeypatch.setattr(native, "path_number", native.PATHS[path])
    monkeypatch.setattr(cpu_conv, "_integers_pay", lambda *a: True)
    monkeypatch.setattr(cpu_conv, "dequantize_into", None)  # the float weight is not made
    for spatial, channels, rows, kernel_size, *steps in GEOMETRIES:
        case = random_case("int3", rows, channels * torch.Size(kernel_size).numel(), 8)
        for x in (torch.randn(2, channels, *spatial, generator=generator), torch.zeros(3, channels, *spatial)):
            moved = x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)  # not side by side
            ranges = (None, None) if activations is None else fit_static_range(moved, FORMATS[activations])
            bias = torch.randn(rows, generator=generator) if len(x) == 2 else None
            arguments = (*case.stored, *ranges, bias, "int3", 8, activations, kernel_size, *steps, 1)
            out = cpu_conv.conv(moved, *arguments)
            assert (out.dtype, out.is_contiguous()) == (dtype, True)
            expected = reference.conv(moved.float(), *arguments)
            room = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=max(room, 1e-5))


# (images, spatial sizes, kernel_size, stride, padding, dilation): lines and images that end within 16 positions, places
# two and three apart, kernels that see padding alone; of some every thread packs its own rows, of others all share them.
LARGER = [
    (3, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
    (5, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, (28, 27), (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, (40, 33), (1, 1), (2, 2), (0, 0), (1, 1)),
    (2, (23, 22), (2, 3), (3, 3), (0, 2), (2, 1)),
    (2, (5, 70), (5, 1), (1, 1), (4, 0), (2, 1)),
    (4, (3, 9), (3, 3), (1, 2), (3, 3), (1, 1)),
    (1, (3, 100), (1, 1), (1, 1), (2, 0), (1, 1)),
    (2, (350,), (3,), (2,), (1,), (1,)),
]


@pytest.mark.parametrize("path", native.available_paths())
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_what_the_reference_gives(dtype, activations, path, monkeypatch, generator):
    monkeypatch.setattr(native, "path_number", native.PATHS[path])
    monkeypatch.setattr(cpu_conv, "_integers_pay", lambda *a: True)
    monkeypatch.setattr(cpu_conv, "dequantize_into", None)
    for images, spatial, kernel_size, *steps in LARGER:
        case = random_case("ternary", 197, 37 * torch.Size(kernel_size).numel(), 8)  # enough products for threads
        x = torch.randn(images, 37, *spatial, generator=generator).to(dtype)
        ranges = (None, None) if activations is None else fit_static_range(x, FORMATS[activations])
        bias = torch.randn(197, generator=generator)
        arguments = (*case.stored, *ranges, bias, "ternary", 8, activations, kernel_size, *steps, 1)
        found = []
        for threads in (1, 3, 8):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(cpu_conv.conv(x, *arguments))
        expected = reference.conv(x.float(), *arguments)
        room = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(found[0].float(), expected, rtol=0, atol=max(room, 1e-5))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_values_that_are_not_finite_take_the_float_weight(monkeypatch):
    monkeypatch.setattr(cpu_conv, "_integers_pay", lambda *a: True)
    case, x = random_case("int4", 4, 27, 8), torch.randn(1, 3, 5, 5)
    x[0, 1, 2, 2] = float("inf")
    for given in ((None, None, None, "int4", 8, None), (torch.tensor(0.1), None, None, "int4", 8, "int8")):
        arguments = (*case.stored, *given, (3, 3), (1, 1), (1, 1), (1, 1), 1)
        torch.testing.assert_close(cpu_conv.conv(x, *arguments), reference.conv(x, *arguments), equal_nan=True)


def test_plans_are_of_all_that_is_checked(monkeypatch):
    """A call whose shapes were checked once does not spare another one its error."""
    case, x = random_case("int4", 4, 27, 8), torch.randn(1, 3, 5, 5)
    rest = (None, None, None, "int4", 8, None, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    packed, scale, offset = case.stored
    cpu_conv.conv(x, *case.stored, *rest)
    for wrong in (
        (x[:, :2], *case.stored, *rest),
        (x, packed[:, 1:], scale, offset, *rest),
        (x, packed, scale[:, 1:], offset, *rest),
        (x, packed, scale, None, *rest),
        (x, packed.to("meta"), scale, offset, *rest),
        (x, packed, scale.to("meta"), offset, *rest),
        (x.to(torch.int32), *case.stored, *rest),
        (x, *case.stored, torch.tensor(0.1), *rest[1:]),
        (x, *case.stored, None, None, torch.zeros(3), *rest[3:]),
        (x, *case.stored, *rest[:5], "int7", *rest[6:]),
        (x[..., :1, :1], *case.stored, *rest[:7], (1, 1), (0, 0), (1, 1), 1),
    ):
        with pytest.raises(RuntimeError):
            cpu_conv.conv(*wrong)
    monkeypatch.setattr(cpu_conv, "MOST_PLANS", 1)
    cpu_conv.conv(x[:, :, :4], *case.stored, *rest)
    assert len(cpu_conv._plans) == 1


@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("activations", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_ways_give_what_the_reference_gives(dtype, activations, patches, monkeypatch, generator):
    monkeypatch.setattr(cpu_conv, "MOST_POSITIONS", 1 << 20 if patches else 0)
    monkeypatch.setattr(native, "dense_from", 1 << 62)
    monkeypatch.setattr(native, "conv_costs", None)
    taken = []
    monkeypatch.setattr(cpu_conv, "linear", lambda *a, linear=cpu_conv.linear: taken.append(1) or linear(*a))
    for spatial, channels, rows, kernel_size, *steps in GEOMETRIES:
        case = random_case("int3", rows, channels * torch.Size(kernel_size).numel(), 8)
        x = torch.randn(2, channels, *spatial, generator=generator).to(dtype)
        ranges = (None, None) if activations is None else fit_static_range(x, FORMATS[activations])
        arguments = (*case.stored, *ranges, torch.ones(rows), "int3", 8, activations, kernel_size, *steps, 1)
        out = cpu_conv.conv(x, *arguments)
        assert (out.dtype, out.is_contiguous()) == (dtype, True)
        expected = reference.conv(x.float(), *arguments)
        room = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=max(room, 1e-5))
    assert len(taken) == (len(GEOMETRIES) if patches else 0)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch's flags
@pytest.mark.parametrize("is_grouped", [False, True])
def test_by_onednn_and_without(is_grouped, monkeypatch, generator):
    """Torch's choice depends on the number of threads and on the sizes; ours is the same result with less time."""
    monkeypatch.setattr(cpu_conv, "_integers_pay", lambda *a: False)
    monkeypatch.setattr(native, "dense_from", 0)
    onednn, taken = torch.mkldnn_convolution, []
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *a: taken.append(1) or onednn(*a))
    for spatial, channels, rows, kernel_size, *steps in GEOMETRIES:
        groups = channels if is_grouped else 1
        rows *= groups
        case = random_case("int3", rows, channels // groups * torch.Size(kernel_size).numel(), 8)
        plain = torch.randn(2, channels, *spatial, generator=generator)
        last = torch.randn(2, *spatial, channels, generator=generator).movedim(-1, 1)
        for x, bias in (
            (plain, torch.ones(rows)),
            (last, None),
            (plain.transpose(0, 1).contiguous().transpose(0, 1), None),
        ):
            arguments = (*case.stored, None, None, bias, "int3", 8, None, kernel_size, *steps, groups)
            expected = reference.conv(x, *arguments)
            for least in (0, 1 << 62):
                monkeypatch.setattr(cpu_conv, "LEAST_PRODUCTS", least)
                found = cpu_conv.conv(x, *arguments)
                assert found.is_contiguous()
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert len(taken) == 3 * len(GEOMETRIES)
    monkeypatch.setattr(cpu_conv, "LEAST_PRODUCTS", 0)
    with torch.backends.mkldnn.flags(enabled=False):
        cpu_conv.conv(x, *arguments)
    assert len(taken) == 3 * len(GEOMETRIES)


def test_a_range_of_every_row_is_not_one_of_every_patch(monkeypatch):
    monkeypatch.setattr(cpu_conv, "_integers_pay", lambda *a: True)
    case, x = random_case("int4", 4, 27, 8), torch.randn(1, 3, 5, 5)
    arguments = (*case.stored, None, None, None, "int4", 8, "int8", (3, 3), (1, 1), (1, 1), (1, 1), 1)
    torch.testing.assert_close(cpu_conv.conv(x, *arguments), reference.conv(x, *arguments))
