"""NVFP4 of blocks of 16 bf16: the arithmetic of `nvfp4_quantize`, in device code.

Codes and scales equal `reference.nvfp4_quantize` bit for bit, under Triton's interpreter as on any
GPU. A block is eight int32 words of two bf16, the even column in the low half, in eight tensors
(blocks,). `quantize_plain` is the fast path: finite values, a block scale that is neither zero nor
saturated nor below a seventh of a value, a global scale from 2^-32 to 2^32. `quantize_any` takes
any block.
"""

import triton
import triton.language as tl

# Of float32 as an integer: infinity (NaN is above), the sign, and the bits that bf16 has.
INF, _SIGN, _BF16 = tl.constexpr(0x7F800000), tl.constexpr(-0x80000000), tl.constexpr(-0x10000)
# Global scales of plain rows: 2^-32 to 2^32.
LEAST_GS, MOST_GS = tl.constexpr(2.3283064365386963e-10), tl.constexpr(4294967296.0)


@triton.jit
def _even(word):
    """The bf16 of an even column, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _odd(word):
    return (word & _BF16).to(tl.float32, bitcast=True)


@triton.jit
def four_columns(x):
    """(blocks, 4) -> 4 times (blocks,)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_blocks(row_ptr, block, NUM_BLOCKS: tl.constexpr):
    """(blocks,) numbers -> 8 words of two bf16 each, each (blocks,) int32; 0 beyond the last."""
    words = row_ptr + block[:, None] * 8 + tl.arange(0, 4)[None, :]
    exists = block[:, None] < NUM_BLOCKS
    first = tl.load(words, mask=exists, other=0)
    second = tl.load(words + 4, mask=exists, other=0)
    return four_columns(first) + four_columns(second)


@triton.jit
def largest_bits(words):
    """Each block's amax as float32 bits; with a NaN, bits above infinity's.

    Magnitudes of bf16 order as integers, which a GPU may compare two at once.
    """
    largest = tl.zeros(words[0].shape, tl.uint16)
    for i in tl.static_range(8):
        pair = words[i] & 0x7FFF7FFF
        largest = tl.maximum(tl.maximum(largest, pair.to(tl.uint16)), (pair >> 16).to(tl.uint16))
    return largest.to(tl.int32) << 16


@triton.jit
def largest_number(words):
    """Each block's amax, NaN left out."""
    largest = tl.maximum(tl.abs(_even(words[0])), tl.abs(_odd(words[0])))
    for i in tl.static_range(1, 8):
        # maximum() takes the number where the other is NaN.
        pair = tl.maximum(tl.abs(_even(words[i])), tl.abs(_odd(words[i])))
        largest = tl.maximum(largest, pair)
    return tl.where(largest == largest, largest, 0.0)


@triton.jit
def _e4m3(x):
    """x >= 0 to E4M3, nearest even, saturating at 448 -> (bits, value)."""
    x = tl.minimum(x, 448.0)
    # Adding 2^20 times x's power of two, at least 2^-6, rounds x to three bits after its leading
    # one, or, subnormal, to a multiple of 2^-9.
    power = tl.maximum(x.to(tl.int32, bitcast=True) & INF, (127 - 6) << 23) + (20 << 23)
    power = power.to(tl.float32, bitcast=True)
    value = (x + power) - power
    # Times 2^-120, float32 has E4M3's exponent, and its subnormals.
    return (value * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20, value


@triton.jit
def _inverse(scale):
    """1 / scale as float32 plus a float32 correction: too large by a relative 2^-39 at most, never
    too small. The correction is within 2^-43 of the residual, and 2^-40 is added for the sign.
    """
    scale = tl.maximum(scale, 1e-30)  # a zero scale: the block is all zeros, or not plain
    inverse = 1.0 / scale
    return inverse, inverse * (tl.fma(-inverse, scale, 1.0) + 9.094947017729282e-13)


@triton.jit
def _e2m1(x, inverse, rest):
    """|x| / scale, below 7, to E2M1, nearest even -> its 3 bits plus 0x4AC00000.

    The oracle rounds the quotient q to float32, then to E2M1. So q's code changes at the midpoints
    m between a tie of E2M1 and its two float32 neighbours.

    Lemma: for every bf16 x and float32 scale s, q = x / s is at least 2^-33 q away from every m,
    but for s = 2^k (1 - 2^-24), where q may lie 2^-48 q above one.

    So a relative error of `_inverse` from 0 to 2^-39 never carries q across an m.
    `test_no_quotient_is_close_to_where_rounding_it_to_float32_matters` checks the lemma for all
    significands, `test_every_bf16_gets_the_code_of_its_quotient` codes at the closest ones.

    As a function of the value, 0, 0.5, 1, 1.5, 2 | 3, 4 | 6, the code is concave: the minimum of
    three lines. Each addition below rounds q to the steps of one line, in the last bits of the sum.
    """
    quotient = tl.abs(tl.fma(x, inverse, x * rest))
    halves = (quotient + 6291456.0).to(tl.int32, bitcast=True)  # 1.5 * 2^22
    ones = (quotient + 12582914.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23, and 2 steps
    twos = (quotient + 25165832.0).to(tl.int32, bitcast=True)  # 1.5 * 2^24, and 4 steps
    return tl.minimum(tl.minimum(halves, ones - (1 << 23)), twos - (2 << 23))


@triton.jit
def _eight_codes(w0, w1, w2, w3, inverse, rest):
    """8 values in 4 words -> a word of codes, the first in the low nibble."""
    codes = _e2m1(_odd(w3), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w3), inverse, rest)
    codes = codes * 16 + _e2m1(_odd(w2), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w2), inverse, rest)
    codes = codes * 16 + _e2m1(_odd(w1), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w1), inverse, rest)
    codes = codes * 16 + _e2m1(_odd(w0), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w0), inverse, rest)
    codes += 0x49400000  # cancels the eight 0x4AC00000
    # Signs: the high bytes of the bf16, of even and of odd columns.
    first = ((w0 >> 8) & 0x00FF00FF) | (w1 & ~0x00FF00FF)
    second = ((w2 >> 8) & 0x00FF00FF) | (w3 & ~0x00FF00FF)
    even = (first & 0xFFFF) | (second << 16)
    odd = ((first >> 16) & 0xFFFF) | (second & _BF16)
    return codes | ((even >> 4) & 0x08080808) | (odd & ~0x7F7F7F7F)


