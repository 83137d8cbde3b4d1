"""A compiled CuTe DSL function launched in the emulator by its own host code."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from tests.emulator.ptx_emulator.findings import EmulatorError, Finding
from tests.emulator.ptx_emulator.host import emulate

ROWS_PER_CTA = 128


@cute.kernel
def scale_rows_kernel(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    row = block * ROWS_PER_CTA + thread
    if row < x.shape[0]:
        y[row, 0] = x[row, 0] * factor
        y[row, 1] = x[row, 1] + 1.0


@cute.jit
def scale_rows(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32, stream: cuda.CUstream):
    blocks = (x.shape[0] + ROWS_PER_CTA - 1) // ROWS_PER_CTA
    scale_rows_kernel(x, y, factor).launch(
        grid=[blocks, 1, 1], block=[ROWS_PER_CTA, 1, 1], stream=stream
    )


@pytest.fixture(scope="module", params=["sm_90a", "sm_100a"])
def scale(request):
    rows = cute.sym_int()
    fake = [
        make_fake_compact_tensor(cutlass.Float32, (rows, 2), stride_order=(1, 0), assumed_align=16)
        for _ in range(2)
    ]
    return emulate(scale_rows, *fake, cutlass.Float32(0), make_fake_stream(), arch=request.param)


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_results_in_place(scale, mode, rows):
    x = torch.randn(rows, 2)
    y = torch.full_like(x, float("nan"))
    statistics = scale.run(x, y, 3.0, None, mode=mode)
    assert torch.equal(y[:, 0], x[:, 0] * 3)
    assert torch.equal(y[:, 1], x[:, 1] + 1)
    assert [launch.grid for launch in statistics.launches] == [(-(-rows // ROWS_PER_CTA), 1, 1)]


def test_an_output_that_is_too_short_is_found(scale):
    with pytest.raises(Finding, match=r"out-of-bounds: .* nearest is y of 2048 bytes") as found:
        scale.run(torch.zeros(300, 2), torch.zeros(256, 2), 1.0, None)
    assert found.value.kind == "out-of-bounds"


def test_a_tensor_of_another_shape_is_refused(scale):
    with pytest.raises(EmulatorError, match=r"x has shape \(8, 3\), compiled for"):
        scale.run(torch.zeros(8, 3), torch.zeros(8, 3), 1.0, None)
