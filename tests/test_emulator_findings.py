"""Every kind of mistake that the PTX emulator reports, each in a few lines of PTX.

Each case has its correct twin: the same lines with the missing one in place run without a report.
"""

from typing import NamedTuple

import numpy as np
import pytest

from tests.ptx_emulator.findings import Finding
from tests.ptx_emulator.snippet import run_snippet

MODES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1), ("starved", 0)]
_SETUP = """
    mov.b32 %r1, smem;
    and.b32 %r5, lane, 31;
    setp.eq.u32 %p1, lane, 0;
    setp.lt.u32 %p3, lane, 32;
"""
_INIT = "@%p1 mbarrier.init.shared.b64 [%r1], {count}; bar.sync 0;"
_BULK_LOAD = """
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r1+1024], [data], {bytes}, [%r1];
"""
_WAIT = """
    WAIT{n}:
    mbarrier.try_wait.parity.shared.b64 %p4, [%r1], {parity};
    @!%p4 bra WAIT{n};
"""
_BULK_STORE = """
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [data], [%r1+1024], 128;
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group 0;
"""
_BULK_STORE_NO_WAIT = _BULK_STORE.rsplit("@", 1)[0]
_TMEM = """
    @!%p3 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+8], 64;
    ALLOCATED:
    bar.sync 0;
    ld.shared.b32 %r40, [%r1+8];
"""
_FREE = """
    bar.sync 0;
    @!%p3 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 64;
    FREED:
"""
_PAIR_TMEM = (_TMEM + _FREE).replace("cta_group::1", "cta_group::2")
_MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
_MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
_STORE_REMOTE = f"""
    mov.u32 %r9, %cluster_ctarank;
    setp.eq.u32 %p6, %r9, 0;
    setp.eq.and.u32 %p7, %r9, 0, %p1;
    @%p7 mbarrier.init.shared.b64 [%r1], 1;
    {_MEET}
    mapa.shared::cluster.u32 %r10, %r1, 0;
    mapa.shared::cluster.u32 %r11, %r1, 1;
    @%p6 bra STORES;
    @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r10];
    bra.uni LEAVES;
    STORES:
    {_WAIT.format(n=0, parity=0)}
    @%p1 st.shared::cluster.b32 [%r11+16], 77;
    LEAVES:
"""
_STORE_WORD = "mad.lo.u32 %r6, %r5, 4, %r1; st.shared.b32 [%r6+1024], 7;"
_ACCUMULATORS = "{%r100, %r101, %r102, %r103}"
_WGMMA_SETUP = """
    mov.b64 %rd1, {descriptor};
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    mov.b32 %r100, 0; mov.b32 %r101, 0; mov.b32 %r102, 0; mov.b32 %r103, 0;
    setp.ne.u32 %p5, 0, 1;
"""
_WGMMA = f"""
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {_ACCUMULATORS},
        {{%r20, %r21, %r22, %r23}}, %rd1, %p5, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
"""
# No swizzle, start at shared byte 1024 + 1024 of the system: (2048 >> 4), strides of 128 bytes.
_DESCRIPTOR = 2048 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32


# One column of tensor memory, in the lanes of the warp that executes it.
_ST = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r40], {lane}; "
_LD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r40]; tcgen05.wait::ld.sync.aligned; "
_LD_OF_WARP = """
    shr.u32 %r42, lane, 5; shl.b32 %r42, %r42, 21; add.u32 %r42, %r40, %r42;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r42]; tcgen05.wait::ld.sync.aligned;
"""
_WAIT_ST = "tcgen05.wait::st.sync.aligned; "
_BEFORE, _AFTER = "tcgen05.fence::before_thread_sync; ", "tcgen05.fence::after_thread_sync; "


def _hand_over(writer: str, reader: str) -> str:
    """Warp 0 writes column 0; after a barrier warp 4, which owns the same lanes, reads it."""
    return f"""
    {_TMEM}
    setp.ge.u32 %p8, lane, 128;
    @!%p3 bra WRITTEN; {writer} WRITTEN:
    bar.sync 0;
    @!%p8 bra READ; {reader} READ:
    {_FREE}
    """


