"""PTX of the sm_100a grouped GEMM that CuTe DSL lacks.

An MMA with run-time N in its descriptor, TMEM loads fused with their wait, NVFP4 conversions.
Operand formats are those of the PTX ISA 9.x, chapters "tcgen05" and "cvt".
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import cute_nvgpu, llvm

_REGISTER = {Float32: "f", Int32: "r", Uint32: "r", Int64: "l", Boolean: "b"}


def _asm(template: str, results: tuple = (), args: tuple = (), effects: bool = True):
    """PTX with operands $0, $1, ...: the results, then the args. None, a value, or a tuple.

    Statements with effects keep their order among themselves and are never dropped.
    """
    types = [result.mlir_type for result in results]
    constraints = [f"={_REGISTER[result]}" for result in results]
    constraints += [_REGISTER[type(arg)] for arg in args]
    operation_type = None
    if len(types) == 1:
        operation_type = types[0]
    elif types:
        operation_type = llvm.StructType.get_literal(types)
    value = llvm.inline_asm(
        operation_type,
        [arg.ir_value() for arg in args],
        template,
        ",".join(constraints),
        has_side_effects=effects,
    )
    if len(types) < 2:
        return results[0](value) if types else None
    return tuple(
        result(llvm.extractvalue(type_, value, ir.DenseI64ArrayAttr.get([i])))
        for i, (result, type_) in enumerate(zip(results, types, strict=True))
    )


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


# Bit 24 of a shared::cluster address is the lowest of the CTA's rank; without it, the same place
# in the even CTA of a pair.
EVEN_CTA = ~(1 << 24)


def tensor_map_address(atom: cute.CopyAtom) -> Int64:
    """Address of a TMA atom's tensor map, for `load_box`."""
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value)
    pointer = ir.Type.parse("!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<64>>")
    return cute_nvgpu.get_tma_desc_addr(pointer, executable).toint()


def load_box(
    tensor_map: Int64,
    coordinates: tuple,
    to: Int32,
    barrier: Int32,
    num_ctas: cutlass.Constexpr[int],
) -> None:
    """TMA load of the box at these coordinates, innermost first; issued by an elected lane.

    A pair's CTA writes its own shared memory at `to`, and `barrier` may be the other's.
    """
    operands = ", ".join(f"${3 + i}" for i in range(len(coordinates)))
    space, group = ("cluster", ".cta_group::2") if num_ctas == 2 else ("cta", "")
    _asm(
        f"cp.async.bulk.tensor.{len(coordinates)}d.shared::{space}.global.tile"
        f".mbarrier::complete_tx::bytes{group} [$0], [$1, {{{operands}}}], [$2];",
        args=(to, tensor_map, barrier, *map(Int32, coordinates)),
    )


def mma_mxf4nvf4(
    d_tmem: Int32,
    a_desc: Int64,
    b_desc: Int64,
    idesc: Int32,
    a_scales_tmem: Int32,
    b_scales_tmem: Int32,
    accumulate: Boolean,
    num_ctas: cutlass.Constexpr[int],
) -> None:
    """D (M, N) (+)= (A * scales) (B * scales)^T over K = 64; issued by an elected lane."""
    _asm(
        f"tcgen05.mma.cta_group::{num_ctas}.kind::mxf4nvf4.block_scale.block16 "
        "[$0], $1, $2, $3, [$4], [$5], $6;",
        args=(d_tmem, a_desc, b_desc, idesc, a_scales_tmem, b_scales_tmem, accumulate),
    )


def copy_scales(tmem: Int32, desc: Int64, num_ctas: cutlass.Constexpr[int]) -> None:
    """512 bytes, the scales of 128 rows and K = 64, into 4 TMEM columns of every sub-partition."""
    _asm(f"tcgen05.cp.cta_group::{num_ctas}.32x128b.warpx4 [$0], $1;", args=(tmem, desc))


def load_accumulators(tmem: Int32) -> tuple[list[Float32], list[Float32]]:
    """32 columns of this warp's 32 TMEM lanes, complete on return; lanes 0-15 and 16-31 apart.

    Value 4 j + i of a list, on warp lane l, is at TMEM lane l // 4 + 8 (i // 2) of its half and
    column 8 j + 2 (l % 4) + i % 2 (PTX ISA, ".16x256b"). One asm statement, because nothing
    else keeps the compiler from using the values before the wait.
    """

    def registers(first: int) -> str:
        return "{" + ", ".join(f"${first + i}" for i in range(16)) + "}"

    values = _asm(
        f"tcgen05.ld.sync.aligned.16x256b.x4.b32 {registers(0)}, [$32];\n"
        f"\ttcgen05.ld.sync.aligned.16x256b.x4.b32 {registers(16)}, [$33];\n"
        "\ttcgen05.wait::ld.sync.aligned;",
        (Float32,) * 32,
        (tmem, tmem + (16 << 16)),
    )
    return list(values[:16]), list(values[16:])