@triton.jit
def _sixteen_codes(words, inverse, rest):
    """int64, the first value's code in the low nibble."""
    low = _eight_codes(words[0], words[1], words[2], words[3], inverse, rest)
    high = _eight_codes(words[4], words[5], words[6], words[7], inverse, rest)
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def quantize_plain(words, largest, gs, gs_inverse):
    """Blocks -> (codes, scales' bits, whether the block is plain; if not, discard both).

    largest is the words' largest_bits; gs from LEAST_GS to MOST_GS; gs_inverse = RN(1 / gs).
    """
    amax = largest.to(tl.float32, bitcast=True)
    # Both quotients are correctly rounded: amax / 6 by 1 / 6 in two parts, sixth / gs by one
    # correction with the exact remainder (Markstein).
    sixth = tl.fma(amax, 0.16666667163372039794921875, amax * -4.967053731282552e-09)
    near = sixth * gs_inverse
    quotient = tl.fma(tl.fma(-near, gs, sixth), gs_inverse, near)
    scale, value = _e4m3(quotient)
    inverse, rest = _inverse(value * gs)
    # NaN compares false; an infinite amax makes the quotient NaN.
    is_plain = (scale > 0) & (quotient <= 464.0) & (amax * inverse < 6.99)
    return _sixteen_codes(words, inverse, rest), scale, is_plain


@triton.jit
def _clamp_bf16(bits, up, limit):
    """bf16 in the high half of an int32, times up, clamped to +-limit; NaN to limit; 0 if limit is
    0."""
    x = bits.to(tl.float32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x) * up, limit).to(tl.int32, bitcast=True) & _BF16
    sign = tl.where(x == x, bits & _SIGN, 0)
    return tl.where(limit > 0, magnitude | sign, 0)


@triton.jit
def quantize_any(words, gs):
    """Blocks -> (codes, scales' bits, 1 if saturated), for any values and gs."""
    amax = largest_number(words)
    quotient = tl.div_rn(tl.div_rn(amax, 6.0), gs)
    scale, value = _e4m3(quotient)
    # Tiny and huge scales, and the values with them, move to where inverses are normal numbers.
    up = tl.where(gs < LEAST_GS, 1.8446744073709552e19, 1.0)  # 2^64
    up = tl.where(gs > MOST_GS, 5.421010862427522e-20, up)
    scaled = (value * gs) * up
    # A bf16 between 5 and 7 scales has the largest code: clamping to it changes none.
    limit = ((scaled * 6.5).to(tl.int32, bitcast=True) & _BF16).to(tl.float32, bitcast=True)
    clamped = ()
    for i in tl.static_range(8):
        low = _clamp_bf16(words[i] << 16, up, limit)
        high = _clamp_bf16(words[i] & _BF16, up, limit)
        clamped = clamped + (high | ((low >> 16) & 0xFFFF),)
    inverse, rest = _inverse(scaled)
    # 464 is the tie between 448 and the next E4M3 step, and goes to 448.
    saturated = (quotient > 464.0) | (largest_bits(words) >= INF)
    return _sixteen_codes(clamped, inverse, rest), scale, saturated.to(tl.int32)
