"""Ops as torch sees them: schemas and fakes (opcheck), refusals, gradients, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import ALL_FORMATS, random_case
from hf_catquant import kernels  # noqa: F401  registers what the ops compute
from hf_catquant.formats import FORMATS
from hf_catquant.ops import SCHEMAS

ops = torch.ops.catquant


def randn(*shape: int, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device)


def samples(name: str, device: torch.device | str) -> dict[str, list[tuple]]:
    """Arguments of every op with a weight in the format ``name``."""
    linear, conv = random_case(name, 4, 21, 8, device), random_case(name, 4, 18, 8, device)
    x, rows, strided = randn(3, 21, device=device), randn(2, 3, 21, device=device), randn(21, 3, device=device).T
    image, bias = randn(2, 4, 6, 5, device=device), randn(4, device=device)
    scale, offset = torch.tensor(0.1, device=device), torch.tensor(-0.2, device=device)
    centroids, gamma = randn(5, 5, device=device), randn(5, 5, device=device)
    # Three experts of two rows: the second is sent nothing, the last row of x is nobody's; and no rows at all.
    experts, sent = random_case(name, 6, 21, 8, device), randn(5, 21, device=device)
    ends, nowhere = torch.tensor([2, 2, 4], device=device), torch.zeros(3, dtype=torch.int64, device=device)
    indices = torch.tensor([[0, 3], [1, 1]], device=device)
    geometry, flat = ((3, 3), (2, 1), (1, 0), (1, 2), 2), ((3,), (1,), (1,), (1,), 2)
    return {
        "linear": [
            (x.requires_grad_(), *linear.stored, None, None, None, name, 8, None),
            (rows, *linear.stored, scale, offset, bias.clone().requires_grad_(), name, 8, "int4"),
            (strided, *linear.stored, None, None, bias, name, 8, "int8"),
            (strided.bfloat16(), *linear.stored, None, None, bias, name, 8, None),
        ],
        "expert_linear": [
            (sent.clone().requires_grad_(), ends, *experts.stored, None, name, 8, None),
            (sent, ends, *experts.stored, randn(3, 2, device=device).requires_grad_(), name, 8, "int8"),
            (randn(21, 5, device=device).T.bfloat16(), ends, *experts.stored, None, name, 8, None),
            (sent[:0], nowhere, *experts.stored, randn(3, 2, device=device), name, 8, "int4"),
        ],
        # Without requires_grad_: it is a gradient itself, and there is none of second order.
        "expert_transposed": [
            (randn(5, 2, device=device), ends, *experts.stored, name, 8, 21),
            (randn(2, 5, device=device).T.bfloat16(), ends, *experts.stored, name, 8, 21),
            (randn(0, 2, device=device), nowhere, *experts.stored, name, 8, 21),
        ],
        "conv": [
            (image.requires_grad_(), *conv.stored, None, None, bias, name, 8, None, *geometry),
            (image.to(memory_format=torch.channels_last), *conv.stored, scale, None, None, name, 8, "int8", *geometry),
            (randn(2, 12, 7, device=device).half(), *conv.stored, None, None, bias, name, 8, None, *flat),
        ],
        "embedding": [(indices, *linear.stored, name, 8, 21, torch.float32)],
        "dequantize": [(*linear.stored, name, 8, 21, torch.bfloat16)],
        "unpack": [(linear.packed, name, 8, 21)],
        "cluster_affine": [
            (rows[..., :5].clone().requires_grad_(), gamma[:, :2], centroids[:, :2], gamma, gamma),
            (randn(5, 3, device=device).T, None, centroids, gamma, gamma),
            (rows[..., :5].bfloat16(), None, centroids, gamma, gamma),
        ],
        "rotate": [
            (randn(3, 24, device=device).requires_grad_(), False),
            (strided.bfloat16(), True),
        ],
    }


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("name", ["ternary", "int8"])  # with and without an offset
def test_opcheck(op, name, device):
    for arguments in samples(name, device)[op]:
        torch.library.opcheck(getattr(ops, op).default, arguments)


def bad_calls() -> dict[str, tuple[str, str, dict[int, object]]]:
    """Message: (op, what argument replaces which)."""
    packed, scale = torch.zeros(4, 5, dtype=torch.uint8), torch.ones(4, 3)
    return {
        r"x must be \(..., K\) floating point with K > 0, got \(2,\) torch.int64": ("rotate", {0: torch.arange(2)}),
        r"weight_packed must be uint8, got torch.int32": ("linear", {1: packed.int()}),
        r"weight_packed must be \(N, 5\) for 21 ternary columns in groups of 8, got \(4, 4\)": (
            "linear",
            {1: packed[:, :4]},
        ),
        r"weight_packed must be \(N, 5\) .*, got \(20,\)": ("linear", {1: packed.flatten()}),
        r"weight_packed must be \(N, 6\) for 22 ternary columns": ("linear", {0: torch.ones(3, 22)}),
        r"weight_scale must be \(N, G\) = \(4, 3\), got \(4, 2\)": ("linear", {2: scale[:, :2]}),
        r"weight_offset must be \(N, G\) = \(4, 3\), got \(3, 3\)": ("dequantize", {2: scale[:3]}),
        r"weight_offset must be given for ternary": ("embedding", {3: None}),
        r"bias must be \(N,\) = \(4,\), got \(3,\)": ("linear", {6: torch.ones(3)}),
        r"x must be float32, float16, bfloat16 or float64, got torch.int64": ("linear", {0: torch.ones(3, 21).long()}),
        r"x must be .* or float64, got torch.float8_e5m2": (
            "conv",
            {0: torch.ones(2, 4, 6, 5, dtype=torch.float8_e5m2)},
        ),
        r"activations must be None or one of int2, int3, int4, int8, got 'ternary'": ("linear", {9: "ternary"}),
        r"input_scale was given but activations is None": ("linear", {4: torch.tensor(1.0)}),
        r"with 2 spatial dimensions \(1 or 2\), got \(2, 4, 6\)": ("conv", {0: torch.ones(2, 4, 6)}),
        r"with 3 spatial dimensions \(1 or 2\)": ("conv", {0: torch.ones(2, 4, 6, 5, 5), 10: (3, 3, 3)}),
        r"channels in 5 and out 4 must be multiples of groups 2": ("conv", {0: torch.ones(2, 5, 6, 5)}),
        r"indices must be int32 or int64, got torch.float32": ("embedding", {0: torch.ones(2)}),
        r"weight_packed must be uint8, got torch.int16": ("unpack", {0: packed.short()}),
        r"y must be floating point, got torch.int64": ("cluster_affine", {0: torch.ones(2, 5).long()}),
        r"basis must be \(5, 2\) for y of width 5, got \(4, 2\)": ("cluster_affine", {1: torch.ones(4, 2)}),
        r"centroids must be \(5, 2\) for y of width 5, got \(5, 3\)": ("cluster_affine", {2: torch.ones(5, 3)}),
        r"gamma must be \(5, 5\) for y of width 5, got \(5, 4\)": ("cluster_affine", {3: torch.ones(5, 4)}),
        r"beta must be \(5, 5\) for y of width 5, got \(1, 5\)": ("cluster_affine", {4: torch.ones(1, 5)}),
    }


@pytest.mark.parametrize("fake", [False, True], ids=["kernel", "fake"])
@pytest.mark.parametrize("message", bad_calls())
def test_bad_arguments_are_refused(message, fake, device):
    op, changes = bad_calls()[message]
    arguments = list(samples("ternary", "cpu")[op][0])
    for position, value in changes.items():
        arguments[position] = value
    target = torch.device("meta") if fake else device
    arguments = [a.detach().to(target) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)


def test_offset_of_a_format_without_one_is_refused():
    case = random_case("int8", 4, 21, 8)
    with pytest.raises(RuntimeError, match="weight_offset must be None for int8"):
        ops.dequantize(case.packed, case.scale, case.scale, "int8", 8, 21, torch.float32)


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"format must be one of binary, .*, got 'int7'"):
        ops.unpack(torch.zeros(1, 1, dtype=torch.uint8), "int7", 8, 1)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_linear_gradients_are_those_of_the_dense_product(name, activations, device):
    case = random_case(name, 4, 21, 8, device)
    x, bias = randn(2, 3, 21, device=device).requires_grad_(), randn(4, device=device).requires_grad_()
    out = ops.linear(x, *case.stored, None, None, bias, name, 8, activations)
    assert_same_gradients(out, F.linear(x, case.dense.float(), bias), x, bias)


@pytest.mark.parametrize("kernel_size", [(3,), (3, 3)], ids=["1d", "2d"])
@pytest.mark.parametrize("name", ALL_FORMATS)
def test_conv_gradients_are_those_of_the_dense_convolution(name, kernel_size, device):
    spatial = len(kernel_size)
    case = random_case(name, 4, 2 * 3**spatial, 8, device)
    steps = (2,) * spatial, (1,) * spatial, (1,) * spatial, 2
    x = randn(2, 4, *(7, 6)[:spatial], device=device).requires_grad_()
    bias = randn(4, device=device).requires_grad_()
    out = ops.conv(x, *case.stored, None, None, bias, name, 8, None, kernel_size, *steps)
    convolve = F.conv1d if spatial == 1 else F.conv2d
    assert_same_gradients(out, convolve(x, case.dense.float().view(4, 2, *kernel_size), bias, *steps), x, bias)


@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
def test_cluster_affine_gradient_is_gamma_of_the_cluster(projected, device):
    y, basis = randn(2, 6, 5, device=device).requires_grad_(), randn(5, 2, device=device) if projected else None
    centroids, gamma = randn(4, 2 if projected else 5, device=device), randn(4, 5, device=device)
    out = ops.cluster_affine(y, basis, centroids, gamma, torch.ones_like(gamma))
    z = y.detach() if basis is None else y.detach() @ basis
    cluster = torch.cdist(z.reshape(12, -1), centroids).argmin(-1)
    assert cluster.unique().numel() > 1
    assert_same_gradients(out, (gamma[cluster].view(2, 6, 5) * y + 1), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_their_input(dtype, device):
    case = random_case("int4", 4, 21, 8, device)
    x, bias = randn(3, 21, device=device).to(dtype).requires_grad_(), randn(4, device=device).requires_grad_()
    ops.linear(x, *case.stored, None, None, bias, "int4", 8, None).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)


def assert_same_gradients(actual, expected, *inputs):
    torch.testing.assert_close(actual.shape, expected.shape)
    direction = randn(*expected.shape, device=expected.device)
    got, wanted = (torch.autograd.grad((out * direction).sum(), inputs) for out in (actual, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """Every op of a model that is run and trained: embedding, convolution, linear, correction."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.table, self.filter = random_case(name, 9, 12, 8, device), random_case(name, 6, 36, -1, device)
        self.weight = random_case(name, 5, 6, 8, device)
        self.bias = nn.Parameter(randn(5, device=device))
        self.centroids, self.gamma = randn(3, 5, device=device), randn(3, 5, device=device)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        h = ops.embedding(indices, *self.table.stored, self.name, 8, 12, torch.float32).transpose(1, 2)
        geometry = ((3,), (1,), (1,), (1,), 1)
        h = ops.conv(h, *self.filter.stored, None, None, None, self.name, -1, None, *geometry).relu()
        h = ops.linear(h.transpose(1, 2), *self.weight.stored, None, None, self.bias, self.name, 8, "int8")
        return ops.cluster_affine(h, None, self.centroids, self.gamma, self.gamma)


@pytest.mark.parametrize("name", ["ternary", "int3", "int8"])
def test_compiles_into_one_graph(name, device):
    torch._dynamo.reset()
    model, indices = Small(name, device), torch.tensor([[0, 8, 3, 1], [5, 5, 2, 7]], device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = model(indices), compiled(indices)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), model.bias)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), model.bias)[0], gradient)


def test_samples_cover_every_format_kind():
    assert {FORMATS[name].affine for name in ("ternary", "int8")} == {True, False}
    assert set(samples("ternary", "cpu")) == set(SCHEMAS)
