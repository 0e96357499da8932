"""NVRTC without a GPU: every kernel for every architecture within its registers, the cache, and what happens without."""

from __future__ import annotations

import ctypes
import multiprocessing
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from hf_catquant.kernels import cuda_calls, cuda_compile, cuda_driver, cuda_layout, cuda_table
from hf_catquant.kernels.cuda_compile import Unserved, Variant

ARCHITECTURES = (80, 89, 90, 100, 120)


def found() -> bool:
    try:
        cuda_compile.library()
    except Unserved:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not found(), reason="NVRTC is not here: pip install nvidia-cuda-nvrtc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def products() -> dict[str, Variant]:
    """The variants that large matrices on a device of 132 multiprocessors use, and the ones with most registers."""
    made = {}
    cases = [*product((1, 2, 4, 8), (4, 0), (1, 2, 4, 8, 16, 32, 64, 256), (False, True), (torch.float16,))]
    cases += product((1, 2, 4, 8), (1, 2), (1, 2, 16, 64, 256), (False, True), (torch.float16,))
    cases += product((1, 2, 4, 8), (4, 2, 1), (1, 2), (False,), (torch.float32,))
    for bits, group_steps, tokens, integer, scales in cases:
        for rows in (2048, 8192, 28672):
            layout = shape_of(rows, bits, group_steps, scales)
            variant = cuda_table.product(layout, tokens, 0, integer, processors=132).variant
            made[" ".join((variant.source, *variant.options))] = variant
    return made


