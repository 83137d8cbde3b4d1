"""Mistakes that the PTX emulator reports: memory, copies, barriers, launches."""

from typing import NamedTuple

SETUP = """
    mov.b32 %r1, smem;
    and.b32 %r5, lane, 31;
    setp.eq.u32 %p1, lane, 0;
    setp.lt.u32 %p3, lane, 32;
"""
INIT = "@%p1 mbarrier.init.shared.b64 [%r1], {count}; bar.sync 0;"
BULK_LOAD = """
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r1+1024], [data], {bytes}, [%r1];
"""
WAIT = """
    WAIT{n}:
    mbarrier.try_wait.parity.shared.b64 %p4, [%r1], {parity};
    @!%p4 bra WAIT{n};
"""
BULK_STORE = """
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [data], [%r1+1024], 128;
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group 0;
"""
BULK_STORE_NO_WAIT = BULK_STORE.rsplit("@", 1)[0]
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
STORE_REMOTE = f"""
    mov.u32 %r9, %cluster_ctarank;
    setp.eq.u32 %p6, %r9, 0;
    setp.eq.and.u32 %p7, %r9, 0, %p1;
    @%p7 mbarrier.init.shared.b64 [%r1], 1;
    {MEET}
    mapa.shared::cluster.u32 %r10, %r1, 0;
    mapa.shared::cluster.u32 %r11, %r1, 1;
    @%p6 bra STORES;
    @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r10];
    bra.uni LEAVES;
    STORES:
    {WAIT.format(n=0, parity=0)}
    @%p1 st.shared::cluster.b32 [%r11+16], 77;
    LEAVES:
"""
STORE_WORD = "mad.lo.u32 %r6, %r5, 4, %r1; st.shared.b32 [%r6+1024], 7;"


def bulk_load(expected: int = 128) -> str:
    """Thread 0 copies 128 bytes and waits for as many as it says."""
    return (
        INIT.format(count=1)
        + f"@!%p1 bra DONE; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {expected};"
        + BULK_LOAD.format(bytes=128)
        + WAIT.format(n=0, parity=0)
        + "DONE:"
    )


class Case(NamedTuple):
    kind: str  # of the Finding
    message: str  # regular expression
    wrong: str
    right: str | None = None
    warps: int = 1
    ctas: int = 1
    dependent: bool = False  # launched while the kernel that writes `data` may still run


MEMORY_CASES = {
    "no one arrives": Case(
        "deadlock",
        r"waits for mbarrier 0:0 \(pending 1 of 1, 0 bytes, 0 phases done\)",
        INIT.format(count=1) + WAIT.format(n=0, parity=0),
        INIT.format(count=1)
        + "@%p1 mbarrier.arrive.shared.b64 _, [%r1];"
        + WAIT.format(n=0, parity=0),
    ),
    "wait for the wrong parity": Case(
        "deadlock",
        "1 phases done",
        INIT.format(count=1)
        + "@%p1 mbarrier.arrive.shared.b64 _, [%r1];"
        + WAIT.format(n=0, parity=0)
        + WAIT.format(n=1, parity=1),
    ),
    "a warp skips bar.sync": Case(
        "deadlock",
        r"barrier 1 \(32 of 64 threads\)",
        "@%p3 bra DONE; bar.sync 1, 64; DONE:",
        "bar.sync 1, 64;",
        warps=2,
    ),
    "more bytes expected than copied": Case(
        "deadlock", "128 bytes, 0 phases", bulk_load(256), bulk_load()
    ),
    "bytes outstanding at exit": Case(
        "mbarrier",
        "exits with -128 bytes outstanding",
        INIT.format(count=1) + "@!%p1 bra DONE;" + BULK_LOAD.format(bytes=128) + "DONE:",
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
        INIT.format(count=1)
        + "@%p1 mbarrier.expect_tx.relaxed.cta.shared.b64 [%r1], 4112; @!%p1 bra DONE;"
        + BULK_LOAD.format(bytes=4112)
        + "DONE:",
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
        INIT.format(count=1) + "@!%p1 bra DONE;" + BULK_LOAD.format(bytes=8) + "DONE:",
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
        INIT.format(count=3) + "@%p1 mbarrier.arrive.shared.b64 _, [%r1], 4;",
        INIT.format(count=3) + "@%p1 mbarrier.arrive.shared.b64 _, [%r1], 3;",
    ),
    "a store over an mbarrier": Case(
        "mbarrier",
        "an ordinary store overwrites",
        INIT.format(count=1) + "@%p1 st.shared.b32 [%r1+4], 0;",
        INIT.format(count=1) + "@%p1 st.shared.b32 [%r1+8], 0;",
    ),
    "a bulk copy over an mbarrier": Case(
        "mbarrier",
        "overwrites an mbarrier object",
        INIT.format(count=1)
        + "@%p1 mbarrier.init.shared.b64 [%r1+1024], 1; @!%p1 bra DONE;"
        + "mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;"
        + BULK_LOAD.format(bytes=128)
        + WAIT.format(n=0, parity=0)
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
        STORE_REMOTE,
        STORE_REMOTE + MEET,
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
        bulk_load(),
        # Whoever waits for the copy knows as well.
        INIT.format(count=1)
        + "@!%p1 bra READS; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;"
        + "griddepcontrol.wait;"
        + BULK_LOAD.format(bytes=128)
        + "READS:"
        + WAIT.format(n=0, parity=0)
        + "ld.global.b32 %r2, [data];",
        warps=2,
        dependent=True,
    ),
    "barrier 16": Case("barrier", "a CTA has 16", "bar.sync 16;", "bar.sync 15;"),
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
    "a bulk store with no proxy fence": Case(
        "proxy-fence",
        "written by warp 0 with no fence.proxy.async",
        STORE_WORD + "bar.sync 0;" + BULK_STORE,
        STORE_WORD + "fence.proxy.async.shared::cta; bar.sync 0;" + BULK_STORE,
    ),
    "a proxy fence before the store": Case(
        "proxy-fence",
        "written by warp 0",
        "fence.proxy.async.shared::cta;" + STORE_WORD + "bar.sync 0;" + BULK_STORE,
    ),
    "a proxy fence by a warp that has not synchronised": Case(
        "proxy-fence",
        "written by warp 1",
        f"@%p3 bra FENCE; {STORE_WORD} bar.sync 0; bra.uni DONE;"
        "FENCE: fence.proxy.async.shared::cta; bar.sync 0;" + BULK_STORE + "DONE:",
        # After the barrier warp 0 has seen warp 1's stores, and its fence covers them.
        f"@%p3 bra FENCE; {STORE_WORD} bar.sync 0; bra.uni DONE;"
        "FENCE: bar.sync 0; fence.proxy.async.shared::cta;" + BULK_STORE + "DONE:",
        warps=2,
    ),
    "exit before a bulk store has read": Case(
        "async-wait",
        "thread 0 exits with a bulk store",
        STORE_WORD + "fence.proxy.async.shared::cta;" + BULK_STORE_NO_WAIT,
        STORE_WORD
        + "fence.proxy.async.shared::cta;"
        + BULK_STORE_NO_WAIT
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
    "a tensor map that is none": Case(
        "descriptor",
        "not a tiled tensor map",
        INIT.format(count=1)
        + "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
        + " [%r1+1024], [data, {0, 0}], [%r1];",
    ),
}
