"""The ops of kernels/cuda.py on the host: dequantization, embedding, correction, dispatch, the life of a layout."""

from __future__ import annotations

import copy
import gc
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cuda_emulator import compiler, emulated
from helpers import ALL_FORMATS, SHAPES, Case, assert_product, random_case
from hf_catquant.formats import FORMATS, Format
from hf_catquant.kernels import (
    cuda,
    cuda_calls,
    cuda_compile,
    cuda_driver,
    cuda_layout,
    cuda_products,
    cuda_table,
    cuda_trial,
    reference,
)
from hf_catquant.kernels.cuda_compile import Unserved
from hf_catquant.layers import QuantizedModule, Scheme, layer_for
from hf_catquant.ops import SCHEMAS
from hf_catquant.rotation import rotate
from hf_catquant.weight import QuantizedWeight

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_tools

emulator = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler: g++ or clang++")
FORMAT = pytest.mark.parametrize("name", ALL_FORMATS)
DTYPES = list(cuda_calls.TYPES)


@pytest.fixture
def device(folder):
    """A device that is emulated, whose tensors are on the CPU."""
    with emulated(folder):
        yield torch.device("cpu")


def half(case: Case) -> Case:
    offset = None if case.offset is None else case.offset.half()
    return replace(case, scale=case.scale.half(), offset=offset)


@emulator
@pytest.mark.parametrize("scale", [torch.float16, torch.float32], ids=str)
@FORMAT
def test_dequantize_is_the_reference_bit_for_bit(name, scale, device):
    for dtype, (rows, columns, group_size) in zip([*DTYPES, DTYPES[0], DTYPES[0]], SHAPES, strict=True):
        case = random_case(name, rows, columns, group_size)
        stored = (half(case) if scale == torch.float16 else case).stored
        arguments = (*stored, name, group_size, columns, dtype)
        assert torch.equal(cuda.dequantize(*arguments), reference.dequantize(*arguments))


@emulator
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["ternary", "int3", "int8"])
def test_embedding_is_the_reference_bit_for_bit(name, index, device):
    case, indices = half(random_case(name, 9, 40, 16)), torch.tensor([[8, 0, 3], [3, 3, 7]], dtype=index)
    arguments = (indices, *case.stored, name, 16, 40, torch.bfloat16)
    assert torch.equal(cuda.embedding(*arguments), reference.embedding(*arguments))
    assert cuda.embedding(indices[:0], *arguments[1:]).shape == (0, 3, 40)


@emulator
@pytest.mark.parametrize("wrong", [-1, 9])
def test_embedding_of_a_row_that_is_not_there_stops(wrong, device):
    case = half(random_case("int8", 9, 40, 16))
    with pytest.raises(RuntimeError, match="the kernel refuses its arguments"):
        cuda.embedding(torch.tensor([wrong]), *case.stored, "int8", 16, 40, torch.bfloat16)


