"""The benchmark: it refuses wrong products, counts what it times, and writes what was asked for."""

from __future__ import annotations

import json

import pytest
import torch

from hf_catquant import bench, bench_peers
from hf_catquant.cli import main
from hf_catquant.kernels import cpu_linear, machine

CASE = bench.Case(count=2, rows=40, columns=64, threads=1)


def ours(x, generator, **changes):
    options = {"name": "ternary", "group_size": 32, "activations": None, "working_set": 1 << 14, **changes}
    return bench.our_contender(CASE, x, generator=generator, **options)


def test_a_wrong_product_is_not_timed(generator, monkeypatch):
    x = torch.randn(2, 64, generator=generator)
    assert ours(x, generator).nbytes > 0
    right = cpu_linear._library_linear
    monkeypatch.setattr(cpu_linear, "_library_linear", lambda *arguments: right(*arguments) * 1.001)
    monkeypatch.setattr(cpu_linear, "_float_linear", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(RuntimeError, match="wrong product"):
        ours(x, generator)


def test_contenders_take_turns_over_all_their_weights():
    order = []
    contenders = [
        bench.Contender(name, 1, [lambda i=i, name=name: order.append((name, i)) for i in range(3)]) for name in "ab"
    ]
    bench.measure(contenders, seconds=0, least=3)
    turns = [[("a", i), ("a", (i + 1) % 3), ("b", i), ("b", (i + 1) % 3)] for i in (0, 2, 1)]
    assert order[4:] == [call for turn in turns for call in turn]
    assert [len(contender.times) for contender in contenders] == [3, 3]


def test_ratios_are_to_torch_float32():
    contenders = [
        bench.Contender("torch float32", 4, [], [4.0, 2.0, 3.0]),
        bench.Contender("x", 1, [], [1.0, 1.5, 9.0]),
    ]
    found = bench.rows_of(CASE, contenders, bench.Limits(1 << 16))
    assert [row.ratio for row in found] == [1.0, 2.0]
    assert [row.median for row in found] == [3.0, 1.5]


def test_the_command_writes_json_and_a_plot(tmp_path, capsys):
    words = (
        "bench --shapes 40x64 --rows 1 3 --formats binary int4 --group-size 32 --threads 1 --seconds 0 --working-set 1"
    )
    assert main([*words.split(), "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]) == 0
    printed = capsys.readouterr().out
    assert "binary/32 int8" in printed
    found = json.loads((tmp_path / "b.json").read_text())
    names = {row["contender"] for row in found["results"]}
    assert names == {
        "torch float32",
        "torch bfloat16",
        *(f"{n}/32 {a}" for n in ("binary", "int4") for a in ("float32", "int8")),
    }
    assert {"processor", "torch", "path"} <= set(found["machine"])
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_list_names_every_op(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in ("linear", "conv", "embedding", "dequantize", "unpack", "cluster_affine"))


@pytest.mark.parametrize("text", ["12", "0x4", "ax4", "4x4x4"])
def test_a_shape_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--shapes", text])
    assert "must be NxK" in capsys.readouterr().err


def test_limits_of_the_machine_are_numbers_or_nothing():
    memory = machine.spare_memory(1 << 20)
    bandwidth = machine.read_bandwidth(memory, 1)
    assert bandwidth is None or bandwidth > 1e6
    for path in ("scalar", "avx512", "amx"):
        peak = machine.integer_peak(path, 1)
        assert peak is None or peak > 1e9


def test_formats_of_llama_cpp_are_those_that_it_names():
    assert {name for name, _ in bench_peers.ggml_formats()} <= set(bench_peers.GGML_FORMATS)
