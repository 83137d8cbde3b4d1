"""Arithmetic of the PTX emulator against values worked out by hand from the PTX ISA 9.0.

The comment of each group names the section, by the instruction that it documents.
"""

import numpy as np
import pytest

from tests.emulator.ptx_emulator.findings import Unsupported
from tests.emulator.ptx_emulator.snippet import lanewise

U32, S32, U64, F32 = np.uint32, np.int32, np.uint64, np.float32
NAN, INF = float("nan"), float("inf")


def _u(*values: int) -> np.ndarray:
    return np.array(values, U32)


def _u16(*values: int) -> np.ndarray:
    return np.array(values, np.uint16)


def _u64(*values: int) -> np.ndarray:
    return np.array(values, U64)


def _s(*values: int) -> np.ndarray:
    return np.array(values, S32)


def _f(*values: float) -> np.ndarray:
    return np.array(values, F32)


def _one(instruction: str, result: type, expected, **operands) -> None:
    expected = np.array(expected, result)
    got = lanewise(instruction, {"d": result}, **operands)["d"][: len(expected)]
    if expected.dtype.kind == "f":
        np.testing.assert_array_equal(got, expected)
        number = ~np.isnan(expected)
        assert np.signbit(got[number]).tolist() == np.signbit(expected[number]).tolist()
    else:
        assert got.tolist() == expected.tolist()