@emulator
@pytest.mark.parametrize("fused", [True, False], ids=["one kernel", "projected before"])
@pytest.mark.parametrize("projected", [False, True], ids=["whole", "projected"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cluster_affine(dtype, projected, fused, device, generator, monkeypatch):
    if not fused:
        monkeypatch.setattr(cuda_table, "PROJECT_ROWS", 0)
    for width, rank in ((70, 40), (4136, 40)) if dtype == torch.float16 else ((70, 40), (72, 40)):
        y = torch.randn(2, 5, width, generator=generator).to(dtype)
        basis = torch.randn(width, rank, generator=generator) if projected else None
        centroids = torch.randn(11, rank if projected else width, generator=generator)
        gamma, beta = torch.randn(2, 11, width, generator=generator)
        arguments = (y, basis, centroids, gamma, beta)
        assert torch.equal(cuda.cluster_affine(*arguments), reference.cluster_affine(*arguments))


@emulator
@pytest.mark.parametrize(
    ("width", "rank"), [(1, 1), (3, 1), (7, 2), (5, 3), (40, 256), (2003, 33), (1024, 50), (8192, 6), (1000, 255)]
)
def test_a_projection_inside_the_kernel(width, rank, device, generator):
    """One cluster a component: the nearest is the largest component of z, so that every one of them is looked at."""
    y, basis = torch.randn(6, width, generator=generator), torch.randn(width, rank, generator=generator)
    z = y.double() @ basis.double()
    beta = torch.arange(1.0, rank + 1)[:, None].expand(-1, width).contiguous()
    unit = torch.eye(rank) * 1e-3  # much shorter than z: the nearest is the one that points its way
    out = cuda.cluster_affine(y, basis, unit, torch.zeros(rank, width), beta)
    assert torch.equal(out, (z.argmax(1) + 1.0).float()[:, None].expand_as(out))
    for component in range(0, rank, max(1, rank // 3)):  # and its value: on one side of a plane, then on the other
        value = z[0, component].item()
        for side in (-1, 1):
            pair = torch.zeros(2, rank)
            pair[0, component], pair[1, component] = value + side * 1e-3 - 1, value + side * 1e-3 + 1
            out = cuda.cluster_affine(y[:1], basis, pair, torch.zeros(2, width), torch.eye(2)[:, :1].expand(-1, width))
            assert bool((out == (side > 0)).all()), (component, side)


@emulator
def test_autocast_changes_no_type_inside_an_op(device, generator):
    y, basis, centroids = (torch.randn(*shape, generator=generator) for shape in ((100, 70), (70, 40), (11, 40)))
    gamma, beta = torch.randn(2, 11, 70, generator=generator)
    case, x = half(random_case("int4", 6, 18, 8)), torch.randn(40, 2, 5, 4, generator=generator)  # many positions
    rest = (x, *case.stored, None, None, None, "int4", 8, None, (3, 3), (1, 1), (1, 1), (1, 1), 1)

    def results() -> list[torch.Tensor]:
        return [
            cuda.cluster_affine(y, basis, centroids, gamma, beta),
            reference.cluster_affine(y, basis, centroids, gamma, beta),
            reference.rotate(y[:, :64], False),
            cuda.conv(*rest),
        ]

    before = results()
    with torch.autocast("cpu", torch.bfloat16):
        after = results()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))


@emulator
def test_cluster_affine_takes_the_first_of_equal_centroids(device):
    centroids = torch.tensor([[1.0], [-1.0]] * 9)  # more than a block has warps
    beta = torch.arange(18.0)[:, None]
    y = torch.tensor([[0.0], [2.0], [-2.0]])
    out = cuda.cluster_affine(y, None, centroids, torch.zeros_like(beta), beta)
    assert out.flatten().tolist() == [0.0, 0.0, 1.0]


@emulator
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_linear_takes_the_same_way_twice(rows, activations, device, generator):
    case = half(random_case("ternary", 20, 200, 64))
    x, bias = torch.randn(rows, 1, 200, generator=generator).bfloat16(), torch.randn(20, generator=generator)
    arguments = (x, *case.stored, None, None, bias, "ternary", 64, activations)
    first, then = cuda.linear(*arguments), cuda.linear(*arguments)  # dequantized, from tiles
    x_hat = reference.quantize_activation(x, FORMATS["int8"]) if activations else x
    expected = x_hat.double() @ case.dense.T + bias.double()
    magnitude = 2 * (x_hat.double().abs() @ case.dense.abs().T + bias.abs())  # x_hat is rounded once more in the first
    for out in (first, then):
        assert (out.shape, out.dtype) == ((rows, 1, 20), torch.bfloat16)
        assert_product(out, expected, magnitude)
    assert not torch.equal(first, then) or rows == 300 or activations


@emulator
def test_linear_in_pieces(device, generator, monkeypatch):
    monkeypatch.setattr(cuda_table, "DENSE_BYTES", 1)
    case, x = half(random_case("int4", 150, 40, 8)), torch.randn(3, 40, generator=generator)
    for bias in (None, torch.randn(150, generator=generator)):
        out = cuda.linear(x, *case.stored, None, None, bias, "int4", 8, None)
        torch.testing.assert_close(out, reference.linear(x, *case.stored, None, None, bias, "int4", 8, None))


@emulator
def test_linear_of_nothing(device):
    case = half(random_case("int4", 5, 40, 8))
    for x in (torch.empty(0, 40), torch.empty(0, 40).bfloat16()):
        assert cuda.linear(x, *case.stored, None, None, None, "int4", 8, None).shape == (0, 5)


@emulator
def test_float64_is_left_to_the_reference(device):
    case, x = half(random_case("int4", 5, 40, 8)), torch.ones(2, 40, dtype=torch.float64).cumsum(1).sin()
    arguments = (x, *case.stored, None, None, None, "int4", 8, None)
    assert torch.equal(cuda.linear(*arguments), reference.linear(*arguments))
    assert cuda.linear(*arguments).dtype == torch.float64
    arguments = (x.unsqueeze(2), *arguments[1:], (1,), (1,), (0,), (1,), 1)
    assert torch.equal(cuda.conv(*arguments), reference.conv(*arguments))


@emulator
def test_conv_is_the_reference_bit_for_bit(device, generator):
    case, x = half(random_case("int3", 6, 18, 8)), torch.randn(2, 4, 7, 6, generator=generator)
    geometry = ((3, 3), (2, 1), (1, 1), (1, 1), 2)
    arguments = (x, *case.stored, torch.tensor(0.02), None, None, "int3", 8, "int8", *geometry)
    assert torch.equal(cuda.conv(*arguments), reference.conv(*arguments))


@emulator
@pytest.mark.parametrize(("dtype", "activations"), [(torch.bfloat16, None), (torch.float16, "int8")], ids=str)
@pytest.mark.parametrize(
    ("spatial", "kernel", "geometry"),
    [
        ((7, 6), (3, 3), ((2, 1), (1, 1), (1, 1))),
        ((9,), (3,), ((1,), (2,), (2,))),
        ((4, 4), (4, 4), ((4, 4), (0, 0), (1, 1))),
    ],
    ids=str,
)
def test_conv_of_few_positions_is_a_product_from_tiles(
    spatial, kernel, geometry, activations, dtype, device, generator, monkeypatch
):
    columns = 4 * torch.Size(kernel).numel()
    case, x = half(random_case("ternary", 20, columns, 16)), torch.randn(2, 4, *spatial, generator=generator).to(dtype)
    scale = torch.tensor(0.02) if activations else None
    arguments = (x, *case.stored, scale, None, torch.randn(20, generator=generator), "ternary", 16, activations)
    before = cuda.conv(*arguments, kernel, *geometry, 1)
    monkeypatch.setattr(cuda, "expand", None)  # not dequantized
    out = cuda.conv(*arguments, kernel, *geometry, 1)
    assert not out._is_view()
    assert out.shape == before.shape
    torch.testing.assert_close(out.float(), before.float(), rtol=0.02, atol=0.1)
    assert not torch.equal(out, before)


@emulator
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("columns", [7, 12, 8, 96, 1536, 2080, 8192])
def test_rotate(columns, inverse, device, generator):
    for dtype in DTYPES if columns in (12, 96) else DTYPES[-1:]:
        x = torch.randn(2, 1, columns, generator=generator).to(dtype)
        out, expected = cuda.rotate(x, inverse), rotate(x.double(), inverse)
        assert (out.shape, out.dtype) == (x.shape, dtype)
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=3e-6)
    assert cuda.rotate(x[:0], inverse).shape == (0, 1, columns)


@emulator
@pytest.mark.parametrize(("rows", "columns"), [(500, 96), (500, 7), (7, 8192), (41, 2080)])
def test_a_block_rotates_several_rows(rows, columns, device, generator, monkeypatch):
    monkeypatch.setattr(cuda_driver, "processors", lambda device: 1)
    x = torch.randn(rows, columns, generator=generator)
    torch.testing.assert_close(cuda.rotate(x, False).double(), rotate(x.double(), False), rtol=1e-6, atol=3e-6)


@emulator
def test_rotations_that_a_block_does_not_hold_are_left_to_the_reference(device, monkeypatch):
    x = torch.ones(1, 1 << 14)
    assert torch.equal(cuda.rotate(x, False), reference.rotate(x, False))
    monkeypatch.setenv("CATQUANT_CUDA", "cuda")
    with pytest.raises(RuntimeError, match="rotate takes blocks of up to 8192 columns, 16384 have one of 16384"):
        cuda.rotate(x, False)


@emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        *(("binary", size) for size in (32, 128, 256)),
        *(("ternary", 32), ("int2", 128), ("ternary", 512), ("int3", 64)),
        *(("int4", -1), ("int4", 32), ("int8", 128), ("int8", 32)),
    ],
)
def test_tiles_become_the_weight_of_the_reference_bit_for_bit(name, group_size, dtype, device):
    case = half(random_case(name, 40, 520, group_size))
    layout = cuda_layout.build(*case.stored, name, group_size, 520)
    expected = reference.dequantize(*case.stored, name, group_size, 520, dtype)
    assert torch.equal(cuda_calls.untile(layout, 0, 3, dtype), expected)
    assert torch.equal(cuda_calls.untile(layout, 1, 2, dtype), expected[16:32])


