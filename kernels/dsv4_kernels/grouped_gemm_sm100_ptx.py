"""sm_100a instructions that CuTe DSL does not have in the form that `grouped_gemm_sm100` needs.

A run-time N in the MMA's descriptor, TMEM loads fused with their wait, and the NVFP4 conversions.
Operand formats are those of the PTX ISA 9.x, chapters "tcgen05" and "cvt".
"""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute.arch import inline_ptx

# Shared-memory descriptors of tcgen05 (PTX ISA, "Shared memory descriptor"): bits 16-29 leading
# and 32-45 stride byte offset over 16, bit 46 version 1, bits 61-63 swizzle (2 = 128 bytes).
OPERAND_DESC = (2 << 61) | (1 << 46) | ((1024 >> 4) << 32) | (1 << 16)
SCALES_DESC = (1 << 46) | ((128 >> 4) << 32) | (1 << 16)


def _block(*lines: str) -> str:
    """Several instructions with registers of their own."""
    return "\n  ".join(("{", *lines, "}"))


def instruction_descriptor(m: int) -> int:
    """Instruction descriptor of an E2M1 x E2M1, E4M3-scaled MMA, with N left 0.

    PTX ISA, "Instruction descriptor" for .kind::mxf4nvf4: bits 7-9 and 10-11 the types of A and B
    (1 = E2M1), 17-22 N >> 3, 23 the scale type (0 = E4M3), 27-28 M >> 7. Both operands K-major.
    """
    return (1 << 7) | (1 << 10) | ((m >> 7) << 27)


def smem_address(pointer: cute.Pointer) -> Int32:
    """The 32-bit shared-memory address of a pointer."""
    return Int32(pointer.toint())


def smem_desc(address: Int32, high_bits: int) -> Int64:
    """Descriptor of shared memory at this address, 16-byte aligned and below 256 KiB."""
    return Int64(high_bits) | Int64((address & 0x3FFFF) >> 4)


def mma_mxf4nvf4(
    d_tmem: Int32,
    a_desc: Int64,
    b_desc: Int64,
    idesc: Int32,
    a_scales_tmem: Int32,
    b_scales_tmem: Int32,
    accumulate: cutlass.Boolean,
    num_ctas: cutlass.Constexpr[int],
) -> None:
    """D (M, N) (+)= (A * its scales) (B * its scales)^T over K = 64; one thread issues it."""
    inline_ptx(
        _block(
            ".reg .pred p;",
            "setp.ne.b32 p, {$r6}, 0;",
            f"tcgen05.mma.cta_group::{num_ctas}.kind::mxf4nvf4.block_scale.block16 "
            "[{$r0}], {$r1}, {$r2}, {$r3}, [{$r4}], [{$r5}], p;",
        ),
        read_only_args=[
            d_tmem,
            a_desc,
            b_desc,
            idesc,
            a_scales_tmem,
            b_scales_tmem,
            Int32(accumulate),
        ],
    )


def copy_scales(tmem: Int32, desc: Int64, num_ctas: cutlass.Constexpr[int]) -> None:
    """512 bytes, the scales of 128 rows and K = 64, into 4 TMEM columns of every sub-partition."""
    inline_ptx(
        f"tcgen05.cp.cta_group::{num_ctas}.32x128b.warpx4 [{{$r0}}], {{$r1}};",
        read_only_args=[tmem, desc],
    )


def load_accumulators(tmem: Int32) -> tuple[list[Float32], list[Float32]]:
    """32 columns of this warp's 32 TMEM lanes, complete on return; lanes 0-15 and 16-31 apart.

    Value 4 j + i of a list, on warp lane l, is at TMEM lane l // 4 + 8 (i // 2) of its half and
    column 8 j + 2 (l % 4) + i % 2 (PTX ISA, ".16x256b"). One asm statement, because nothing
    else keeps the compiler from using the values before the wait.
    """

    def registers(first: int) -> str:
        return "{" + ", ".join(f"{{$w{first + i}}}" for i in range(16)) + "}"

    values = inline_ptx(
        f"tcgen05.ld.sync.aligned.16x256b.x4.b32 {registers(0)}, [{{$r0}}];\n"
        f"tcgen05.ld.sync.aligned.16x256b.x4.b32 {registers(16)}, [{{$r1}}];\n"
        "tcgen05.wait::ld.sync.aligned;",
        write_only_types=[Float32] * 32,
        read_only_args=[tmem, tmem + (16 << 16)],
    )
    return list(values[:16]), list(values[16:])


