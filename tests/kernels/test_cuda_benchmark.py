"""benchmarks/gpu.py where there is no GPU: it says so, and its checks can fail."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cuda_emulator import compiler, emulated
from hf_catquant.kernels import cuda_calls, cuda_compile
from hf_catquant.kernels.cuda_compile import Unserved, Variant

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_right_answers_pass_and_wrong_ones_do_not(script, folder, monkeypatch):
    with emulated(folder):
        assert max(script.check_products(torch.device("cpu"), quick=True).values()) <= 1
        right = cuda_calls.multiply
        monkeypatch.setattr(cuda_calls, "multiply", lambda *a: right(*a) * 1.02)
        assert max(script.check_products(torch.device("cpu"), quick=True).values()) > 1


def test_random_weights_are_what_a_layer_stores(script):
    for name in script.FORMATS:
        stored = script.random_weight(name, 8, 40, 16, torch.device("cpu"))
        dense = script.dequantize_packed(*stored, script.get_format(name), 16, 40)
        assert dense.shape == (8, 40)
        assert dense.isfinite().all()


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
    assert module.count("product8", 2, 128, 90, split=1).instructions < 1.75
    assert module.count("product16", 2, 128, 90).instructions < 2.3
    with pytest.raises(RuntimeError, match="no loop with tensor-core instructions"):
        module.loop(cuda_compile.compile_variant(Variant("rows", (("TYPE", 0), ("AFFINE", 0))), 90).image)


def nvrtc_is_here() -> bool:
    try:
        cuda_compile.library()
    except Unserved:
        return False
    return True