# Section 9.7.1, integer arithmetic; 9.7.8, logic and shift.
INTEGER = [
    ("add.s32 d, a, b;", S32, [-(2**31)], dict(a=_u(2**31 - 1), b=_u(1))),
    ("sub.s32 d, a, b;", S32, [-1, 4], dict(a=_u(1, 7), b=_u(2, 3))),
    ("mul.lo.s32 d, a, b;", S32, [-6, 0], dict(a=_s(-2, 65536), b=_s(3, 65536))),
    ("mul.hi.s32 d, a, b;", S32, [-1, 1], dict(a=_s(-2, 65536), b=_s(3, 65536))),
    ("mul.hi.u32 d, a, b;", U32, [2], dict(a=_u(0xFFFFFFFE), b=_u(3))),
    ("mul.hi.u64 d, a, b;", U64, [1 << 32], dict(a=_u64(1 << 63), b=_u64(1 << 33))),
    ("mul.hi.s64 d, a, b;", np.int64, [-1], dict(a=np.array([-1]), b=np.array([5]))),
    ("mul.wide.s32 d, a, b;", np.int64, [-(2**32)], dict(a=_s(-65536), b=_u(65536))),
    ("mad.lo.u32 d, a, b, c;", U32, [23], dict(a=_u(4), b=_u(5), c=_u(3))),
    (
        "mad.wide.u32 d, a, b, c;",
        U64,
        [(0xFFFFFFFF * 2) + 1],
        dict(a=_u(0xFFFFFFFF), b=_u(2), c=_u64(1)),
    ),
    ("div.s32 d, a, b;", S32, [-3, 3], dict(a=_s(-7, 7), b=_s(2, 2))),
    ("rem.s32 d, a, b;", S32, [-1, 1], dict(a=_s(-7, 7), b=_s(2, -2))),
    ("div.u64 d, a, b;", U64, [(2**64 - 1) // 10], dict(a=_u64(2**64 - 1), b=_u64(10))),
    ("min.s32 d, a, b;", S32, [-5], dict(a=_s(-5), b=_u(3))),
    ("max.u32 d, a, b;", U32, [0xFFFFFFFB], dict(a=_s(-5), b=_u(3))),
    ("abs.s32 d, a;", S32, [5, 5], dict(a=_s(-5, 5))),
    ("neg.s32 d, a;", S32, [5], dict(a=_s(-5))),
    ("shl.b32 d, a, b;", U32, [8, 0, 0], dict(a=_u(1, 1, 1), b=_u(3, 32, 100))),
    ("shr.u32 d, a, b;", U32, [1, 0], dict(a=_u(0x80000000, 0x80000000), b=_u(31, 32))),
    ("shr.s32 d, a, b;", S32, [-1, -1, 0], dict(a=_u(0x80000000, 0x80000000, 1), b=_u(31, 99, 99))),
    ("shl.b64 d, a, 33;", U64, [1 << 34], dict(a=_u64(2))),
    # shf: the funnel is {b, a}, a being the low word.
    (
        "shf.l.wrap.b32 d, a, b, c;",
        U32,
        [0x34567812],
        dict(a=_u(0x12000000), b=_u(0x12345678), c=_u(40)),
    ),
    (
        "shf.r.clamp.b32 d, a, b, c;",
        U32,
        [0x78123456, 0x12345678],
        dict(a=_u(0x12345678, 0), b=_u(0x12345678, 0x12345678), c=_u(8, 40)),
    ),
    # lop3: the table is f(0xF0, 0xCC, 0xAA).
    ("lop3.b32 d, a, b, c, 0x96;", U32, [0b1001], dict(a=_u(0b1100), b=_u(0b1010), c=_u(0b1111))),
    ("lop3.b32 d, a, b, c, 0xE8;", U32, [0b1110], dict(a=_u(0b1100), b=_u(0b1010), c=_u(0b1111))),
    (
        "lop3.b32 d, a, b, c, 0x01;",
        U32,
        [0xFFFFFFF0],
        dict(a=_u(0b1100), b=_u(0b1010), c=_u(0b1111)),
    ),
    # bfe and bfi: position and length in bits.
    ("bfe.u32 d, a, 4, 8;", U32, [0x67], dict(a=_u(0x12345678))),
    ("bfe.s32 d, a, 4, 4;", S32, [-8], dict(a=_u(0x80))),
    ("bfe.u32 d, a, 0, 0;", U32, [0], dict(a=_u(0xFFFFFFFF))),
    ("bfi.b32 d, a, b, 8, 4;", U32, [0xFFFFF5FF], dict(a=_u(0x5), b=_u(0xFFFFFFFF))),
    ("popc.b32 d, a;", U32, [8, 32], dict(a=_u(0xFF, 0xFFFFFFFF))),
    ("clz.b32 d, a;", U32, [32, 0, 24], dict(a=_u(0, 0x80000000, 0xFF))),
    ("brev.b32 d, a;", U32, [0x80000000], dict(a=_u(1))),
    ("bfind.u32 d, a;", U32, [0xFFFFFFFF, 31, 7], dict(a=_u(0, 0x80000000, 0xFF))),
    ("cnot.b32 d, a;", U32, [1, 0], dict(a=_u(0, 7))),
    ("dp4a.s32.u32 d, a, b, c;", S32, [10 - 3], dict(a=_u(0xFD), b=_u(1), c=_u(10))),
]

# prmt: selectors pick bytes of {b, a}; bit 3 replicates the byte's sign.
PERMUTE = [
    ("3210", 0x3210, 0x33221100),
    ("7654", 0x7654, 0x77665544),
    ("5140", 0x5140, 0x55114400),
    ("signs", 0xBBBF, 0x00000000),
    ("sign of a negative byte", 0xC00C, 0xFF0000FF),
]

# Section 9.7.3, floating point; 9.7.4, half precision.
FLOAT = [
    ("add.f32 d, a, b;", F32, [3.5, NAN], dict(a=_f(1.25, INF), b=_f(2.25, -INF))),
    (
        "fma.rn.f32 d, a, b, c;",
        F32,
        [2.0**-46],
        dict(a=_f(1 + 2**-23), b=_f(1 + 2**-23), c=_f(-(1 + 2**-22))),
    ),
    ("min.f32 d, a, b;", F32, [1.0, 2.0], dict(a=_f(NAN, 2), b=_f(1, NAN))),
    ("max.NaN.f32 d, a, b;", F32, [NAN], dict(a=_f(NAN), b=_f(1))),
    ("min.xorsign.abs.f32 d, a, b;", F32, [-2, 2, 1], dict(a=_f(-3, -3, NAN), b=_f(2, -2, 1))),
    ("min.NaN.xorsign.abs.f32 d, a, b;", F32, [-1, NAN], dict(a=_f(-1, NAN), b=_f(2, 2))),
    ("mul.ftz.f32 d, a, b;", F32, [0.0, -0.0], dict(a=_f(2.0**-100, -(2.0**-100)), b=_f(2.0**-40))),
    ("add.sat.f32 d, a, b;", F32, [1.0, 0.0], dict(a=_f(0.75, -3), b=_f(0.75))),
    ("neg.f32 d, a;", F32, [-0.0], dict(a=_f(0.0))),
    ("div.rn.f32 d, a, b;", F32, [np.float32(1) / np.float32(3)], dict(a=_f(1), b=_f(3))),
    ("ex2.approx.ftz.f32 d, a;", F32, [8.0, 0.0, INF], dict(a=_f(3, -INF, 200))),
    ("lg2.approx.f32 d, a;", F32, [3.0, -INF], dict(a=_f(8, 0))),
    ("rcp.approx.ftz.f32 d, a;", F32, [0.25, INF, -INF], dict(a=_f(4, 0.0, -0.0))),
    ("rsqrt.approx.f32 d, a;", F32, [0.5], dict(a=_f(4))),
    ("tanh.approx.f32 d, a;", F32, [0.0, 1.0, -1.0], dict(a=_f(0, 40, -40))),
    # bf16x2: 1.0 is 3f80, 1.5 3fc0, 2.0 4000, 3.0 4040; the lower half first.
    ("mul.bf16x2 d, a, b;", U32, [0x40403FC0], dict(a=_u(0x3FC03F80), b=_u(0x40003FC0))),
    (
        "fma.rn.bf16x2 d, a, b, c;",
        U32,
        [0x40803F80],
        dict(a=_u(0x40003F80), b=_u(0x3FC03F80), c=_u(0x3F800000)),
    ),
    ("add.rn.bf16x2 d, a, b;", U32, [0x40004000], dict(a=_u(0x3F803F80), b=_u(0x3F803F80))),
    ("max.bf16x2 d, a, b;", U32, [0x40003FC0], dict(a=_u(0x3F803FC0), b=_u(0x40003F80))),
    # f16x2: 1.0 is 3c00, 2.0 4000, 3.0 4200.
    ("mul.f16x2 d, a, b;", U32, [0x42004000], dict(a=_u(0x3C004000), b=_u(0x42003C00))),
    (
        "fma.rn.f16x2 d, a, b, c;",
        U32,
        [0x44004200],
        dict(a=_u(0x3C003C00), b=_u(0x42004000), c=_u(0x3C003C00)),
    ),
    (
        "add.rn.f32x2 d, a, b;",
        U64,
        [0x40400000_40000000],
        dict(a=_u64(0x40000000_3F800000), b=_u64(0x3F800000_3F800000)),
    ),
    (
        "fma.rn.f32x2 d, a, b, c;",
        U64,
        [0x40A00000_40000000],
        dict(a=_u64(0x40000000_3F800000), b=_u64(0x40000000_3F800000), c=_u64(0x3F800000_3F800000)),
    ),
]

# `cvt`: the first source of a pair is the upper half; .satfinite and .rn to nearest even.
CONVERT = [
    ("cvt.rn.bf16x2.f32 d, a, b;", U32, [0x40003F80], dict(a=_f(2), b=_f(1))),
    # 1 + 2^-8 is half-way between 3f80 and 3f81, 1 + 3 * 2^-8 between 3f81 and 3f82.
    ("cvt.rn.bf16x2.f32 d, a, b;", U32, [0x3F823F80], dict(a=_f(1 + 3 * 2**-8), b=_f(1 + 2**-8))),
    ("cvt.rz.bf16x2.f32 d, a, b;", U32, [0x3F813F80], dict(a=_f(1 + 3 * 2**-8), b=_f(1 + 2**-8))),
    ("cvt.rn.relu.bf16x2.f32 d, a, b;", U32, [0x00003F80], dict(a=_f(-2), b=_f(1))),
    ("cvt.rn.f16x2.f32 d, a, b;", U32, [0x7C003C00], dict(a=_f(1e6), b=_f(1))),
    # e4m3: 1.0 is 38, 448 is 7e, the smallest 2^-9; ties 17 -> 16 (58), 19 -> 20 (5a).
    (
        "cvt.rn.satfinite.e4m3x2.f32 d, a, b;",
        np.uint16,
        [0x387E, 0x5A58, 0xFE01, 0x7F00],
        dict(a=_f(1, 19, -1e9, NAN), b=_f(1e9, 17, 2**-9, 2**-10)),
    ),
    ("cvt.rn.satfinite.e5m2x2.f32 d, a, b;", np.uint16, [0x3C7B], dict(a=_f(1), b=_f(1e9))),
    # e2m1: codes of 0 .5 1 1.5 2 3 4 6; ties 0.25 -> 0, 0.75 -> 1 (2), 2.5 -> 2 (4), 5 -> 4 (6).
    (
        "{.reg .b8 x; cvt.rn.satfinite.e2m1x2.f32 x, a, b; cvt.u32.u8 d, x;}",
        U32,
        [0x20, 0x46, 0xF7, 0x79],
        dict(a=_f(0.75, 2.5, -100, NAN), b=_f(0.25, 5, 100, -0.5)),
    ),
    ("cvt.rn.f16x2.e4m3x2 d, a;", U32, [0x5F003C00], dict(a=_u16(0x7E38))),
    (
        "{.reg .b8 x; cvt.u8.u32 x, a; cvt.rn.f16x2.e2m1x2 d, x;}",
        U32,
        [0x4600B800],
        dict(a=_u(0x79)),
    ),
    ("cvt.rn.bf16x2.ue8m0x2 d, a;", U32, [0x40003F80], dict(a=_u16(0x807F))),
    ("cvt.rp.satfinite.ue8m0x2.f32 d, a, b;", np.uint16, [0x807F], dict(a=_f(1.5), b=_f(1.0))),
    ("cvt.rz.satfinite.ue8m0x2.f32 d, a, b;", np.uint16, [0x7F7F], dict(a=_f(1.5), b=_f(1.0))),
    ("cvt.rni.s32.f32 d, a;", S32, [2, 4, -2, 2**31 - 1, 0], dict(a=_f(2.5, 3.5, -1.5, 1e20, NAN))),
    ("cvt.rzi.u32.f32 d, a;", U32, [2, 0], dict(a=_f(2.9, -3))),
    ("cvt.rn.f32.s32 d, a;", F32, [-3.0, 16777216.0], dict(a=_s(-3, 2**24 + 1))),
    ("cvt.rmi.f32.f32 d, a;", F32, [-2.0, 1.0], dict(a=_f(-1.5, 1.5))),
    ("cvt.s32.s8 d, a;", S32, [-1], dict(a=_u16(0xFF))),
    ("cvt.u64.u32 d, a;", U64, [0xFFFFFFFF], dict(a=_u(0xFFFFFFFF))),
    ("cvt.s64.s32 d, a;", np.int64, [-1], dict(a=_u(0xFFFFFFFF))),
    ("cvt.sat.u8.s32 d, a;", np.uint16, [255, 0], dict(a=_s(300, -3))),
    ("cvt.f32.bf16 d, a;", F32, [1.5], dict(a=_u16(0x3FC0))),
    ("cvt.rn.bf16.f32 d, a;", np.uint16, [0x3FC0], dict(a=_f(1.5))),
    ("cvt.f32.f16 d, a;", F32, [1.0], dict(a=_u16(0x3C00))),
    ("mov.b64 d, {a, b};", U64, [0x00000002_00000001], dict(a=_u(1), b=_u(2))),
    (
        "{.reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 d, {y, x};}",
        U32,
        [0x56781234],
        dict(a=_u(0x12345678)),
    ),
    ("selp.b32 d, a, b, p;", U32, [1, 4], dict(a=_u(1, 2), b=_u(3, 4), p=np.array([True, False]))),
]


def _name(case: tuple) -> str:
    return case[0].split(" d,")[0].split("cvt.u32")[0].strip("{ ")


CASES = INTEGER + FLOAT + CONVERT


@pytest.mark.parametrize(
    ("instruction", "result", "expected", "operands"), CASES, ids=map(_name, CASES)
)
def test_instruction(instruction, result, expected, operands):
    _one(instruction, result, expected, **operands)


@pytest.mark.parametrize(
    ("selector", "expected"), [c[1:] for c in PERMUTE], ids=[c[0] for c in PERMUTE]
)
def test_prmt(selector, expected):
    # b's byte 4 is 0x44 for plain selectors; byte 4 is negative in the case of signs.
    b = 0x776655C4 if selector == 0xC00C else 0x77665544
    _one("prmt.b32 d, a, b, c;", U32, [expected], a=_u(0x33221100), b=_u(b), c=_u(selector))


# `setp`: unordered forms are true where one side is NaN; the second predicate is the complement.
COMPARE = [
    ("lt.s32", [-1, 3], [2, 2], [True, False]),
    ("lt.u32", [-1, 3], [2, 4], [False, True]),
    ("ne.f32", [NAN, 1.0, 2.0], [1.0, 1.0, 1.0], [False, False, True]),
    ("neu.f32", [NAN, 1.0], [1.0, 1.0], [True, False]),
    ("ge.f32", [NAN, 1.0], [1.0, 1.0], [False, True]),
    ("geu.f32", [NAN, 0.0], [1.0, 1.0], [True, False]),
    ("nan.f32", [NAN, 0.0], [1.0, 1.0], [True, False]),
]


@pytest.mark.parametrize(("form", "a", "b", "expected"), COMPARE, ids=[c[0] for c in COMPARE])
def test_setp(form, a, b, expected):
    dtype = F32 if form.endswith("f32") else S32
    got = lanewise(
        f"setp.{form} p|q, a, b;",
        {"p": bool, "q": bool},
        a=np.array(a, dtype),
        b=np.array(b, dtype),
    )
    assert got["p"][: len(expected)].tolist() == expected
    assert got["q"][: len(expected)].tolist() == [not e for e in expected]


def test_setp_combines_with_a_predicate():
    got = lanewise(
        "setp.eq.and.s32 p|q, a, 1, !c;",
        {"p": bool, "q": bool},
        a=_s(1, 1, 2),
        c=np.array([False, True, False]),
    )
    assert got["p"][:3].tolist() == [True, False, False]
    assert got["q"][:3].tolist() == [False, False, True]


def test_a_false_guard_leaves_the_register():
    got = lanewise(
        "mov.b32 d, a; @!p add.u32 d, d, 100;",
        {"d": U32},
        a=np.arange(32, dtype=U32),
        p=np.arange(32) % 2 == 0,
    )
    assert got["d"].tolist() == [i if i % 2 == 0 else i + 100 for i in range(32)]


def test_a_divergent_loop_reconverges():
    """Lane i adds its index i times; then every lane adds 1000 together."""
    got = lanewise(
        """
        mov.b32 %r1, 0;
        mov.b32 d, 0;
        LOOP:
        setp.ge.u32 %p1, %r1, lane;
        @%p1 bra DONE;
        add.u32 d, d, lane;
        add.u32 %r1, %r1, 1;
        bra.uni LOOP;
        DONE:
        bar.warp.sync -1;
        add.u32 d, d, 1000;
        """,
        {"d": U32},
    )
    assert got["d"].tolist() == [i * i + 1000 for i in range(32)]


@pytest.mark.parametrize(
    "instruction",
    [
        "add.f32.unknown d, a, a;",
        "frobnicate.b32 d, a;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 d, a, a, a;",
        "cvt.rn.e4m3x2.f32 d, a, a;",
        "ld.local.b32 d, [a];",
        "mov.b32 d, %unknown_special;",
        "cp.async.bulk.tensor.3d.shared::cta.global.im2col [a], [a, {a, a, a}], [a];",
    ],
    ids=lambda i: i.split()[0],
)
def test_what_is_not_known_is_refused_by_name(instruction):
    with pytest.raises(Unsupported) as refused:
        lanewise(instruction, {"d": U32}, a=_u(1))
    assert instruction.split(" ")[0] in str(refused.value)
