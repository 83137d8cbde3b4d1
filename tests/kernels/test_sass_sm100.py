"""Machine code of every sm100 kernel: block-scaled MMAs in the loop, nothing in local memory."""

import pytest
from bench.sass_sm100 import every_gemm, inspect, name


@pytest.mark.parametrize("gemm", every_gemm("pro"), ids=name)
def test_sass(gemm):
    sass = inspect(gemm)
    # K = 256 a stage is four MMAs of K = 64.
    assert sass.block_scaled_mmas == 4, sass
    assert sass.mmas_elsewhere == 0, sass
    assert (sass.spilled_bytes, sass.stack_bytes, sass.local_accesses) == (0, 0, 0), sass
    # 192 threads of up to 255 registers fit; above 168 the next warp would not.
    assert sass.registers <= 168, sass