MISTAKES = {
    "side of a pair": ("untile.cu", "FIELDS > 1 ? BITS * side : 0", "0"),
    "other row": ("untile.cu", "* 8 + (even >> 2) + i % 2", "* 8 + (even >> 2)"),
    "group of a pair": ("untile.cu", "values[(turn + APART) / GROUP_PAIRS]", "values[turn / GROUP_PAIRS]"),
    "y not waited for": ("cluster.cu", "sync_block();  // y is there", ""),
    "y overwritten": ("cluster.cu", "sync_block();  // nobody reads y any more", ""),
    "rows of a turn": ("cluster.cu", "y[i] += AHEAD * rows", "y[i] += rows"),
    "exchange not waited for": ("rotate.cu", "        sync_block();\n        low = ", "        low = "),
    "eight columns not waited for": (
        "rotate.cu",
        "    sync_block();\n    take(v, held, thread, 0)",
        "    take(v, held, thread, 0)",
    ),
}


@emulator
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, folder, tmp_path, generator):
    file, right, wrong = MISTAKES[mistake]
    shutil.copytree(cuda_compile.CSRC, tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / "csrc" / file).write_text(text.replace(right, wrong), encoding="utf-8")
    case = half(random_case("ternary", 16, 256, 64))
    layout = cuda_layout.build(*case.stored, "ternary", 64, 256)
    y, basis = torch.randn(2, 1024, generator=generator), torch.randn(1024, 50, generator=generator)
    unit, beta = torch.eye(50) * 1e-3, torch.arange(50.0)[:, None].expand(-1, 1024)
    with emulated(folder, sources=tmp_path / "csrc"):
        found = {
            "untile.cu": lambda: cuda_calls.untile(layout, 0, 1, torch.bfloat16),
            "cluster.cu": lambda: cuda.cluster_affine(y, basis, unit, torch.zeros(50, 1024), beta)[:, 0],
            "rotate.cu": lambda: cuda.rotate(y, False).double(),
        }[file]()
    expected = {
        "untile.cu": reference.dequantize(*case.stored, "ternary", 64, 256, torch.bfloat16),
        "cluster.cu": (y @ basis).argmax(1).float(),
        "rotate.cu": rotate(y.double(), False),
    }[file]
    assert not torch.allclose(found, expected, atol=1e-5)