def _mma_over(accesses: str, fence: str) -> str:
    """Warps 0-3 read the accumulator of an MMA that warp 0 then issues again."""
    return f"""
    {_TMEM}
    {_INIT.format(count=1)}
    mov.b64 %rd1, 0x400800000080;
    setp.ne.u32 %p5, 0, 0;
    {accesses}
    bar.sync 0;
    @!%p1 bra ISSUED; {fence}
    tcgen05.mma.cta_group::1.kind::f16 [%r40], %rd1, %rd1, 0x8040490, %p5;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];
    ISSUED:
    {_WAIT.format(n=0, parity=0)}
    {_FREE}
    """


class Case(NamedTuple):
    kind: str  # of the Finding
    message: str  # regular expression
    wrong: str
    right: str | None = None
    warps: int = 1
    ctas: int = 1
    dependent: bool = False  # launched while the kernel that writes `data` may still run


CASES = {
    "no one arrives": Case(
        "deadlock",
        r"waits for mbarrier 0:0 \(pending 1 of 1, 0 bytes, 0 phases done\)",
        _INIT.format(count=1) + _WAIT.format(n=0, parity=0),
        _INIT.format(count=1)
        + "@%p1 mbarrier.arrive.shared.b64 _, [%r1];"
        + _WAIT.format(n=0, parity=0),
    ),
    "wait for the wrong parity": Case(
        "deadlock",
        "1 phases done",
        _INIT.format(count=1)
        + "@%p1 mbarrier.arrive.shared.b64 _, [%r1];"
        + _WAIT.format(n=0, parity=0)
        + _WAIT.format(n=1, parity=1),
    ),
    "a warp skips bar.sync": Case(
        "deadlock",
        r"barrier 1 \(32 of 64 threads\)",
        "@%p3 bra DONE; bar.sync 1, 64; DONE:",
        "bar.sync 1, 64;",
        warps=2,
    ),
    "more bytes expected than copied": Case(
        "deadlock",
        "128 bytes, 0 phases",
        _INIT.format(count=1)
        + "@!%p1 bra DONE; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 256;"
        + _BULK_LOAD.format(bytes=128)
        + _WAIT.format(n=0, parity=0)
        + "DONE:",
        _INIT.format(count=1)
        + "@!%p1 bra DONE; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;"
        + _BULK_LOAD.format(bytes=128)
        + _WAIT.format(n=0, parity=0)
        + "DONE:",
    ),
    "bytes outstanding at exit": Case(
        "mbarrier",
        "exits with -128 bytes outstanding",
        _INIT.format(count=1) + "@!%p1 bra DONE;" + _BULK_LOAD.format(bytes=128) + "DONE:",
    ),
    "an endless loop": Case("livelock", "more than", "LOOP: bra.uni LOOP;"),
    "global store past the end": Case(
        "out-of-bounds",
        r"nearest is data of 4096 bytes, the access is at byte 4096",
        "mad.wide.u32 %rd1, lane, 4, data; st.global.b32 [%rd1+3972], lane;",
        "mad.wide.u32 %rd1, lane, 4, data; st.global.b32 [%rd1+3968], lane;",
    ),
    "global load before the start": Case(
        "out-of-bounds", "at byte -4", "ld.global.b32 %r2, [data+-4];", "ld.global.b32 %r2, [data];"
    ),
    "shared store past the end": Case(
        "out-of-bounds",
        "shared write of 4 bytes at byte 8192 of 8192",
        "st.shared.b32 [%r1+8192], 1;",
        "st.shared.b32 [%r1+8188], 1;",
    ),
    "bulk copy past the end of a buffer": Case(
        "out-of-bounds",
        "cp.async.bulk of 4112 bytes",
        _INIT.format(count=1)
        + "@%p1 mbarrier.expect_tx.relaxed.cta.shared.b64 [%r1], 4112; @!%p1 bra DONE;"
        + _BULK_LOAD.format(bytes=4112)
        + "DONE:",
    ),
    "tensor memory that is not allocated": Case(
        "out-of-bounds",
        "tensor memory columns 64..67; allocated: {0: 64}",
        _TMEM
        + "@!%p3 bra SKIP; add.u32 %r41, %r40, 64;"
        + "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r50, %r51, %r52, %r53}, [%r41];"
        + "tcgen05.wait::ld.sync.aligned; SKIP:"
        + _FREE,
    ),
    "a vector load at half its size": Case(
        "misaligned",
        "load of 16 bytes",
        "ld.global.v4.b32 {%r2, %r3, %r4, %r6}, [data+8];",
        "ld.global.v4.b32 {%r2, %r3, %r4, %r6}, [data+16];",
    ),
    "a bulk copy of 8 bytes": Case(
        "misaligned",
        "cp.async.bulk of 8 bytes",
        _INIT.format(count=1) + "@!%p1 bra DONE;" + _BULK_LOAD.format(bytes=8) + "DONE:",
    ),
    "an mbarrier at 4": Case(
        "misaligned", "a multiple of 8", "@%p1 mbarrier.init.shared.b64 [%r1+4], 1;"
    ),
    "an mbarrier without init": Case(
        "mbarrier",
        "none was initialised at shared byte 0",
        "@%p1 mbarrier.arrive.shared.b64 _, [%r1];",
    ),
    "two inits": Case(
        "mbarrier",
        "in use",
        "@%p1 mbarrier.init.shared.b64 [%r1], 1; @%p1 mbarrier.init.shared.b64 [%r1], 1;",
        "@%p1 mbarrier.init.shared.b64 [%r1], 1; @%p1 mbarrier.inval.shared.b64 [%r1];"
        "@%p1 mbarrier.init.shared.b64 [%r1], 1;",
    ),
    "more arrivals than the count": Case(
        "mbarrier",
        "more arrivals than the count of 3",
        _INIT.format(count=3) + "@%p1 mbarrier.arrive.shared.b64 _, [%r1], 4;",
        _INIT.format(count=3) + "@%p1 mbarrier.arrive.shared.b64 _, [%r1], 3;",
    ),
    "a store over an mbarrier": Case(
        "mbarrier",
        "an ordinary store overwrites",
        _INIT.format(count=1) + "@%p1 st.shared.b32 [%r1+4], 0;",
        _INIT.format(count=1) + "@%p1 st.shared.b32 [%r1+8], 0;",
    ),
    "a bulk copy over an mbarrier": Case(
        "mbarrier",
        "overwrites an mbarrier object",
        _INIT.format(count=1)
        + "@%p1 mbarrier.init.shared.b64 [%r1+1024], 1; @!%p1 bra DONE;"
        + "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;"
        + _BULK_LOAD.format(bytes=128)
        + _WAIT.format(n=0, parity=0)
        + "DONE:",
    ),
    "threads that differ about a barrier": Case(
        "barrier",
        "others said",
        "@%p3 bra FIRST; bar.sync 1, 96; bra.uni DONE; FIRST: bar.sync 1, 64; DONE:",
        warps=2,
    ),
    "a store to a CTA that has ended": Case(
        "exited",
        r"CTA \(0, 0, 0\) reaches CTA \(1, 0, 0\), which has ended",
        _STORE_REMOTE,
        _STORE_REMOTE + _MEET,
        ctas=2,
    ),
    "a load before griddepcontrol.wait": Case(
        "dependence",
        "load of data by warp 0 before griddepcontrol.wait",
        "ld.global.b32 %r2, [data]; griddepcontrol.wait;",
        "griddepcontrol.wait; ld.global.b32 %r2, [data];",
        dependent=True,
    ),
    "a store before griddepcontrol.wait": Case(
        "dependence",
        "store of data by warp 1 before griddepcontrol.wait",
        "@!%p3 st.global.b32 [data], 1; griddepcontrol.wait;",
        "@%p3 griddepcontrol.wait; bar.sync 0; @!%p3 st.global.b32 [data], 1;",
        warps=2,
        dependent=True,
    ),
    "a bulk copy before griddepcontrol.wait": Case(
        "dependence",
        "cp.async.bulk of data by warp 0",
        _INIT.format(count=1)
        + "@!%p1 bra DONE; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;"
        + _BULK_LOAD.format(bytes=128)
        + _WAIT.format(n=0, parity=0)
        + "DONE:",
        # Whoever waits for the copy knows as well.
        _INIT.format(count=1)
        + "@!%p1 bra READS; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;"
        + "griddepcontrol.wait;"
        + _BULK_LOAD.format(bytes=128)
        + "READS:"
        + _WAIT.format(n=0, parity=0)
        + "ld.global.b32 %r2, [data];",
        warps=2,
        dependent=True,
    ),
    "a store to tensor memory without fence::before_thread_sync": Case(
        "tensor-order",
        "tcgen05.ld after warp 0 of CTA 0 wrote there, with no fence::before_thread_sync",
        _hand_over(_ST + _WAIT_ST, _AFTER + _LD),
        _hand_over(_ST + _WAIT_ST + _BEFORE, _AFTER + _LD),
        warps=5,
    ),
    "a store to tensor memory told of before its wait": Case(
        "tensor-order",
        "with no fence::before_thread_sync, or a wait, on its side",
        _hand_over(_ST + _BEFORE, _AFTER + _LD),
        warps=5,
    ),
    "a load from tensor memory without fence::after_thread_sync": Case(
        "tensor-order",
        "with no tcgen05.fence::after_thread_sync since it was waited for",
        _hand_over(_ST + _WAIT_ST + _BEFORE, _LD),
        warps=5,
    ),
    "an MMA over what was read, without fence::before_thread_sync": Case(
        "tensor-order",
        "tcgen05.mma after warp 1 of CTA 0 read there, with no fence::before_thread_sync",
        _mma_over(_LD_OF_WARP, _AFTER),
        _mma_over(_LD_OF_WARP + _BEFORE, _AFTER),
        warps=4,
    ),
    "an MMA over what was read, without fence::after_thread_sync": Case(
        "tensor-order",
        "tcgen05.mma after warp 1 of CTA 0 read there, with no tcgen05.fence::after_thread_sync",
        _mma_over(_LD_OF_WARP + _BEFORE, ""),
        warps=4,
    ),
    "a result of an MMA without fence::after_thread_sync": Case(
        "tensor-order",
        "tcgen05.ld after the MMA pipe of CTA 0 wrote there, with no tcgen05.fence::after",
        _mma_over("", "").replace(_FREE, _LD_OF_WARP + _FREE),
        _mma_over("", "").replace(_FREE, _AFTER + _LD_OF_WARP + _FREE),
        warps=4,
    ),
    "barrier 16": Case("barrier", "a CTA has 16", "bar.sync 16;", "bar.sync 15;"),
    "an accumulator at a lane": Case(
        "tmem",
        "tcgen05.mma D at lane 32; its data begin at lane 0",
        _TMEM
        + "mov.b64 %rd1, 0x400800000080; setp.ne.u32 %p5, 0, 0; add.u32 %r41, %r40, 0x200000;"
        + "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r41], %rd1, %rd1, 0x8040490, %p5;"
        + _FREE,
    ),
    "more registers than there are": Case(
        "launch",
        "setmaxnreg leaves 66560 registers in use of 65536",
        "setp.lt.u32 %p2, lane, 128; @%p2 bra UP; setmaxnreg.dec.sync.aligned.u32 56;"
        "bra.uni DONE; UP: setmaxnreg.inc.sync.aligned.u32 240; DONE:",
        "setp.lt.u32 %p2, lane, 128; @%p2 bra UP; setmaxnreg.dec.sync.aligned.u32 56;"
        "bra.uni DONE; UP: setmaxnreg.inc.sync.aligned.u32 232; DONE:",
        warps=24,
    ),
    "registers of half a warpgroup": Case(
        "launch",
        r"warps 0\.\. ask for \[40, 40, 0, 0\] registers",
        "setp.lt.u32 %p2, lane, 64; @%p2 setmaxnreg.dec.sync.aligned.u32 40;",
        "setmaxnreg.dec.sync.aligned.u32 40;",
        warps=4,
    ),
    "wgmma by three warps": Case(
        "divergent",
        r"warps 0\.\. issued \[1, 1, 1, 0\] wgmma",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "setp.ge.u32 %p2, lane, 96; @%p2 bra DONE; wgmma.fence.sync.aligned;"
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 0; DONE:",
        warps=4,
    ),
    "a bulk store with no proxy fence": Case(
        "proxy-fence",
        "written by warp 0 with no fence.proxy.async",
        _STORE_WORD + "bar.sync 0;" + _BULK_STORE,
        _STORE_WORD + "fence.proxy.async.shared::cta; bar.sync 0;" + _BULK_STORE,
    ),
    "a proxy fence before the store": Case(
        "proxy-fence",
        "written by warp 0",
        "fence.proxy.async.shared::cta;" + _STORE_WORD + "bar.sync 0;" + _BULK_STORE,
    ),
    "a proxy fence by a warp that has not synchronised": Case(
        "proxy-fence",
        "written by warp 1",
        f"@%p3 bra FENCE; {_STORE_WORD} bar.sync 0; bra.uni DONE;"
        "FENCE: fence.proxy.async.shared::cta; bar.sync 0;" + _BULK_STORE + "DONE:",
        # After the barrier warp 0 has seen warp 1's stores, and its fence covers them.
        f"@%p3 bra FENCE; {_STORE_WORD} bar.sync 0; bra.uni DONE;"
        "FENCE: bar.sync 0; fence.proxy.async.shared::cta;" + _BULK_STORE + "DONE:",
        warps=2,
    ),
    "wgmma with no proxy fence": Case(
        "proxy-fence",
        "the wgmma at line",
        _STORE_WORD
        + "bar.sync 0;"
        + _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 0;",
        _STORE_WORD
        + "fence.proxy.async.shared::cta; bar.sync 0;"
        + _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 0;",
        warps=4,
    ),
    "an accumulator read before wgmma.wait_group": Case(
        "async-wait",
        "the wgmma at line .* read before wgmma.wait_group",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + "add.f32 %r2, %r100, %r101; wgmma.wait_group.sync.aligned 0;",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 0; add.f32 %r2, %r100, %r101;",
        warps=4,
    ),
    "an A fragment overwritten before wgmma.wait_group": Case(
        "async-wait",
        "reads a register, overwritten before wgmma.wait_group",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + "mov.b32 %r21, lane; wgmma.wait_group.sync.aligned 0;",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + "mov.b32 %r2, %r21; wgmma.wait_group.sync.aligned 0; mov.b32 %r21, lane;",
        warps=4,
    ),
    "a wait for an older group only": Case(
        "async-wait",
        "read before wgmma.wait_group",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned;"
        + _WGMMA
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 1; add.f32 %r2, %r100, %r101;"
        + "wgmma.wait_group.sync.aligned 0;",
        warps=4,
    ),
    "wgmma without a wgmma.fence": Case(
        "async-wait",
        "without a wgmma.fence before it",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR) + _WGMMA + "wgmma.wait_group.sync.aligned 0;",
        warps=4,
    ),
    "an A fragment written after the wgmma.fence": Case(
        "async-wait",
        "takes a register written after the last wgmma.fence",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "wgmma.fence.sync.aligned; add.u32 %r21, lane, lane;"
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 0;",
        _WGMMA_SETUP.format(descriptor=_DESCRIPTOR)
        + "add.u32 %r21, lane, lane; wgmma.fence.sync.aligned;"
        + _WGMMA
        + "wgmma.wait_group.sync.aligned 0;",
        warps=4,
    ),
    "a tcgen05.ld used before its wait": Case(
        "async-wait",
        "`tcgen05.ld` at line .* read before tcgen05.wait::ld",
        _TMEM
        + "@!%p3 bra SKIP; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r40];"
        + "add.u32 %r2, %r50, 1; tcgen05.wait::ld.sync.aligned; SKIP:"
        + _FREE,
        _TMEM
        + "@!%p3 bra SKIP; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r40];"
        + "tcgen05.wait::ld.sync.aligned; add.u32 %r2, %r50, 1; SKIP:"
        + _FREE,
    ),
    "a tcgen05.ld overwritten before its wait": Case(
        "async-wait",
        "overwritten before tcgen05.wait::ld",
        _TMEM
        + "@!%p3 bra SKIP; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r40];"
        + "mov.b32 %r50, lane; tcgen05.wait::ld.sync.aligned; SKIP:"
        + _FREE,
    ),
    "exit before a bulk store has read": Case(
        "async-wait",
        "thread 0 exits with a bulk store",
        _STORE_WORD + "fence.proxy.async.shared::cta;" + _BULK_STORE_NO_WAIT,
        _STORE_WORD
        + "fence.proxy.async.shared::cta;"
        + _BULK_STORE_NO_WAIT
        + "cp.async.bulk.wait_group.read 0;",
    ),
    "shfl by half a warp": Case(
        "divergent",
        "shfl.sync.idx|other lanes of its warp",
        "setp.lt.u32 %p2, lane, 16; @%p2 bra HALF; bra.uni DONE;"
        "HALF: shfl.sync.idx.b32 %r2, lane, 0, 31, -1; DONE:",
        "setp.lt.u32 %p2, lane, 16; shfl.sync.idx.b32 %r2, lane, 0, 31, -1;",
    ),
    "a guarded bar.sync inside a warp": Case(
        "divergent",
        "by a part of a warp",
        "setp.lt.u32 %p2, lane, 16; @%p2 bar.sync 0;",
        "setp.lt.u32 %p2, lane, 32; @%p2 bar.sync 0;",
    ),
    "tensor memory kept at exit": Case(
        "tmem", "exits owning columns {0: 64}", _TMEM, _TMEM + _FREE
    ),
    "48 columns": Case(
        "tmem",
        "a power of 2 from 32 to 512",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+8], 48;",
    ),
    "more columns than there are": Case(
        "tmem",
        "64 are in use",
        _TMEM + "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+16], 512;" + _FREE,
    ),
    "an alloc after giving up the permit": Case(
        "tmem",
        "after relinquish_alloc_permit",
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" + _TMEM + _FREE,
    ),
    "an alloc for a pair of which one CTA may not have started": Case(
        "tmem",
        "a pair whose CTAs have not met",
        _PAIR_TMEM + _MEET,
        _MEET + _PAIR_TMEM + _MEET,
        ctas=2,
    ),
    "columns freed that were not allocated": Case(
        "tmem",
        "dealloc of 32 columns at 0; owned: {0: 64}",
        _TMEM + "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 32;",
    ),
    "another warp's lanes": Case(
        "tmem",
        r"of lanes 0\.\. by warp 1, which owns 32\.\.63",
        _TMEM
        + "@%p3 bra SKIP; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r40];"
        + "tcgen05.wait::ld.sync.aligned; SKIP:"
        + _FREE,
        _TMEM
        + "@%p3 bra SKIP; add.u32 %r41, %r40, 0x200000;"
        + "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r41];"
        + "tcgen05.wait::ld.sync.aligned; SKIP:"
        + _FREE,
        warps=2,
    ),
    "an instruction descriptor of M 64": Case(
        "descriptor",
        "tcgen05.mma of M 64, N 16",
        _TMEM
        + "mov.b64 %rd1, 0x400000000080; setp.ne.u32 %p5, 0, 0;"
        + "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r40], %rd1, %rd1, 0x4040490, %p5;"
        + _FREE,
    ),
    "a matrix descriptor of no version": Case(
        "descriptor",
        "version, bits 46-48",
        _TMEM
        + "mov.b64 %rd1, 0x80; setp.ne.u32 %p5, 0, 0;"
        + "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r40], %rd1, %rd1, 0x8040490, %p5;"
        + _FREE,
    ),
    "a tensor map that is none": Case(
        "descriptor",
        "not a tiled tensor map",
        _INIT.format(count=1)
        + "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
        + " [%r1+1024], [data, {0, 0}], [%r1];",
    ),
}


