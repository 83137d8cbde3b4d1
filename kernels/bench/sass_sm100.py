"""What ptxas makes of every sm100 kernel: one line each, with no GPU.

    python -m bench.sass_sm100 [--model pro|flash] [--json sass.json]

Registers and spills are ptxas's own report on the kernel's PTX; the instructions are those of the
cubin that is launched. A loop is the instructions between a backward branch and its target.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from dsv4_kernels.sm100.heuristic import all_gemms
from dsv4_kernels.sm100.kernel import Dsv4GroupedGemmSm100, example_arguments
from dsv4_kernels.sm100.spec import TMEM_COLUMNS, Gemm
from dsv4_kernels.types import MoeShape

SHAPES = {
    "pro": MoeShape(384, 48, 6, 7168, 3072, 1 << 16, True),  # one of 8 ranks
    "flash": MoeShape(256, 32, 6, 4096, 2048, 1 << 16, True),
}


class Sass(NamedTuple):
    registers: int
    spilled_bytes: int  # stores and loads
    stack_bytes: int
    local_accesses: int  # LDL and STL
    instructions: int
    block_scaled_mmas: int  # in the innermost loop that has MMAs
    loop_instructions: int  # of that loop
    mmas_elsewhere: int


def every_gemm(model: str) -> list[Gemm]:
    """All variants of the model's layers, one and many scales included."""
    shape = SHAPES[model]
    both = all_gemms(shape) + all_gemms(shape._replace(scale_per_row=True))
    return list(dict.fromkeys(both))


def cuda_tool(name: str) -> str:
    """A program of the nvidia-cuda-nvcc and nvidia-cuda-nvdisasm wheels."""
    for package in ("nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm"):
        for file in metadata.files(package) or []:
            if file.name == name and "bin" in file.parts:
                return str(file.locate())
    raise FileNotFoundError(f"{name}: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")


def compile_kept(gemm: Gemm, arch: str):
    """The compiled function, with its PTX and cubin."""
    from cutlass import cute

    with tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch={arch} --keep-ptx --keep-cubin --dump-dir={folder}"
        return cute.compile(Dsv4GroupedGemmSm100(gemm), *example_arguments(gemm), options=options)


def inspect(gemm: Gemm, arch: str = "sm_100a") -> Sass:
    kernel = compile_kept(gemm, arch)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.__ptx__)
        cubin.write_bytes(kernel.__cubin__)
        report = _run("ptxas", "-v", f"-arch={arch}", ptx, "-o", Path(folder) / "unused")
        listing = _run("nvdisasm", "-c", cubin)
    numbers = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    registers = re.search(r"Used (\d+) registers", report)
    assert numbers and registers, report
    stack, *spilled = map(int, numbers.groups())
    return Sass(int(registers[1]), sum(spilled), stack, *_count(listing))


def _run(tool: str, *arguments) -> str:
    done = subprocess.run(
        [cuda_tool(tool), *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def _count(listing: str) -> tuple[int, int, int, int, int]:
    """Of nvdisasm's text: local accesses, instructions, and the loop of MMAs."""
    opcodes: list[str] = []
    labels, branches = {}, []
    for line in listing.splitlines():
        label = re.match(r"(\.L_x?_?\d+):", line.strip())
        if label:
            labels[label[1]] = len(opcodes)
        text = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if text:
            target = re.search(r"`\((\.L_x?_?\d+)\)", text[2])
            if text[1].startswith("BRA") and target:
                branches.append((len(opcodes), target[1]))
            opcodes.append(text[1])
    is_mma = [op.startswith("UTC") and "MMA" in op and ".4X" in op for op in opcodes]
    loops = [(labels[to], at + 1) for at, to in branches if labels.get(to, at + 1) <= at]
    with_mmas = [(end - start, start, end) for start, end in loops if any(is_mma[start:end])]
    assert with_mmas, "no loop has a block-scaled MMA"
    size, start, end = min(with_mmas)
    inside = sum(is_mma[start:end])
    kinds = Counter(op.split(".")[0] for op in opcodes)
    others = sum("MMA" in op for op in opcodes) - inside
    return kinds["LDL"] + kinds["STL"], len(opcodes), inside, size, others


def name(gemm: Gemm) -> str:
    output = "nvfp4" if gemm.quantize else "bf16"
    rows = " row scales" if gemm.scale_per_row else ""
    return f"{gemm.op} {gemm.config.num_ctas}cta n{gemm.config.tile} -> {output}{rows}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="pro")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(
        f"{'kernel':38} {'regs':>4} {'spill':>5} {'local':>5} {'smem':>7} {'stages':>6} "
        f"{'TMEM':>9} {'MMAs/loop':>9} {'loop':>4} {'SASS':>5}"
    )
    rows = {}
    for gemm in every_gemm(args.model):
        sass = inspect(gemm)
        rows[name(gemm)] = {**sass._asdict(), "smem_bytes": gemm.smem_bytes}
        print(
            f"{name(gemm):38} {sass.registers:4} {sass.spilled_bytes:5} {sass.local_accesses:5} "
            f"{gemm.smem_bytes:7} {gemm.config.stages:6} {gemm.tmem_columns:4}/{TMEM_COLUMNS} "
            f"{sass.block_scaled_mmas:9} {sass.loop_instructions:4} {sass.instructions:5}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
