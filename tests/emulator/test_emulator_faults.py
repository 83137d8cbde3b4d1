"""Faults planted in the PTX of this project's own kernels: the emulator catches each kind.

A fault is caught where a run raises a report, or leaves other rows or flags than it should. Each is
tried in several orders of the asynchronous work until one catches it. `pytest -s` prints the list.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.spec import Sm90Config

from tests.emulator import sm90_emulation, sm100_emulation
from tests.emulator import test_grouped_gemm_sm100 as on_sm100
from tests.emulator.ptx_emulator.findings import EmulatorError
from tests.support import sm90_problems
from tests.support.layers import aligned, rounding_error

Order = tuple[str, int]
ORDERS: list[Order] = [("lazy", 0), ("random", 1), ("eager", 0)]
MORE_ORDERS: list[Order] = [("random", seed) for seed in (2, 3, 5, 7)]
MAX_INSTRUCTIONS = 3_000_000
WAIT = r"mbarrier\.try_wait[^;]*?(P\d), \[(%\w+)\], (%\w+), \d+;"


class Fault(NamedTuple):
    what: str
    pattern: str
    replacement: str
    which: slice = slice(None)  # of the pattern's matches


def plant(ptx: str, fault: Fault) -> str:
    matches = list(re.finditer(fault.pattern, ptx, re.S))[fault.which]
    assert matches, f"the kernel no longer has what `{fault.what}` changes"
    for match in reversed(matches):
        ptx = ptx[: match.start()] + match.expand(fault.replacement) + ptx[match.end() :]
    return ptx


def nth(index: int) -> slice:
    return slice(index, index + 1 or None)


def no_wait(name: str, which: slice) -> Fault:
    return Fault(f"{name}: no wait", WAIT, r"setp.eq.u32 \1, 0, 0;", which)


def wrong_parity(name: str, which: slice) -> Fault:
    return Fault(
        f"{name}: wrong parity",
        WAIT,
        r"{.reg .b32 q; xor.b32 q, \3, 1; mbarrier.try_wait.parity.shared.b64 \1, [\2], q, 0;}",
        which,
    )


def dropped(what: str, pattern: str, which: slice = slice(None)) -> Fault:
    return Fault(f"{what} dropped", pattern + ";", "", which)


ELECTED = r"elect\.sync\s+%\w+\|(%p\d+), -1;\s+not\.pred\s+(%p\d+), \1;\s+@\2 bra\s+\S+;\s+{}"
EXPECT = r"(mbarrier\.arrive\.expect_tx\S+\s+%\w+, \[[^\]]*\]), (%\w+);"
SHARED_FAULTS = [
    Fault("128 bytes too many expected", EXPECT, r"{.reg .b32 q; add.u32 q, \2, 128; \1, q;}"),
    Fault("128 bytes too few expected", EXPECT, r"{.reg .b32 q; sub.u32 q, \2, 128; \1, q;}"),
]

# What follows an instruction, to tell it from others like it.
THEN_EPILOGUE_BARRIER = r"(?=.{0,200}\+96\])"
THEN_LOOP_END = r"(?=\s+setp\.ne\.b32[^;]*;\s+@%p\d+ bra)"
THEN_LOOP = r"(?=\s+\$L\w+:\s+\.pragma)"
THEN_MMA = r"(?=[^;]*tcgen05\.mma)"
GATHER = r"cp\.async\.mbarrier\.arrive\.noinc"
BULK_COPY = r"(cp\.async\.bulk\.shared::cluster\.global\S+ \[%\w+"
COORDINATES = r"\{(%\w+), (%\w+), (%\w+)\}(?=\], \[%\w+\];)"
COMMIT = r"tcgen05\.commit\.[^\[]*\[%\w+\+{}\]"
SCALED = r"(tcgen05\.mma\.\S+ \[[^\]]*\], %\w+, %\w+, %\w+), (\[%\w+\]), (\[%\w+\]), (%p\d+);"
SM100_FAULTS = [
    *SHARED_FAULTS,
    no_wait("producer, stage empty", nth(0)),
    wrong_parity("producer, stage empty", nth(0)),
    dropped("bar.sync after alloc and mbarrier.init", r"bar\.sync\s+0", nth(0)),
    dropped("bar.sync before dealloc", r"bar\.sync\s+0", nth(-1)),
    no_wait("MMA, accumulator empty", nth(1)),
    no_wait("MMA, stage full", nth(2)),
    no_wait("epilogue, accumulator full", nth(3)),
    wrong_parity("MMA, accumulator empty", nth(1)),
    wrong_parity("MMA, stage full", nth(2)),
    wrong_parity("epilogue, accumulator full", nth(3)),
    dropped("commit of a stage", COMMIT.format(r"\d+"), nth(0)),
    dropped("commit of an accumulator", COMMIT.format(r"\d+"), nth(1)),
    Fault("commit to the next stage", r"(tcgen05\.commit[^\[]*\[%\w+)\+40\]", r"\1+48]", nth(0)),
    dropped("arrival of the epilogue", r"mbarrier\.arrive\.shared\.b64[^;]*"),
    Fault(
        "one arrival more expected",
        r"mov\.b32(\s+%\w+), 4;" + THEN_EPILOGUE_BARRIER,
        r"mov.b32\1, 5;",
    ),
    Fault(
        "one arrival less expected",
        r"mov\.b32(\s+%\w+), 4;" + THEN_EPILOGUE_BARRIER,
        r"mov.b32\1, 3;",
    ),
    dropped("fence.proxy.async", r"fence\.proxy\.async\S*"),
    dropped("tcgen05.fence before arriving", r"tcgen05\.fence::before_thread_sync", nth(0)),
    dropped("tcgen05.fence of the MMA warp", r"tcgen05\.fence::after_thread_sync", slice(0, 2)),
    dropped("tcgen05.fence of the epilogue", r"tcgen05\.fence::after_thread_sync", nth(2)),
    dropped("tcgen05.wait::ld", r"tcgen05\.wait::ld\.sync\.aligned"),
    dropped("wait for the staging buffer", r"cp\.async\.bulk\.wait_group\.read\s+1"),
    dropped("wait for the last stores", r"cp\.async\.bulk\.wait_group\.read\s+0"),
    Fault(
        "one staging buffer for two", r"xor\.b32(\s+%\w+, %\w+), 1;" + THEN_LOOP_END, r"mov.b32\1;"
    ),
    Fault("coordinates of a weight tile swapped", COORDINATES, r"{\2, \1, \3}", nth(0)),
    Fault("a tile copied one KiB off", r"(bytes \[%\w+)(?=\], \[%rd)", r"\1+1024", nth(0)),
    dropped("one copy of scales to tensor memory", r"tcgen05\.cp\.[^;]*", nth(3)),
    Fault("scales of A and B swapped", SCALED, r"\1, \3, \2, \4;", nth(1)),
    Fault(
        "the first MMA of a tile accumulates",
        r"mov\.pred(\s+%\w+), 0;" + THEN_LOOP,
        r"mov.pred\1, -1;",
    ),
    Fault(
        "a later MMA does not accumulate",
        r"mov\.pred(\s+%\w+), -1;" + THEN_MMA,
        r"mov.pred\1, 0;",
        nth(0),
    ),
    Fault("a descriptor not advanced along K", r"(add\.s64\s+%\w+, %\w+), 2;", r"\1, 0;", nth(0)),
    Fault(
        "half the tensor memory allocated",
        r"mov\.b32(\s+%\w+), 512;(?=\s+tcgen05\.alloc)",
        r"mov.b32\1, 256;",
    ),
    dropped("wait for the kernel before", r"griddepcontrol\.wait"),
    dropped("dealloc", r"tcgen05\.dealloc[^;]*"),
    Fault("both loads from the lower lanes", r"(add\.s32\s+%\w+, %\w+), 1048576;", r"\1, 0;"),
    Fault("every lane issues the loads of a stage", ELECTED.format(""), "", nth(1)),
    Fault("every lane issues the MMA", ELECTED.format(r"(?=shl[^@]*?tcgen05\.cp)"), ""),
    Fault("stmatrix not transposed", r"x4\.trans\.shared", "x4.shared"),
    Fault("staging rows overlap", r"(stmatrix[^\[]*\[%\w+)\+512\]", r"\1+256]"),
    Fault(
        "the ring has one stage less for the MMA",
        r"(setp\.eq\.b32\s+%\w+, %\w+), 5;",
        r"\1, 4;",
        nth(-1),
    ),
]

SM90_FAULTS = [
    *SHARED_FAULTS,
    no_wait("producer, tile stored", nth(0)),
    no_wait("producer, stage empty", nth(1)),
    wrong_parity("producer, tile stored", nth(0)),
    wrong_parity("producer, stage empty", nth(1)),
    dropped("bar.sync after mbarrier.init", r"bar\.sync\s+0"),
    no_wait("fence warp, rows gathered", nth(2)),
    no_wait("gather, rows consumed", nth(3)),
    no_wait("consumers, stage full", slice(4, None)),
    wrong_parity("fence warp, rows gathered", nth(2)),
    wrong_parity("gather, rows consumed", nth(3)),
    wrong_parity("consumers, stage full", slice(4, None)),
    dropped("fence.proxy.async after cp.async", r"fence\.proxy\.async\S*"),
    dropped("arrival of the factors", r"mbarrier\.arrive\.shared\.b64[^;]*", nth(0)),
    dropped("arrival after the proxy fence", r"mbarrier\.arrive\.shared\.b64[^;]*", nth(1)),
    dropped("arrival of the gather", r"cp\.async\.mbarrier\.arrive\.noinc[^;]*"),
    Fault(
        "arrival of the gather before its copies end",
        GATHER + r"(\S*)\s+(\[[^;]*\]);",
        r"mbarrier.arrive\1 _, \2;",
    ),
    Fault("arrival of the gather without .noinc", r"(cp\.async\.mbarrier\.arrive)\.noinc", r"\1"),
    dropped("arrival of the consumers", r"mbarrier\.arrive\.shared\.b64[^;]*", slice(2, None)),
    dropped("wgmma.fence", r"wgmma\.fence\.sync\.aligned"),
    dropped("wgmma.commit_group", r"wgmma\.commit_group\.sync\.aligned"),
    dropped("the last wgmma.wait_group", r"wgmma\.wait_group\.sync\.aligned\s+0"),
    Fault("one group too many in flight", r"(wgmma\.wait_group\.sync\.aligned\s+)1;", r"\g<1>2;"),
    Fault(
        "a scale of the wrong step",
        r"mul\.rn\.bf16x2 (%\w+), (%\w+), both",
        r"mul.rn.bf16x2 \1, both, both",
        slice(0, 4),
    ),
    Fault(
        "low and high half of a scale swapped",
        r"mov\.b32 both, \{lo, lo\}",
        "mov.b32 both, {hi, hi}",
    ),
    Fault("a bulk copy one block off", BULK_COPY + r"\], \[%\w+)\]", r"\1+16]", nth(0)),
    Fault("a bulk copy to the wrong place", BULK_COPY + r")\]", r"\1+128]", nth(0)),
    Fault(
        "swizzle of the gathered rows off",
        r"(cp\.async\.cg\.shared\.global \[%\w+)\]",
        r"\1+16]",
        nth(0),
    ),
    Fault(
        "flag of partial sums not awaited",
        r"ld\.acquire\.gpu\.global\.b32 (%\w+), \[%\w+\];",
        r"mov.b32 \1, 1;",
    ),
    dropped("raising the flag of partial sums", r"st\.release\.gpu\.global\.b32[^;]*"),
    dropped("wait for the kernel before", r"griddepcontrol\.wait"),
]


CLUSTER_BARRIER = r"barrier\.cluster\.(?:arrive|wait)"
SM90_CLUSTER_FAULTS = [
    *SHARED_FAULTS,
    dropped("the cluster's meeting at the end", CLUSTER_BARRIER, slice(2, 4)),
    no_wait("producer, stage empty in both blocks", nth(1)),
    dropped("arrival of the consumers", r"mbarrier\.arrive\.shared::cluster[^;]*"),
    Fault(
        "arrival of the consumers at their own block, twice",
        r"mapa\.shared::cluster\.u32\s+(%\w+), (%\w+), %\w+;",
        r"mov.b32 \1, \2;",
    ),
    Fault(
        "rows for one block of the cluster",
        r"(cp\.async\.bulk\.tensor[^;]*), %rs\d+(, %\w+;)",
        r"{.reg .b16 one; mov.b16 one, 1; \1, one\2}",
    ),
]
# Caught where the warp that initialises barriers starves in the second block of a cluster.
FIRST_WARP_OF_THE_SECOND = 14  # after 12 warps and the lanes
SM90_CLUSTER_STARVED_FAULTS = [
    dropped("the cluster's meeting at the start", CLUSTER_BARRIER, slice(0, 2))
]

# Caught where the victim of mode "starved" is behind the others (`ptx_emulator.starvation`).
THEN_FLAG = r"(?=;[^;]*;[^;]*st\.release\.gpu)"
SM90_STARVED_FAULTS = [
    dropped("lanes joined before the flag of partial sums", r"bar\.warp\.sync[^;]*" + THEN_FLAG),
    dropped("lanes joined, anywhere", r"bar\.warp\.sync[^;]*"),
]


class Kernel(NamedTuple):
    """A kernel with a problem: `run(ptx, mode, seed)` raises, or says whether rows are right."""

    ptx: str
    run: Callable[[str, str, int], bool]
    orders: list[Order]


def sm90_kernel(
    monkeypatch,
    problem: sm90_problems.Problem,
    orders: list[Order],
    num_sms: int = 3,
    op: str = "fc1",
) -> Kernel:
    """Of which some tiles are split between blocks."""
    inputs = sm90_problems.make_inputs(problem)
    exact, live = sm90_problems.expected(problem, inputs, op), sm90_problems.live_rows(inputs)
    emulation = sm90_emulation.Emulation(num_sms=num_sms, max_instructions=MAX_INSTRUCTIONS)
    monkeypatch.setattr(sm90, "launch", emulation.launch)

    def run(ptx: str | None, mode: str, seed: int) -> bool:
        emulation.ptx, emulation.mode, emulation.seed = ptx, mode, seed
        return rounding_error(sm90_problems.run(problem, inputs, op)[live], exact[live]) <= 1

    assert run(None, "eager", 0)
    assert emulation.spills[0], "no tile is split"
    gemm = sm90.gemms(problem.shape, problem.num_tokens)[op == "fc2"]
    return Kernel(sm90_emulation.emulated(gemm).ptx, run, orders)


def sm100_kernel(monkeypatch, tile: int, op: str, orders: list[Order]) -> Kernel:
    """One cluster works on all tiles, one after another."""
    config = on_sm100.CONFIGS[tile]
    problem = on_sm100.make_problem([40, 0, 65, 300], config.tile)
    scales = on_sm100.ActivationScales(None, torch.rand(4) * 0.01 + 0.001)
    rows = torch.randn(len(problem.live), on_sm100.INTERMEDIATE)
    h, meaning = on_sm100.quantized_rows(problem, rows, scales.fc2)
    exact = on_sm100.oracle_fc2(problem, meaning)[problem.live]
    layer = on_sm100.layer_of(problem, scales)
    emulation = sm100_emulation.Emulation(clusters=1, max_instructions=MAX_INSTRUCTIONS)
    monkeypatch.setattr(on_sm100.sm100, "launch", emulation.launch)

    def run(ptx: str | None, mode: str, seed: int) -> bool:
        emulation.ptx, emulation.mode, emulation.seed = ptx, mode, seed
        if op == "fc1":
            on_sm100.check_fc1(emulation, problem, on_sm100.LIMIT)
            return True
        size = (len(problem.live), on_sm100.HIDDEN)
        out = aligned(torch.full(size, torch.nan, dtype=torch.bfloat16))
        on_sm100.sm100.fc2(h, problem.layout, layer, out=out)
        return rounding_error(out[problem.live], exact) <= 1

    assert run(None, "eager", 0)
    return Kernel(sm100_emulation.emulated(emulation.gemm).ptx, run, orders)


def how_caught(kernel: Kernel, ptx: str) -> str | None:
    """The report or the order that shows the fault, or None."""
    for mode, seed in kernel.orders:
        try:
            if not kernel.run(ptx, mode, seed):
                return f"wrong rows ({mode}, seed {seed})"
        except (EmulatorError, AssertionError) as error:
            return f"{str(error).splitlines()[0][:90]} ({mode}, seed {seed})"
    return None


def check_all(kernel: Kernel, faults: list[Fault]) -> None:
    assert all(kernel.run(kernel.ptx, mode, seed) for mode, seed in kernel.orders[:3])
    caught = {fault.what: how_caught(kernel, plant(kernel.ptx, fault)) for fault in faults}
    assert len(caught) == len(faults)
    for what, how in caught.items():
        print(f"  {what:55} {how or 'NOT CAUGHT'}")
    found = sum(how is not None for how in caught.values())
    print(f"  caught {found} of {len(faults)} kinds, {found / len(faults):.0%}")
    assert not [what for what, how in caught.items() if how is None]


def test_faults_in_the_sm100_kernel(monkeypatch):
    check_all(sm100_kernel(monkeypatch, 128, "fc2", ORDERS + MORE_ORDERS), SM100_FAULTS)


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("tile", on_sm100.CONFIGS)
def test_faults_under_a_starved_epilogue(monkeypatch, tile, op):
    """The MMA warp runs ahead of the epilogue, but for its wait for a free accumulator."""
    which = nth(2 if on_sm100.CONFIGS[tile].num_ctas == 2 else 1)
    faults = [no_wait("MMA, accumulator empty", which), wrong_parity("MMA, the same", which)]
    check_all(sm100_kernel(monkeypatch, tile, op, [("starved", 0)]), faults)


def test_faults_in_the_sm90_kernel(monkeypatch):
    problem = sm90_problems.Problem("faults", 11, 4, 2, 576, 256)
    check_all(sm90_kernel(monkeypatch, problem, ORDERS + MORE_ORDERS), SM90_FAULTS)


def test_fc2_of_the_sm90_kernel_that_does_not_wait_for_fc1(monkeypatch):
    problem = sm90_problems.Problem("faults", 3, 2, 2, 256, 448)
    wait = dropped("wait before the first rows", r"griddepcontrol\.wait", nth(0))
    check_all(sm90_kernel(monkeypatch, problem, ORDERS, op="fc2"), [wait])


def test_faults_in_the_sm90_kernel_of_a_cluster(monkeypatch, keep_sm90_choice):
    problem = sm90_problems.Problem("faults", 75, 4, 1, 384, 320, counts=(33, 0, 41, 1))
    config = Sm90Config(1, 2, (16, 32, 48), 64, cluster=2)
    sm90_problems.use_config(config)
    kernel = sm90_kernel(monkeypatch, problem, ORDERS + MORE_ORDERS, num_sms=4)
    check_all(kernel, SM90_CLUSTER_FAULTS)
    starved = kernel._replace(orders=[("starved", FIRST_WARP_OF_THE_SECOND)])
    check_all(starved, SM90_CLUSTER_STARVED_FAULTS)


def test_faults_under_starved_lanes_of_the_sm90_kernel(monkeypatch, keep_sm90_choice):
    problem = sm90_problems.Problem("starved", 3, 2, 2, 320, 128)
    config = Sm90Config(1, 4, (8, 16, 24, 32), 64)
    sm90_problems.use_config(config, gather=True)
    upper_lanes = 20  # after its 20 warps
    check_all(sm90_kernel(monkeypatch, problem, [("starved", upper_lanes)]), SM90_STARVED_FAULTS)