def shape_of(rows: int, bits: int, group_steps: int, dtype: torch.dtype = torch.float16) -> cuda_layout.Layout:
    """A layout of a weight (``rows``, 8192) with scales of ``dtype``, without its memory."""
    chunks = 8192 // cuda_layout.chunk_width(bits)
    groups = 8192 // (32 * group_steps) if group_steps else 1
    tiles = torch.empty(rows // 16, 8192 * bits // 256, 512, dtype=torch.uint8, device="meta")
    scales = torch.empty(rows // 16, groups, 8, 2, 2, dtype=dtype, device="meta")
    return cuda_layout.Layout(tiles, scales, rows, 8192, bits, group_steps, chunks, None, 1.0, 0.0)


def grouped() -> dict[str, Variant]:
    """Products of warp groups, which one architecture has."""
    made = {}
    for bits, group_steps, tokens, integer in product((1, 2, 4, 8), (4, 0, 8), (16, 32, 64, 256), (False, True)):
        layout = shape_of(8192, bits, group_steps)
        variant = cuda_table.product(layout, tokens, 0, integer, 132, ()).variant
        assert variant.source == ("wdense" if tokens == 256 and bits <= 2 and not integer else "wgemm")
        made[" ".join((variant.source, *variant.options))] = variant
    return made


def others() -> dict[str, Variant]:
    made = {
        "rows": Variant("rows", (("TYPE", 0), ("AFFINE", 1), ("THREADS", 256), ("HOLDS", 4))),
        "rows, read twice": Variant("rows", (("TYPE", 2), ("AFFINE", 0), ("THREADS", 1024), ("HOLDS", 0))),
        "cluster": Variant("cluster", (("TYPE", 0), ("THREADS", 512), ("PROJECT", 0))),
    }
    for run in (1, 2, 4):
        constants = (("TYPE", 0), ("THREADS", cuda_table.PROJECT_THREADS), ("PROJECT", run))
        made[f"cluster {run}"] = Variant("cluster", constants)
    for log, threads in ((8, 128), (12, 512), (13, 1024)):
        names, values = ("LOG", "TYPE", "INVERSE", "THREADS"), (log, 0, 0, threads)
        made[f"rotate {log}"] = Variant("rotate", tuple(zip(names, values, strict=True)))
    made["partials"] = Variant("partials", (("TYPE", 0),))
    for bits in (1, 2, 8):
        shared = tuple(zip(cuda_table.NAMES, (bits, 4, 0, 0, 1, 1, cuda_table.UNTILE_WARPS), strict=True))
        made[f"untile {bits}"] = Variant("untile", shared)
        made[f"sums {bits}"] = Variant("sums", (*shared, ("INTEGER", bits % 2)))
    for radix, digits, nbytes in ((2, 8, 1), (3, 5, 1), (8, 8, 3), (256, 1, 1)):
        names = ("RADIX", "DIGITS", "NBYTES", "SCALE32", "TYPE", "INDEX")
        made[f"weight {radix}"] = Variant("weight", tuple(zip(names, (radix, digits, nbytes, 0, 1, 64), strict=True)))
    return made


def check_budget(variants: dict[str, Variant], arch: int) -> None:
    if arch not in cuda_compile.supported():
        pytest.skip(f"NVRTC {cuda_compile.version()} does not know sm_{arch}")
    for name, variant in variants.items():
        registers, spilled = cuda_compile.budget(cuda_compile.compile_variant(variant, arch).log)
        constants = dict(variant.constants)
        threads = constants.get("THREADS", 32 * constants.get("WARPS", 8)) * constants.get("BLOCKS", 1)
        assert registers * threads <= 65536, (
            f"{name}: {registers} registers for {threads} threads do not fit sm_{arch}"
        )
        # Four column tiles would spill nothing there, for a third more instructions everywhere.
        allowed = 64 if variant.source == "gemm" and constants["GROUP_STEPS"] == 1 and arch >= 100 else 0
        assert spilled <= allowed, f"{name} spills {spilled} bytes on sm_{arch}"


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    check_budget({**dict(list(products().items())[:: len(ARCHITECTURES) * 4 + 1]), **others()}, arch)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_product_compiles_without_spills(arch):
    check_budget(products(), arch)


def check_groups(variants: dict[str, Variant]) -> None:
    check_budget(variants, 90)
    for name, variant in variants.items():
        log = cuda_compile.compile_variant(variant, 90).log
        assert "serialized" not in log, f"{name}: tensor-core products wait for each other: {log}"


@needs_nvrtc
def test_products_of_warp_groups_compile_without_spills_and_overlap():
    check_groups(dict(list(grouped().items())[::16]))


@needs_nvrtc
@pytest.mark.slow
def test_every_product_of_warp_groups_compiles_without_spills_and_overlaps():
    check_groups(grouped())


@pytest.mark.parametrize(
    ("arch", "nvrtc", "expected"),
    [(90, (12, 0), True), (90, (11, 8), False), (80, (13, 0), False), (100, (13, 0), False)],
)
def test_warp_groups_are_used_where_they_are_and_compile(arch, nvrtc, expected, monkeypatch):
    monkeypatch.setattr(cuda_driver, "_arch", lambda index: arch)
    monkeypatch.setattr(cuda_driver, "version", lambda: nvrtc)
    assert cuda_driver.has_warp_groups.__wrapped__(torch.device("cuda", 0)) is expected


@needs_nvrtc
def test_structs_are_as_long_as_the_kernels_take_them():
    sizes = {"Product": "product16", "Quantization": "rows", "Rows": "weight", "Correction": "cluster"}
    sizes |= {"Arrangement": "arrange", "XSums": "sums", "Partials": "partials", "Rotation": "rotate"}
    assert {cuda_calls.FORMS[name].format for name in ("product8", "split8", "gemm", "untile")} == {
        cuda_calls.FORMS["product16"].format
    }
    texts = {path.name: path.read_text(encoding="utf-8") for path in cuda_compile.CSRC.glob("*.cu*")}
    fields = {"const": "P", "u32*": "P", "uint4*": "P", "float*": "P", "void*": "P", "int": "i", "float": "f"}
    for name, source in sizes.items():
        text = next(text for text in texts.values() if f"struct {name} {{" in text)
        body = text.split(f"struct {name} {{")[1].split("};")[0]
        form = ""
        for line in filter(None, (line.split("//")[0].strip() for line in body.splitlines())):
            form += fields[line.split()[0]] * len(line.split(","))
        assert form == "".join(c * n for n, c in form_of(cuda_calls.FORMS[source].format))


def form_of(text: str) -> list[tuple[int, str]]:
    count, found = "", []
    for letter in text.removesuffix("0P"):
        if letter.isdigit():
            count += letter
        else:
            found.append((int(count or 1), letter))
            count = ""
    return found


@needs_nvrtc
def test_code_is_compiled_once_and_damage_is_repaired(cache, monkeypatch):
    variant = others()["rows"]
    image = cuda_compile.machine_code(variant, 90)
    assert image[:4] == b"\x7fELF"
    (file,) = cache.iterdir()
    assert file.name.startswith("rows-sm_90-")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert cuda_compile.machine_code(variant, 90) == image
    monkeypatch.setattr(cuda_compile, "compile_variant", None)  # what is cached is not compiled
    assert cuda_compile.machine_code(variant, 90) == image
    with pytest.raises(TypeError):
        cuda_compile.machine_code(variant, 80)


@needs_nvrtc
def test_a_cache_that_cannot_be_written_to_costs_only_time(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("CATQUANT_CACHE", str(blocked))
    assert cuda_compile.machine_code(others()["rows"], 90)


@needs_nvrtc
def test_a_user_without_a_home_compiles_every_time(monkeypatch):
    monkeypatch.delenv("CATQUANT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cuda_compile.cache_folder() is None
    assert cuda_compile.machine_code(others()["rows"], 90)


def compile_rows(_: int) -> bytes:
    return cuda_compile.machine_code(others()["rows"], 90)


@needs_nvrtc
def test_processes_share_the_cache(cache):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert len(set(pool.map(compile_rows, range(6)))) == 1
    assert [file.suffix for file in cache.iterdir()] == [".bin"]


@needs_nvrtc
def test_devices_newer_than_nvrtc_get_code_that_the_driver_finishes(monkeypatch):
    monkeypatch.setattr(cuda_compile, "supported", lambda: (75, 80, 90))
    code = cuda_compile.compile_variant(others()["rows"], 100)
    assert b".target sm_90" in code.image


@needs_nvrtc
def test_devices_older_than_nvrtc_are_left_to_the_reference():
    with pytest.raises(Unserved, match=r"does not compile for compute capability 3\.0"):
        cuda_compile.machine_code(others()["rows"], 30)


@needs_nvrtc
def test_source_that_does_not_compile_is_shown(monkeypatch, tmp_path):
    (tmp_path / "rows.cu").write_text("int x = nothing;")
    monkeypatch.setattr(cuda_compile, "CSRC", tmp_path)
    with pytest.raises(Unserved, match=r'NVRTC .* refuses rows.cu for sm_90(.|\n)*identifier "nothing" is undefined'):
        cuda_compile.compile_variant(others()["rows"], 90)


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda_compile, "_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    with pytest.raises(Unserved, match=r"NVRTC 11.2 or newer .* found /nowhere/libnvrtc.so: install torch with CUDA"):
        cuda_compile.library.__wrapped__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_kernels_are_not_served():
    with pytest.raises(Unserved, match="libcuda"):
        cuda_driver._driver()


class FakeDriver:
    """Records what is called, and answers as the driver does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stack = [0]
        self.version = 13000
        self.allowed: list[tuple[int, int, int]] = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return getattr(type(self), f"do_{name}", lambda *a: 0)(self, *arguments)

        return call

    def do_cuCtxGetCurrent(self, out):
        out._obj.value = self.stack[-1]
        return 0

    def do_cuCtxPushCurrent_v2(self, context):
        self.stack.append(context)
        return 0

    def do_cuCtxPopCurrent_v2(self, out):
        self.stack.pop()
        return 0

    def do_cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value = 100 + device.value
        return 0

    def do_cuDeviceGet(self, out, index):
        out._obj.value = index
        return 0

    def do_cuModuleGetFunction(self, out, module, name):
        out._obj.value = 7
        self.name = name
        return 0

    def do_cuLaunchKernel(self, function, *arguments):
        *sizes, stream, parameters, _ = arguments
        # Not parameters[0], which ends at the first zero byte.
        where = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        self.launched = function, tuple(sizes), stream, ctypes.string_at(where, 8), self.stack[-1]
        return 0

    def do_cuLaunchKernelEx(self, config, function, parameters, extra):
        c = config._obj
        (self.attribute,) = ((a.id, a.value) for a in c.attributes[: c.count])
        return self.do_cuLaunchKernel(function, *c.grid, *c.block, c.shared, c.stream, parameters, extra)

    def do_cuDriverGetVersion(self, out):
        out._obj.value = self.version
        return 0

    def do_cuFuncSetAttribute(self, function, attribute, value):
        self.allowed.append((function, attribute, value))
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A device of compute capability 9.0, and torch's current stream on it."""
    driver = FakeDriver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "_functions", {})
    monkeypatch.setattr(cuda_driver, "_shared", {})
    monkeypatch.setattr(cuda_driver, "_arch", lambda index: 90)
    monkeypatch.setattr(cuda_driver, "_overlaps", cuda_driver._overlaps.__wrapped__)
    monkeypatch.setattr(cuda_driver, "machine_code", lambda variant, arch: b"code")
    monkeypatch.setattr(cuda_driver, "_context", cuda_driver._context.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 55}))
    return driver


def launch_rows(codes: torch.Tensor, shared: int = 0) -> None:
    arguments = (codes, codes, None, 1, 2, 3.0, 4.0)
    form, device = cuda_calls.FORMS["rows"], torch.device("cuda", 1)
    cuda_driver.launch(others()["rows"], device, (5, 6), (32, 8), form, arguments, shared)


@pytest.mark.parametrize(("arch", "version"), [(90, 13000), (90, 12020), (80, 13000)])
def test_a_launch_enters_the_context_of_its_device_and_leaves_it(arch, version, driver, monkeypatch):
    driver.version = version
    monkeypatch.setattr(cuda_driver, "_arch", lambda index: arch)
    codes, overlaps = torch.zeros(4, dtype=torch.int8), (arch, version) == (90, 13000)
    for _ in range(2):
        launch_rows(codes, shared=64)
        sizes = (5, 6, 1, 32, 8, 1, 64)
        assert driver.launched == (7, sizes, 55, codes.data_ptr().to_bytes(8, sys.byteorder), 101)
        assert driver.stack == [0]
    assert driver.name == b"rows"
    assert driver.calls.count("cuModuleLoadData") == 1
    assert driver.calls.count("cuLaunchKernelEx") == 2 * overlaps
    assert not overlaps or driver.attribute == (6, 1)


def test_launches_one_after_another(driver, monkeypatch):
    monkeypatch.setattr(cuda_table, "OVERLAP", False)
    launch_rows(torch.zeros(4, dtype=torch.int8))
    assert "cuLaunchKernelEx" not in driver.calls


def test_much_shared_memory_is_asked_for_once(driver):
    for shared in (48 << 10, 100 << 10, 100 << 10, 64 << 10, 200 << 10):
        launch_rows(torch.zeros(4, dtype=torch.int8), shared)
    assert driver.allowed == [(7, 8, 100 << 10), (7, 8, 200 << 10)]


def test_launch_structures_lie_as_the_driver_reads_them():
    assert ctypes.sizeof(cuda_driver._Attribute) == 72
    assert cuda_driver._Attribute.value.offset == 8
    config = cuda_driver._Config
    offsets = [getattr(config, name).offset for name, *_ in config._fields_]
    assert offsets == [0, 12, 24, 32, 40, 48]
    assert ctypes.sizeof(config) == 56


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_driver", FakeDriver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Unserved, match="rows is first used while a CUDA graph is captured: run it once before"):
        cuda_driver._load(others()["rows"], 77)


def test_importing_the_package_touches_no_cuda():
    code = (
        "import torch, ctypes\n"
        "def forbidden(*a, **k): raise SystemExit('CUDA was touched')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.get_device_capability = forbidden\n"
        "import hf_catquant\n"
        "from hf_catquant.kernels import cuda_compile, cuda_driver\n"
        "assert not cuda_compile.library.cache_info().currsize and not cuda_driver._driver.cache_info().currsize\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
