"""Barriers and flags between warps and CTAs in the PTX emulator, by hand from PTX ISA 9.0."""

import numpy as np
import pytest

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.snippet import run_snippet

U32 = np.uint32
LANES = np.arange(32, dtype=U32)
MODES = ["eager", "lazy", "random"]


@pytest.mark.parametrize("mode", MODES)
def test_named_barriers_order_two_warps(mode):
    """Warp 1 arrives on barrier 2 after writing; warp 0 waits for it, with 64 threads."""
    target = np.zeros(32, U32)
    run_snippet(
        """
        mov.b32 %r1, smem;
        and.b32 %r5, lane, 31;
        mad.lo.u32 %r2, %r5, 4, %r1;
        setp.lt.u32 %p1, lane, 32;
        @%p1 bra READER;
        add.u32 %r3, %r5, 1000;
        st.shared.b32 [%r2], %r3;
        bar.arrive 2, 64;
        bra.uni DONE;
        READER:
        bar.sync 2, 64;
        ld.shared.b32 %r4, [%r2];
        mad.wide.u32 %rd1, %r5, 4, target;
        st.global.b32 [%rd1], %r4;
        DONE:
        """,
        {"target": target},
        warps=2,
        shared_bytes=128,
        mode=mode,
        seed=1,
    )
    assert np.array_equal(target, LANES + 1000)


@pytest.mark.parametrize("mode", MODES)
def test_an_mbarrier_of_the_other_cta(mode):
    """CTA 1 stores into CTA 0's shared memory and arrives there; CTA 0 waits for the phase."""
    target = np.zeros(1, U32)
    run_snippet(
        """
        mov.b32 %r1, smem;
        mov.u32 %r2, %cluster_ctarank;
        setp.eq.u32 %p1, lane, 0;
        setp.eq.and.u32 %p2, %r2, 0, %p1;
        @%p2 mbarrier.init.shared.b64 [%r1], 1;
        barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        setp.eq.and.u32 %p3, %r2, 1, %p1;
        mapa.shared::cluster.u32 %r3, %r1, 0;
        @%p3 st.shared::cluster.b32 [%r3+16], 77;
        @%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];
        @!%p2 bra DONE;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0;
        @!%p4 bra WAIT;
        ld.shared.b32 %r4, [%r1+16];
        st.global.b32 [target], %r4;
        DONE:
        barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        """,
        {"target": target},
        ctas=2,
        shared_bytes=32,
        mode=mode,
    )
    assert target[0] == 77


@pytest.mark.parametrize("mode", MODES)
def test_a_cta_polls_a_flag_of_a_later_cta(mode):
    """CTA 1 copies a value with the asynchronous unit, then raises the flag that CTA 0 polls."""
    flag, target = np.zeros(1, U32), np.zeros(1, U32)
    data = np.full(4, 55, U32)
    run_snippet(
        """
        mov.b32 %r1, smem;
        setp.ne.u32 %p1, lane, 0;
        @%p1 bra DONE;
        mov.u32 %r2, %ctaid.x;
        setp.eq.u32 %p2, %r2, 1;
        @%p2 bra PRODUCER;
        POLL:
        ld.acquire.gpu.global.b32 %r3, [flag];
        setp.eq.u32 %p3, %r3, 0;
        @%p3 bra POLL;
        st.global.b32 [target], %r3;
        bra.uni DONE;
        PRODUCER:
        mbarrier.init.shared.b64 [%r1], 1;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r1+16], [data], 16, [%r1];
        WAIT:
        mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0;
        @!%p4 bra WAIT;
        ld.shared.b32 %r5, [%r1+16];
        st.release.gpu.global.b32 [flag], %r5;
        DONE:
        """,
        {"flag": flag, "target": target, "data": data},
        ctas=2,
        shared_bytes=32,
        mode=mode,
    )
    assert target[0] == 55


@pytest.mark.parametrize("looks", [1, 500])
@pytest.mark.parametrize("mode", [*MODES, "starved"])
def test_a_poll_that_counts_its_looks_may_trap(mode, looks):
    """And one that does not ends in a deadlock."""
    poll = """
        mov.b32 %r2, 0;
        POLL:
        ld.acquire.gpu.global.b32 %r3, [flag];
        add.u32 %r2, %r2, 1;
        setp.eq.u32 %p2, %r2, {looks};
        @%p2 trap;
        setp.eq.u32 %p3, %r3, 0;
        @%p3 bra POLL;
        """
    for given, message in ((looks, "trap"), (0, "nothing can go on")):
        with pytest.raises(Finding, match=message):
            run_snippet(poll.format(looks=given), {"flag": np.zeros(1, U32)}, mode=mode)
