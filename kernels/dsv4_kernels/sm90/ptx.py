"""Per-thread code of the sm90 grouped GEMM: PTX that CuTe DSL lacks, widening, SwiGLU."""

import math

import cutlass
from cutlass import Float32, Int32, Uint32, cute
from cutlass.cutlass_dsl import dsl_user_op


@dsl_user_op
def inline(text: str, *operands, results: tuple = (), loc=None, ip=None):
    """PTX of operands {$r0}, {$r1} .. -> nothing, or {$w0} .. of the types in results."""
    return cute.arch.inline_ptx(
        text, write_only_types=list(results), read_only_args=list(operands), loc=loc, ip=ip
    )


def copy_row_chunk(dst, src, live_bytes) -> None:
    """cp.async of 16 bytes, zero-filled from live_bytes on."""
    inline("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", dst, src, live_bytes)


def copy_bulk(dst, src, num_bytes, barrier) -> None:
    """cp.async.bulk, global -> shared, with complete_tx on barrier."""
    inline(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        dst,
        src,
        num_bytes,
        barrier,
    )


def opaque(value) -> Int32:
    """value, through a shuffle: what is computed from it is not hoisted out of a loop."""
    return cute.arch.shuffle_sync(value, cute.arch.lane_idx())


def set_flag(ptr, value) -> None:
    inline("st.release.gpu.global.b32 [{$r0}], {$r1};", ptr, value)


def get_flag(ptr) -> Int32:
    return inline("ld.acquire.gpu.global.b32 {$w0}, [{$r0}];", ptr, results=(Int32,))


def trap() -> None:
    """Abort the kernel with an error that the host sees."""
    inline("trap;")


def load_partial(ptr):
    """Four floats that another CTA wrote, past L1."""
    return inline(
        "ld.relaxed.gpu.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        ptr,
        results=(Float32,) * 4,
    )


def store_partial(ptr, a, b, c, d) -> None:
    inline("st.global.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", ptr, a, b, c, d)


def scale_pair(a, pair, half: int) -> Uint32:
    """bf16x2: a times the low (half 0) or high (half 1) bf16 of pair."""
    name = "hi" if half else "lo"
    return inline(
        "{.reg .b16 lo, hi; .reg .b32 both; mov.b32 {lo, hi}, {$r1};"
        f" mov.b32 both, {{{name}, {name}}}; mul.rn.bf16x2 {{$w0}}, {{$r0}}, both;}}",
        a,
        pair,
        results=(Uint32,),
    )


def pack_bf16(lo, hi) -> Uint32:
    return inline("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", lo, hi, results=(Uint32,))


def pack_f16(lo, hi) -> Uint32:
    return inline("cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", lo, hi, results=(Uint32,))


def store_transposed(ptr, words) -> None:
    """stmatrix.x4.trans of 8 x 8 bf16; lane i has the address of row i % 8 of matrix i // 8."""
    inline(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        ptr,
        *words,
    )


@cute.jit
def widen(word: Uint32, scale_word: Uint32, scale_bits: Uint32, scale: cutlass.Constexpr):
    """A word of codes -> the four bf16x2 of a thread's m64k16 A fragment, times the first (0) or
    second (1) scales of a scale word. The bits are `weights`'s."""
    code_bits = Uint32(0x81C081C0)
    code_0 = word & code_bits
    code_1 = (word << 6) & code_bits
    code_2 = cute.arch.shf(word, word, 4, "r") & code_bits
    code_3 = ((word << 2) ^ (word >> 6)) & code_bits
    # Scales of row and row + 8: the first are at bits 11:4 and 27:20, a rotation brings the second
    # there. All exponents share their upper bits.
    if cutlass.const_expr(scale == 1):
        scale_word = cute.arch.shf(scale_word, scale_word, 8, "r")
    pair = (scale_word & scale_bits) | Uint32(0x70007000)
    return (
        scale_pair(code_0, pair, 0),
        scale_pair(code_1, pair, 1),
        scale_pair(code_2, pair, 0),
        scale_pair(code_3, pair, 1),
    )


@cute.jit
def activate(
    acc: cute.Tensor,
    i: cutlass.Constexpr,
    first: cutlass.Constexpr,
    scalars: tuple,
    row_weights: cute.Pointer,
    lane: Int32,
    fp8: cutlass.Constexpr,
    h_factor: Float32 | None,
):
    """SwiGLU of a thread's gate (row r) and up (row r + 8) of two tokens, times their routing
    weights -> bf16x2; fp8: row_weights are scales of the sums instead, and with h_factor, which
    then multiplies -> f16x2."""
    scale_g, scale_u, limit = scalars
    values = [Float32(0.0)] * 2
    weights = factors_of_pair(row_weights, first, lane)
    for c in cutlass.range_constexpr(2):
        if cutlass.const_expr(fp8):
            scale_g, scale_u = scalars[0] * weights[c], scalars[1] * weights[c]
        gate = cute.arch.fmin(acc[i + c] * scale_g, limit)
        up = acc[i + 2 + c] * scale_u
        up = cute.arch.fmax(cute.arch.fmin(up, limit), -limit)
        weight = weights[c]
        if cutlass.const_expr(fp8):
            weight = Float32(1.0) if h_factor is None else h_factor
        # silu(g) = g / (1 + 2^(-g log2 e)); ex2.approx and rcp.approx are within 2 ulp of fp32.
        power = cute.math.exp2(gate * -math.log2(math.e), fastmath=True)
        values[c] = gate * cute.arch.rcp_approx(1.0 + power) * up * weight
    if cutlass.const_expr(h_factor is not None):
        return pack_f16(values[0], values[1])
    return pack_bf16(values[0], values[1])


@cute.jit
def factors_of_pair(row_factors: cute.Pointer, first: cutlass.Constexpr, lane: Int32):
    """Of the two rows of a tile, from `first` on, that a thread has sums of."""
    factors = cute.make_rmem_tensor((2,), Float32)
    source = (row_factors + (first + lane % 4 * 2)).align(8)
    cute.autovec_copy(cute.make_tensor(source, cute.make_layout(2)), factors)
    return factors