def _run(case: Case, body: str, mode: str, seed: int) -> None:
    data = np.zeros(1024, np.uint32)
    run_snippet(
        _SETUP + body,
        {"data": data},
        warps=case.warps,
        ctas=case.ctas,
        produced=("data",) if case.dependent else (),
        shared_bytes=8192,
        mode=mode,
        seed=seed,
    )


@pytest.mark.parametrize(("mode", "seed"), MODES, ids=[f"{m}-{s}" for m, s in MODES])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_mistake_is_reported(case, mode, seed):
    with pytest.raises(Finding, match=case.message) as found:
        _run(case, case.wrong, mode, seed)
    assert found.value.kind == case.kind


@pytest.mark.parametrize(("mode", "seed"), MODES, ids=[f"{m}-{s}" for m, s in MODES])
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.right], ids=[n for n, c in CASES.items() if c.right]
)
def test_the_correct_form_is_not_reported(case, mode, seed):
    _run(case, case.right, mode, seed)


def test_every_kind_has_a_case():
    assert {case.kind for case in CASES.values()} == set(Finding.KINDS)


def test_a_report_says_where():
    with pytest.raises(Finding, match=r"at line \d+: st\.global\.b32") as found:
        run_snippet("st.global.b32 [data+64], lane;", {"data": np.zeros(4, np.uint32)})
    assert "warp 0 of CTA (0, 0, 0), mode eager, seed 0" in str(found.value)
