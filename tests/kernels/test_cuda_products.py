"""Products from tiles, run on the host: every format, number of rows, group and tail against float64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cuda_emulator import compiler, emulated
from helpers import ALL_FORMATS, Case, assert_product, random_case, slow
from hf_catquant.formats import ACTIVATION_FORMATS, FORMATS
from hf_catquant.kernels import cuda_calls, cuda_compile, cuda_driver, cuda_layout, cuda_products, cuda_table
from hf_catquant.weight import dequantize_packed, quantize_activation

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler: g++ or clang++")
FORMAT = pytest.mark.parametrize("name", ALL_FORMATS)
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 70]


def stored(name: str, rows: int, columns: int, group_size: int, dtype: torch.dtype = torch.float16) -> Case:
    case = random_case(name, rows, columns, group_size)
    offset = None if case.offset is None else case.offset.to(dtype)
    return replace(case, scale=case.scale.to(dtype), offset=offset)


def inputs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def check(
    case: Case,
    x: torch.Tensor,
    folder: Path,
    activations: str | None = None,
    sources: Path | None = None,
    parts: int | None = None,
    warp_groups: bool = False,
) -> None:
    weights, columns = case.fmt.name, x.shape[1]
    bias = torch.randn(case.codes.shape[0], generator=torch.Generator().manual_seed(1)).to(x.dtype)
    layout = cuda_layout.build(*case.stored, weights, case.group_size, columns)
    with emulated(folder, sources or cuda_compile.CSRC, warp_groups), cut_in(parts):
        out = cuda_products.multiply(x, layout, bias, activations)
    x_hat = x if activations is None else quantize_activation(x.float(), FORMATS[activations])
    expected = x_hat.double() @ case.dense.T + bias.double()
    magnitude = x_hat.double().abs() @ case.dense.abs().T + bias.double().abs()
    assert out.dtype == x.dtype
    assert_product(out, expected, magnitude)


@contextmanager
def cut_in(parts: int | None) -> Iterator[None]:
    """Products for many tokens are cut in this many parts along k."""
    with pytest.MonkeyPatch.context() as patch:
        if parts is not None:
            patch.setattr(cuda_table, "cuts", lambda *_: parts)
            patch.setattr(cuda_table, "group_cuts", lambda *_: parts)
        cuda_table._shared.cache_clear()
        cuda_table._grouped.cache_clear()
        yield
    cuda_table._shared.cache_clear()
    cuda_table._grouped.cache_clear()


@pytest.mark.parametrize("rows", ROWS)
@FORMAT
def test_rows_of_x(name, rows, folder):
    check(stored(name, 40, 200, 64), inputs(rows, 200, torch.bfloat16), folder)


GROUPS = pytest.mark.parametrize(
    ("outputs", "columns", "group_size"),
    [(16, 33, 8), (3, 1, 8), (17, 520, -1), (1, 300, 96), (50, 640, 128), (70, 576, 256), (33, 104, 32)],
    ids=str,
)


@pytest.mark.parametrize("rows", [1, 5])
@GROUPS
def test_groups_and_tails(outputs, columns, group_size, rows, folder):
    check(stored("ternary", outputs, columns, group_size), inputs(rows, columns, torch.bfloat16), folder)


@pytest.mark.slow
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("rows", [1, 5, 12, 20])
@GROUPS
@FORMAT
def test_groups_and_tails_of_every_format(name, outputs, columns, group_size, rows, activations, folder):
    check(stored(name, outputs, columns, group_size), inputs(rows, columns, torch.bfloat16), folder, activations)


@pytest.mark.parametrize(
    ("name", "rows", "group_size", "activations"),
    [
        ("ternary", 9, 64, None),
        ("binary", 33, 256, None),
        ("int4", 70, 64, "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("ternary", 70, -1, "int8"),
                ("binary", 40, -1, None),
                ("int4", 65, 64, None),
                ("int4", 9, 256, "int8"),
                ("int8", 40, -1, None),
            )
        ),
    ],
)
def test_many_rows_cut_along_k(name, rows, group_size, activations, folder):
    case, x = stored(name, 280, 600, group_size), inputs(rows, 600, torch.bfloat16)  # 5 chunks, 3 of one bit
    check(case, x, folder, activations, parts=3)


@pytest.mark.slow
def test_few_rows_of_x_and_of_the_weight(folder, monkeypatch):
    monkeypatch.setattr(cuda_table, "TALL_TOKENS", 0)  # as on a device that tall blocks would leave idle
    check(stored("ternary", 280, 600, 64), inputs(9, 600, torch.bfloat16), folder, parts=3)


WARP_GROUPS = (  # format, weight rows, columns, group, rows of x, activations, dtype, parts
    ("ternary", 40, 200, 128, 9, None, torch.bfloat16, None),
    ("ternary", 150, 600, 128, 20, "int8", torch.bfloat16, None),
    ("binary", 40, 700, 128, 40, None, torch.bfloat16, 2),
    ("binary", 17, 300, -1, 70, "int8", torch.float32, None),
    ("int3", 17, 33, -1, 12, None, torch.float16, None),
    ("int4", 280, 520, 256, 130, None, torch.bfloat16, None),
    ("int8", 70, 520, 128, 33, "int8", torch.bfloat16, 3),
    ("int8", 70, 520, -1, 17, None, torch.float16, None),
    ("int2", 40, 1300, 256, 12, "int8", torch.float32, 3),
    ("ternary", 17, 300, 96, 12, None, torch.float16, None),  # groups padded apart
    ("ternary_symmetric", 20, 512, 128, 16, None, torch.bfloat16, 2),
)


@pytest.mark.parametrize(
    ("name", "outputs", "columns", "group_size", "rows", "activations", "dtype", "parts"), WARP_GROUPS
)
def test_products_of_warp_groups(name, outputs, columns, group_size, rows, activations, dtype, parts, folder):
    scales = torch.float32 if columns == 300 else torch.float16
    case = stored(name, outputs, columns, group_size, scales)
    check(case, inputs(rows, columns, dtype), folder, activations, parts=parts, warp_groups=True)


@pytest.mark.parametrize(
    ("name", "outputs", "columns", "group_size", "rows", "dtype", "parts"),
    [
        ("ternary", 40, 200, 128, 65, torch.bfloat16, None),
        ("ternary_symmetric", 150, 1100, 256, 70, torch.float16, 2),
        ("binary", 150, 700, -1, 140, torch.bfloat16, None),
        ("int2", 280, 900, 128, 129, torch.float16, 2),
        ("binary", 17, 300, 128, 90, torch.float16, 2),
    ],
)
def test_products_of_weights_looked_up(name, outputs, columns, group_size, rows, dtype, parts, folder):
    scales = torch.float32 if columns == 300 else torch.float16
    case, x = stored(name, outputs, columns, group_size, scales), inputs(rows, columns, dtype)
    layout = cuda_layout.build(*case.stored, name, group_size, columns)
    with emulated(folder, warp_groups=True), cut_in(parts):
        assert cuda_table.product(layout, rows, cuda_calls.TYPES[dtype], False, 132, ()).variant.source == "wdense"
        out = cuda_products.multiply(x, layout, None, None)
    dense = (
        dequantize_packed(*case.stored, case.fmt, group_size, columns).to(dtype).double()
    )  # rounded, as torch's would be
    assert_product(out, x.double() @ dense.T, x.double().abs() @ dense.abs().T)


def test_warp_groups_serve_groups_of_whole_units_of_128_columns():
    layout = cuda_layout.build(*stored("int4", 16, 256, 128).stored, "int4", 128, 256)
    small = cuda_layout.build(*stored("int4", 16, 256, 64).stored, "int4", 64, 256)
    sources = [
        cuda_table.product(at, tokens, 0, False, 132, () if have else cuda_table.WARP_GROUPS).variant.source
        for at, tokens, have in ((layout, 9, True), (layout, 8, True), (layout, 9, False), (small, 9, True))
    ]
    assert sources == ["wgemm", "product16", "gemm", "gemm"]


def test_what_warp_groups_cannot_serve_goes_on_without_them(folder, monkeypatch, caplog):
    case, x = stored("ternary", 40, 256, 128), inputs(12, 256, torch.bfloat16)
    cuda_products._say.cache_clear()
    with emulated(folder, warp_groups=True):
        run = cuda_driver.launch

        def launch(variant, *arguments):
            if variant.source == "wgemm":
                raise cuda_compile.Unserved("NVRTC refuses it")
            run(variant, *arguments)

        monkeypatch.setattr(cuda_driver, "launch", launch)
        layout = cuda_layout.build(*case.stored, "ternary", 128, 256)
        out = cuda_products.multiply(x, layout, None, None)
    assert_product(out, x.double() @ case.dense.T, x.double().abs() @ case.dense.abs().T)
    assert "wgemm is not used: NVRTC refuses it" in caplog.text


@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS)
@pytest.mark.parametrize("columns", [77, 520])
def test_arranged_codes_are_those_of_rows(columns, fmt, folder):
    case, x = stored("ternary", 16, columns, -1), inputs(5, columns, torch.float16)
    x[1], x[2] = x[1].abs(), 0
    layout = cuda_layout.build(*case.stored, "ternary", -1, columns)
    with emulated(folder):
        codes, scale = cuda_products.quantize_rows(x, FORMATS[fmt], layout.padded)
        found, scales = cuda_products.arrange(x, layout, FORMATS[fmt], 16)
    stages = -(-layout.padded // 256)
    made = found.view(stages, 2 * 16 * 128 + 2 * 16 * 4)  # of a block: two units, then the sums of both
    pieces = made[:, : 2 * 16 * 128].contiguous().view(torch.int8)
    pieces = pieces.view(2 * stages, 16, 8, 16)[:, :5]  # unit, row, piece, byte
    order = torch.arange(8)[None] ^ torch.arange(5)[:, None]
    pieces = pieces.gather(2, order[None, :, :, None].expand_as(pieces))
    words = pieces.view(2 * stages, 5, 4, 2, 4, 4)  # unit, row, step, word of a run, run, byte
    straight = words.permute(1, 0, 2, 4, 3, 5).reshape(5, 256 * stages)
    assert torch.equal(straight[:, : layout.padded], codes)
    assert not straight[:, layout.padded :].any()
    assert torch.equal(scales, scale)
    sums = made[:, 2 * 16 * 128 :].contiguous().view(torch.float32).view(2 * stages, 4, 2, 2)  # unit, pair, tile, one
    sums = sums.transpose(1, 2).reshape(2 * stages, 16)  # those of two column tiles lay side by side
    assert torch.equal(sums[:, :5].T, straight.view(5, 2 * stages, 128).float().sum(2))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [2, 6, 40])
@FORMAT
def test_float16(name, rows, scale_dtype, folder):
    check(stored(name, 20, 160, 32, scale_dtype), inputs(rows, 160, torch.float16), folder)


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FORMAT
def test_activations_of_8_bits(name, dtype, rows, folder):
    check(stored(name, 24, 200, 64, torch.float32), inputs(rows, 200, dtype), folder, "int8")


@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
@pytest.mark.parametrize("name", ["ternary", "int8"])
def test_activations_of_few_bits(name, activations, folder):
    x = inputs(3, 136, torch.float32)
    x[0] = x[0].abs()  # all levels on one side
    x[1] = 0
    check(stored(name, 24, 136, -1, torch.float32), x, folder, activations)


@pytest.mark.parametrize("fmt", ACTIVATION_FORMATS)
@pytest.mark.parametrize("dtype", list(cuda_calls.TYPES), ids=str)
def test_codes_of_activations_are_those_of_the_reference(dtype, fmt, folder):
    x = inputs(5, 77, dtype)
    x[1], x[2] = x[1].abs(), 0
    with emulated(folder):
        codes, scale = cuda_products.quantize_rows(x, FORMATS[fmt], 128)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # columns of the bytes of each eight
    straight = torch.empty_like(codes).view(5, 16, 8)
    straight[..., order] = codes.view(5, 16, 8)
    straight = straight.view(5, 128)
    assert not straight[:, 77:].any()
    expected = quantize_activation(x.float(), FORMATS[fmt])
    # code * scale and (code + zero) * scale - zero * scale differ by the rounding of the latter
    torch.testing.assert_close(straight[:, :77] * scale[:, None], expected, rtol=1e-6, atol=4e-6)


def test_a_large_activation_costs_the_others_little(folder):
    case, x = stored("ternary", 32, 512, 128), inputs(1, 512, torch.bfloat16)
    x[0, [7, 300]] = torch.tensor([1000.0, -700.0], dtype=torch.bfloat16)
    check(case, x, folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("rows", "group_size"), [(2, 64), (5, 64), (40, 64), (40, 128)])
def test_what_is_not_finite_stays_so(rows, group_size, bad, folder):
    case, x = stored("int4", 16, 128, group_size), inputs(rows, 128, torch.bfloat16)
    x[1, 5] = bad
    layout = cuda_layout.build(*case.stored, "int4", group_size, 128)
    with emulated(folder, warp_groups=True):
        out = cuda_products.multiply(x, layout, None, None)
    assert not out[1].isfinite().any()
    assert out[0].isfinite().all()


def test_the_same_twice(folder):
    case, x = stored("int2", 40, 1024, 128), inputs(3, 1024, torch.bfloat16)
    layout = cuda_layout.build(*case.stored, "int2", 128, 1024)
    with emulated(folder):
        assert torch.equal(
            cuda_products.multiply(x, layout, None, None), cuda_products.multiply(x, layout, None, None)
        )


MISTAKES = {
    "field": ("product16.cu", "step % FIELDS + half * FIELDS", "step % FIELDS + (1 - half) * FIELDS", 5),
    "row of a pair": ("product.cuh", "* 8 + (lane >> 2);", "* 8 + (lane >> 2 ^ 1);", 5),
    "fields in place": ("split8.cu", "mma_u8s8(sums[field % PLANES]", "mma_u8s8(sums[0]", 1),
    "bytes of x": ("split8.cu", "i & 2 ? high_of", "i & 1 ? high_of", 1),
    "token": ("split8.cu", "x_scale = t == token ?", "x_scale = t != token ?", 2),
    "columns of others": ("split8.cu", "opaque(pair / TOKENS == s ? own : zeros)", "opaque(own)", 1),
    "tile of a set": ("split8.cu", "mt % SHARED * TOKENS + t", "mt % SHARED + t * SHARED", 2),
    "missing barrier": ("split8.cu", "            sync_warp();  //", "            //", 2),
    "warps": ("product.cuh", "for (int warp = 0; warp < WARPS;", "for (int warp = 1; warp < WARPS;", 5),
    "place in a stage": (
        "gemm.cu",
        "STEP_PIECES * (step % STAGE_STEPS));",
        "STEP_PIECES * (step % STAGE_STEPS ^ 1));",
        9,
    ),
    "copies not waited for": ("gemm.cu", "wait_async<STAGES - 2>", "wait_async<STAGES - 1>", 9),
    "stage not shared": ("gemm.cu", "                    sync_block();", "                    ", 9),
    "stage overwritten": ("gemm.cu", "fetch(copy, staged + vacant)", "fetch(copy, staged + slot)", 9),
    "start of a part": ("stage.cuh", "c.column = begin * each + piece", "c.column = piece", 9),
    "first of a run": ("gemm.cu", "x, magic, origin, begins)", "x, magic, origin, false)", 70),
    "codes of a run": ("gemm.cu", "BITS * RUN % 8", "BITS", 70),
    "run of sums": ("gemm.cu", "run * (RUN / FLUSH) + step / FLUSH, m", "step / FLUSH, m", 70),
    "warp of tokens": ("gemm.cu", "token = warp % TOKEN_WARPS * 8 * NT", "token = warp / ROW_WARPS * 8 * NT", 70),
    "parts": ("partials.cu", "p.partial + s * one", "p.partial", 9),
    "launch before": ("product16.cu", "    wait_for_inputs();\n", "", 5),
    "sums of x": ("sums.cu", "FLUSH * run + i", "run + i", 70),
}
GROUP_MISTAKES = {  # the last number: rows of x
    "stage not waited for": ("wgemm.cu", "                wait_turn(full + next, next_turn);\n", "", 12),
    "place not given back": ("wgemm.cu", "        if (threadIdx.x == 0) arrive(empty + slot);\n", "", 12),
    "sums not waited for": ("wgemm.cu", "            wait_wgmma<0>();\n", "", 12),
    "sums of the other item": (
        "wgemm.cu",
        "add_item(y[mt], sums[item % 2]",
        "add_item(y[mt], sums[(item + 1) % 2]",
        12,
    ),
    "sums of the second unit": ("wgemm.cu", " + unit * TOKENS);", ");", 12),
    "codes of the next stage": (
        "warp_group.cuh",
        "(2 * stage + unit) / UNITS + CHUNKS_HELD",
        "(2 * stage + unit) / UNITS",
        12,
    ),
    "rows of the second product": (
        "warp_group.cuh",
        "tile + 4 * mt < p.row_tiles ? tile + 4 * mt",
        "tile + mt < p.row_tiles ? tile + mt",
        12,
    ),
    "piece of a token": ("arrange.cu", "at.first + i ^ at.token", "at.first + i", 12),
    "run of a step": ("arrange.cu", "+ run % 4, step", "+ (run % 4 ^ 1), step", 12),
    "pairs": ("arrange.cu", "x.v[first + (PAIRED ? 4 : 1)]", "x.v[first + 1]", 66),
    "products not waited for": ("wdense.cu", "    wait_wgmma<0>();\n", "", 66),
    "half of a word": ("wdense.cu", "+ i % 2 * 16;", "+ (i + 1) % 2 * 16;", 66),
    "table of the other row": ("wdense.cu", "look_up(tables[j % 2], codes)", "look_up(tables[j / 2], codes)", 66),
    "bytes of a number": ("lookup.cuh", "0x7531)};", "0x6420)};", 66),
}


# One of each file.
ALWAYS = (
    "field",
    "row of a pair",
    "fields in place",
    "copies not waited for",
    "start of a part",
    "parts",
    "launch before",
    "sums of x",
)


@pytest.mark.parametrize("mistake", [*ALWAYS, *slow(*(name for name in MISTAKES if name not in ALWAYS))])
def test_mistakes_are_found(mistake, folder, tmp_path):
    file, right, wrong, rows = MISTAKES[mistake]
    shutil.copytree(cuda_compile.CSRC, tmp_path / "csrc")
    path = tmp_path / "csrc" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises((AssertionError, RuntimeError), match=r"times the bound|out of bounds|not waited for"):
        check(
            stored("ternary", 80, 1024, 64),
            inputs(rows, 1024, torch.bfloat16),
            folder,
            sources=tmp_path / "csrc",
            parts=3,
        )


GROUPS_ALWAYS = ("sums not waited for", "codes of the next stage", "piece of a token", "bytes of a number")


@pytest.mark.parametrize(
    "mistake", [*GROUPS_ALWAYS, *slow(*(name for name in GROUP_MISTAKES if name not in GROUPS_ALWAYS))]
)
def test_mistakes_with_warp_groups_are_found(mistake, folder, tmp_path):
    file, right, wrong, rows = GROUP_MISTAKES[mistake]
    shutil.copytree(cuda_compile.CSRC, tmp_path / "csrc")
    path = tmp_path / "csrc" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    case, x = stored("ternary", 150, 1536, 128), inputs(rows, 1536, torch.bfloat16)
    with pytest.raises((AssertionError, RuntimeError), match=r"times the bound|more arrivals|more products|forever"):
        check(case, x, folder, sources=tmp_path / "csrc", parts=1, warp_groups=True)


def test_reading_past_the_end_is_found(folder):
    case, x = stored("ternary", 40, 256, 128), inputs(1, 256, torch.bfloat16)
    layout = cuda_layout.build(*case.stored, "ternary", 128, 256)
    short = replace(layout, tiles=layout.tiles[:-1].clone(), rows=40)
    with emulated(folder), pytest.raises(RuntimeError, match=r"split8 .*read out of bounds"):
        _ = cuda_products.multiply(
            x, replace(short, scales=layout.scales[:-1].clone(), chunks=layout.chunks + 1), None, None
        )