@emulator
@pytest.mark.parametrize("columns", [33, 520])
def test_many_rows_are_multiplied_with_the_weight_from_its_tiles(columns, device, generator, monkeypatch):
    monkeypatch.setattr(cuda_table, "DENSE_BYTES", 1)
    monkeypatch.setattr(cuda_table, "EXACT_TOKENS", 0)
    case, x = half(random_case("int4", 150, columns, -1)), torch.randn(3, columns, generator=generator).bfloat16()
    for bias in (None, torch.randn(150, generator=generator)):
        arguments = (x, *case.stored, None, None, bias, "int4", -1, None)
        cuda.linear(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_calls, "expand", None)
            torch.testing.assert_close(cuda.linear(*arguments), reference.linear(*arguments))


@emulator
def test_what_a_linear_returns_may_be_written_to(device, generator):
    case = half(random_case("int4", 20, 64, 32))
    for rows in (3, 400):
        x = torch.randn(1, rows, 64, generator=generator).bfloat16()
        for _ in range(2):
            assert not cuda.linear(x, *case.stored, None, None, None, "int4", 32, None)._is_view()


@emulator
def test_scales_of_other_types_and_strided_tensors(device, generator):
    case = half(random_case("int4", 40, 200, 64))
    case = replace(case, scale=case.scale.bfloat16(), offset=case.offset.bfloat16())
    x = torch.randn(12, 203, generator=generator).bfloat16()[:, 3:]  # not contiguous, and not on 16 bytes
    bias = torch.randn(80, generator=generator).bfloat16()[::2]
    for rows in (1, 6, 12):
        arguments = (x[-rows:], *case.stored, None, None, bias, "int4", 64, None)
        expected = reference.linear(*arguments)
        for _ in range(2):  # dequantized, then from tiles
            torch.testing.assert_close(cuda.linear(*arguments), expected, rtol=0.02, atol=0.1)


