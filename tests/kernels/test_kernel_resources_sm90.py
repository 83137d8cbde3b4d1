"""What sm90's kernels take of a multiprocessor: registers, local memory and shared memory."""

import re

import pytest
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.arguments import example_arguments
from dsv4_kernels.sm90.kernel import SMEM_BYTES, Dsv4GroupedGemmSm90
from dsv4_kernels.sm90.spec import MOST_PARTIALS
from dsv4_kernels.types import MoeShape

from tests.support.sass import Sass, innermost_loops, matching, sass

pytestmark = pytest.mark.slow

PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 8192, False)
FLASH = MoeShape(256, 256, 6, 4096, 2048, 8192, False)
MXFP4 = FLASH._replace(weight_format="mxfp4")
KERNELS = {f"flash-{n}": sm90.gemms(FLASH, n)[0] for n in (8, 8192)}
KERNELS |= {f"mxfp4-{n}": sm90.gemms(MXFP4, n)[0] for n in (8, 8192)}
KERNELS |= {f"fp8-{n}": sm90.gemms(MXFP4._replace(fp8=True), n)[0] for n in (8, 8192)}
for size in (576, 288):
    shape = MoeShape(384, 384, 6, 5120, size, 8192, False, weight_format="mxfp4")
    for n in (8, 512):
        KERNELS |= {f"v41-{size}-{gemm.op}-{n}": gemm for gemm in sm90.gemms(shape, n)}
    fc2 = sm90.gemms(shape._replace(fp8=True), 128)[1]
    KERNELS[f"v41-{size}-fp8-fc2"] = fc2  # stages of an odd number of blocks


@pytest.mark.parametrize("gemm", KERNELS.values(), ids=KERNELS)
def test_a_kernel_fits_and_spills_nothing(gemm, tmp_path):
    kernel = Dsv4GroupedGemmSm90(gemm)
    block = 64 * 64 // 2 + 64 * 64 // gemm.scale_block
    stage = kernel.x_blocks * kernel.tile_n_max * kernel.x_bytes
    stage += kernel.k_blocks * kernel.m_blocks_tile * block
    assert kernel.stages >= 2 and kernel.stages * stage + kernel._fixed_smem() <= SMEM_BYTES
    assert kernel.partial_floats <= MOST_PARTIALS
    found = sass_of(gemm, tmp_path)
    assert (found.stack_bytes, found.spilled_bytes) == (0, 0), found.report


def sass_of(gemm: sm90.Gemm, folder) -> Sass:
    found = sass(Dsv4GroupedGemmSm90(gemm), example_arguments(gemm), "sm_90a", folder)
    assert not re.search("C751[23]", found.report), "WGMMA waits: " + found.report
    return found


# Of the kernels for Pro (EP8, TP8), Flash and Flash 4.1, those that spill.
SPILLING = {"fc2-48": sm90.gemms(PRO_EP8, 2048)[1], "fc1-64": sm90.gemms(PRO_EP8, 3072)[0]}
V41_TP4 = MoeShape(384, 384, 6, 5120, 576, 8192, False, weight_format="mxfp4")
SPILLING["v41-576-fc2"] = sm90.gemms(V41_TP4, 128)[1]
SPILLING |= {
    f"mxfp4-{gemm.op}-64": gemm
    for gemm in sm90.gemms(PRO_EP8._replace(weight_format="mxfp4"), 3072)
}


@pytest.mark.parametrize("gemm", SPILLING.values(), ids=SPILLING)
def test_what_kernels_spill_is_not_touched_by_a_stage(gemm, tmp_path):
    """A few bytes in code that runs once a tile; the loops over K have no local memory."""
    found = sass_of(gemm, tmp_path)
    assert found.spilled_bytes <= 32, found.report
    loops = innermost_loops(found.lines, "HGMMA")
    assert len(loops) == len(gemm.config.tile_n)
    assert not [line for loop in loops for line in matching(loop, r"\b(LDL|STL)\b")]
