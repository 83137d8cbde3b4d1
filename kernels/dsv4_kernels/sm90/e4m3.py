"""Weights as E4M3 for FP8 WGMMA: device code of the sm90 grouped GEMM with fp8 activations.

A table in shared memory has, for each scale byte s, the eight magnitudes of E2M1 times the scale:
byte c of entry s is e4m3(E2M1[c] * scale(s) / 8), rounded to nearest even. Of NVFP4, s is E4M3
without its sign; of MXFP4, s is 0 .. 14 and the scale 2^(s - 5), so every product is exact.

Columns. A k32 step of WGMMA wants columns 4 q .. 4 q + 3 and 16 + 4 q .. of its 32 from lane q of a
quad. K's order is free where weights and rows agree on it: of each 64 columns, the 4 x 4 words of
four are transposed, so column 16 q + 4 j + c of the checkpoint is column 16 j + 4 q + c here, and
lane q owns the whole block of columns 16 q .. 16 q + 15 of the checkpoint. fc1's rows of weights
are in the order in which fc2 wants columns, so that a warp's eight are eight bytes of a row of h.

A thread's words of a 64 x 64 block: codes 0 .. 7 and 8 .. 15 of row r, then of row r + 8. Magnitude
i of a word is at bits 4 i; its sign at bit 8 i + 7 (i < 4), or 8 (i - 4) + 3.
"""

import cutlass
from cutlass import Float32, Int32, Uint32, cute

from dsv4_kernels.sm90.ptx import inline
from dsv4_kernels.types import NVFP4_BLOCK

ENTRIES = 128
TABLE_BYTES = 8 * ENTRIES
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def permute(lo, hi, selector) -> Uint32:
    """prmt: byte i is that of the eight of (lo, hi) which the selector's bits 4 i name."""
    return inline("prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", lo, hi, selector, results=(Uint32,))


def pack_e4m3(values) -> Uint32:
    """Four float32 -> E4M3, to nearest even, at most 448; the first is the lowest byte."""
    return inline(
        "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, {$r1}, {$r0};"
        " cvt.rn.satfinite.e4m3x2.f32 hi, {$r3}, {$r2}; mov.b32 {$w0}, {lo, hi};}",
        *values,
        results=(Uint32,),
    )


def narrow(lo, hi) -> Uint32:
    """Two f16x2 -> four E4M3, to nearest even, at most 448."""
    return inline(
        "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f16x2 a, {$r0};"
        " cvt.rn.satfinite.e4m3x2.f16x2 b, {$r1}; mov.b32 {$w0}, {a, b};}",
        lo,
        hi,
        results=(Uint32,),
    )


def bits_as_float(bits) -> Float32:
    return inline("mov.b32 {$w0}, {$r0};", bits, results=(Float32,))


@cute.jit
def fill_table(table: cute.Pointer, scale_block: cutlass.Constexpr):
    """A thread an entry."""
    entry = cute.arch.thread_idx()[0]
    if entry < ENTRIES:
        if cutlass.const_expr(scale_block == NVFP4_BLOCK):
            # Exponent and mantissa where float32 has them, of a number 2^120 times smaller.
            scale = bits_as_float(entry << 20) * 2.0**117
        else:
            scale = bits_as_float((entry + 119) << 23)
        for half in cutlass.range_constexpr(2):
            values = [scale * m for m in _MAGNITUDES[4 * half : 4 * half + 4]]
            (table + (2 * entry + half)).store(pack_e4m3(values))


@cute.jit
def look_up(scales: cute.Tensor, table: cute.Pointer):
    """The scale bytes of rows r and r + 8, a pair -> the four words of their entries."""
    pair = Uint32(scales[0])
    entries = cute.make_rmem_tensor((2, 2), Uint32)
    for i in cutlass.range_constexpr(2):
        scale = pair >> 8 if i else pair & 0xFF
        entry = (table + Int32(scale) * 2).align(8)
        cute.autovec_copy(cute.make_tensor(entry, cute.make_layout(2)), entries[None, i])
    return entries


@cute.jit
def widen(codes: cute.Tensor, entries: cute.Tensor, step: cutlass.Constexpr):
    """A thread's four words of A of a k32 step."""
    words = [Uint32(0)] * 4
    for row in cutlass.range_constexpr(2):
        word = codes[2 * row + step]
        lo, hi = entries[0, row], entries[1, row]
        magnitudes = word & Uint32(0x77777777)
        signs = Uint32(0x80808080)
        words[row] = permute(lo, hi, magnitudes) | (word & signs)
        words[2 + row] = permute(lo, hi, magnitudes >> 16) | ((word << 4) & signs)
    return words
