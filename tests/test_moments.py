"""Sums over batches equal the dense computation, and padding does not count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_catquant.formats import get_format
from hf_catquant.gather import Gather, Streams
from hf_catquant.layers import Scheme, layer_for
from hf_catquant.moments import ChannelSums, MomentSums, match_batch_norm, rotated
from hf_catquant.rotation import rotate
from hf_catquant.solvers import Moments
from hf_catquant.units import Leaf
from hf_catquant.weight import quantize_activation


def dense_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows (B, M, K) by the identity: what each weight of the first output channel of a group multiplies."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    groups, columns = module.groups, module.weight[0].numel()
    picker = nn.utils.skip_init(type(module), module.in_channels, groups * columns, **_geometry(module))
    eye = torch.eye(columns).view(columns, *module.weight.shape[1:])
    picker.weight.data = eye.repeat(groups, *[1] * (eye.dim() - 1))
    out = picker(x)  # (batch, groups * K, *positions)
    return out.flatten(2).view(len(x), groups, columns, -1).permute(1, 0, 3, 2).reshape(groups, -1, columns)


def _geometry(module: nn.Module) -> dict[str, object]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {"bias": False, **{name: getattr(module, name) for name in names}}


MODULES = {
    "linear": (nn.Linear(6, 4), (5, 7, 6)),
    "conv2d": (nn.Conv2d(6, 4, 3, padding=1, stride=2), (5, 6, 9, 8)),
    "grouped": (nn.Conv2d(6, 9, (3, 2), groups=3, dilation=(1, 2)), (5, 6, 9, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding="same"), (5, 6, 9, 8)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1, stride=2, groups=2), (5, 6, 11)),
    "reflected": (nn.Conv1d(6, 4, 3, padding=1, padding_mode="reflect"), (5, 6, 11)),
}


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_moments_equal_the_dense_computation(name, generator):
    module, shape = MODULES[name]
    layer = layer_for(module)
    sums = MomentSums()
    pairs = [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(3)]
    for x, y in pairs:
        sums.add(layer.input_rows(module, x), layer.input_rows(module, y))
    found = sums.result()
    x, y = (torch.cat([dense_rows(module, t) for t in side], 1).double() for side in zip(*pairs, strict=True))
    assert found.count == x.shape[1]
    for actual, expected in (
        (found.gram, torch.einsum("bmk,bml->bkl", y, y) / x.shape[1]),
        (found.cross, torch.einsum("bmk,bml->bkl", x, y) / x.shape[1]),
        (found.mean, y.mean(1)),
        (found.float_mean, x.mean(1)),
    ):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_rows_times_the_matrix_are_the_output(name, generator):
    module, shape = MODULES[name]
    layer = layer_for(module)
    x = torch.randn(shape, generator=generator)
    rows, matrix = layer.input_rows(module, x), layer.to_matrix(module.weight)
    runs = matrix.view(rows.shape[0], -1, rows.shape[2])
    product = (rows @ runs.transpose(1, 2)).permute(1, 0, 2).reshape(rows.shape[1], -1) + module.bias
    expected = module(x)
    expected = expected if isinstance(module, nn.Linear) else expected.movedim(1, -1)
    torch.testing.assert_close(product, expected.reshape(product.shape), rtol=1e-4, atol=1e-5)


def test_without_rows_there_are_no_moments():
    assert MomentSums().result() is None
    sums = MomentSums()
    sums.add(torch.zeros(1, 0, 3), torch.zeros(1, 0, 3))
    assert sums.result() is None


def gathered(module: nn.Module, batch: dict[str, Tensor], x: Tensor, scheme: Scheme | None = None) -> Moments:
    return next(trials(module, batch, x, [scheme or Scheme("int4", -1)]))


def trials(module: nn.Module, batch: dict[str, Tensor], x: Tensor, schemes: list[Scheme]) -> Iterator[Moments]:
    calls = [[((x,), {})]]
    gather = Gather(nn.Sequential(module), [batch], range(1), seed=0)
    streams = Streams(module, module, calls, calls)
    return gather.moments("0", Leaf("", 0, 1), schemes, streams, None)


@torch.no_grad()
def test_padding_is_left_out(generator):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    module, x = nn.Linear(6, 4), torch.randn(3, 4, 6, generator=generator)
    x[mask == 0] = 1e6
    found = gathered(module, {"attention_mask": mask}, x)
    real = x[mask == 1]
    assert found.count == 8
    torch.testing.assert_close(found.gram[0], real.T @ real / 8)
    torch.testing.assert_close(found.mean[0], real.mean(0))
    assert gathered(module, {}, x).count == 12


@torch.no_grad()
def test_the_quantized_stream_is_seen_through_the_activation_format(generator):
    module, x = nn.Linear(6, 4), torch.randn(3, 4, 6, generator=generator)
    found = gathered(module, {}, x, Scheme("int4", -1, "int2"))
    y = quantize_activation(x, get_format("int2")).view(-1, 6)
    torch.testing.assert_close(found.gram[0], y.T @ y / 12)
    torch.testing.assert_close(found.cross[0], x.view(-1, 6).T @ y / 12)
    torch.testing.assert_close(found.float_mean[0], x.view(-1, 6).mean(0))


@torch.no_grad()
def test_a_window_of_positions_stands_for_an_image(generator):
    module = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    layer, x = layer_for(module), torch.randn(2, 3, 33, 40, generator=generator)
    window = layer.window(module, x, 60, generator)
    rows = layer.input_rows(module, x, window)
    everything = {tuple(row) for row in layer.input_rows(module, x)[0].tolist()}
    assert 30 <= rows.shape[1] <= 120
    assert all(tuple(row) in everything for row in rows[0].tolist())


@pytest.mark.parametrize("shape", [(40, 5), (8, 5, 6), (8, 5, 4, 3)])
def test_channel_sums_equal_the_dense_computation(shape, generator):
    x = torch.randn(shape, generator=generator) * 3 + 2
    sums = ChannelSums()
    for part in x.split(3):
        sums.add(part)
    mean, var = sums.result()
    flat = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1), rtol=1e-6, atol=0)  # each run's own deviations are float32
    torch.testing.assert_close(var, flat.var(1, unbiased=False), rtol=1e-6, atol=0)


def test_channels_far_from_zero_keep_their_variance(generator):
    """Of squares in float32 nothing would be left of it."""
    x = torch.randn(6, 3, 20, 20, generator=generator) + 3000
    sums = ChannelSums()
    for part in x.split(2):
        sums.add(part)
    expected = x.double().transpose(0, 1).flatten(1).var(1, unbiased=False)
    torch.testing.assert_close(sums.result()[1], expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_matched_batch_norm_puts_out_the_float_mean_and_deviation(generator):
    norm = nn.BatchNorm2d(5).eval()
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    norm.weight.uniform_(0.5, 2, generator=generator)
    x = torch.randn(16, 5, 4, 4, generator=generator) * 2 + 1
    y = x * torch.tensor([0.3, 0.8, 1.0, 1.5, 3.0]).view(1, 5, 1, 1) + torch.randn(5, 1, 1, generator=generator)
    expected = norm(x)
    sums = [ChannelSums(), ChannelSums()]
    for total, values in zip(sums, (x, y), strict=True):
        total.add(values)
    assert (norm(y) - expected).abs().max() > 0.5
    match_batch_norm(norm, *sums)
    torch.testing.assert_close(norm(y), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_channel_that_is_constant_keeps_its_variance(generator):
    norm = nn.BatchNorm1d(2).eval()
    x = torch.randn(50, 2, generator=generator)
    x[:, 1] = 3.0
    sums = [ChannelSums(), ChannelSums()]
    for total, values in zip(sums, (x, 2 * x), strict=True):
        total.add(values)
    match_batch_norm(norm, *sums)
    assert float(norm.running_var[1]) == pytest.approx(1.0)
    assert float(norm.running_var[0]) == pytest.approx(4.0, rel=1e-3)
    assert bool(torch.isfinite(norm(F.pad(x, (0, 0)))).all())


@pytest.mark.parametrize("activations", [None, "int4"])
@torch.no_grad()
def test_moments_of_rotated_rows(activations, generator):
    module, x = nn.Linear(12, 4), torch.randn(3, 4, 12, generator=generator)
    schemes = [Scheme("int4", -1, activations, rotation=rotation) for rotation in (None, "hadamard")]
    plain, found = trials(module, {}, x, schemes)
    y = rotate(x, False).view(-1, 12)
    read = y if activations is None else quantize_activation(y, get_format(activations))
    torch.testing.assert_close(found.gram[0], read.T @ read / 12)
    torch.testing.assert_close(found.cross[0], y.T @ read / 12)
    torch.testing.assert_close(found.mean[0], read.mean(0))
    torch.testing.assert_close(found.float_mean[0], y.mean(0))
    assert found.count == 12
    torch.testing.assert_close(plain.float_mean[0], x.view(-1, 12).mean(0))


def test_moments_of_more_columns_than_are_summed_at_once(generator):
    pairs = torch.randn(3, 2, 2, 9, 1100, generator=generator)  # batches of two runs, in both streams
    sums = MomentSums()
    for x, y in pairs:
        sums.add(x, y)
    found = sums.result()
    x, y = (torch.cat(list(side), 1) for side in pairs.unbind(1))
    torch.testing.assert_close(found.gram, y.mT @ y / 27, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross, x.mT @ y / 27, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.gram[:, :512, 512:], found.gram[:, 512:, :512].mT)


def test_moments_are_rotated_where_they_lie(generator):
    x, y = torch.randn(2, 2, 9, 600, generator=generator)  # more columns than are rotated at once, two runs
    sums = MomentSums()
    sums.add(x, y)
    plain = sums.result()
    found = rotated(plain)
    x, y = rotate(x, False), rotate(y, False)
    torch.testing.assert_close(found.gram, y.mT @ y / 9)
    torch.testing.assert_close(found.cross, x.mT @ y / 9)
    assert found.gram.data_ptr() == plain.gram.data_ptr()
    assert found.cross.data_ptr() == plain.cross.data_ptr()
    assert found.gram.is_contiguous()  # a factor is made in its place, which takes a copy otherwise
