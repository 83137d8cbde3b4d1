"""Stream-K of the sm90 layer on a GPU: beside a kernel that holds most multiprocessors, and with
graph replays over poisoned partial sums. With the kernels that serve, and with those that trap
where a wait takes too long, so that a hang ends in an error.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cuda.bindings import driver
from cutlass import Int32
from cutlass.cute.runtime import make_ptr
from dsv4_kernels import moe
from dsv4_kernels.backends import BACKENDS
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90 import ptx
from dsv4_kernels.sm90.arguments import example_arguments
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.sm90.spec import Gemm
from dsv4_kernels.types import MoeLayer

from tests.gpu.test_moe_gpu import FLASH, make_layer
from tests.support.layers import random_call, workspace_of

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("stream-k")]

SHAPE = FLASH._replace(num_experts=8, num_local_experts=8, max_num_tokens=250)
TOKENS = [1, 250]  # every tile is cut; clusters
FREE = 12  # multiprocessors that are left to the layer
LOOKS = 20_000_000  # of a block that holds one, at 1 to 2 us each


class SpinLimit(Dsv4GroupedGemmSm90):
    spin_limit = 1 << 22  # seconds


@functools.cache
def compile_with_limit(gemm: Gemm, arch: str = "sm_90a"):
    options = f"--gpu-arch={arch}"
    return cute.compile(SpinLimit(gemm), *example_arguments(gemm), options=options)


@pytest.fixture(scope="module", params=["served", "spin-limit"])
def layer(request) -> Iterator[MoeLayer]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("stream-K is sm90's")
    compile_gemm = sm90.compile_gemm if request.param == "served" else compile_with_limit
    with patch.object(sm90, "compile_gemm", compile_gemm):
        for num_tokens in TOKENS:
            for gemm in sm90.gemms(SHAPE, num_tokens):
                compile_gemm(gemm)
        yield make_layer(BACKENDS["sm90"], SHAPE)


@cute.kernel
def hold_kernel(started: cute.Pointer, release: cute.Pointer, most: Int32):
    cutlass.memory.SmemAllocator().allocate(200 * 1024, byte_alignment=16)
    if cute.arch.thread_idx()[0] == 0:
        cute.arch.atomic_add(started, Int32(1), scope="gpu")
        looks = Int32(0)
        while looks < most:
            cute.arch.inline_ptx("nanosleep.u32 1000;")
            looks += 1
            if ptx.get_flag(release) != 0:
                looks = most


@cute.jit
def hold(
    started: cute.Pointer,
    release: cute.Pointer,
    most: Int32,
    blocks: Int32,
    stream: driver.CUstream,
):
    """Takes a multiprocessor a block, in pairs, so that pairs are left for clusters, until *release
    is set or after `most` looks at it; *started counts the blocks."""
    hold_kernel(started, release, most).launch(
        grid=[blocks, 1, 1], block=[32, 1, 1], cluster=[2, 1, 1], stream=stream
    )


def word(address: int):
    return make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4)


@functools.cache
def compile_hold():
    arguments = (word(1 << 20), word(1 << 20), Int32(1), Int32(2), driver.CUstream(0))
    return cute.compile(hold, *arguments, options="--gpu-arch=sm_90a")


@contextmanager
def held(blocks: int) -> Iterator[torch.cuda.Event]:
    """All of them run; the event is when they have ended, which they do after this."""
    started, release = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    stream, end = torch.cuda.Stream(), torch.cuda.Event()
    release.fill_(0)  # loads what ends the kernel: a first use may wait for kernels that run
    torch.cuda.synchronize()
    pointers = (word(tensor.data_ptr()) for tensor in (started, release))
    compile_hold()(*pointers, Int32(LOOKS), Int32(blocks), driver.CUstream(stream.cuda_stream))
    end.record(stream)
    try:
        while started.item() < blocks:
            assert not end.query(), f"{started.item()} of {blocks} blocks ran"
        yield end
    finally:
        release.fill_(1)
        stream.synchronize()


def differs(out: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (out.view(torch.int16) != expected.view(torch.int16)).any()


def call_of(layer: MoeLayer, x, routing, out: torch.Tensor) -> Callable[[], None]:
    workspace = workspace_of(layer)

    def call() -> None:
        out.fill_(torch.nan)
        moe.moe(x, routing, layer, workspace, out=out)

    return call


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_the_layer_runs_while_most_multiprocessors_are_held(layer, num_tokens):
    x, routing = random_call(num_tokens, SHAPE, num_tokens, device="cuda")
    out = torch.empty_like(x)
    call = call_of(layer, x, routing, out)
    call()
    expected, wrong = out.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    assert expected.isfinite().all()
    blocks = (sm90.num_sms(x.device) - FREE) // 2 * 2
    wrong += differs(out, expected)
    with held(blocks):
        pass  # all that follows is loaded now
    with held(blocks) as end:
        for _ in range(1000):
            call()
            wrong += differs(out, expected)
        torch.cuda.current_stream().synchronize()
        assert not end.query(), "the layer waited for the kernel that held multiprocessors"
    assert wrong.item() == 0


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_replays_are_eager_bit_for_bit_over_poisoned_partial_sums(layer, num_tokens):
    x, routing = random_call(num_tokens, SHAPE, 0, device="cuda")
    out = torch.empty_like(x)
    call = call_of(layer, x, routing, out)
    call()
    expected, wrong = out.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    partials, flags = sm90._fix_up(x.device)

    def poisoned() -> None:
        partials.fill_(torch.nan)
        call()
        wrong.add_(differs(out, expected))

    poisoned()
    assert not partials.isnan().all(), "no tile is cut"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        poisoned()
    for seed in range(1, 11):
        _, new = random_call(num_tokens, SHAPE, seed, device="cuda")
        routing.ids.copy_(new.ids)
        routing.weights.copy_(new.weights)
        call()
        expected.copy_(out)
        for _ in range(1000):
            graph.replay()
    assert wrong.item() == 0
    assert not flags.any(), "flags are left set"
