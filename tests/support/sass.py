"""What ptxas makes of a kernel, without a GPU: registers, local memory and SASS."""

import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple


class Sass(NamedTuple):
    registers: int
    stack_bytes: int
    spilled_bytes: int  # stored
    report: str  # ptxas's
    lines: list[str]  # instructions and labels of the cubin that is launched


def sass(kernel: Any, arguments: tuple, arch: str, folder: Path) -> Sass:
    """Of a kernel's `__call__` with example arguments; files go into the folder."""
    import cutlass.cute as cute

    options = f"--gpu-arch={arch} --keep-ptx --keep-cubin --dump-dir={folder}"
    compiled = cute.compile(kernel, *arguments, options=options)
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.__ptx__)
    cubin.write_bytes(compiled.__cubin__)
    report = _run("ptxas", "-v", f"-arch={arch}", ptx, "-o", folder / "unused")
    listing = _run("nvdisasm", "-c", cubin)
    local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert local and registers, report
    line = re.compile(r"\.L\S+:|\s+/\*[0-9a-f]{4,}\*/")
    lines = list(filter(line.match, listing.splitlines()))
    return Sass(int(registers[1]), int(local[1]), int(local[2]), report, lines)


def _run(tool: str, *arguments) -> str:
    command = [_cuda_tool(tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _cuda_tool(name: str) -> str:
    """A program of the nvidia-cuda-nvcc and nvidia-cuda-nvdisasm wheels."""
    for package in ("nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm"):
        for file in metadata.files(package) or []:
            if file.name == name and "bin" in file.parts:
                return str(file.locate())
    raise FileNotFoundError(f"{name}: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")


def matching(lines: list[str], opcode: str) -> list[str]:
    return [line for line in lines if re.search(opcode, line)]


def innermost_loops(lines: list[str], opcode: str) -> list[list[str]]:
    """The smallest loop around each such instruction: from a label to a branch back to it."""
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".L")}
    branches = [(at, re.search(r"BRA.*`\((\.L\S+?)\)", line)) for at, line in enumerate(lines)]
    loops = [(labels[to[1]], at + 1) for at, to in branches if to and labels[to[1]] <= at]
    found = [at for at, line in enumerate(lines) if re.search(opcode, line)]
    around = [[loop for loop in loops if loop[0] <= at < loop[1]] for at in found]
    innermost = {min(each, key=lambda loop: loop[1] - loop[0]) for each in around}
    return [lines[start:end] for start, end in sorted(innermost)]
