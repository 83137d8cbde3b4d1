"""NVFP4: bf16 rows -> packed E2M1 codes and E4M3 block scales, in the rows of a layout.

    block scale = e4m3(max|block| / 6 / gs)          16 values, gs the global scale
    code        = e2m1(x / (block scale * gs))       both to nearest even; a zero scale: zero codes

gs comes per layer or per expert, or is the row's own, max|row| / 2688 (`token`), for which the
program reads its row twice, from L1 the second time. A program quantises one token once, a block of
16 a thread, and writes it to the row of each of its local slots: only tokens that have rows are
read. Codes and scales equal `reference.nvfp4_quantize` bit for bit, under Triton's interpreter as
on any GPU. Rows of finite numbers whose block scales are neither zero nor clipped are plain: few
instructions a value are enough (`_quantize_plain`). Others are quantised once more
(`_quantize_any`).

Block scales are written row-major, or as the 128x4 blocks that tcgen05 reads: the scale of row r
and block c is at byte ((r // 128) * ceil(K / 64) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4
+ c % 4. Groups of a layout whose tile is a multiple of 128 are swizzled each for itself. Of each
32-byte sector of them a row has 4 bytes: of many tokens the scales therefore go to a scratch
buffer, once a token, and a second launch writes whole sectors from there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.types import NVFP4_BLOCK, ExpertLayout, QuantizedRows

SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4
# Where the global scale of a row is.
PER_LAYER, PER_EXPERT, PER_ROW, OWN = 0, 1, 2, 3
_PER_EXPERT, _PER_ROW, _OWN = tl.constexpr(PER_EXPERT), tl.constexpr(PER_ROW), tl.constexpr(OWN)
# Where block scales are written: as rows, swizzled, or to the scratch, as rows of tokens.
ROWS, SWIZZLED, TOKENS = 0, 1, 2
_SWIZZLED, _TOKENS = tl.constexpr(SWIZZLED), tl.constexpr(TOKENS)
WORDS_AT_ONCE = 16  # of four swizzled scales
# Of float32 as an integer: infinity (NaN is above), the sign, and the bits that bf16 has.
_INF, _SIGN, _BF16 = tl.constexpr(0x7F800000), tl.constexpr(-0x80000000), tl.constexpr(-0x10000)
# The global scales of plain rows are from 2^-32 to 2^32.
_LEAST_GS, _MOST_GS = tl.constexpr(2.3283064365386963e-10), tl.constexpr(4294967296.0)


class Config(NamedTuple):
    blocks: int  # of 16 values, at once
    num_warps: int
    swizzles: bool  # scales in a launch of its own


def choose_config(scale_columns: int, num_tokens: int) -> Config:
    """Of many tokens 64 blocks at once, of which 4096, 5120 and 7168 columns are multiples.

    On an H200, 7168 columns, 6 slots, layer scale, swizzled. 8192 tokens, all experts local: 100 us
    in two launches and 244 in one; one expert in eight local: 36 and 35, and with 128 blocks at
    once 39. 128 tokens, one in eight local: 4.4 us with 64 blocks, 3.4 with 128.
    """
    many = num_tokens >= 1024
    blocks = min(64 if many else 128, triton.next_power_of_2(scale_columns))
    return Config(blocks, num_warps=max(1, blocks // 32), swizzles=many)


@triton.jit
def _even(word):
    """The bf16 of an even column, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _odd(word):
    return (word & _BF16).to(tl.float32, bitcast=True)


@triton.jit
def _four_columns(x):
    """(blocks, 4) -> 4 times (blocks,)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _load_blocks(row_ptr, block, NUM_BLOCKS: tl.constexpr):
    """(blocks,) numbers -> 8 words of two bf16 each, each (blocks,) int32; 0 beyond the last."""
    words = row_ptr + block[:, None] * 8 + tl.arange(0, 4)[None, :]
    exists = block[:, None] < NUM_BLOCKS
    first = tl.load(words, mask=exists, other=0)
    second = tl.load(words + 4, mask=exists, other=0)
    return _four_columns(first) + _four_columns(second)


@triton.jit
def _without_signs(word):
    """Both columns shifted left past the sign, where they compare as unsigned integers.

    An even column is still under the odd one, where it decides only between equals.
    """
    word = word.to(tl.uint32, bitcast=True)
    return word << 17, word << 1


@triton.jit
def _larger_bits(even, odd):
    return (tl.maximum(even, odd & 0xFFFE0000) >> 1).to(tl.int32, bitcast=True)


@triton.jit
def _largest_bits(words):
    """The largest magnitude of every block as float32 bits; of NaN, bits above infinity's."""
    even, odd = _without_signs(words[0])
    for i in tl.static_range(1, 8):
        next_even, next_odd = _without_signs(words[i])
        even, odd = tl.maximum(even, next_even), tl.maximum(odd, next_odd)
    return _larger_bits(even, odd)


