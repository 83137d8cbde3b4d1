"""Memory, copies and warp collectives of the PTX emulator against PTX ISA 9.0 by hand."""

import numpy as np
import pytest

from tests.emulator.ptx_emulator.snippet import lanewise, run_snippet

U32 = np.uint32
LANES = np.arange(32, dtype=U32)
MODES = ["eager", "lazy", "random"]


# `ld`, `st`: vectors up to 256 bits, sign extension, shared and generic addresses.


@pytest.mark.parametrize(
    ("form", "registers"),
    [("v2.b32", 2), ("v4.b32", 4), ("v8.b32", 8), ("v4.b64", 4), ("v2.b64", 2), ("b64", 1)],
)
def test_vector_copy(form, registers):
    bits = int(form[-2:])
    size = registers * bits // 8
    source = np.random.default_rng(0).integers(0, 256, 32 * size, np.uint8)
    target = np.zeros_like(source)
    names = ", ".join(f"%r{i}" if bits == 32 else f"%rd{i}" for i in range(registers))
    vector = f"{{{names}}}" if registers > 1 else names
    run_snippet(
        f"""
        mad.wide.u32 %rd20, lane, {size}, source;
        mad.wide.u32 %rd21, lane, {size}, target;
        ld.global.{form} {vector}, [%rd20];
        st.global.{form} [%rd21], {vector};
        """,
        {"source": source, "target": target},
    )
    assert np.array_equal(source, target)


@pytest.mark.parametrize(
    ("kind", "expected"), [("s8", -2), ("u8", 254), ("s16", -258), ("u16", 65278)]
)
def test_narrow_loads_extend(kind, expected):
    source = np.array([-2, -2], np.int8)  # as 16 bits fefe, -258
    target = np.zeros(1, np.int32)
    run_snippet(
        f"ld.global.{kind} %r1, [source]; st.global.b32 [target], %r1;",
        {"source": source, "target": target},
    )
    assert target[0] == expected


def test_shared_memory_by_shared_and_generic_address():
    got = lanewise(
        """
        mov.b32 %r1, smem;
        mad.lo.u32 %r2, lane, 4, %r1;
        st.shared.b32 [%r2], lane;
        bar.warp.sync -1;
        xor.b32 %r3, lane, 1;
        mad.lo.u32 %r4, %r3, 4, %r1;
        cvt.u64.u32 %rd1, %r4;
        cvta.shared.u64 %rd2, %rd1;
        ld.b32 d, [%rd2];
        """,
        {"d": U32},
        shared_bytes=128,
    )
    assert np.array_equal(got["d"], LANES ^ 1)


# `atom`, `red`: each lane's operation happens; atom returns what was there.


def test_atomics():
    counter = np.array([100], U32)
    largest = np.array([-5], np.int32)
    old = np.zeros(32, U32)
    run_snippet(
        """
        atom.global.add.u32 %r1, [counter], 2;
        red.global.max.s32 [largest], lane;
        mad.wide.u32 %rd1, lane, 4, old;
        st.global.b32 [%rd1], %r1;
        """,
        {"counter": counter, "largest": largest, "old": old},
    )
    assert counter[0] == 164 and largest[0] == 31
    assert sorted(old.tolist()) == list(range(100, 164, 2))


def test_compare_and_swap_and_exchange():
    cell, old = np.array([7], U32), np.zeros(32, U32)
    run_snippet(
        """
        atom.global.cas.b32 %r1, [cell], 7, 9;
        setp.eq.u32 %p1, lane, 31;
        @%p1 atom.global.exch.b32 %r1, [cell], 5;
        mad.wide.u32 %rd1, lane, 4, old;
        st.global.b32 [%rd1], %r1;
        """,
        {"cell": cell, "old": old},
    )
    assert cell[0] == 5 and old.tolist() == [7] + [9] * 31


