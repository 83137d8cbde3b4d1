"""What sm90's kernels take of a multiprocessor: registers, local memory and shared memory."""

import re
import subprocess

import pytest
from bench.sass_sm100 import cuda_tool
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.arguments import example_arguments
from dsv4_kernels.sm90.kernel import SMEM_BYTES, Dsv4GroupedGemmSm90
from dsv4_kernels.sm90.spec import MOST_PARTIALS
from dsv4_kernels.types import MoeShape

pytestmark = pytest.mark.slow

PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 8192, False)
FLASH = MoeShape(256, 256, 6, 4096, 2048, 8192, False)
MXFP4 = FLASH._replace(weight_format="mxfp4")
KERNELS = {f"flash-{n}": sm90.gemms(FLASH, n)[0] for n in (8, 8192)}
KERNELS |= {f"mxfp4-{n}": sm90.gemms(MXFP4, n)[0] for n in (8, 8192)}
for size in (576, 288):
    shape = MoeShape(384, 384, 6, 5120, size, 8192, False, weight_format="mxfp4")
    KERNELS |= {f"v41-{size}-{gemm.op}": gemm for gemm in sm90.gemms(shape, 128)}


@pytest.mark.parametrize("gemm", KERNELS.values(), ids=KERNELS)
def test_a_kernel_fits_and_spills_nothing(gemm, tmp_path):
    kernel = Dsv4GroupedGemmSm90(gemm)
    block = 64 * 64 // 2 + 64 * 64 // gemm.scale_block
    stage = kernel.k_blocks * (kernel.tile_n_max * 128 + kernel.m_blocks_tile * block)
    assert kernel.stages >= 2 and kernel.stages * stage + kernel._fixed_smem() <= SMEM_BYTES
    assert kernel.partial_floats <= MOST_PARTIALS
    assert resources(gemm, tmp_path) == {"stack": 0, "spilled": 0}


# Of the kernels for Pro (EP8, TP8), Flash and Flash 4.1, those that spill.
SPILLING = {"fc2-48": sm90.gemms(PRO_EP8, 2048)[1], "fc1-64": sm90.gemms(PRO_EP8, 3072)[0]}
SPILLING |= {
    f"mxfp4-{gemm.op}-64": gemm
    for gemm in sm90.gemms(PRO_EP8._replace(weight_format="mxfp4"), 3072)
}


@pytest.mark.parametrize("gemm", SPILLING.values(), ids=SPILLING)
def test_what_kernels_spill_is_not_touched_by_a_stage(gemm, tmp_path):
    """A few bytes in code that runs once a tile; the loops over K have no local memory."""
    assert resources(gemm, tmp_path)["spilled"] <= 32
    command = [cuda_tool("nvdisasm"), "-c", tmp_path / "kernel.cubin"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops = wgmma_loops(listing)
    assert len(loops) == len(gemm.config.tile_n)
    assert not [line for loop in loops for line in loop if re.search(r"\b(LDL|STL)\b", line)]


def wgmma_loops(listing: str) -> list[list[str]]:
    """Of nvdisasm's text, the innermost loops around WGMMA."""
    lines = [
        line for line in listing.splitlines() if re.match(r"\.L\S+:|\s+/\*[0-9a-f]{4,}\*/", line)
    ]
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".L")}
    branches = [(at, re.search(r"BRA.*`\((\.L\S+?)\)", line)) for at, line in enumerate(lines)]
    loops = [(labels[to[1]], at + 1) for at, to in branches if to and labels[to[1]] <= at]
    wgmmas = [at for at, line in enumerate(lines) if "HGMMA" in line]
    around = [[loop for loop in loops if loop[0] <= at < loop[1]] for at in wgmmas]
    innermost = {min(each, key=lambda loop: loop[1] - loop[0]) for each in around}
    return [lines[start:end] for start, end in sorted(innermost)]


def resources(gemm: sm90.Gemm, folder) -> dict[str, int]:
    """ptxas's account of local memory, in bytes a thread."""
    import cutlass.cute as cute

    options = f"--gpu-arch=sm_90a --keep-ptx --dump-dir={folder}"
    arguments = example_arguments(gemm)
    compiled = cute.compile(Dsv4GroupedGemmSm90(gemm), *arguments, options=options)
    (folder / "kernel.ptx").write_text(compiled.__ptx__)
    command = [cuda_tool("ptxas"), "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not re.search("C751[23]", done.stderr), "WGMMA waits: " + done.stderr
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    return {"stack": int(numbers[1]), "spilled": int(numbers[2])}