@triton.jit
def _largest_number(words):
    """The largest magnitude that is not NaN."""
    largest = tl.maximum(tl.abs(_even(words[0])), tl.abs(_odd(words[0])))
    for i in tl.static_range(1, 8):
        # maximum() takes the number where the other is NaN.
        pair = tl.maximum(tl.abs(_even(words[i])), tl.abs(_odd(words[i])))
        largest = tl.maximum(largest, pair)
    return tl.where(largest == largest, largest, 0.0)


@triton.jit
def _e4m3(x):
    """0 <= x to the nearest E4M3, to even, 448 at most: its bits and its value."""
    x = tl.minimum(x, 448.0)
    # Added to 2^20 times its power of two, 2^-6 at least, a number is rounded to three bits after
    # its leading one, or to multiples of 2^-9.
    power = tl.maximum(x.to(tl.int32, bitcast=True) & _INF, (127 - 6) << 23) + (20 << 23)
    power = power.to(tl.float32, bitcast=True)
    value = (x + power) - power
    # Times 2^-120 the exponent is E4M3's, and subnormal numbers are.
    return (value * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20, value


@triton.jit
def _inverse(scale):
    """1 / scale in two parts, of which the second makes up for the first's error.

    Their sum is too large, by 2^-39 of it at most: what rests is known to 2^-43 and has 2^-40
    added.
    """
    scale = tl.maximum(scale, 1e-30)  # under 0 there are zeros only, or what is not plain
    inverse = 1.0 / scale
    return inverse, inverse * (tl.fma(-inverse, scale, 1.0) + 9.094947017729282e-13)


@triton.jit
def _e2m1(x, inverse, rest):
    """|x| / scale, below 7, to the nearest E2M1, to even: its 3 bits and 0x4AC00000.

    The quotient is rounded to float32 first, as the oracle's is. Of all bf16 and all scales none
    comes closer than 2^-33 of itself to where that makes it a tie of E2M1, or no longer one, but
    for 2^k / (1 - 2^-24): by 2^-48 it is no tie. So an inverse too large by 2^-39 is exact enough.
    The codes of 0, 0.5, 1, 1.5, 2 | 3, 4 | 6 are a concave function of them, the least of three
    lines, and what is added to each makes its steps the last bits.
    """
    quotient = tl.abs(tl.fma(x, inverse, x * rest))
    halves = (quotient + 6291456.0).to(tl.int32, bitcast=True)  # 1.5 * 2^22
    ones = (quotient + 12582914.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23, and 2 steps
    twos = (quotient + 25165832.0).to(tl.int32, bitcast=True)  # 1.5 * 2^24, and 4 steps
    return tl.minimum(tl.minimum(halves, ones - (1 << 23)), twos - (2 << 23))


@triton.jit
def _eight_codes(w0, w1, w2, w3, inverse, rest):
    """8 values in 4 words -> their codes in one, the first in the lowest bits."""
    codes = _e2m1(_odd(w3), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w3), inverse, rest)
    codes = codes * 16 + _e2m1(_odd(w2), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w2), inverse, rest)
    codes = codes * 16 + _e2m1(_odd(w1), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w1), inverse, rest)
    codes = codes * 16 + _e2m1(_odd(w0), inverse, rest)
    codes = codes * 16 + _e2m1(_even(w0), inverse, rest)
    codes += 0x49400000  # that takes away 0x4AC00000 from each
    # Bytes with the signs, of the even columns and of the odd ones.
    first = ((w0 >> 8) & 0x00FF00FF) | (w1 & ~0x00FF00FF)
    second = ((w2 >> 8) & 0x00FF00FF) | (w3 & ~0x00FF00FF)
    even = (first & 0xFFFF) | (second << 16)
    odd = ((first >> 16) & 0xFFFF) | (second & _BF16)
    return codes | ((even >> 4) & 0x08080808) | (odd & ~0x7F7F7F7F)