def fence_before_sync() -> None:
    """Orders this thread's tcgen05 operations before a following barrier arrival."""
    _asm("tcgen05.fence::before_thread_sync;")


def fence_after_sync() -> None:
    """Orders this thread's later tcgen05 operations after the barrier it has just waited for."""
    _asm("tcgen05.fence::after_thread_sync;")


def max_abs3(a: Float32, b: Float32, c: Float32, nan: cutlass.Constexpr[bool]) -> Float32:
    """max(|a|, |b|, |c|); with `nan`, NaN if one of them is, otherwise the largest number."""
    modifier = ".NaN" if nan else ""
    return _asm(f"max{modifier}.abs.f32 $0, $1, $2, $3;", (Float32,), (a, b, c), effects=False)


def clamp(value: Float32, limit: Float32) -> Float32:
    """value, or limit with its sign where it is larger; limit is not negative. NaN stays."""
    return _asm("min.NaN.xorsign.abs.f32 $0, $1, $2;", (Float32,), (value, limit), effects=False)


# Two fp32 values as one operand: the fp32 pipe takes the pair in one instruction.


def pack(low: Float32, high: Float32) -> Int64:
    return _asm("mov.b64 $0, {$1, $2};", (Int64,), (low, high), effects=False)


def unpack(pair: Int64) -> tuple[Float32, Float32]:
    return _asm("mov.b64 {$0, $1}, $2;", (Float32, Float32), (pair,), effects=False)


def mul2(a: Int64, b: Int64) -> Int64:
    return _asm("mul.rn.f32x2 $0, $1, $2;", (Int64,), (a, b), effects=False)


def fma2(a: Int64, b: Int64, c: Int64) -> Int64:
    """a * b + c of both halves, each rounded once."""
    return _asm("fma.rn.f32x2 $0, $1, $2, $3;", (Int64,), (a, b, c), effects=False)


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c, rounded once."""
    return _asm("fma.rn.f32 $0, $1, $2, $3;", (Float32,), (a, b, c), effects=False)


def e4m3_round(value: Float32) -> tuple[Uint32, Float32]:
    """value to nearest even E4M3, clamped at 448: the byte and what it stands for."""
    return _asm(
        _block(
            ".reg .f32 zero;",
            ".reg .b16 pair, low, high;",
            ".reg .b32 both;",
            "mov.f32 zero, 0f00000000;",
            "cvt.rn.satfinite.e4m3x2.f32 pair, zero, $2;",
            "cvt.u32.u16 $0, pair;",
            "cvt.rn.f16x2.e4m3x2 both, pair;",
            "mov.b32 {low, high}, both;",
            "cvt.f32.f16 $1, low;",
        ),
        (Uint32, Float32),
        (value,),
        effects=False,
    )


def e2m1_pack(values: list[Float32]) -> Uint32:
    """Eight values to nearest even E2M1, clamped at 6, the first in the lowest nibble."""
    assert len(values) == 8, len(values)
    converts = (f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4))
    return _asm(
        _block(".reg .b8 b0, b1, b2, b3;", *converts, "mov.b32 $0, {b0, b1, b2, b3};"),
        (Uint32,),
        tuple(values),
        effects=False,
    )


def bf16x2_pack(low: Float32, high: Float32) -> Uint32:
    """Two values to nearest even bf16, low in the low half."""
    return _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", (Uint32,), (low, high), effects=False)


def stmatrix_x4_trans(
    address: Int32, matrices: list[Uint32], offset: cutlass.Constexpr[int]
) -> None:
    """Four transposed 8x8 b16 matrices; lane 8 i + r gives the address of row r of matrix i."""
    _asm(
        f"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0+{offset}], {{$1, $2, $3, $4}};",
        args=(address, *matrices),
    )


def store_shared(address: Int32, value: Float32, offset: cutlass.Constexpr[int]) -> None:
    _asm(f"st.shared.b32 [$0+{offset}], $1;", args=(address, value))


def load_shared_pairs(address: Int32, offset: cutlass.Constexpr[int]) -> tuple[Int64, Int64]:
    """Four fp32 values, 16-byte aligned, as two pairs."""
    return _asm(f"ld.shared.v2.b64 {{$0, $1}}, [$2+{offset}];", (Int64, Int64), (address,))


def store_global(address: Int64, words: list[Uint32]) -> None:
    """Two or four words, aligned to their size."""
    registers = ", ".join(f"${1 + i}" for i in range(len(words)))
    _asm(f"st.global.v{len(words)}.b32 [$0], {{{registers}}};", args=(address, *words))


def store_global_byte(address: Int64, value: Uint32) -> None:
    _asm("st.global.u8 [$0], $1;", args=(address, value))
