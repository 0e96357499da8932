"""Builds the CPU kernels of hf_catquant/kernels/csrc into one library with a C ABI, and puts hf_catquant_autoload.pth
beside the package; everything else is in pyproject.toml.

Every path is a file of its own, compiled with the instructions that it needs; the library asks the processor at run
time which ones it may call. A path that the compiler does not know is left out. Without a compiler there is no
library: the package installs all the same and runs on plain torch, slower.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

SOURCES = Path("hf_catquant/kernels/csrc")
AUTOLOAD = "hf_catquant_autoload.pth"
LIBRARY = "hf_catquant.kernels.libcatquant_cpu"
# Floating point as it is written, but for what only signalling would see; no product and sum are joined by the
# compiler.
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-g0", "-fPIC", "-pthread", "-fopenmp-simd"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8"]
# The file of a path, the name that dispatch.c knows it by, and its flags, by processor.
PATHS = {
    "x86_64": [
        ("path_avx2.c", "AVX2", AVX2),
        ("path_avx512.c", "AVX512", AVX512),
        ("lookup.c", "LOOKUP", [*AVX512, "-mavx512vbmi"]),
        ("amx.c", "AMX", AMX),
    ],
    "aarch64": [("path_neon.c", "NEON", ["-march=armv8.2-a+dotprod"])],
}
EVERYWHERE = [
    "bits.c",
    "columns.c",
    "decode.c",
    "float_rows.c",
    "floats.c",
    "layout.c",
    "linear.c",
    "measure.c",
    "path_scalar.c",
    "pool.c",
    "scratch.c",
    "unpack.c",
]


def digest() -> str:
    """What tells the C sources from others; as in hf_catquant/kernels/native.py."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def machine() -> str:
    """The processor in one of the names of PATHS."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


class BuildKernels(build_ext):
    """Compiles each file with its own flags and links one library whose name carries no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        """``.so`` on every Unix, as ctypes opens it."""
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: there is no PyInit function."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile what the compiler knows, tell dispatch.c what that was, link."""
        objects, macros = [], []
        for file, name, flags in PATHS.get(machine(), []):
            try:
                objects += self._compile(file, flags)
                macros.append((f"CQ_HAS_{name}", "1"))
            except Exception as error:  # each compiler class has an error of its own
                self.warn(f"{file} is left out, this compiler does not build it: {error}")
        for file in EVERYWHERE:
            objects += self._compile(file, [])
        macros.append(("CQ_SOURCES", f'"{digest()}"'))
        objects += self._compile("dispatch.c", [], macros)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), libraries=["m"], extra_postargs=["-pthread"])

    def _compile(self, file: str, flags: list[str], macros: list[tuple[str, str]] | None = None) -> list[str]:
        return self.compiler.compile(
            [str(SOURCES / file)], self.build_temp, macros or [], [str(SOURCES)], extra_postargs=[*FLAGS, *flags]
        )


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and every Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


class BuildAutoload(Command):
    """Copies the .pth file to the top of what will be installed, where Python looks for such files.

    A part of setuptools' ``build``, so that it is the same for wheels and for editable installations.
    """

    description = "copy the file that makes Python run hf_catquant_autoload"
    user_options: list[tuple[str, str, str]] = []  # noqa: RUF012  as setuptools declares it
    build_lib: str
    editable_mode = False

    def initialize_options(self) -> None:
        """Nothing is asked."""

    def finalize_options(self) -> None:
        """An editable installation is not made from the build folder: there the file goes straight into the wheel."""
        source, name = ("install", "install_lib") if self.editable_mode else ("build", "build_lib")
        self.build_lib = getattr(self.get_finalized_command(source), name)

    def run(self) -> None:
        """Copy."""
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        self.copy_file(AUTOLOAD, str(Path(self.build_lib) / AUTOLOAD))

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        return [AUTOLOAD]

    def get_outputs(self) -> list[str]:
        """What is in the build folder afterwards."""
        return [] if self.editable_mode else [str(Path(self.build_lib) / AUTOLOAD)]

    def get_output_mapping(self) -> dict[str, str]:
        """Where it comes from."""
        return dict.fromkeys(self.get_outputs(), AUTOLOAD)


build.sub_commands = [*build.sub_commands, ("build_autoload", None)]
setup(
    ext_modules=[
        Extension(
            LIBRARY,
            [str(SOURCES / "dispatch.c")],
            depends=[str(path) for path in sorted(SOURCES.glob("*"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel, "build_autoload": BuildAutoload},
)