@triton.jit
def _sixteen_codes(words, inverse, rest):
    """The first four bits are the first value's."""
    low = _eight_codes(words[0], words[1], words[2], words[3], inverse, rest)
    high = _eight_codes(words[4], words[5], words[6], words[7], inverse, rest)
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def _quantize_plain(words, gs, gs_inverse):
    """Blocks -> codes, scales' bits, and whether they are right: the block is plain.

    gs is from _LEAST_GS to _MOST_GS, gs_inverse its inverse, correctly rounded.
    """
    amax = _largest_bits(words).to(tl.float32, bitcast=True)
    # Both quotients are IEEE's: amax times both parts of 1 / 6; that by gs, corrected once by its
    # exact remainder (Markstein).
    sixth = tl.fma(amax, 0.16666667163372039794921875, amax * -4.967053731282552e-09)
    near = sixth * gs_inverse
    quotient = tl.fma(tl.fma(-near, gs, sixth), gs_inverse, near)
    scale, value = _e4m3(quotient)
    inverse, rest = _inverse(value * gs)
    # NaN compares false. Infinity leaves NaN in the quotient.
    is_plain = (scale > 0) & (quotient <= 464.0) & (amax * inverse < 6.99)
    return _sixteen_codes(words, inverse, rest), scale, is_plain


@triton.jit
def _clamp_bf16(bits, up, limit):
    """bf16 in the high half of an int32, times up, to limit; NaN to limit. All 0 if limit is."""
    x = bits.to(tl.float32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x) * up, limit).to(tl.int32, bitcast=True) & _BF16
    sign = tl.where(x == x, bits & _SIGN, 0)
    return tl.where(limit > 0, magnitude | sign, 0)


@triton.jit
def _quantize_any(words, gs):
    """Blocks -> codes, scales' bits, saturated: of any values, and of any gs."""
    amax = _largest_number(words)
    quotient = tl.div_rn(tl.div_rn(amax, 6.0), gs)
    scale, value = _e4m3(quotient)
    # Tiny and huge scales and their values are multiplied to where their inverses are normal.
    up = tl.where(gs < _LEAST_GS, 1.8446744073709552e19, 1.0)  # 2^64
    up = tl.where(gs > _MOST_GS, 5.421010862427522e-20, up)
    scaled = (value * gs) * up
    # A bf16 above 5 and below 7 times the scale has the code of all that is larger.
    limit = ((scaled * 6.5).to(tl.int32, bitcast=True) & _BF16).to(tl.float32, bitcast=True)
    clamped = ()
    for i in tl.static_range(8):
        low = _clamp_bf16(words[i] << 16, up, limit)
        high = _clamp_bf16(words[i] & _BF16, up, limit)
        clamped = clamped + (high | ((low >> 16) & 0xFFFF),)
    inverse, rest = _inverse(scaled)
    # 464 is the tie between 448 and the next E4M3 step, and goes to 448.
    saturated = (quotient > 464.0) | (_largest_bits(words) >= _INF)
    return _sixteen_codes(clamped, inverse, rest), scale, saturated.to(tl.int32)