def test_what_products_cannot_count_is_left_to_the_reference():
    with gpu_tools.no_device(132):
        for rows, columns, group_size, activations, what in (
            (1, 1 << 17, -1, "int8", r"integer sums of 131072 columns with one scale do not fit 32 bits"),
            (1 << 19, 1 << 16, 64, "int8", r"\(524288, 65536\) is too much: use fewer rows"),
        ):
            weight = gpu_tools.random_weight("int8", 16, columns, group_size, torch.device("meta"))
            layout = cuda_layout.build(*weight, "int8", group_size, columns)
            x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
            with pytest.raises(Unserved, match=what):
                cuda_products.multiply(x, layout, None, activations)


def test_any_number_of_rows_has_a_launch():
    with gpu_tools.no_device(132):
        weight = gpu_tools.random_weight("int4", 64, 256, 64, torch.device("meta"))
        layout = cuda_layout.build(*weight, "int4", 64, 256)
        for rows in (1, 9, 33, 200, 70000, 1 << 21):
            x = torch.empty(rows, 256, dtype=torch.bfloat16, device="meta")
            assert cuda_products.multiply(x, layout, None, "int8").shape == (rows, 64)


def test_tensors_on_different_devices_are_refused(monkeypatch):
    case = half(random_case("int4", 20, 64, 32))
    layout = cuda_layout.build(*case.stored, "int4", 32, 64)
    x = torch.empty(9, 64, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(cuda_driver, "processors", lambda device: 3)
    monkeypatch.setattr(cuda_driver, "has_warp_groups", lambda device: False)
    monkeypatch.setenv(cuda_trial.SWITCH, "0")
    with pytest.raises(RuntimeError, match="all tensors of gemm must be on meta, one is on cpu: move the layer there"):
        cuda_products.multiply(x, layout, None, None)


def test_a_layout_is_built_at_the_second_use_and_dropped_with_the_weight():
    case, held = half(random_case("int4", 20, 64, 32)), cuda_layout.Layouts()
    arguments = ("int4", 32, 64)
    assert held.of(*case.stored, *arguments) is None
    layout = held.of(*case.stored, *arguments)
    assert layout is not None
    assert held.of(*case.stored, *arguments) is layout
    before, place = layout.scales.clone(), layout.scales.data_ptr()
    case.scale.mul_(2)
    again = held.of(*case.stored, *arguments)
    assert again is not None
    assert torch.equal(again.scales[..., 0], before[..., 0] * 2)
    assert again.scales.data_ptr() == place  # where a captured graph reads it
    assert len(held) == 1
    del case
    gc.collect()
    assert len(held) == 0


def test_layouts_of_shared_and_copied_weights():
    held, layer = cuda_layout.Layouts(), quantized_linear()
    shared, copied = quantized_linear(), copy.deepcopy(layer)
    shared.share(layer)
    first, second, third = (
        held.of(*module.packed_tensors(), "int4", 32, 64, build_now=True) for module in (layer, shared, copied)
    )
    assert first is second
    assert third is not first
    assert len(held) == 2


def test_parts_of_a_weight_have_layouts_of_their_own():
    case, held = half(random_case("int4", 32, 64, 32)), cuda_layout.Layouts()

    def of(first: int) -> cuda_layout.Layout | None:
        part = slice(first, first + 16)  # other tensors at every call, as experts make them
        return held.of(case.packed[part], case.scale[part], case.offset[part], "int4", 32, 64)

    assert of(0) is of(16) is None
    first, second = of(0), of(16)
    assert first is not None
    assert second is not None
    assert not torch.equal(first.tiles, second.tiles)
    assert of(0) is first
    assert of(16) is second
    case.packed[:16] = case.packed[16:].clone()
    again = of(0)
    assert again is not None
    assert torch.equal(again.tiles, second.tiles)


def test_layouts_of_inference_tensors():
    with torch.inference_mode():
        case = random_case("int8", 4, 64, 32)
        held = cuda_layout.Layouts()
        layout = held.of(*case.stored, "int8", 32, 64, build_now=True)
        assert layout is not None
        before = layout.tiles.clone()
        case.stored[0].add_(1)  # torch counts nothing here: whoever writes says so
        held.doubt(case.stored[0])
        again = held.of(*case.stored, "int8", 32, 64)
        assert again is not None
        assert not torch.equal(again.tiles, before)
        assert held.of(*case.stored, "int8", 32, 64) is again


def quantized_linear() -> QuantizedModule:
    case = random_case("int4", 20, 64, 32)
    linear = nn.Linear(64, 20, dtype=torch.bfloat16)
    kind = layer_for(linear)
    assert kind is not None
    layer = kind(linear, Scheme("int4", 32))
    layer.fill(QuantizedWeight(case.codes, case.scale, case.offset))
    return layer


@pytest.fixture
def as_if_cuda(monkeypatch):
    come_to_cuda(monkeypatch)


def come_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor says that it is on CUDA, where nothing is captured and NVRTC is there."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "require", lambda device: None)
    monkeypatch.setattr(cuda_layout, "_finish", lambda device: None)
    monkeypatch.setattr(cuda, "layouts", cuda_layout.Layouts())


def test_a_linear_that_comes_to_cuda_gets_its_layout_and_is_saved_as_it_was(as_if_cuda, monkeypatch):
    model = nn.Sequential(quantized_linear(), nn.ReLU(), nn.Linear(20, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.float16)
    assert len(cuda.layouts) == 1
    model.to(torch.bfloat16)
    assert len(cuda.layouts) == 1
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("0.weight"))
    monkeypatch.setenv("CATQUANT_CUDA", "reference")
    assert cuda.place(*model[0].packed_tensors(), "int4", 32, 64) is None


@emulator
def test_a_model_comes_to_cuda_and_back_unchanged(folder, monkeypatch, generator):
    model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 20), nn.Conv1d(4, 6, 3))  # over 4 tokens
    for i, module in enumerate(model):
        kind = layer_for(module)
        if kind is not None:
            case = random_case("int4", *kind.matrix_shape(module), 32)
            model[i] = kind(module, Scheme("int4", 32, rotation="hadamard" if i == 1 else None))
            model[i].fill(QuantizedWeight(case.codes, case.scale, case.offset))
    model.bfloat16()
    indices = torch.tensor([[8, 0, 3, 1]])
    before, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(indices)
    with monkeypatch.context() as patch, emulated(folder):
        come_to_cuda(patch)
        model._apply(torch.clone)  # what moving does: other tensors, which say that they are on CUDA
        assert len(cuda.layouts) == 1
        with torch.no_grad():
            h = cuda.embedding(indices, *model[0].packed_tensors(), "int4", 32, 64, torch.bfloat16)
            h = cuda.rotate(h, False)
            out = cuda.linear(h, *model[1].packed_tensors(), None, None, model[1].bias, "int4", 32, None)
    model._apply(torch.clone)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(indices), expected)
    torch.testing.assert_close(out, model[:2](indices), rtol=0.02, atol=0.05)


