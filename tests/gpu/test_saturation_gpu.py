"""The log of NVFP4 blocks that did not fit, beside a stream that serves."""

import pytest
import torch


@pytest.mark.gpu
def test_a_look_does_not_wait_for_the_stream_that_serves():
    from vllm_dsv4_moe.saturation import SaturationLog

    log, counter = SaturationLog(), torch.tensor([3], device="cuda")
    log.counters = {"one": counter}
    torch.cuda.synchronize()
    assert log.look() == {"one": 3}
    counter += 0  # CUDA may wait for the device where it first loads a kernel
    stream, done = log.stream, torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    counter += 4
    done.record()
    assert log.look() == {} and not done.query()
    assert log.stream is stream
    torch.cuda.synchronize()
    assert log.look() == {"one": 4}