@triton.jit
def _own_scale(row_ptr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """max|row| / 2688; NaN counts as 0."""
    words = tl.arange(0, BLOCKS * 8)
    even = tl.zeros([BLOCKS * 8], tl.uint32)
    odd = tl.zeros([BLOCKS * 8], tl.uint32)
    for chunk in tl.static_range(CHUNKS):
        exists = chunk * BLOCKS * 8 + words < NUM_BLOCKS * 8
        word = tl.load(row_ptr + chunk * BLOCKS * 8 + words, mask=exists, other=0)
        next_even, next_odd = _without_signs(word)
        even, odd = tl.maximum(even, next_even), tl.maximum(odd, next_odd)
    largest = tl.max(_larger_bits(even, odd), axis=0)
    amax = largest.to(tl.float32, bitcast=True)
    if largest > _INF:
        numbers = tl.zeros([BLOCKS], tl.float32)
        for first in range(0, NUM_BLOCKS, BLOCKS):
            blocks = _load_blocks(row_ptr, first + tl.arange(0, BLOCKS), NUM_BLOCKS)
            numbers = tl.maximum(numbers, _largest_number(blocks))
        amax = tl.max(numbers, axis=0)
    gs = tl.maximum(tl.div_rn(tl.minimum(amax, 3.4e38), 2688.0), 7.888609052210118e-31)
    return tl.where(amax > 0, gs, 1.0)


@triton.jit
def _store_scales(scales_ptr, row, block, scales, SCALE_COLUMNS: tl.constexpr, ORDER: tl.constexpr):
    if ORDER == _SWIZZLED:
        place = (row // 128) * (SCALE_COLUMNS * 128) + row % 32 * 16 + row % 128 // 32 * 4
        place = place + block // 4 * 512 + block % 4
    else:
        place = row * SCALE_COLUMNS + block
    tl.store(scales_ptr + place, scales.to(tl.uint8), mask=block < SCALE_COLUMNS)


@triton.jit
def _store_codes(codes_ptr, row, block, codes, NUM_BLOCKS: tl.constexpr):
    place = row * NUM_BLOCKS + block
    tl.store(codes_ptr + place, codes, mask=block < NUM_BLOCKS, cache_modifier=".cs")


@triton.jit
def _quantize_kernel(
    x_ptr,  # (tokens, K // 2) int32: two bf16, the even column in the low half
    slot_to_row_ptr,
    live_ptr,
    tile_to_expert_ptr,
    gs_in_ptr,
    codes_ptr,  # int64: a block each
    scales_ptr,
    gs_out_ptr,
    saturated_ptr,
    NUM_BLOCKS: tl.constexpr,  # K // 16
    SCALE_COLUMNS: tl.constexpr,  # of a row of block scales, padding included
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of so many blocks, in a row of block scales
    POLICY: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_LAYOUT: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    COUNTS_SATURATED: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    token = tl.program_id(0).to(tl.int64)

    # Phase 1: the rows to write; none, and the token is not read.
    rows = ()
    num_rows = tl.zeros([], tl.int32)
    for slot in tl.static_range(TOP_K):
        row = token
        if HAS_LAYOUT:
            row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
        elif HAS_LIVE:
            row = tl.where(tl.load(live_ptr + token) >= 0, token, -1)
        rows = rows + (row,)
        num_rows += (row >= 0).to(tl.int32)
    if num_rows > 0:
        # Phase 2: the global scale, where it is the layer's or the row's.
        row_ptr = x_ptr + token * (NUM_BLOCKS * 8)
        if POLICY == _OWN:
            gs = _own_scale(row_ptr, NUM_BLOCKS, BLOCKS, CHUNKS)
            for slot in tl.static_range(TOP_K):
                if rows[slot] >= 0:
                    tl.store(gs_out_ptr + rows[slot], gs)
        elif POLICY == _PER_ROW:
            gs = tl.load(gs_in_ptr + token)
        elif POLICY != _PER_EXPERT:
            gs = tl.load(gs_in_ptr)

        # Phase 3: quantise as if the row were plain, and write.
        is_plain = POLICY != _PER_EXPERT
        if POLICY != _PER_EXPERT:
            gs_inverse = tl.div_rn(1.0, gs)
            exceptions = tl.zeros([BLOCKS], tl.int32)
            block = tl.arange(0, BLOCKS)
            words = _load_blocks(row_ptr, block, NUM_BLOCKS)
            for _ in range(CHUNKS):
                # Loaded while the blocks before are quantised.
                following = _load_blocks(row_ptr, block + BLOCKS, NUM_BLOCKS)
                codes, scales, plain = _quantize_plain(words, gs, gs_inverse)
                exceptions = tl.where(plain | (block >= NUM_BLOCKS), exceptions, 1)
                if ORDER == _TOKENS:
                    _store_scales(scales_ptr, token, block, scales, SCALE_COLUMNS, ORDER)
                for slot in tl.static_range(TOP_K):
                    if rows[slot] >= 0:
                        _store_codes(codes_ptr, rows[slot], block, codes, NUM_BLOCKS)
                        if ORDER != _TOKENS:
                            _store_scales(
                                scales_ptr, rows[slot], block, scales, SCALE_COLUMNS, ORDER
                            )
                words = following
                block += BLOCKS
            is_plain = tl.max(exceptions, axis=0) == 0
            is_plain = is_plain & (gs >= _LEAST_GS) & (gs <= _MOST_GS)

        # Phase 4: if it is not, quantise again and write over it.
        if not is_plain:
            num_saturated = tl.zeros([BLOCKS], tl.int32)
            for chunk in range(CHUNKS):
                block = chunk * BLOCKS + tl.arange(0, BLOCKS)
                words = _load_blocks(row_ptr, block, NUM_BLOCKS)
                if POLICY != _PER_EXPERT:
                    codes, scales, saturated = _quantize_any(words, gs)
                    num_saturated += num_rows * saturated
                if ORDER == _TOKENS:
                    _store_scales(scales_ptr, token, block, scales, SCALE_COLUMNS, ORDER)
                for slot in tl.static_range(TOP_K):
                    row = rows[slot]
                    if row >= 0:
                        if POLICY == _PER_EXPERT:
                            expert = tl.load(tile_to_expert_ptr + row // TILE)
                            codes, scales, saturated = _quantize_any(
                                words, tl.load(gs_in_ptr + expert)
                            )
                            num_saturated += saturated
                        _store_codes(codes_ptr, row, block, codes, NUM_BLOCKS)
                        if ORDER != _TOKENS:
                            _store_scales(scales_ptr, row, block, scales, SCALE_COLUMNS, ORDER)
            if COUNTS_SATURATED:
                count = tl.sum(num_saturated, axis=0)
                if count > 0:
                    tl.atomic_add(saturated_ptr, count.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def _swizzle_kernel(
    per_token_ptr,  # (tokens, WORDS) int32: four block scales each
    row_to_slot_ptr,
    scales_ptr,
    num_rows,
    TOP_K: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of words, at once
    HAS_LAYOUT: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """128x4 blocks of the scales of 128 rows; those of rows that no slot has are left."""
    wait_for_inputs(launch_pdl)
    tile = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, 128)  # of a word in a 128x4 block
    row = tile * 128 + place % 4 * 32 + place // 4
    slot = tl.load(row_to_slot_ptr + row, mask=row < num_rows, other=-1)
    if tl.max(slot, axis=0) >= 0:
        token = row
        if HAS_LAYOUT:
            token = (slot // TOP_K).to(tl.int64)
        word = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        exists = (slot >= 0)[:, None] & (word < WORDS)[None, :]
        words = token[:, None] * WORDS + word[None, :]
        scales = tl.load(per_token_ptr + words, mask=exists, other=0)
        # A word a thread: four, where not all have to exist, were four writes to parts of sectors.
        words = tl.max_contiguous(word[None, :] * 128 + place[:, None], [1, 1])
        tl.store(scales_ptr + tile * (WORDS * 128) + words, scales, mask=exists)


def scratch_size(num_tokens: int, K: int) -> int:
    """Bytes of `nvfp4_quantize`'s scratch."""
    columns = block_scales_shape(1, K, swizzled=True)[1]
    return num_tokens * columns if choose_config(columns, num_tokens).swizzles else 0


def block_scales_shape(rows: int, K: int, swizzled: bool) -> tuple[int, int]:
    """Of a tensor of E4M3 block scales; 128x4 blocks round both sides up."""
    columns = K // NVFP4_BLOCK
    if not swizzled:
        return rows, columns
    return _round_up(rows, SWIZZLE_ROWS), _round_up(columns, SWIZZLE_COLUMNS)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def nvfp4_quantize(
    x: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: ExpertLayout | None = None,
    *,
    live: torch.Tensor | None = None,
    swizzled: bool = False,
    saturated: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    out: QuantizedRows | None = None,
) -> QuantizedRows:
    """NVFP4 of every row of x: what `reference.nvfp4_quantize` says, on the GPU.

    x (num_tokens, K) bf16, contiguous, K a multiple of 16. With a layout, token t's codes and
    scales go to every row slot_to_row[t, j] >= 0, and rows that no slot has are left as they are;
    without, row i goes to row i, unless live (num_tokens,) int32 is negative there: row_to_slot as
    live quantises rows that are in their place and skips the padding. global_scale float32: (1,),
    or (num_local_experts,) with a layout, or (num_tokens,) without; None for each row's own, which
    is then written to out.global_scales (rows,). saturated, a (1,) int64, grows by the blocks, of
    written rows, that did not fit. out is (rows, K // 2) uint8 codes and E4M3 block scales of
    block_scales_shape; scratch uint8, scratch_size bytes for swizzled scales; both made here if
    None.
    """
    num_tokens, K = x.shape
    assert x.dtype == torch.bfloat16 and x.is_contiguous(), (x.dtype, x.stride())
    assert K % NVFP4_BLOCK == 0, f"K {K} is not a multiple of {NVFP4_BLOCK}"
    rows = num_tokens if layout is None else len(layout.row_to_slot)
    policy = _policy(global_scale, layout, num_tokens)
    if out is None:
        out = _make_out(rows, K, swizzled, global_scale, x.device)
    scales_shape = block_scales_shape(rows, K, swizzled)
    assert out.codes.shape == (rows, K // 2), (out.codes.shape, rows, K)
    assert out.block_scales.shape == scales_shape, (out.block_scales.shape, scales_shape)
    assert out.codes.is_contiguous() and out.block_scales.is_contiguous()
    assert live is None or (layout is None and live.shape == (num_tokens,)), live.shape
    assert policy != OWN or out.global_scales.shape == (rows,), out.global_scales.shape
    if num_tokens == 0:
        return out
    has_pdl = supports_pdl(x)
    top_k = 1 if layout is None else layout.slot_to_row.shape[1]
    config = choose_config(scales_shape[1], num_tokens)
    order, scales = SWIZZLED if swizzled else ROWS, out.block_scales.view(torch.uint8)
    row_to_slot = live if layout is None else layout.row_to_slot
    swizzles = swizzled and config.swizzles and policy != PER_EXPERT and row_to_slot is not None
    if swizzles:
        if scratch is None:
            scratch = torch.empty(scratch_size(num_tokens, K), dtype=torch.uint8, device=x.device)
        assert scratch.numel() >= scratch_size(num_tokens, K), scratch.shape
        order, scales = TOKENS, scratch
    _quantize_kernel[(num_tokens,)](
        x.view(torch.int32),
        layout.slot_to_row if layout else None,
        live,
        layout.tile_to_expert if layout else None,
        global_scale,
        out.codes.view(torch.int64),
        scales,
        out.global_scales,
        saturated,
        NUM_BLOCKS=K // NVFP4_BLOCK,
        SCALE_COLUMNS=scales_shape[1],
        TOP_K=top_k,
        TILE=1 if layout is None else rows // max(1, len(layout.tile_to_expert)),
        BLOCKS=config.blocks,
        CHUNKS=triton.cdiv(scales_shape[1], config.blocks),
        POLICY=policy,
        ORDER=order,
        HAS_LAYOUT=layout is not None,
        HAS_LIVE=live is not None,
        COUNTS_SATURATED=saturated is not None,
        launch_pdl=has_pdl,
        num_warps=config.num_warps,
    )
    if swizzles:
        words = scales_shape[1] // SWIZZLE_COLUMNS
        _swizzle_kernel[(scales_shape[0] // SWIZZLE_ROWS, triton.cdiv(words, WORDS_AT_ONCE))](
            scales.view(torch.int32),
            row_to_slot,
            out.block_scales.view(torch.int32),
            rows,
            TOP_K=top_k,
            WORDS=words,
            COLUMNS=WORDS_AT_ONCE,
            HAS_LAYOUT=layout is not None,
            launch_pdl=has_pdl,
            num_warps=4,
        )
    return out


def _policy(global_scale: torch.Tensor | None, layout: ExpertLayout | None, num_tokens: int) -> int:
    if global_scale is None:
        return OWN
    assert global_scale.dtype == torch.float32, global_scale.dtype
    if global_scale.numel() == 1:
        return PER_LAYER
    if layout is None:
        assert global_scale.shape == (num_tokens,), (global_scale.shape, num_tokens)
        return PER_ROW
    assert global_scale.shape == layout.counts.shape, (global_scale.shape, layout.counts.shape)
    return PER_EXPERT


def _make_out(
    rows: int, K: int, swizzled: bool, global_scale: torch.Tensor | None, device: torch.device
) -> QuantizedRows:
    scales = torch.zeros(
        block_scales_shape(rows, K, swizzled), dtype=torch.uint8, device=device
    ).view(torch.float8_e4m3fn)
    if global_scale is None:
        global_scale = torch.ones(rows, dtype=torch.float32, device=device)
    return QuantizedRows(
        torch.zeros(rows, K // 2, dtype=torch.uint8, device=device), scales, global_scale
    )
