"""Blocks of GGML against the package that reads them: the codes arrive, in every format and group."""

from __future__ import annotations

import pytest
import torch

from hf_catquant.exports.blocks import TOLERANCE, encode
from hf_catquant.formats import FORMATS, get_format, group_count
from hf_catquant.layers import LAYERS, QuantizedModule, Scheme
from hf_catquant.weight import QuantizedWeight

gguf = pytest.importorskip("gguf")
ROWS, COLUMNS = 6, 512


def layer(weights: str, group_size: int, offset: float, columns: int = COLUMNS, scale: float = 1.0) -> QuantizedModule:
    generator = torch.Generator().manual_seed(0)
    fmt, groups = get_format(weights), group_count(columns, group_size)
    made = LAYERS[torch.nn.Linear](torch.nn.Linear(columns, ROWS, bias=False), Scheme(weights, group_size))
    codes = torch.randint(0, fmt.radix, (ROWS, columns), generator=generator).to(torch.uint8)
    # As they are stored: float16.
    scales = ((torch.rand(ROWS, groups, generator=generator) + 0.1) * scale).half().float()
    offsets = (torch.randn(ROWS, groups, generator=generator) * offset).half().float() if fmt.affine else None
    made.fill(QuantizedWeight(codes, scales, offsets))
    return made


def kind_for(weights: str, group_size: int, offset: float, ternary: str) -> str | None:
    """The smallest type that can hold a layer."""
    fmt = get_format(weights)
    if offset and fmt.affine:
        return "Q4_1" if group_size % 32 == 0 or group_size == -1 else None
    if fmt.levels[0] >= -1 and fmt.levels[-1] <= 1 and group_size in (-1, 256):
        return ternary
    if group_size % 32 and group_size != -1:
        return None
    return "Q8_0" if weights == "int8" else "Q4_0"


@pytest.mark.parametrize("group_size", [256, -1, 96, 32, 16])
@pytest.mark.parametrize("weights", FORMATS)
def test_what_is_written_is_read_back(weights, group_size):
    for offset, ternary in ((0.0, "TQ1_0"), (0.0, "TQ2_0"), (0.3, "TQ2_0")):
        module = layer(weights, group_size, offset)
        order = torch.arange(ROWS).flip(0)
        found = encode(module, order, ternary)
        wanted = kind_for(weights, group_size, offset, ternary)
        assert (None if found is None else found.block.name) == wanted
        if found is None:
            continue
        read = torch.tensor(gguf.dequantize(found.data, gguf.GGMLQuantizationType[wanted]))
        matrix = module.matrix(torch.float32)[order]
        levels = get_format(weights).levels
        step = float(module.weight_scale.max()) * (levels[1] - levels[0])
        assert float((read - matrix).abs().max()) <= (found.moved + 1e-6) * step
        assert found.moved < TOLERANCE
        assert (found.moved == 0) == (wanted != "Q4_1")
        assert torch.equal(read, matrix) or wanted == "Q4_1"


def test_what_float16_does_not_hold_is_left_alone():
    assert encode(layer("int4", 32, 300.0, scale=0.01), torch.arange(ROWS)) is None  # offsets of 30,000 steps
    module = layer("int8", 32, 0.0)
    assert encode(module, torch.arange(ROWS)) is not None
    module.weight_scale = module.weight_scale.float() * 1e6
    assert encode(module, torch.arange(ROWS)) is None
    assert encode(layer("int8", 32, 0.0, columns=40), torch.arange(ROWS)) is None
