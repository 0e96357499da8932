"""Instructions a weight of the CUDA products, counted in machine code: no GPU is needed, nor told anything of by this.

    pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
    python benchmarks/gpu_instructions.py [--arch 90]

The main loop of a product is the smallest loop of its machine code that holds tensor-core instructions. Its instructions,
divided by the codes that a thread goes through in it, are compared with what a GPU can issue while it reads the codes from
memory at full speed: that is a ceiling on the bandwidth that the product can reach, not a measurement of it. Writes
``benchmarks/results/gpu_instructions.json`` and prints the table of ``docs/gpu.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_catquant.kernels import cuda_compile, cuda_table
from hf_catquant.kernels.cuda_compile import Variant
from hf_catquant.kernels.cuda_layout import Layout, chunk_width

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_instructions.json"
# An H200: 4.3 TB/s of measured bandwidth, 132 multiprocessors at 1.755 GHz, 128 lanes issued a clock.
BYTES_A_CLOCK = 4.3e12 / (132 * 1.755e9)
LANES_A_CLOCK = 128
LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


@dataclass(frozen=True)
class Count:
    """What one product costs.

    Attributes:
        kernel: source file; what: the constants that tell variants apart.
        registers: of a thread; instructions: of the loop, a code; ceiling: of the bandwidth, that issuing them allows.
    """

    kernel: str
    bits: int
    group: int
    what: str
    registers: int
    instructions: float
    ceiling: float


def disassembler() -> str | None:
    """nvdisasm of the path or of the pip package, if there is one."""
    packaged = (tool for folder in sys.path for tool in sorted(Path(folder).glob("nvidia/*/bin/nvdisasm")))
    return shutil.which("nvdisasm") or next(map(str, packaged), None)


def loop(image: bytes) -> list[str]:
    """The instructions of the smallest loop with tensor-core instructions.

    Raises:
        RuntimeError: there is no disassembler, or no such loop.
    """
    tool = disassembler()
    if tool is None:
        raise RuntimeError("counting instructions needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    names: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if re.match(r"\.L_x_\d+:", line):
            labels[line[:-1]] = len(names)
        found = LINE.match(line)
        if found is None:
            continue
        condition, name, rest = found.groups()
        names.append(name)
        target = re.search(r"\.L_x_\d+", rest)
        # Without a condition it is the way back from a warp's meeting, which is written down behind the kernel.
        if condition and name.startswith("BRA") and target is not None and target.group() in labels:
            body = names[labels[target.group()] :]
            if any("MMA" in name for name in body) and (not best or len(body) < len(best)):
                best = body
    if not best:
        raise RuntimeError("the machine code has no loop with tensor-core instructions")
    return best


def count(kernel: str, bits: int, group: int, arch: int, tokens: int = 8) -> Count:
    """Count one product: 4 row tiles (2 with 8 bits), 8 warps (16 of split8), float16 scales a ``group`` (-1: row)."""
    tiles = 2 if bits == 8 else 4
    constants = [("BITS", bits), ("GROUP_STEPS", 0 if group == -1 else group // 32), ("SCALE32", 0), ("TYPE", 0)]
    constants += [("MT", tiles), ("NT", 1), ("WARPS", 16 if kernel == "split8" else 8)]
    constants += [("AHEAD", 2 if kernel == "split8" else cuda_table.FEW_AHEAD), ("TOKENS", tokens), ("BLOCKS", 1)]
    made = cuda_compile.compile_variant(Variant(kernel, tuple(constants)), arch)
    registers, _ = cuda_compile.budget(made.log)
    body = Counter(name.split(".")[0] for name in loop(made.image))
    steps = chunk_width(bits) // 32 * (2 if kernel == "product16" else 1)
    turns = (body["IMMA"] + body["HMMA"]) / (steps * (tiles + (bits < 8)))  # the compiler may unroll the loop
    instructions = body.total() / (turns * tiles * 16 * chunk_width(bits) / 32)
    bytes_a_code = bits / 8 + (4 / group if group > 0 else 0)
    ceiling = LANES_A_CLOCK / instructions * bytes_a_code / BYTES_A_CLOCK
    what = f"{tokens} x 16-bit" if kernel == "split8" else "8-bit" if kernel == "product8" else "up to 8 x 16-bit"
    return Count(kernel, bits, group, what, registers, round(instructions, 2), round(ceiling, 2))


def gemm_instructions(bits: int, group: int, arch: int, tokens: int, integer: bool) -> tuple[int, float]:
    """Registers of a thread, and instructions of the loop for each tensor-core instruction that multiplies codes, of the
    product of many rows. A row of ones, which sums x, is work besides.

    A multiprocessor of an H200 begins a 16-bit ``mma`` about every 1.6 clocks (600 TFLOP/s) and four other instructions in
    each clock: with more than six for each, they are the limit.
    """
    layout = Layout(
        tiles=torch.empty(512, 8192 * bits // 256, 512, dtype=torch.uint8, device="meta"),
        scales=torch.empty(512, 1 if group == -1 else 8192 // group, 8, 2, 2, dtype=torch.float16, device="meta"),
        rows=8192,
        columns=8192,
        bits=bits,
        group_steps=0 if group == -1 else group // 32,
        chunks=8192 // chunk_width(bits),
        spread=None,
        level_step=1.0,
        level_zero=0.0,
    )
    variant = cuda_table.product(layout, tokens, 0, integer, 132).variant
    made, constants = cuda_compile.compile_variant(variant, arch), dict(variant.constants)
    body = Counter(name.split(".")[0] for name in loop(made.image))
    products = body["IMMA"] + body["HMMA"]
    if bits < 8 and not constants["SUMS"]:
        products *= constants["MT"] / (constants["MT"] + 1)  # of MT + 1, one multiplies ones
    return cuda_compile.budget(made.log)[0], round(body.total() / products, 2)


def table(arch: int) -> list[Count]:
    """Every width of code, by group and by row."""
    return [
        made
        for bits in (1, 2, 4, 8)
        for group in (128, -1)
        for made in (
            count("split8", bits, group, arch, tokens=1),
            count("product16", bits, group, arch),
            count("product8", bits, group, arch),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    arch = parser.parse_args().arch
    rows = table(arch)
    print(
        "| bits in a tile | group | activations | registers | instructions a weight | ceiling |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        group = "row" if row.group == -1 else row.group
        shown = f"{100 * row.ceiling:.0f} %"
        print(f"| {row.bits} | {group} | {row.what} | {row.registers} | {row.instructions:.2f} | {shown} |")
    print("\n| bits in a tile | rows of x | activations | registers | instructions a tensor-core instruction |")
    print("|---|---|---|---|---|")
    shared = []
    for bits in (1, 2, 4, 8):
        for tokens in (16, 64, 256):
            for integer in (False, True):
                registers, cost = gemm_instructions(bits, 128, arch, tokens, integer)
                shared.append(
                    {"bits": bits, "tokens": tokens, "integer": integer, "registers": registers, "cost": cost}
                )
                print(f"| {bits} | {tokens} | {'8-bit' if integer else '16-bit'} | {registers} | {cost:.2f} |")
    held = {
        "gemm": shared,
        "arch": arch,
        "nvrtc": ".".join(map(str, cuda_compile.version())),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
