"""Ops: the schemas, the shapes of results, and the gradients. What they compute is in ``kernels/``.

Letters: N out features, K in features, M rows of x, G groups a row, C clusters, D corrected width, P projection rank.

    catquant::linear          x (..., K)                -> (..., N)
    catquant::expert_linear   x (S, K), ends (E,)       -> (S, N)          S rows, sorted by the expert that they meet
    catquant::expert_transposed   x (S, N), ends (E,)  -> (S, K)         the same with w_hat transposed: its gradient
    catquant::conv            x (B, C_in, *spatial)     -> (B, N, *spatial_out)     one or two spatial dimensions
    catquant::embedding       indices (...)             -> (..., K)
    catquant::dequantize      packed rows               -> w_hat (N, K)
    catquant::unpack          packed rows               -> codes (N, K) uint8
    catquant::cluster_affine  y (..., D)                -> (..., D)
    catquant::rotate          x (..., K)                -> R x or R^T x, (..., K)

x may be float32, float16, bfloat16 or float64, of which compiled kernels compute float64 in float32; the result has the
dtype of x. Gradients flow to x and bias; packed weights are constants, and activation quantization passes gradients straight
through.
"""

from __future__ import annotations

import torch

from .op_checks import (
    check_cluster_affine,
    check_conv,
    check_devices,
    check_experts,
    check_indices,
    check_input,
    check_packed,
    check_rotate,
    check_weight,
)

_WEIGHT = "Tensor weight_packed, Tensor weight_scale, Tensor? weight_offset"
_INPUT = "Tensor? input_scale, Tensor? input_offset"

SCHEMAS = {
    "linear": f"(Tensor x, {_WEIGHT}, {_INPUT}, Tensor? bias, str weights, int group_size, str? activations) "
    "-> Tensor",
    "expert_linear": f"(Tensor x, Tensor ends, {_WEIGHT}, Tensor? bias, str weights, int group_size, "
    "str? activations) -> Tensor",
    "expert_transposed": f"(Tensor x, Tensor ends, {_WEIGHT}, str weights, int group_size, int columns) -> Tensor",
    "conv": f"(Tensor x, {_WEIGHT}, {_INPUT}, Tensor? bias, str weights, int group_size, str? activations, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    "embedding": f"(Tensor indices, {_WEIGHT}, str weights, int group_size, int columns, ScalarType dtype) -> Tensor",
    "dequantize": f"({_WEIGHT}, str weights, int group_size, int columns, ScalarType dtype) -> Tensor",
    "unpack": "(Tensor weight_packed, str weights, int group_size, int columns) -> Tensor",
    "cluster_affine": "(Tensor y, Tensor? basis, Tensor centroids, Tensor gamma, Tensor beta) -> Tensor",
    "rotate": "(Tensor x, bool inverse) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"catquant::{_name}", _schema)


@torch.library.register_fake("catquant::linear")
def _linear(x, packed, scale, offset, input_scale, input_offset, bias, weights, group_size, activations):
    check_weight(packed, scale, offset, weights, group_size, x.shape[-1])
    check_input(x, packed, bias, activations, input_scale)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.register_fake("catquant::expert_linear")
def _expert_linear(x, ends, packed, scale, offset, bias, weights, group_size, activations):
    rows = check_experts(x, ends, packed, scale, offset, bias, weights, group_size, activations)
    return x.new_empty((x.shape[0], rows))


@torch.library.register_fake("catquant::expert_transposed")
def _expert_transposed(x, ends, packed, scale, offset, weights, group_size, columns):
    check_devices(x, ends, packed)
    check_weight(packed, scale, offset, weights, group_size, columns)
    return x.new_empty((x.shape[0], columns))


@torch.library.register_fake("catquant::conv")
def _conv(
    x,
    packed,
    scale,
    offset,
    input_scale,
    input_offset,
    bias,
    weights,
    group_size,
    activations,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
):
    check_conv(x, packed, scale, offset, weights, group_size, kernel_size, groups)
    check_input(x, packed, bias, activations, input_scale)
    sides = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    spatial = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides]
    return x.new_empty((x.shape[0], packed.shape[0], *spatial))


@torch.library.register_fake("catquant::embedding")
def _embedding(indices, packed, scale, offset, weights, group_size, columns, dtype):
    check_indices(indices, packed)
    check_weight(packed, scale, offset, weights, group_size, columns)
    return packed.new_empty((*indices.shape, columns), dtype=dtype)


