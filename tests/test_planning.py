"""What a plan says before, against what quantizing then writes and takes."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from hf_catquant import CatQuantConfig, memory
from hf_catquant.cli import main
from hf_catquant.folder import open_source
from hf_catquant.mixed import Losses
from hf_catquant.model import select
from hf_catquant.pipeline import quantize_modules
from hf_catquant.planning import plan_model
from hf_catquant.planning_time import size, whole_seconds
from hf_catquant.report import stored_bytes
from hf_catquant.sizes import output_bytes, packed_bytes
from hf_catquant.solvers import SLICE, row_slices
from hf_catquant.training import STEP, forwards, train


@pytest.mark.parametrize("name", ["llama_tied", "resnet", "wav2vec2", "gpt2"])
@pytest.mark.parametrize("weights", ["ternary", "int8", "binary"])
def test_the_size_of_the_output_is_known_before(name, weights):
    config = CatQuantConfig(weights, group_size=16, solver="rtn", correction=None, low_rank=2)
    model = tiny_models.build(name)
    selection = select(model, config)
    wanted, packed = output_bytes(model, selection), sum(map(packed_bytes, selection.sites))
    _, outcome, _ = quantize_modules(model, config)
    wide = sum(entry["scale_dtype"] == "float32" for entry in outcome.modules.values())
    assert stored_bytes(model) == wanted or wide  # scales that float16 cannot hold take more
    assert 0 < packed < wanted


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_plan_of_a_model(tmp_path, solver):
    folder = tiny_models.folder_of("llama", str(tmp_path))
    data = {"dataset": tiny_models.samples("llama", 8), "batch_size": 4} if solver == "gptq" else {}
    config = CatQuantConfig(group_size=16, solver=solver, correction=None, **data)
    model = open_source(folder, torch.float32, True, False)
    wanted = output_bytes(model, select(model, config))
    plan = plan_model(model, config)
    assert plan.disk == 2 * wanted
    assert plan.units == 4
    assert plan.peak_ram >= plan.base + plan.packed > plan.packed > 0
    assert plan.peak_vram == 0
    assert plan.seconds > 0
    assert (plan.streams > 0) == (solver == "gptq")
    assert json.loads(json.dumps(plan.to_dict()))["largest"] == plan.largest
    assert plan.largest in ("model.layers.0", "model.layers.1", "model.embed_tokens", "lm_head")
    assert re.search(r"peak RAM +\d+\.\d+ .iB  while ", str(plan))


def test_a_plan_counts_the_search_for_formats(tmp_path, monkeypatch):
    folder = tiny_models.folder_of("llama", str(tmp_path))
    tried = []

    def slow(self, site, names):
        tried.append((site.name, names))
        time.sleep(0.2)
        return dict.fromkeys(names, 1.0)

    monkeypatch.setattr(Losses, "of", slow)
    data = {"dataset": tiny_models.samples("llama", 4), "batch_size": 4}
    config = CatQuantConfig("int4", group_size=16, solver="rtn", correction=None, average_bits=7.0, **data)
    plan = plan_model(open_source(folder, torch.float32, True, False), config)
    assert [names for _, names in tried] == [["int4", "int8"]]
    assert 14 * 0.2 <= plan.phases["formats"] < 28 * 0.2
    assert plan.seconds == pytest.approx(sum(plan.phases.values()))
    assert re.search(r"\n  formats +\d+ s  every layer in every format.*\n  units ", str(plan))


@pytest.mark.parametrize("block_steps", [0, 2])
def test_a_plan_counts_the_steps_of_the_whole_model(tmp_path, block_steps):
    folder = tiny_models.folder_of("llama", str(tmp_path))
    data = {"dataset": tiny_models.samples("llama", 2), "batch_size": 2, "rotation": None, "correction": None}
    options = {"block_steps": block_steps, "model_steps": 40_000}
    config = CatQuantConfig("int4", group_size=16, solver="reconstruct", solver_options=options, **data)
    phases = plan_model(open_source(folder, torch.float32, True, False), config).phases
    assert phases["whole model"] > phases["units"]  # 120,000 forwards


def test_a_step_of_the_whole_takes_as_long_for_a_weight_as_one_of_a_block():
    model = tiny_models.build("llama")
    sites = select(model, CatQuantConfig(group_size=16, dataset=[1])).sites
    options = SimpleNamespace(model_steps=100)
    learner = SimpleNamespace(options=options, pace={"model.layers.0": 0.5}, batches=range(3), held_out=range(3, 4))
    calibration = SimpleNamespace(reconstruction=learner)
    block = sum(size(site) for site in sites if site.name.startswith("model.layers.0."))
    head = next(size(site) for site in sites if site.name == "lm_head")
    found = whole_seconds(calibration, "model.layers.0", sites, 0.0)
    assert found == pytest.approx(0.5 * (2 + head / block) * (300 + 6 + 9))
    options.model_steps = 0
    assert whole_seconds(calibration, "model.layers.0", sites, 0.0) == 0


@pytest.mark.parametrize(("batches", "held_out"), [([0, 1, 2], [3]), ([0, 1], [])])
def test_training_takes_the_forwards_that_are_counted(batches, held_out):
    parameter, taken = torch.nn.Parameter(torch.tensor(1.0)), []

    def loss_of(batch, learning):
        taken.append(STEP if learning else 1)
        return parameter.square()

    train([{"params": [parameter], "lr": 1e-3}], loss_of, batches, held_out, 24, 0)
    assert sum(taken) == forwards(24, len(batches), len(held_out))


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    folder = tiny_models.folder_of("llama", str(tmp_path / "float"))
    monkeypatch.chdir(tmp_path)
    request = ["--solver", "rtn", "--correction", "none", "--group-size", "16"]
    assert main(["plan", folder, *request]) == 0
    assert "of the peak:" in capsys.readouterr().out
    assert main(["plan", folder, *request, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    assert main(["plan", folder]) == 1
    assert "calibration data" in capsys.readouterr().err


def test_the_peak_is_that_of_what_was_held():
    if not memory.reset_peak():
        pytest.skip("this system cannot set the mark back")
    before = memory.peak()
    block = mmap.mmap(-1, 64 << 20)  # what malloc frees it may keep
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert memory.peak() - before > 60 << 20
    block.close()
    assert memory.resident() < before + (20 << 20)
    memory.reset_peak()
    assert memory.peak() < before + (20 << 20)


def test_large_blocks_go_back_when_they_are_freed():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("memory", {memory.__file__!r})
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
if not memory.map_large_blocks() or not memory.reset_peak():
    raise SystemExit("none")
b"x" * (30 << 20)  # a block that is freed: from here on the C library would keep smaller ones
before, blocks, kept = memory.resident(), [], []
for _ in range(8):
    blocks.append(b"x" * (16 << 20))
    kept += [b"x" * 4000 for _ in range(100)]
del blocks
print(memory.resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "none" in done.stderr:
        pytest.skip("another C library, or system")
    assert int(done.stdout) < 16 << 20


def test_what_was_freed_below_a_block_in_use_goes_back_when_trimmed():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("memory", {memory.__file__!r})
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
if getattr(memory._c_library(), "malloc_trim", None) is None or not memory.map_large_blocks():
    raise SystemExit("none")
before, blocks = memory.resident(), [b"x" * (1 << 20) for _ in range(64)]
last = b"x" * (1 << 19)
del blocks
freed = memory.resident()
memory.trim()
print(freed - before, memory.resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "none" in done.stderr:
        pytest.skip("another C library, or system")
    freed, trimmed = map(int, done.stdout.split())
    assert freed > 32 << 20
    assert trimmed < 16 << 20


def test_small_blocks_leave_no_trace_in_the_heap_where_they_are_mapped():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("memory", {memory.__file__!r})
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
def taken():
    before, blocks, kept = memory.resident(), [], []
    for _ in range(32):
        blocks.append(b"x" * (1 << 20))
        kept.append(b"x" * 100_000)
    del blocks
    return memory.resident() - before, kept
if not memory.map_large_blocks():
    raise SystemExit("none")
with memory.small_blocks_mapped():
    mapped, first = taken()
heap, second = taken()
print(mapped, heap)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "none" in done.stderr:
        pytest.skip("another C library, or system")
    mapped, heap = map(int, done.stdout.split())
    assert mapped < 8 << 20
    assert heap > 16 << 20


@pytest.mark.parametrize(
    ("shape", "runs"), [((7, SLICE // 3), 1), ((12, SLICE // 2), 2), ((5, 3), 1), ((4, 2 * SLICE), 4)]
)
def test_slices_of_rows_are_small_and_cross_no_border(shape, runs):
    matrix = torch.zeros(1).expand(shape)
    slices = list(row_slices(matrix, runs))
    assert [row for s in slices for row in range(s.start, s.stop)] == list(range(shape[0]))
    each = shape[0] // runs
    for s in slices:
        assert (s.stop - s.start) * shape[1] <= max(SLICE, shape[1])
        assert s.start // each == (s.stop - 1) // each


def test_rounding_leaves_no_holes_in_the_heap():
    """Grids of all pieces that are kept among a piece's temporaries once took half a megabyte a piece."""
    code = f"""
import sys, types
sys.modules["hf_catquant"] = package = types.ModuleType("hf_catquant")  # all of it would import transformers
package.__path__ = [{str(Path(memory.__file__).parent)!r}]
import torch
from hf_catquant import memory
from hf_catquant.formats import get_format
from hf_catquant.solvers import _grid
_grid._SHRINK = ()
weight, fmt = torch.randn(8192, 1024, generator=torch.Generator().manual_seed(0)), get_format("int8")
_grid.fit_grid(weight[:128], fmt, 128)
if not memory.map_large_blocks() or not memory.reset_peak():
    raise SystemExit("none")
before = memory.resident()
_grid.fit_grid(weight, fmt, 128)
print(memory.peak() - before)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if "none" in done.stderr:
        pytest.skip("another C library, or system")
    assert int(done.stdout) < 16 << 20, done.stderr
