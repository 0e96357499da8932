"""benchmarks/gpu.py where there is no GPU: it says so, and its checks can fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cuda_emulator import compiler, emulated
from hf_catquant.kernels import cuda_compile, cuda_products
from hf_catquant.kernels.cuda_compile import Unserved, Variant

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


sys.path.insert(0, str(SCRIPT.parent))

import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_report  # noqa: E402
import gpu_stages  # noqa: E402
import gpu_tools  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_needs_torch_alone():
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['transformers', 'datasets', 'sklearn', 'accelerate']))\n"
        f"sys.argv = ['gpu.py']\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "benchmarks/gpu.py needs a GPU: torch finds no CUDA device\n"


@pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler: g++ or clang++")
def test_right_answers_pass_and_wrong_ones_do_not(folder, monkeypatch, tmp_path):
    results, device = gpu.Results(tmp_path / "gpu.json"), torch.device("cpu")
    with emulated(folder):
        assert gpu.check("check few", device, results, quick=True)
        assert set(results.held["right kernels"]) == {"split8", "product8", "product16", "rows"}
        right = cuda_products.multiply
        monkeypatch.setattr(cuda_products, "multiply", lambda *a: right(*a) * 1.02)
        assert not gpu.check("check few", device, results, quick=True)
    assert results.held["check few"]["wrong"]
    assert set(results.held["wrong kernels"]) == {"split8", "product8", "product16", "rows"}
    assert gpu.Results(tmp_path / "gpu.json").held == json.loads(json.dumps(results.held))  # on disk


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler: g++ or clang++")
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_every_check_passes_on_the_host(name, folder, tmp_path):
    with emulated(folder):
        assert gpu.check(name, torch.device("cpu"), gpu.Results(tmp_path / "gpu.json"), quick=True)


def test_every_stage_runs_where_nothing_does(monkeypatch):
    monkeypatch.setattr(gpu_stages, "SHAPES", ((256, 256), (512, 512), (1024, 512)))
    monkeypatch.setattr(gpu_tools, "ROTATED_BYTES", 1 << 16)
    found = gpu.record([name for name in gpu.LIMITS if name not in gpu_checks.CHECKS], 132, None)
    assert found.sources >= {
        "product8",
        "split8",
        "product16",
        "wgemm",
        "arrange",
        "partials",
        "untile",
        "rows",
        "rotate",
        "cluster",
        "weight",
    }


def test_what_was_not_found_right_is_not_timed():
    with gpu_tools.no_device(132):
        stored = gpu_tools.random_weight("ternary", 64, 256, 128, torch.device("meta"))
        call = partial(gpu_tools.cuda.dequantize, *stored, "ternary", 128, 256, torch.bfloat16)
        row = gpu_stages.measured([call], torch.device("meta"), {"gemm"})
    assert row == {"skipped": "not found right: weight"}


FAKE = """
import json, os, sys, time
sys.argv = sys.argv[1:]
sys.path.insert(0, {folder!r})
import gpu
from functools import partial
from pathlib import Path
names, out = sys.argv[sys.argv.index("--only") + 1:], Path(sys.argv[sys.argv.index("--out") + 1])
results = gpu.Results(out)
for name in names:
    results.put("in progress", [name, time.time()])
    if name == "products": time.sleep(60)
    if name == "decode": os._exit(gpu.BROKEN)
    results.add("done", name)
"""


def test_a_stage_that_hangs_or_breaks_the_gpu_loses_itself_alone(monkeypatch, tmp_path):
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE.format(folder=str(SCRIPT.parent)))
    monkeypatch.setattr(gpu, "__file__", str(fake))
    monkeypatch.setitem(gpu.LIMITS, "products", 0.5)
    gpu.supervise(["bandwidth", "products", "thresholds", "decode", "peers"], tmp_path / "out.json", 1e12)
    held = gpu.Results(tmp_path / "out.json").held
    assert held["done"] == ["bandwidth", "thresholds", "peers"]
    assert [row["stage"] for row in held["failed"]] == ["products"]  # the other one has said so itself


def test_targets_are_compared_with_what_was_measured():
    row = {"weights": "ternary", "group_size": 128, "activations": None, "shape": [4096, 4096], "tokens": 1}
    held = {
        "products": [{**row, "us": 4.0, "speedup": 2.6, "tb_s": 1.0}, {**row, "tokens": 4, "skipped": "why"}],
        "bandwidth": [{"copy_tb_s": 4.0}],
        "peers": [{"peer": "gemlite_two", "shape": [4096, 4096], "tokens": 1, "us": 6.0}],
    }
    met = {row["target"]: row["met"] for row in gpu_report.targets(held)}
    assert met["ternary 4096 x 4096, 1 tokens, 16-bit activations: times bfloat16"]
    assert not met["gemlite_two [4096, 4096], 1 tokens: times as fast"]
    assert sum(met.values()) == 1


def test_a_weight_costs_few_instructions():
    spec = importlib.util.spec_from_file_location("gpu_instructions", SCRIPT.with_name("gpu_instructions.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if module.disassembler() is None or not nvrtc_is_here():
        pytest.skip("needs NVRTC and nvdisasm: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm")
    # What an H200 can issue for a 2-bit code while memory is read at full speed is 1.95; a tenth is left for the rest.
    assert module.count("split8", 2, 128, 90, tokens=1).instructions < 0.95
    assert module.count("product16", 2, 128, 90).instructions < 2.3
    # A tensor-core instruction leaves room for six. In integers with groups there are more: docs/gpu.md says why.
    assert module.gemm_instructions(2, 128, 90, 16, integer=False)[1] < 10  # 6.9 at full bandwidth
    assert module.gemm_instructions(2, 128, 90, 64, integer=False)[1] < 4.5
    assert module.gemm_instructions(2, 128, 90, 256, integer=True)[1] < 7.4
    assert module.gemm_instructions(2, -1, 90, 256, integer=True)[1] < 4.2
    with pytest.raises(RuntimeError, match="no loop with tensor-core instructions"):
        module.loop(cuda_compile.compile_variant(Variant("partials", (("TYPE", 0),)), 90).image)


def nvrtc_is_here() -> bool:
    try:
        cuda_compile.library()
    except Unserved:
        return False
    return True