# `ldmatrix`, `stmatrix`: thread t holds elements 2 (t % 4) and + 1 of row t / 4.


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
def test_ldmatrix(transposed):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    target = np.zeros((32, 4), U32)
    trans = ".trans" if transposed else ""
    run_snippet(
        f"""
        mov.b32 %r1, smem;
        mad.lo.u32 %r2, lane, 16, %r1;
        mad.wide.u32 %rd1, lane, 16, source;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd1];
        st.shared.v4.b32 [%r2], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r2];
        mad.wide.u32 %rd2, lane, 16, target;
        st.global.v4.b32 [%rd2], {{%r20, %r21, %r22, %r23}};
        """,
        {"source": matrices, "target": target},
        shared_bytes=512,
    )
    got = target.view(np.uint16).reshape(32, 4, 2)
    for thread in range(32):
        row, column = thread // 4, thread % 4 * 2
        for i in range(4):
            m = matrices[i].T if transposed else matrices[i]
            assert got[thread, i].tolist() == m[row, column : column + 2].tolist()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
def test_stmatrix(transposed):
    """Thread t's register i is 2 halves of row t / 4 of matrix i; lane r's address is row r's."""
    target = np.zeros((32, 8), np.uint16)
    trans = ".trans" if transposed else ""
    run_snippet(
        f"""
        mov.b32 %r1, smem;
        mad.lo.u32 %r2, lane, 16, %r1;
        shl.b32 %r3, lane, 16;
        or.b32 %r10, %r3, 0;
        or.b32 %r11, %r3, 1;
        or.b32 %r12, %r3, 2;
        or.b32 %r13, %r3, 3;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r2];
        mad.wide.u32 %rd2, lane, 16, target;
        st.global.v4.b32 [%rd2], {{%r20, %r21, %r22, %r23}};
        """,
        {"target": target},
        shared_bytes=512,
    )
    for i in range(4):
        matrix = target[8 * i : 8 * i + 8]
        for row in range(8):
            for column in range(8):
                r, c = (column, row) if transposed else (row, column)
                thread = r * 4 + c // 2
                assert matrix[row, column] == (thread if c % 2 else i)


# Warp collectives.

