"""What the ops compute, on every device, against loops over the equation and float64 products.

Every kernel is held to these: the op calls whichever one serves the device.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from helpers import ALL_FORMATS, SHAPES, assert_product, random_case
from hf_catquant import kernels  # noqa: F401  registers what the ops compute
from hf_catquant.formats import ACTIVATION_FORMATS, FORMATS
from hf_catquant.rotation import rotate
from hf_catquant.weight import expand_groups, fit_static_range, quantize_activation

ops = torch.ops.catquant

FORMAT = pytest.mark.parametrize("name", ALL_FORMATS)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# (spatial sizes, channels in, channels out, groups, kernel_size, stride, padding, dilation)
CONVS = {
    "1d": ((11,), 3, 4, 1, (3,), (2,), (1,), (1,)),
    "1d grouped dilated": ((13,), 4, 6, 2, (3,), (1,), (2,), (2,)),
    "2d": ((6, 5), 3, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d pointwise": ((4, 4), 5, 3, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    "2d depthwise": ((7, 6), 4, 4, 4, (3, 3), (2, 2), (1, 1), (1, 1)),
    "2d oblong": ((8, 9), 2, 4, 2, (3, 2), (2, 1), (0, 1), (2, 3)),
}


def randn(*shape: int, device="cpu", dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device, dtype)


def assert_linear(out, x_hat, case, bias):
    dense, bias = case.dense, bias.double()
    expected = F.linear(x_hat.double(), dense, bias)
    assert_product(out, expected, F.linear(x_hat.double().abs(), dense.abs(), bias.abs()))


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@DTYPE
@FORMAT
def test_linear(name, dtype, rows, columns, group_size, device):
    case = random_case(name, rows, columns, group_size, device)
    bias = randn(rows, device=device)
    x = randn(6, columns, device=device, dtype=dtype)
    out = ops.linear(x, *case.stored, None, None, bias, name, group_size, None)
    assert out.dtype == dtype
    assert_linear(out, x, case, bias)


@pytest.mark.parametrize("shape", [(), (0,), *((m,) for m in range(1, 10)), (33,), (2, 3), (2, 1, 4)], ids=str)
@FORMAT
def test_linear_takes_any_number_of_rows(name, shape, device):
    case = random_case(name, 5, 21, 8, device)
    x = randn(*shape, 21, device=device)
    out = ops.linear(x, *case.stored, None, None, None, name, 8, None)
    assert_linear(out, x, case, torch.zeros(5, device=device))


def test_linear_takes_strided_rows(device):
    case = random_case("ternary", 5, 20, 16, device)
    x = randn(20, 4, 3, device=device).permute(2, 1, 0)
    out = ops.linear(x, *case.stored, None, None, None, "ternary", 16, None)
    assert_linear(out, x, case, torch.zeros(5, device=device))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
@DTYPE
@FORMAT
def test_linear_with_quantized_activations(name, dtype, activations, static, device):
    case, fmt = random_case(name, 4, 33, 8, device), FORMATS[activations]
    x, bias = randn(7, 33, device=device, dtype=dtype), randn(4, device=device)
    scale, offset = fit_static_range(x, fmt) if static else (None, None)
    out = ops.linear(x, *case.stored, scale, offset, bias, name, 8, activations)
    assert_linear(out, quantize_activation(x.float(), fmt, scale, offset), case, bias)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("activations", [None, "int2", "int8"])
@FORMAT
def test_conv(name, activations, conv, device):
    check_conv(name, torch.float32, activations, CONVS[conv], device)


@DTYPE
def test_conv_keeps_the_dtype(dtype, device):
    check_conv("ternary", dtype, "int8", CONVS["2d depthwise"], device)


def check_conv(name, dtype, activations, geometry, device):
    spatial, channels, rows, groups, kernel_size, *steps = geometry
    case = random_case(name, rows, channels // groups * torch.Size(kernel_size).numel(), 8, device)
    x, bias = randn(2, channels, *spatial, device=device, dtype=dtype), randn(rows, device=device)
    scale, offset, x_hat = None, None, x
    if activations is not None:
        scale, offset = fit_static_range(x, FORMATS[activations])
        x_hat = quantize_activation(x.float(), FORMATS[activations], scale, offset)
    arguments = (name, 8, activations, kernel_size, *steps, groups)
    out = ops.conv(x, *case.stored, scale, offset, bias, *arguments)
    assert out.dtype == dtype
    assert out.is_contiguous()
    convolve = F.conv1d if len(kernel_size) == 1 else F.conv2d
    weight, bias = case.dense.view(rows, channels // groups, *kernel_size), bias.double()
    expected = convolve(x_hat.double(), weight, bias, *steps, groups)
    assert_product(out, expected, convolve(x_hat.double().abs(), weight.abs(), bias.abs(), *steps, groups))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
@DTYPE
@FORMAT
def test_embedding(name, dtype, shape, index_dtype, device):
    case = random_case(name, 9, 21, 8, device)
    indices = torch.randint(9, shape, generator=torch.Generator().manual_seed(0)).to(device, index_dtype)
    out = ops.embedding(indices, *case.stored, name, 8, 21, dtype)
    assert out.dtype == dtype
    expected = case.dense[indices.long()]
    assert_product(out, expected, expected.abs() + 1)


@DTYPE
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@FORMAT
def test_dequantize(name, rows, columns, group_size, dtype, device):
    case = random_case(name, rows, columns, group_size, device)
    out = ops.dequantize(*case.stored, name, group_size, columns, dtype)
    assert out.dtype == dtype
    assert_product(out, case.dense, case.dense.abs() + 1)


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@FORMAT
def test_unpack(name, rows, columns, group_size, device):
    case = random_case(name, rows, columns, group_size, device)
    assert torch.equal(ops.unpack(case.packed, name, group_size, columns), case.codes)


@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
@pytest.mark.parametrize("clusters", [1, 2, 64])
@DTYPE
def test_cluster_affine(dtype, clusters, projected, device):
    y = randn(3, 7, 10, device=device, dtype=dtype)
    basis = randn(10, 4, device=device) if projected else None
    centroids = randn(clusters, 4 if projected else 10, device=device)
    gamma, beta = 1 + 0.1 * randn(clusters, 10, device=device), randn(clusters, 10, device=device)
    out = ops.cluster_affine(y, basis, centroids, gamma, beta)
    assert (out.shape, out.dtype) == (y.shape, dtype)
    rows = y.double().reshape(-1, 10)
    projection = rows if basis is None else rows @ basis.double()
    cluster = torch.cdist(projection, centroids.double()).argmin(-1)
    expected = gamma.double()[cluster] * rows + beta.double()[cluster]
    assert_product(out, expected.view(y.shape), expected.abs().view(y.shape) + 1)


def test_cluster_affine_takes_the_first_of_equal_centroids(device):
    centroids = torch.tensor([[1.0], [-1.0], [1.0]], device=device)
    beta = torch.tensor([[10.0], [20.0], [30.0]], device=device)
    y = torch.tensor([[0.0], [2.0], [-2.0]], device=device)
    out = ops.cluster_affine(y, None, centroids, torch.ones_like(beta), beta)
    assert out.flatten().tolist() == [10.0, 12.0, 18.0]


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_binary_of_zero_and_one_is_the_same_affine_map(rows, columns, group_size, device):
    case = random_case("binary", rows, columns, group_size, device)
    scale, offset = (expand_groups(t.double(), columns, group_size) for t in case.stored[1:])
    # levels {-1, +1} with scale and offset are levels {0, 1} with twice the scale and the offset less one scale
    zero_one = case.codes.double() * 2 * scale + (offset - scale)
    out = ops.dequantize(*case.stored, "binary", group_size, columns, torch.float32)
    assert_product(out, zero_one, zero_one.abs() + 1)


@pytest.mark.parametrize("index", [-1, 9])
def test_embedding_refuses_rows_that_are_not_there(index):
    case = random_case("int4", 9, 21, 8)
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([0, index]), *case.stored, "int4", 8, 21, torch.float32)


@pytest.mark.parametrize("columns", [1, 7, 24, 96, 384])
@DTYPE
def test_rotate(dtype, columns, device):
    x = randn(2, 3, columns, device=device, dtype=dtype)
    matrix = rotate(torch.eye(columns, device=device), False).double()  # row i is R e_i
    for inverse in (False, True):
        out = ops.rotate(x, inverse)
        assert out.dtype == dtype
        wanted = x.double() @ (matrix.T if inverse else matrix)
        assert_product(out, wanted, x.double().abs() @ matrix.abs())