def test_no_layout_is_built_while_a_graph_is_captured(as_if_cuda, monkeypatch):
    case = half(random_case("int4", 20, 64, 32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(3):
        assert cuda.layouts.of(*case.stored, "int4", 32, 64) is None


def test_without_nvrtc_or_on_a_cpu_no_layout_is_built(monkeypatch):
    layer = quantized_linear()
    stored = (*layer.packed_tensors(), "int4", 32, 64)
    assert cuda.place(*stored) is None
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(cuda, "require", Refusing(monkeypatch).launch)
    assert cuda.place(*stored) is None


def test_a_device_that_is_too_old_is_left_to_the_reference_and_gets_no_layout(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(cuda.logger, "warning", said.append)
    monkeypatch.setattr(cuda, "layouts", cuda_layout.Layouts())
    monkeypatch.setattr(cuda_driver, "_arch", lambda index: 75)
    monkeypatch.setattr(cuda_driver, "_index", lambda device: 0)
    monkeypatch.setattr(cuda_driver, "_unfit", cuda_driver._unfit.__wrapped__)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    case, x = half(random_case("int4", 20, 64, 32)), torch.ones(2, 64, dtype=torch.bfloat16)
    arguments = (x, *case.stored, None, None, None, "int4", 32, None)
    cuda._say.cache_clear()
    assert cuda.place(*case.stored, "int4", 32, 64) is None
    for _ in range(3):
        assert torch.equal(cuda.linear(*arguments), reference.linear(*arguments))
    assert said == [
        "linear runs on the reference: CUDA kernels need compute capability 8.0 or newer, the device has 7.5"
    ]
    assert len(cuda.layouts) == len(cuda.layouts._held) == 0


def test_ops_have_kernels_on_cuda():
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    found = {op for op in SCHEMAS if registered(f"catquant::{op}", "CUDA")}
    assert found == set(SCHEMAS) - {
        "unpack",
        "expert_linear",
        "expert_transposed",
    }  # the latter two are made of others


def test_formats_without_a_layout_are_left_to_the_reference():
    uneven = Format("uneven", (-1.0, 0.0, 3.0, 4.0), digits=4, nbytes=1, affine=True)
    with pytest.raises(Unserved, match=r"evenly spaced levels, uneven has"):
        cuda_layout.level_map(uneven)
    wide = Format("wide", tuple(map(float, range(256))), digits=1, nbytes=1, affine=True)
    with pytest.raises(Unserved, match="no layout for the 256 levels of wide"):
        cuda_layout.code_bits(wide)


class Refusing:
    """A device whose kernels cannot be loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_driver, "launch", self.launch)
        monkeypatch.setattr(cuda_driver, "processors", lambda device: 1)
        cuda._say.cache_clear()
        self.launches = 0

    def launch(self, *arguments: object) -> None:
        self.launches += 1
        raise Unserved("NVRTC is not here")


def test_what_cannot_be_compiled_runs_on_the_reference_and_says_so_once(monkeypatch):
    device, case = Refusing(monkeypatch), half(random_case("int4", 5, 40, 8))
    said: list[str] = []
    monkeypatch.setattr(cuda.logger, "warning", said.append)
    arguments = (*case.stored, "int4", 8, 40, torch.float32)
    for _ in range(2):
        assert torch.equal(cuda.dequantize(*arguments), reference.dequantize(*arguments))
    assert said == ["dequantize runs on the reference: NVRTC is not here"]
    assert device.launches == 2


def test_the_switch(monkeypatch):
    device, case = Refusing(monkeypatch), half(random_case("int4", 5, 40, 8))
    arguments = (*case.stored, "int4", 8, 40, torch.float32)
    monkeypatch.setenv("CATQUANT_CUDA", "cuda")
    with pytest.raises(RuntimeError, match="CATQUANT_CUDA=cuda, but dequantize has no kernel here: NVRTC is not here"):
        cuda.dequantize(*arguments)
    monkeypatch.setenv("CATQUANT_CUDA", "reference")
    assert torch.equal(cuda.dequantize(*arguments), reference.dequantize(*arguments))
    assert device.launches == 1
    monkeypatch.setenv("CATQUANT_CUDA", "fast")
    with pytest.raises(ValueError, match="CATQUANT_CUDA must be auto, cuda or reference, got 'fast'"):
        cuda.dequantize(*arguments)


def test_launches_fit_the_device():
    for row_tiles in (1, 7, 256, 3000):
        for bits in (1, 2, 4, 8):
            for column_tiles in (1, 2, 4):
                tiles, warps = cuda_table.blocks(row_tiles, bits, column_tiles, chunks=32, processors=132)
                assert 1 <= tiles <= 4
                assert warps * tiles * column_tiles * 512 <= 48 << 10  # shared memory without asking for more
                assert warps * 32 <= 1024
            for tokens in (1, 2, 4):
                shape = cuda_table.split_shape(row_tiles, bits, 4, tokens, chunks=32, processors=132)
                staged = (2 * tokens + (tokens < 4)) * (cuda_layout.chunk_width(bits) // 4 + 8) * 4
                assert shape.warps * 2 * staged <= 48 << 10
                assert shape.warps * -(-shape.tiles * tokens // 4) * 256 <= 48 << 10
    assert cuda_table.split_shape(256, 2, 4, 1, 32, 132)[:2] == (2, 16)  # one block for nearly every multiprocessor
    assert cuda_table.split_shape(512, 2, 4, 1, 64, 132)[:2] == (4, 16)
    assert cuda_table.split_shape(1792, 2, 4, 1, 64, 132)[:2] == (14, 8)
    assert cuda_table.split_shape(1792, 1, 4, 1, 32, 132) == (7, 4, 2, 2)  # and two


def test_threads_of_a_row_keep_what_they_read():
    for runs in (32, 96, 512, 1024, 3584, 5000):
        for rows in (1, 2048):
            threads, holds = cuda_table.row_threads(runs, rows)
            assert threads % 32 == 0
            assert threads <= 1024
            assert threads * holds >= runs or (holds == 0 and runs > 4096)
    assert cuda_table.row_threads(1024, 1) == (1024, 1)
    assert cuda_table.row_threads(1024, 2048) == (256, 4)


@pytest.mark.parametrize("tokens", [9, 40, 70, 500])
def test_parts_of_warp_groups_products_are_never_empty(tokens):
    for row_tiles in (1, 40, 512, 1792):
        for chunks in (1, 3, 64, 224):
            for integer in (False, True):
                plan = cuda_table._grouped(2, 4, 0, 0, row_tiles, chunks, tokens, integer, False, 132)
                stages = -(-chunks // 2)
                assert -(-stages // plan.splits) * (plan.splits - 1) < stages


def test_cuts_along_k_fill_the_device_and_leave_no_part_empty():
    for made in (1, 7, 32, 64, 132, 1000):
        for chunks in (1, 2, 5, 16, 64, 100):
            parts = cuda_table.cuts(made, chunks, 132)
            assert 1 <= parts <= chunks
            assert -(-chunks // parts) * (parts - 1) < chunks
    assert cuda_table.cuts(32, 64, 132) == 4
    assert cuda_table.cuts(1000, 64, 132) == 1
    assert all(cuda_table.cuts(made, 64, 132) == 1 for made in range(264, 600))  # or sums of parts would fill memory
