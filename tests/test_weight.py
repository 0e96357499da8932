"""The equation, and activations through it: exact zero, error within half a step, no level wasted after a ReLU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import ALL_FORMATS, SHAPES, random_case, sqnr
from hf_catquant.formats import ACTIVATION_FORMATS, FORMATS
from hf_catquant.weight import (
    QuantizedWeight,
    affine_range,
    dequantize,
    dequantize_packed,
    dynamic_range,
    expand_groups,
    fit_static_range,
    quantize_activation,
    storage_dtype,
)

INTEGERS = pytest.mark.parametrize("name", ACTIVATION_FORMATS)
# Below 2**-100 float32 runs out of bits for scale = range / 255, and half a step is no longer what it says.
SIZES = st.floats(2.0**-100, 2.0**100, width=32)
FLOATS = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda size: -size))


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_dequantize_is_the_equation(name, rows, columns, group_size, device):
    case = random_case(name, rows, columns, group_size, device)
    dense = dequantize(QuantizedWeight(case.codes, case.scale, case.offset), case.fmt, group_size)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), case.dense, rtol=1e-6, atol=1e-6)
    packed = dequantize_packed(*case.stored, case.fmt, group_size, columns)
    assert torch.equal(packed, dense), "packed codes give the same numbers, to the bit"


def test_dequantize_computes_in_float32_from_float16_scales():
    case = random_case("ternary", 3, 33, 8)
    halves = case.scale.half(), case.offset.half()
    from_half = dequantize_packed(case.packed, *halves, case.fmt, 8, 33)
    assert torch.equal(from_half, dequantize_packed(case.packed, *(h.float() for h in halves), case.fmt, 8, 33))


def test_expand_groups_cuts_the_last_group():
    assert expand_groups(torch.tensor([[1.0, 2.0, 3.0]]), 5, 2).tolist() == [[1, 1, 2, 2, 3]]
    assert expand_groups(torch.tensor([[7.0]]), 3, -1).tolist() == [[7, 7, 7]]


@given(name=st.sampled_from(ACTIVATION_FORMATS), row=st.lists(FLOATS, min_size=1, max_size=20))
def test_dynamic_error_is_at_most_half_a_step_and_zero_is_exact(name, row):
    fmt, x = FORMATS[name], torch.tensor(row)
    x_hat = quantize_activation(x, fmt)
    scale, _ = dynamic_range(x, fmt)
    # The division by the scale and the product with it each round once, at up to radix steps from zero.
    slack = 1 + 4 * fmt.radix * torch.finfo(torch.float32).eps
    assert bool(((x_hat - x).abs() <= scale / 2 * slack).all())
    assert bool((x_hat[x == 0] == 0).all())


@INTEGERS
def test_each_row_has_its_own_dynamic_range(name, generator):
    x = torch.randn(2, 3, 16, generator=generator)
    x[0, 0] *= 1000
    rows = torch.stack([quantize_activation(row, FORMATS[name]) for row in x.view(6, 16)])
    assert torch.equal(quantize_activation(x, FORMATS[name]).view(6, 16), rows)


@INTEGERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activation_keeps_shape_and_dtype_and_its_input(name, dtype, generator):
    x = torch.randn(2, 5, 8, generator=generator).to(dtype)
    before = x.clone()
    x_hat = quantize_activation(x, FORMATS[name])
    assert (x_hat.shape, x_hat.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)


@INTEGERS
def test_all_zero_rows_stay_zero(name):
    assert torch.equal(quantize_activation(torch.zeros(2, 4), FORMATS[name]), torch.zeros(2, 4))
    scale, _ = dynamic_range(torch.zeros(2, 4), FORMATS[name])
    assert torch.equal(scale, torch.ones(2, 1))


@INTEGERS
def test_more_bits_are_more_accurate(name, generator):
    x = torch.randn(64, 256, generator=generator)
    floor = {"int2": 4, "int3": 11, "int4": 18, "int8": 41}[name]
    assert floor < sqnr(x, quantize_activation(x, FORMATS[name])) < floor + 8


@pytest.mark.parametrize("name", [name for name in ACTIVATION_FORMATS if FORMATS[name].affine])
def test_positive_values_use_every_level(name):
    ramp = torch.linspace(0, 3, 1000)
    assert quantize_activation(ramp, FORMATS[name]).unique().numel() == FORMATS[name].radix
    scale, offset = affine_range(torch.tensor(0.0), torch.tensor(3.0), FORMATS[name])
    assert float(FORMATS[name].levels[0] * scale + offset) == 0, "the lowest level is zero itself"


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_affine_range_always_holds_zero(low, high):
    fmt = FORMATS["int4"]
    scale, offset = affine_range(torch.tensor(low), torch.tensor(high), fmt)
    assert 0.0 in (torch.tensor(fmt.levels) * scale + offset).tolist()


@INTEGERS
def test_static_range_is_two_scalars_that_beat_the_full_range(name, generator):
    fmt = FORMATS[name]
    sample = torch.randn(20_000, generator=generator)
    sample[0] = 30.0  # one outlier, which the full range would pay for everywhere else
    scale, offset = fit_static_range(sample, fmt)
    assert scale.shape == ()
    assert (offset is not None) == fmt.affine
    assert offset is None or offset.shape == ()
    static = sqnr(sample, quantize_activation(sample, fmt, scale, offset))
    assert static >= sqnr(sample, quantize_activation(sample, fmt))
    if fmt.radix <= 8:  # few levels gain much from clipping
        assert static > sqnr(sample, quantize_activation(sample, fmt)) + 2


@pytest.mark.parametrize("name", [name for name in ACTIVATION_FORMATS if FORMATS[name].affine])
def test_static_range_after_relu_has_no_negative_level(name, generator):
    sample = torch.randn(5_000, generator=generator).relu()
    scale, offset = fit_static_range(sample, FORMATS[name])
    assert float(FORMATS[name].levels[0] * scale + offset) == 0


def test_static_range_clips_and_maps_zero_to_zero():
    scale, offset = torch.tensor(0.5), torch.tensor(0.0)
    x = torch.tensor([-100.0, -0.6, 0.0, 0.6, 100.0])
    assert quantize_activation(x, FORMATS["int2"], scale, offset).tolist() == [-1.0, -0.5, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.01, 0.5], torch.float16),
        ([0.0, 1.0], torch.float16),
        ([1e5], torch.float32),
        ([-7e4, 1.0], torch.float32),
        ([1e-5, 3e-5], torch.float32),
        ([1.0, 1e-9], torch.float16),  # so far below the peak it is noise
        ([0.0], torch.float16),
        ([], torch.float16),
    ],
)
def test_storage_dtype(values, expected):
    assert storage_dtype(torch.tensor(values).abs()) == expected
    assert storage_dtype(torch.tensor(values).abs(), torch.tensor(values)) == expected


def test_small_offsets_need_no_more_than_a_step_of_their_group():
    assert storage_dtype(torch.tensor([0.05, 0.03]), torch.tensor([1e-7, 0.02])) == torch.float16
    assert storage_dtype(torch.tensor([0.05, 0.03]), torch.tensor([7e4, 0.02])) == torch.float32


@given(st.lists(st.floats(0, 1e9, width=32), min_size=1, max_size=10))
def test_stored_scales_keep_eleven_bits(values):
    scale = torch.tensor(values)
    stored = scale.to(storage_dtype(scale)).float()
    assert bool(((stored - scale).abs() <= torch.maximum(scale * 2**-10, scale.max() * 2**-20)).all())
