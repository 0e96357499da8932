"""Every format x every solver x every layer type x every device keeps the package's promises.

There is no list here: formats, solvers and layers come from their registries, layers are built from the signature of
the type they wrap, and their input is found by trying. A new entry is tested by being there. Experts alone are built by
hand: their constructor takes parameters, and their rows come with a tensor that says whose they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import sqnr
from hf_catquant import solvers
from hf_catquant.formats import ACTIVATION_FORMATS, FORMATS, get_format
from hf_catquant.layers import LAYERS, QuantizedModule, Scheme, layer_for
from hf_catquant.layers.experts import ExpertLinear, runs_of
from hf_catquant.moments import MomentSums
from hf_catquant.packing import unpack
from hf_catquant.weight import QuantizedWeight, dequantize

SIZES = (12, 18, 3)  # of the required arguments of a constructor, in their order: channels or features, kernel
# What a variant sets, where the constructor has such arguments; groups divide SIZES.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"groups": 3, "stride": 2, "padding": 1},
    {"dilation": 2, "padding": "same"},
    {"padding_mode": "reflect", "padding": 2},
    {"padding_idx": 1},
]
GROUP_SIZES = (8, -1)
LAYER_TYPES = list(LAYERS)
ENDS = (6, 6, 20)  # of the rows of each expert: the second has none


def build(wrapped: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    """A float module of the smallest sizes, with ``options`` set."""
    if wrapped is ExpertLinear:
        columns, rows, experts = SIZES
        bias = nn.Parameter(torch.empty(experts, rows)) if options.get("bias", True) else None
        return ExpertLinear(nn.Parameter(torch.empty(experts, rows, columns)), bias)
    parameters = inspect.signature(wrapped).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return wrapped(**dict(zip(required, SIZES, strict=False)), **options)


def variants(wrapped: type[nn.Module]) -> Iterator[nn.Module]:
    """A float module of every variant that the type knows."""
    parameters = inspect.signature(wrapped).parameters
    for options in VARIANTS:
        if options.keys() <= parameters.keys():
            module = build(wrapped, options)
            for index, parameter in enumerate(module.parameters()):
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.data = drawn * 0.2
            yield module.eval()


def example(module: nn.Module, device: torch.device) -> tuple[Tensor, ...]:
    """What the float module takes, found on the CPU, on ``device``."""
    return tuple(tensor.to(device) for tensor in found_example(copy.deepcopy(module).cpu()))


def found_example(module: nn.Module) -> tuple[Tensor, ...]:
    """What the module takes: an input, and where the rows of each expert end for those (the last row is nobody's)."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(module, ExpertLinear):
        return torch.randn((ENDS[-1] + 1, SIZES[0]), generator=generator), torch.tensor(ENDS)
    candidates = [torch.randint(min(SIZES[:2]), (2, 5), generator=generator)]
    for width in SIZES:
        candidates += [torch.randn(shape, generator=generator) for shape in ((2, 5, width), (2, width, 9))]
        candidates.append(torch.randn((2, width, 9, 10), generator=generator))
    for candidate in candidates:
        try:
            module(candidate)
        except (RuntimeError, TypeError, IndexError):
            continue
        return (candidate,)
    raise AssertionError(f"no input found for {module}: teach tests/test_conformance.py how to build one")


def rows_of_runs(new: QuantizedModule, module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Rows (B, M, K) that meet each of the parts of the weight that are solved one by one."""
    if not isinstance(module, ExpertLinear):
        return [new.input_rows(module, *inputs)]
    x, ends = inputs
    assert new.runs == len(module.weight)
    assert new.input_rows(module, x) is None  # which rows meet which expert, only ``ends`` says
    rows: list[Tensor | None] = [None] * new.runs
    for expert, start, end in runs_of(ends):
        rows[expert] = x[start:end].unsqueeze(0)
    return rows


def solved(
    module: nn.Module, solver: str, scheme: Scheme, device: torch.device
) -> tuple[QuantizedModule, QuantizedWeight]:
    """The quantized layer and what the solver found for it, on the moments of random inputs."""
    layer = layer_for(module)
    assert layer is not None
    module = module.to(device)
    inputs = example(module, device)
    matrix = layer.to_matrix(module.weight.detach()).float().contiguous()
    fmt, parts = get_format(scheme.weights), []
    new = layer(module, scheme)
    for rows, part in zip(rows_of_runs(new, module, inputs), matrix.chunk(new.runs), strict=True):
        moments = None
        if rows is not None:
            sums = MomentSums()
            sums.add(rows, rows)
            moments = sums.result()
        chosen = solvers.get(solver if moments is not None else "rtn")
        parts.append(chosen.solve(part, fmt, scheme.group_size, moments))
    codes, scales, offsets = zip(*parts, strict=True)
    found = QuantizedWeight(torch.cat(codes), torch.cat(scales), torch.cat(offsets) if fmt.affine else None)
    new.fill(found)
    return new, found


@pytest.mark.parametrize("wrapped", LAYER_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("solver", solvers.names())
@pytest.mark.parametrize("weights", FORMATS)
def test_a_layer_computes_what_its_solver_found(weights, solver, wrapped, device):
    with torch.no_grad():
        for module in variants(wrapped):
            for group_size in GROUP_SIZES:
                new, found = solved(module, solver, Scheme(weights, group_size), device)
                x = example(module, device)
                codes = unpack(new.weight_packed, get_format(weights), group_size, new.columns)
                assert torch.equal(codes, found.codes)
                stored = QuantizedWeight(found.codes, new.weight_scale, new.weight_offset)
                expected = dequantize(stored, get_format(weights), group_size)
                assert torch.equal(type(new).to_matrix(new.weight), expected)
                assert (new.weight.shape, new.weight.dtype) == (module.weight.shape, module.weight.dtype)
                twin = copy.deepcopy(module)
                twin.weight.data = new.weight
                assert sqnr(twin(*x), new(*x)) > 100
                assert sqnr(new.to_float().to(device)(*x), new(*x)) > 100
                assert type(new.to_float()) is wrapped
                new.check_values()


@pytest.mark.parametrize("wrapped", LAYER_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("solver", solvers.names())
def test_eight_bits_are_closer_than_two(solver, wrapped):
    for module in variants(wrapped):
        weight = module.weight.detach()
        close, rough = (solved(module, solver, Scheme(w, 8), torch.device("cpu"))[0].weight for w in ("int8", "int2"))
        assert sqnr(weight, close) > sqnr(weight, rough) + 15


@pytest.mark.parametrize("wrapped", LAYER_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("weights", FORMATS)
@torch.no_grad()
def test_a_layer_reloads_bit_exactly_and_keeps_its_buffers(weights, wrapped, device):
    for module in variants(wrapped):
        new, _ = solved(module, "rtn", Scheme(weights, 8), device)
        x = example(module, device)
        state = {name: tensor.clone() for name, tensor in new.state_dict().items()}
        again = type(new)(copy.deepcopy(module), new.scheme)
        again.load_state_dict(state)
        twin = copy.deepcopy(new)
        assert torch.equal(again(*x), new(*x))
        assert torch.equal(twin(*x), new(*x))
        assert twin.weight_packed.data_ptr() != new.weight_packed.data_ptr()
        for dtype in (torch.float16, torch.bfloat16):
            cast = copy.deepcopy(new).to(dtype)
            for name, buffer in cast.named_buffers():
                assert torch.equal(buffer, state[name])
                assert buffer.dtype == state[name].dtype
            assert cast.weight.dtype == dtype
            assert cast.bias is None or cast.bias.dtype == dtype
            out = cast(*(each.to(dtype) if each.is_floating_point() else each for each in x))
            assert out.dtype == dtype
            assert sqnr(new(*x), out) > 30


@pytest.mark.parametrize("wrapped", LAYER_TYPES, ids=lambda t: t.__name__)
def test_a_layer_keeps_the_attributes_of_the_original(wrapped):
    constructor = inspect.signature(wrapped).parameters
    for module in variants(wrapped):
        new = LAYERS[wrapped](module, Scheme("int4", 8))
        for name in {*LAYERS[wrapped].keeps, *(n for n in constructor if n in module.__dict__)}:
            assert getattr(new, name) == getattr(module, name), name
        assert (new.bias is None) == (getattr(module, "bias", None) is None)
        assert new.training == module.training
        assert len(list(new.parameters())) == (new.bias is not None)


@pytest.mark.parametrize("wrapped", LAYER_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
def test_activations_go_through_their_format(activations, wrapped, device):
    fmt = get_format(activations)
    with torch.no_grad():
        for module in variants(wrapped):
            scheme = Scheme("int8", 8)
            plain, found = solved(module, "rtn", scheme, device)
            new = type(plain)(module, replace(scheme, activations=activations))
            new.fill(found)
            x = example(module, device)
            if new.input_scale is not None:
                new.fill_input_range(torch.tensor(8 / fmt.radix), torch.tensor(0.0) if fmt.affine else None)
            if not x[0].is_floating_point():
                assert torch.equal(new(*x), plain(*x))
                continue
            noise = sqnr(plain(*x), new(*x))
            assert 3 * (fmt.bits - 1) < noise < 100


def test_every_registered_layer_wraps_the_type_it_is_registered_for():
    assert all(layer.wraps is wrapped for wrapped, layer in LAYERS.items())
    assert {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding} <= LAYERS.keys()
