"""Mistakes that the PTX emulator reports: wgmma, tcgen05, tensor memory."""

from tests.emulator.finding_cases import INIT, MEET, STORE_WORD, WAIT, Case

TMEM = """
    @!%p3 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+8], 64;
    ALLOCATED:
    bar.sync 0;
    ld.shared.b32 %r40, [%r1+8];
"""
FREE = """
    bar.sync 0;
    @!%p3 bra FREED;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 64;
    FREED:
"""
PAIR_TMEM = (TMEM + FREE).replace("cta_group::1", "cta_group::2")
ACCUMULATORS = "{%r100, %r101, %r102, %r103}"
# No swizzle, start at shared byte 1024 + 1024 of the system: (2048 >> 4), strides of 128 bytes.
DESCRIPTOR = 2048 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32
WGMMA_SETUP = f"""
    mov.b64 %rd1, {DESCRIPTOR};
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    mov.b32 %r100, 0; mov.b32 %r101, 0; mov.b32 %r102, 0; mov.b32 %r103, 0;
    setp.ne.u32 %p5, 0, 1;
"""
WGMMA = f"""
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {ACCUMULATORS},
        {{%r20, %r21, %r22, %r23}}, %rd1, %p5, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
"""
WGMMA_FENCE, WAIT_GROUP = "wgmma.fence.sync.aligned; ", "wgmma.wait_group.sync.aligned 0; "

# One column of tensor memory, in the lanes of the warp that executes it.
ST = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r40], {lane}; "
LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r40]; "
WAIT_LD = "tcgen05.wait::ld.sync.aligned; "
LD = LOAD + WAIT_LD
LD_OF_WARP = """
    shr.u32 %r42, lane, 5; shl.b32 %r42, %r42, 21; add.u32 %r42, %r40, %r42;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r42]; tcgen05.wait::ld.sync.aligned;
"""
WAIT_ST = "tcgen05.wait::st.sync.aligned; "
BEFORE, AFTER = "tcgen05.fence::before_thread_sync; ", "tcgen05.fence::after_thread_sync; "


def in_tmem(body: str, unless: str = "") -> str:
    """With 64 columns of tensor memory at %r40, but by lanes for which a predicate is true."""
    return TMEM + (f"@{unless} bra SKIP; {body} SKIP:" if unless else body) + FREE


def mma(matrices: int = 0x400800000080, instruction: int = 0x8040490, d: str = "%r40") -> str:
    """With those descriptors, of A and B the same."""
    return f"""
    mov.b64 %rd1, {matrices:#x}; setp.ne.u32 %p5, 0, 0;
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [{d}], %rd1, %rd1, {instruction:#x}, %p5;
    """


def hand_over(writer: str, reader: str) -> str:
    """Warp 0 writes column 0; after a barrier warp 4, which owns the same lanes, reads it."""
    return f"""
    {TMEM}
    setp.ge.u32 %p8, lane, 128;
    @!%p3 bra WRITTEN; {writer} WRITTEN:
    bar.sync 0;
    @!%p8 bra READ; {reader} READ:
    {FREE}
    """


def mma_over(accesses: str, fence: str) -> str:
    """Warps 0-3 read the accumulator of an MMA that warp 0 then issues again."""
    return f"""
    {TMEM}
    {INIT.format(count=1)}
    mov.b64 %rd1, 0x400800000080;
    setp.ne.u32 %p5, 0, 0;
    {accesses}
    bar.sync 0;
    @!%p1 bra ISSUED; {fence}
    tcgen05.mma.cta_group::1.kind::f16 [%r40], %rd1, %rd1, 0x8040490, %p5;
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];
    ISSUED:
    {WAIT.format(n=0, parity=0)}
    {FREE}
    """