def fence_before_sync() -> None:
    """Orders this thread's tcgen05 operations before a following barrier arrival."""
    inline_ptx("tcgen05.fence::before_thread_sync;")


def fence_after_sync() -> None:
    """Orders this thread's later tcgen05 operations after the barrier it has just waited for."""
    inline_ptx("tcgen05.fence::after_thread_sync;")


def max_abs3(a: Float32, b: Float32, c: Float32, nan: cutlass.Constexpr[bool]) -> Float32:
    """max(|a|, |b|, |c|); with `nan`, NaN if one of them is, otherwise the largest number."""
    return inline_ptx(
        f"max{'.NaN' if nan else ''}.abs.f32 {{$w0}}, {{$r0}}, {{$r1}}, {{$r2}};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c, rounded once."""
    return inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


def e4m3_round(value: Float32) -> tuple[Uint32, Float32]:
    """value to nearest even E4M3, clamped at 448: the byte and what it stands for."""
    return inline_ptx(
        _block(
            ".reg .f32 zero;",
            ".reg .b16 pair, low, high;",
            ".reg .b32 both;",
            "mov.f32 zero, 0f00000000;",
            "cvt.rn.satfinite.e4m3x2.f32 pair, zero, {$r0};",
            "cvt.u32.u16 {$w0}, pair;",
            "cvt.rn.f16x2.e4m3x2 both, pair;",
            "mov.b32 {low, high}, both;",
            "cvt.f32.f16 {$w1}, low;",
        ),
        write_only_types=[Uint32, Float32],
        read_only_args=[value],
    )


def e2m1_pack(values: list[Float32]) -> Uint32:
    """Eight values to nearest even E2M1, clamped at 6, the first in the lowest nibble."""
    assert len(values) == 8, len(values)
    converts = (
        f"cvt.rn.satfinite.e2m1x2.f32 b{i}, {{$r{2 * i + 1}}}, {{$r{2 * i}}};" for i in range(4)
    )
    return inline_ptx(
        _block(".reg .b8 b0, b1, b2, b3;", *converts, "mov.b32 {$w0}, {b0, b1, b2, b3};"),
        write_only_types=[Uint32],
        read_only_args=values,
    )


def bf16x2_pack(low: Float32, high: Float32) -> Uint32:
    """Two values to nearest even bf16, low in the low half."""
    return inline_ptx(
        "cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};",
        write_only_types=[Uint32],
        read_only_args=[low, high],
    )


def stmatrix_x4_trans(address: Int32, matrices: list[Uint32]) -> None:
    """Four transposed 8x8 b16 matrices; lane 8 i + r gives the address of row r of matrix i."""
    inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, *matrices],
    )


def store_shared_f32(address: Int32, value: Float32, offset: cutlass.Constexpr[int]) -> None:
    inline_ptx(f"st.shared.f32 [{{$r0}}+{offset}], {{$r1}};", read_only_args=[address, value])


def load_shared_f32x4(address: Int32, offset: cutlass.Constexpr[int]) -> tuple[Float32, ...]:
    return inline_ptx(
        f"ld.shared.v4.f32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}}+{offset}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )


def store_global(address: Int64, words: list[Uint32]) -> None:
    """Two or four words, aligned to their size."""
    registers = ", ".join(f"{{$r{1 + i}}}" for i in range(len(words)))
    inline_ptx(
        f"st.global.v{len(words)}.b32 [{{$r0}}], {{{registers}}};", read_only_args=[address, *words]
    )


def store_global_byte(address: Int64, value: Uint32) -> None:
    inline_ptx("st.global.u8 [{$r0}], {$r1};", read_only_args=[address, value])
