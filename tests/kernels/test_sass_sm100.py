"""Machine code of every sm100 kernel: block-scaled MMAs in the loop, nothing in local memory."""

import pytest
from dsv4_kernels.sm100.heuristic import all_gemms
from dsv4_kernels.sm100.kernel import Dsv4GroupedGemmSm100, example_arguments
from dsv4_kernels.types import MoeShape

from tests.emulator.sm100_emulation import name
from tests.support.sass import innermost_loops, matching, sass

PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 1 << 16, True)
# One scale and many, into either GEMM.
GEMMS = dict.fromkeys(all_gemms(PRO_EP8) + all_gemms(PRO_EP8._replace(scale_per_row=True)))


@pytest.mark.parametrize("gemm", GEMMS, ids=name)
def test_sass(gemm, tmp_path):
    found = sass(Dsv4GroupedGemmSm100(gemm), example_arguments(gemm), "sm_100a", tmp_path)
    (loop,) = innermost_loops(found.lines, r"UTC\w*MMA\S*\.4X")
    # K = 256 a stage is four MMAs of K = 64.
    assert len(matching(loop, "MMA")) == len(matching(found.lines, "MMA")) == 4
    assert (found.spilled_bytes, found.stack_bytes) == (0, 0), found.report
    assert not matching(found.lines, r"\b(LDL|STL)\b")
    # 192 threads of up to 255 registers fit; above 168 the next warp would not.
    assert found.registers <= 168, found.report