MATRIX_CASES = {
    "tensor memory that is not allocated": Case(
        "out-of-bounds",
        "tensor memory columns 64..67; allocated: {0: 64}",
        in_tmem(
            "add.u32 %r41, %r40, 64;"
            "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r50, %r51, %r52, %r53}, [%r41];" + WAIT_LD,
            "!%p3",
        ),
    ),
    "a store to tensor memory without fence::before_thread_sync": Case(
        "tensor-order",
        "tcgen05.ld after warp 0 of CTA 0 wrote there, with no fence::before_thread_sync",
        hand_over(ST + WAIT_ST, AFTER + LD),
        hand_over(ST + WAIT_ST + BEFORE, AFTER + LD),
        warps=5,
    ),
    "a store to tensor memory told of before its wait": Case(
        "tensor-order",
        "with no fence::before_thread_sync, or a wait, on its side",
        hand_over(ST + BEFORE, AFTER + LD),
        warps=5,
    ),
    "a load from tensor memory without fence::after_thread_sync": Case(
        "tensor-order",
        "with no tcgen05.fence::after_thread_sync since it was waited for",
        hand_over(ST + WAIT_ST + BEFORE, LD),
        warps=5,
    ),
    "an MMA over what was read, without fence::before_thread_sync": Case(
        "tensor-order",
        "tcgen05.mma after warp 1 of CTA 0 read there, with no fence::before_thread_sync",
        mma_over(LD_OF_WARP, AFTER),
        mma_over(LD_OF_WARP + BEFORE, AFTER),
        warps=4,
    ),
    "an MMA over what was read, without fence::after_thread_sync": Case(
        "tensor-order",
        "tcgen05.mma after warp 1 of CTA 0 read there, with no tcgen05.fence::after_thread_sync",
        mma_over(LD_OF_WARP + BEFORE, ""),
        warps=4,
    ),
    "a result of an MMA without fence::after_thread_sync": Case(
        "tensor-order",
        "tcgen05.ld after the MMA pipe of CTA 0 wrote there, with no tcgen05.fence::after",
        mma_over("", "").replace(FREE, LD_OF_WARP + FREE),
        mma_over("", "").replace(FREE, AFTER + LD_OF_WARP + FREE),
        warps=4,
    ),
    "an accumulator at a lane": Case(
        "tmem",
        "tcgen05.mma D at lane 32; its data begin at lane 0",
        in_tmem("add.u32 %r41, %r40, 0x200000;" + mma(d="%r41")),
    ),
    "wgmma by three warps": Case(
        "divergent",
        r"warps 0\.\. issued \[1, 1, 1, 0\] wgmma",
        WGMMA_SETUP
        + "setp.ge.u32 %p2, lane, 96; @%p2 bra DONE;"
        + WGMMA_FENCE
        + WGMMA
        + WAIT_GROUP
        + "DONE:",
        warps=4,
    ),
    "wgmma with no proxy fence": Case(
        "proxy-fence",
        "the wgmma at line",
        STORE_WORD + "bar.sync 0;" + WGMMA_SETUP + WGMMA_FENCE + WGMMA + WAIT_GROUP,
        STORE_WORD
        + "fence.proxy.async.shared::cta; bar.sync 0;"
        + WGMMA_SETUP
        + WGMMA_FENCE
        + WGMMA
        + WAIT_GROUP,
        warps=4,
    ),
    "an accumulator read before wgmma.wait_group": Case(
        "async-wait",
        "the wgmma at line .* read before wgmma.wait_group",
        WGMMA_SETUP + WGMMA_FENCE + WGMMA + "add.f32 %r2, %r100, %r101;" + WAIT_GROUP,
        WGMMA_SETUP + WGMMA_FENCE + WGMMA + WAIT_GROUP + "add.f32 %r2, %r100, %r101;",
        warps=4,
    ),
    "an A fragment overwritten before wgmma.wait_group": Case(
        "async-wait",
        "reads a register, overwritten before wgmma.wait_group",
        WGMMA_SETUP + WGMMA_FENCE + WGMMA + "mov.b32 %r21, lane;" + WAIT_GROUP,
        WGMMA_SETUP
        + WGMMA_FENCE
        + WGMMA
        + "mov.b32 %r2, %r21;"
        + WAIT_GROUP
        + "mov.b32 %r21, lane;",
        warps=4,
    ),
    "a wait for an older group only": Case(
        "async-wait",
        "read before wgmma.wait_group",
        WGMMA_SETUP
        + WGMMA_FENCE
        + WGMMA
        + WGMMA
        + "wgmma.wait_group.sync.aligned 1; add.f32 %r2, %r100, %r101;"
        + WAIT_GROUP,
        warps=4,
    ),
    "wgmma without a wgmma.fence": Case(
        "async-wait", "without a wgmma.fence before it", WGMMA_SETUP + WGMMA + WAIT_GROUP, warps=4
    ),
    "an A fragment written after the wgmma.fence": Case(
        "async-wait",
        "takes a register written after the last wgmma.fence",
        WGMMA_SETUP + WGMMA_FENCE + "add.u32 %r21, lane, lane;" + WGMMA + WAIT_GROUP,
        WGMMA_SETUP + "add.u32 %r21, lane, lane;" + WGMMA_FENCE + WGMMA + WAIT_GROUP,
        warps=4,
    ),
    "a tcgen05.ld used before its wait": Case(
        "async-wait",
        "`tcgen05.ld` at line .* read before tcgen05.wait::ld",
        in_tmem(LOAD + "add.u32 %r2, %r50, 1;" + WAIT_LD, "!%p3"),
        in_tmem(LOAD + WAIT_LD + "add.u32 %r2, %r50, 1;", "!%p3"),
    ),
    "a tcgen05.ld overwritten before its wait": Case(
        "async-wait",
        "overwritten before tcgen05.wait::ld",
        in_tmem(LOAD + "mov.b32 %r50, lane;" + WAIT_LD, "!%p3"),
    ),
    "tensor memory kept at exit": Case("tmem", "exits owning columns {0: 64}", TMEM, TMEM + FREE),
    "48 columns": Case(
        "tmem",
        "a power of 2 from 32 to 512",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+8], 48;",
    ),
    "more columns than there are": Case(
        "tmem",
        "64 are in use",
        in_tmem("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+16], 512;"),
    ),
    "an alloc after giving up the permit": Case(
        "tmem",
        "after relinquish_alloc_permit",
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" + TMEM + FREE,
    ),
    "an alloc for a pair of which one CTA may not have started": Case(
        "tmem", "a pair whose CTAs have not met", PAIR_TMEM + MEET, MEET + PAIR_TMEM + MEET, ctas=2
    ),
    "columns freed that were not allocated": Case(
        "tmem",
        "dealloc of 32 columns at 0; owned: {0: 64}",
        TMEM + "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 32;",
    ),
    "another warp's lanes": Case(
        "tmem",
        r"of lanes 0\.\. by warp 1, which owns 32\.\.63",
        in_tmem(LD, "%p3"),
        in_tmem("add.u32 %r41, %r40, 0x200000;" + LD.replace("%r40", "%r41"), "%p3"),
        warps=2,
    ),
    "an instruction descriptor of M 64": Case(
        "descriptor",
        "tcgen05.mma of M 64, N 16",
        in_tmem(mma(matrices=0x400000000080, instruction=0x4040490)),
    ),
    "a matrix descriptor of no version": Case(
        "descriptor", "version, bits 46-48", in_tmem(mma(matrices=0x80))
    ),
}