COLLECTIVES = [
    ("shfl.sync.idx.b32 d, lane, 5, 31, -1;", lambda i: 5),
    ("shfl.sync.bfly.b32 d, lane, 3, 31, -1;", lambda i: i ^ 3),
    ("shfl.sync.up.b32 d, lane, 1, 0, -1;", lambda i: max(i - 1, 0)),
    ("shfl.sync.down.b32 d, lane, 2, 31, -1;", lambda i: i + 2 if i + 2 < 32 else i),
    # c = 0x1807 makes segments of 8 lanes: mask 24, clamp 7.
    ("shfl.sync.idx.b32 d, lane, 2, 0x1807, -1;", lambda i: i // 8 * 8 + 2),
    ("redux.sync.add.u32 d, lane, -1;", lambda i: 496),
    ("redux.sync.max.s32 d, lane, -1;", lambda i: 31),
    ("redux.sync.xor.b32 d, lane, -1;", lambda i: 0),
    ("setp.lt.u32 %p1, lane, 4; vote.sync.ballot.b32 d, %p1, -1;", lambda i: 0xF),
    (
        "setp.lt.u32 %p1, lane, 4; vote.sync.any.pred %p2, %p1, -1; selp.b32 d, 1, 0, %p2;",
        lambda i: 1,
    ),
    (
        "setp.lt.u32 %p1, lane, 4; vote.sync.all.pred %p2, %p1, -1; selp.b32 d, 1, 0, %p2;",
        lambda i: 0,
    ),
    (
        "and.b32 %r1, lane, 1; match.any.sync.b32 d, %r1, -1;",
        lambda i: 0xAAAAAAAA if i % 2 else 0x55555555,
    ),
    ("elect.sync %r1|%p1, -1; selp.b32 d, 1, 0, %p1;", lambda i: int(i == 0)),
    ("activemask.b32 d;", lambda i: 0xFFFFFFFF),
]


@pytest.mark.parametrize(
    ("instructions", "expected"),
    COLLECTIVES,
    ids=[" ".join(c[0].split()[:1]) + f"-{i}" for i, c in enumerate(COLLECTIVES)],
)
def test_collective(instructions, expected):
    got = lanewise(instructions, {"d": U32})
    assert got["d"].tolist() == [expected(i) for i in range(32)]


# `cp.async`, `cp.async.bulk`.

_GATHER = """
    mov.b32 %r1, smem;
    mad.lo.u32 %r2, lane, 16, %r1;
    mul.lo.u32 %r3, lane, 7;
    and.b32 %r3, %r3, 31;
    mad.wide.u32 %rd1, %r3, 16, source;
"""
_SCATTER = """
    ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r2];
    mad.wide.u32 %rd2, lane, 16, target;
    st.global.v4.b32 [%rd2], {%r20, %r21, %r22, %r23};
"""


@pytest.mark.parametrize("mode", MODES)
def test_cp_async_groups(mode):
    """Rows 7 i mod 32; odd lanes give a source size of 0, which fills with zeros."""
    source = np.arange(32 * 4, dtype=U32).reshape(32, 4)
    target = np.full_like(source, 9)
    run_snippet(
        _GATHER
        + """
        and.b32 %r4, lane, 1;
        mul.lo.u32 %r4, %r4, 16;
        sub.u32 %r4, 16, %r4;
        cp.async.cg.shared.global [%r2], [%rd1], 16, %r4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        """
        + _SCATTER,
        {"source": source, "target": target},
        shared_bytes=512,
        mode=mode,
    )
    expected = source[np.arange(32) * 7 % 32] * (np.arange(32) % 2 == 0)[:, None]
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("noinc", ["", ".noinc"], ids=["inc", "noinc"])
@pytest.mark.parametrize("mode", MODES)
def test_cp_async_arrives_on_an_mbarrier(mode, noinc):
    """With .noinc the 32 arrivals are in the count; without, they are on top of one more."""
    source = np.arange(32 * 4, dtype=U32).reshape(32, 4)
    target = np.full_like(source, 9)
    run_snippet(
        _GATHER
        + f"""
        setp.eq.u32 %p1, lane, 0;
        @%p1 mbarrier.init.shared.b64 [%r1+512], {32 if noinc else 1};
        bar.warp.sync -1;
        cp.async.cg.shared.global [%r2], [%rd1], 16;
        cp.async.mbarrier.arrive{noinc}.shared.b64 [%r1+512];
        {"" if noinc else "@%p1 mbarrier.arrive.shared.b64 _, [%r1+512];"}
        WAIT:
        mbarrier.try_wait.parity.shared.b64 %p4, [%r1+512], 0;
        @!%p4 bra WAIT;
        """
        + _SCATTER,
        {"source": source, "target": target},
        shared_bytes=520,
        mode=mode,
    )
    assert np.array_equal(target, source[np.arange(32) * 7 % 32])


@pytest.mark.parametrize("mode", MODES)
def test_bulk_copy_in_and_out(mode):
    source = np.arange(128, dtype=U32)
    target = np.zeros_like(source)
    machine = run_snippet(
        """
        mov.b32 %r1, smem;
        setp.ne.u32 %p1, lane, 0;
        @%p1 bra DONE;
        mbarrier.init.shared.b64 [%r1+512], 1;
        fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r1+512], 512;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r1], [source], 512, [%r1+512];
        WAIT:
        mbarrier.try_wait.parity.shared.b64 %p4, [%r1+512], 0;
        @!%p4 bra WAIT;
        ld.shared.b32 %r5, [%r1+4];
        add.u32 %r5, %r5, 1000;
        st.shared.b32 [%r1+4], %r5;
        fence.proxy.async.shared::cta;
        cp.async.bulk.global.shared::cta.bulk_group [target], [%r1], 512;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        """,
        {"source": source, "target": target},
        shared_bytes=520,
        mode=mode,
    )
    source[1] += 1000
    assert np.array_equal(target, source)
    assert machine.counts["cp.async.bulk"] == 2


def test_griddepcontrol_is_counted():
    machine = run_snippet(
        "griddepcontrol.wait; griddepcontrol.launch_dependents;", {"x": np.zeros(1, U32)}
    )
    assert machine.counts["griddepcontrol.wait"] == 1
    assert machine.counts["griddepcontrol.launch_dependents"] == 1