@torch.library.register_fake("catquant::dequantize")
def _dequantize(packed, scale, offset, weights, group_size, columns, dtype):
    check_weight(packed, scale, offset, weights, group_size, columns)
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


@torch.library.register_fake("catquant::unpack")
def _unpack(packed, weights, group_size, columns):
    check_packed(packed, weights, group_size, columns)
    return packed.new_empty((packed.shape[0], columns))


@torch.library.register_fake("catquant::cluster_affine")
def _cluster_affine(y, basis, centroids, gamma, beta):
    check_cluster_affine(y, basis, centroids, gamma, beta)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.register_fake("catquant::rotate")
def _rotate(x, inverse):
    check_rotate(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_linear(ctx, inputs, output):
    x, packed, scale, offset, _, _, bias, ctx.weights, ctx.group_size, _ = inputs
    ctx.columns, ctx.has_bias = x.shape[-1], bias is not None
    ctx.save_for_backward(packed, scale, offset)


def _linear_backward(ctx, grad):
    packed, scale, offset = ctx.saved_tensors
    weight = torch.ops.catquant.dequantize(packed, scale, offset, ctx.weights, ctx.group_size, ctx.columns, grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return grad @ weight, None, None, None, None, None, grad_bias, None, None, None


def _save_expert_linear(ctx, inputs, output):
    x, ends, packed, scale, offset, bias, ctx.weights, ctx.group_size, _ = inputs
    ctx.columns, ctx.bias_shape = x.shape[-1], None if bias is None else bias.shape
    ctx.save_for_backward(ends, packed, scale, offset)


def _expert_linear_backward(ctx, grad):
    ends, packed, scale, offset = ctx.saved_tensors
    stored = (packed, scale, offset, ctx.weights, ctx.group_size, ctx.columns)
    grad_x = torch.ops.catquant.expert_transposed(grad, ends, *stored)
    grad_bias = None
    if ctx.bias_shape is not None:
        experts = torch.searchsorted(ends, torch.arange(len(grad), device=ends.device), right=True)
        mine = (experts < len(ends)).unsqueeze(1)
        experts = experts.clamp(max=len(ends) - 1)
        grad_bias = grad.new_zeros(ctx.bias_shape).index_add(0, experts, grad * mine)
    return grad_x, None, None, None, None, grad_bias, None, None, None


def _save_conv(ctx, inputs, output):
    x, packed, scale, offset, _, _, bias, ctx.weights, ctx.group_size, _, *ctx.geometry = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, packed, scale, offset)


def _conv_backward(ctx, grad):
    x, packed, scale, offset = ctx.saved_tensors
    kernel_size, stride, padding, dilation, groups = ctx.geometry
    columns = x.shape[1] // groups
    shape = (packed.shape[0], columns, *kernel_size)
    for size in kernel_size:
        columns *= size
    weight = torch.ops.catquant.dequantize(packed, scale, offset, ctx.weights, ctx.group_size, columns, grad.dtype)
    no_output_padding = [0] * len(kernel_size)
    grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight.view(shape),
        [packed.shape[0]],
        stride,
        padding,
        dilation,
        False,
        no_output_padding,
        groups,
        [True, False, ctx.has_bias],
    )
    return (grad_x, None, None, None, None, None, grad_bias if ctx.has_bias else None, *([None] * 8))


def _save_cluster_affine(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _cluster_affine_backward(ctx, grad):
    y, basis, centroids, gamma, _ = ctx.saved_tensors
    # gamma of each row's cluster is the op itself with a slope of zero and gamma in the place of the offset.
    slope = torch.ops.catquant.cluster_affine(y.detach(), basis, centroids, torch.zeros_like(gamma), gamma)
    return grad * slope, None, None, None, None


def _save_rotate(ctx, inputs, output):
    _, ctx.inverse = inputs


def _rotate_backward(ctx, grad):
    return torch.ops.catquant.rotate(grad, not ctx.inverse), None


torch.library.register_autograd("catquant::linear", _linear_backward, setup_context=_save_linear)
torch.library.register_autograd("catquant::expert_linear", _expert_linear_backward, setup_context=_save_expert_linear)
torch.library.register_autograd("catquant::conv", _conv_backward, setup_context=_save_conv)
torch.library.register_autograd(
    "catquant::cluster_affine", _cluster_affine_backward, setup_context=_save_cluster_affine
)
torch.library.register_autograd("catquant::rotate", _rotate_backward, setup_context=_save_rotate)
