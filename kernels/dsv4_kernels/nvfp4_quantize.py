"""NVFP4: bf16 rows -> packed E2M1 codes and E4M3 block scales, in the rows of a layout.

    block scale = e4m3(max|block| / 6 / gs)          16 values, gs the global scale
    code        = e2m1(x / (block scale * gs))       both to nearest even; a zero scale: zero codes

gs comes per layer or per row, or is the row's own, max|row| / 2688 (`token`). A program reads
one token's row into registers, a block of 16 a thread in every chunk, quantises it once, and writes
it to the row of each of its local slots: only tokens that have rows are read. Codes and scales
equal `reference.nvfp4_quantize` bit for bit, under Triton's interpreter as on any GPU. Rows of
finite numbers whose block scales are neither zero nor clipped are plain: few instructions a value
are enough (`_quantize_plain`). Others are quantised once more (`_quantize_any`).

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
PER_LAYER, PER_ROW, OWN = 0, 1, 2
_PER_ROW, _OWN = tl.constexpr(PER_ROW), tl.constexpr(OWN)
# Where block scales are written: as rows, swizzled, or to the scratch, as rows of tokens.
ROWS, SWIZZLED, TOKENS = 0, 1, 2
_SWIZZLED, _TOKENS = tl.constexpr(SWIZZLED), tl.constexpr(TOKENS)
SWIZZLE_GROUPS = 4  # of 16 columns of scales, in a program
# Of float32 as an integer: infinity (NaN is above), the sign, and the bits that bf16 has.
_INF, _SIGN, _BF16 = tl.constexpr(0x7F800000), tl.constexpr(-0x80000000), tl.constexpr(-0x10000)
# The global scales of plain rows are from 2^-32 to 2^32.
_LEAST_GS, _MOST_GS = tl.constexpr(2.3283064365386963e-10), tl.constexpr(4294967296.0)


class Config(NamedTuple):
    blocks: int  # of 16 values, at once
    num_warps: int
    swizzles: bool  # scales in a launch of its own


def choose_config(scale_columns: int, num_tokens: int) -> Config:
    """Few tokens: few blocks a thread. Many: few registers, in up to eight chunks.

    us on an H200, 7168 columns, 6 slots, layer scale, row-major, of 64, 128 and 256 blocks at once,
    a thread each. 8192 tokens, all experts local: 84.0, 84.2, 86.4; one in eight local: 30.0, 28.9,
    35.4. 512 tokens, one in eight local: 5.9, 4.9, 4.1; 128 tokens: 3.6, 3.0, 2.8.
    """
    many = num_tokens >= 1024
    blocks = max(128 if many else 256, triton.next_power_of_2(triton.cdiv(scale_columns, 8)))
    blocks = min(blocks, triton.next_power_of_2(scale_columns))
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
def _largest_bits(words):
    """The largest magnitude of every block as float32 bits; of NaN, bits above infinity's.

    Magnitudes of bf16 compare as integers: two words at once, where a GPU has that.
    """
    largest = tl.zeros(words[0].shape, tl.uint16)
    for i in tl.static_range(8):
        pair = words[i] & 0x7FFF7FFF
        largest = tl.maximum(tl.maximum(largest, pair.to(tl.uint16)), (pair >> 16).to(tl.uint16))
    return largest.to(tl.int32) << 16


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
def _quantize_plain(words, largest, gs, gs_inverse):
    """Blocks -> codes, scales' bits, and whether they are right: the block is plain.

    largest is the words' _largest_bits. gs is from _LEAST_GS to _MOST_GS, gs_inverse its inverse,
    correctly rounded.
    """
    amax = largest.to(tl.float32, bitcast=True)
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
def _own_scale(row_ptr, largest, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """max|row| / 2688, of the _largest_bits of its chunks; NaN counts as 0."""
    of_row = largest[0]
    for i in tl.static_range(1, len(largest)):
        of_row = tl.maximum(of_row, largest[i])
    of_row = tl.max(of_row, axis=0)
    amax = of_row.to(tl.float32, bitcast=True)
    if of_row > _INF:
        numbers = tl.zeros([BLOCKS], tl.float32)
        for first in range(0, NUM_BLOCKS, BLOCKS):
            blocks = _load_blocks(row_ptr, first + tl.arange(0, BLOCKS), NUM_BLOCKS)
            numbers = tl.maximum(numbers, _largest_number(blocks))
        amax = tl.max(numbers, axis=0)
    gs = tl.maximum(tl.div_rn(tl.minimum(amax, 3.4e38), 2688.0), 7.888609052210118e-31)
    return tl.where(amax > 0, gs, 1.0)


@triton.jit
def _plain_row(words, largest, gs, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """A row's chunks -> their codes, their scales' bits, and whether they are right."""
    gs_inverse = tl.div_rn(1.0, gs)
    exceptions = tl.zeros([BLOCKS], tl.int32)
    codes = ()
    scales = ()
    for i in tl.static_range(len(words)):
        chunk_codes, chunk_scales, plain = _quantize_plain(words[i], largest[i], gs, gs_inverse)
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        exceptions = tl.where(plain | (block >= NUM_BLOCKS), exceptions, 1)
        codes = codes + (chunk_codes,)
        scales = scales + (chunk_scales,)
    is_plain = tl.max(exceptions, axis=0) == 0
    return codes, scales, is_plain & (gs >= _LEAST_GS) & (gs <= _MOST_GS)


@triton.jit
def _any_row(row_ptr, gs, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """A row -> its chunks' codes, their scales' bits, and how many blocks are saturated."""
    codes = ()
    scales = ()
    for _ in tl.static_range(CHUNKS):
        codes = codes + (tl.zeros([BLOCKS], tl.int64),)
        scales = scales + (tl.zeros([BLOCKS], tl.int32),)
    num_saturated = tl.zeros([BLOCKS], tl.int32)
    for chunk in range(CHUNKS):  # not unrolled: rows are seldom quantised here
        words = _load_blocks(row_ptr, chunk * BLOCKS + tl.arange(0, BLOCKS), NUM_BLOCKS)
        chunk_codes, chunk_scales, saturated = _quantize_any(words, gs)
        codes = codes[1:] + (chunk_codes,)
        scales = scales[1:] + (chunk_scales,)
        num_saturated += saturated
    return codes, scales, tl.sum(num_saturated, axis=0)


@triton.jit
def _store_codes(codes_ptr, row, codes, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    for i in tl.static_range(len(codes)):
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        tl.store(codes_ptr + row * NUM_BLOCKS + block, codes[i], mask=block < NUM_BLOCKS)


@triton.jit
def _store_scales(
    scales_ptr, row, scales, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ORDER: tl.constexpr
):
    for i in tl.static_range(len(scales)):
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        if ORDER == _SWIZZLED:
            place = (row // 128) * (COLUMNS * 128) + row % 32 * 16 + row % 128 // 32 * 4
            place = place + block // 4 * 512 + block % 4
        else:
            place = row * COLUMNS + block
        tl.store(scales_ptr + place, scales[i].to(tl.uint8), mask=block < COLUMNS)


@triton.jit
def _quantize_kernel(
    x_ptr,  # (tokens, K // 2) int32: two bf16, the even column in the low half
    slot_to_row_ptr,
    live_ptr,
    gs_in_ptr,
    codes_ptr,  # int64: a block each
    scales_ptr,
    gs_out_ptr,
    saturated_ptr,
    NUM_BLOCKS: tl.constexpr,  # K // 16
    SCALE_COLUMNS: tl.constexpr,  # of a row of block scales, padding included
    TOP_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of so many blocks, in a row of block scales
    POLICY: tl.constexpr,
    ORDER: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * (NUM_BLOCKS * 8)

    # Phase 1: how many rows to write; none, and the token is not read.
    num_rows = 1
    if slot_to_row_ptr is not None:
        num_rows = 0
        for i in tl.static_range(TOP_K):
            num_rows += (tl.load(slot_to_row_ptr + token * TOP_K + i) >= 0).to(tl.int32)
    elif live_ptr is not None:
        num_rows = (tl.load(live_ptr + token) >= 0).to(tl.int32)
    if num_rows > 0:
        # Phase 2: load all of the row.
        words = ()
        largest = ()
        for i in tl.static_range(CHUNKS):
            block = i * BLOCKS + tl.arange(0, BLOCKS)
            words = words + (_load_blocks(row_ptr, block, NUM_BLOCKS),)
        for i in tl.static_range(CHUNKS):
            largest = largest + (_largest_bits(words[i]),)

        # Phase 3: quantise as if it were plain; if it is not, once more.
        if POLICY == _OWN:
            gs = _own_scale(row_ptr, largest, NUM_BLOCKS, BLOCKS)
        elif POLICY == _PER_ROW:
            gs = tl.load(gs_in_ptr + token)
        else:
            gs = tl.load(gs_in_ptr)
        codes, scales, is_plain = _plain_row(words, largest, gs, NUM_BLOCKS, BLOCKS)
        num_saturated = tl.zeros([], tl.int32)
        if not is_plain:
            codes, scales, num_saturated = _any_row(row_ptr, gs, NUM_BLOCKS, BLOCKS, CHUNKS)
        if saturated_ptr is not None:
            if num_saturated > 0:
                count = (num_saturated * num_rows).to(tl.int64)
                tl.atomic_add(saturated_ptr, count, sem="relaxed")

        # Phase 4: write, one row after the other: chunk after chunk took 5 % longer on an H200.
        if ORDER == _TOKENS:
            _store_scales(scales_ptr, token, scales, SCALE_COLUMNS, BLOCKS, ORDER)
        for slot in range(TOP_K):
            row = token
            if slot_to_row_ptr is not None:
                row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
            if row >= 0:
                if POLICY == _OWN:
                    tl.store(gs_out_ptr + row, gs)
                _store_codes(codes_ptr, row, codes, NUM_BLOCKS, BLOCKS)
                if ORDER != _TOKENS:
                    _store_scales(scales_ptr, row, scales, SCALE_COLUMNS, BLOCKS, ORDER)


@triton.jit(do_not_specialize=["num_rows"])
def _swizzle_kernel(
    per_token_ptr,  # (tokens, WORDS) int32: four block scales each
    row_to_slot_ptr,
    scales_ptr,
    num_rows,
    TOP_K: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,  # of four words, in a program
    HAS_LAYOUT: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """128x4 blocks of the scales of 128 rows; those of rows that no slot has are left.

    A thread has four words of each of four rows, 32 apart: of a word, the rows' are half a sector.
    Sectors that only some of their rows have are read and written as a whole: on an H200, 8192
    tokens of 7168, all experts local, quantise in 91 us so, and in 95 with parts of them written.
    """
    tile = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, 32 * GROUPS)
    row, group = place // GROUPS, tl.program_id(0) * GROUPS + place % GROUPS
    word = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    to = scales_ptr + tile * (WORDS * 128) + group * 512 + row * 4
    to = to[:, None] + tl.arange(0, 4)[None, :]

    # Phase 1: what the launch before this one does not write.
    tokens = ()
    of_sector = tl.full([32 * GROUPS], -1, tl.int32)
    for i in tl.static_range(4):
        token = tile * 128 + i * 32 + row
        slot = _load_slot(row_to_slot_ptr, token, num_rows)
        beside = _load_slot(row_to_slot_ptr, tile * 128 + i * 32 + (row ^ 1), num_rows)
        of_sector = tl.maximum(of_sector, tl.maximum(slot, beside))
        if HAS_LAYOUT:
            token = (slot // TOP_K).to(tl.int64)
        tokens = tokens + (tl.where(slot >= 0, token, -1),)
    least = tl.minimum(tl.minimum(tokens[0], tokens[1]), tl.minimum(tokens[2], tokens[3]))
    before = ()
    for i in tl.static_range(4):
        needed = (of_sector >= 0) & (least < 0) & (group * 4 + i < WORDS)
        before = before + (_four_columns(tl.load(to + i * 128, mask=needed[:, None], other=0)),)
    wait_for_inputs(launch_pdl)

    # Phase 2: from four words of each row to four rows of each word.
    rows = ()
    for i in tl.static_range(4):
        exists = (tokens[i][:, None] >= 0) & (word < WORDS)
        words = tl.load(per_token_ptr + tokens[i][:, None] * WORDS + word, mask=exists, other=0)
        rows = rows + (_four_columns(words),)
    for i in tl.static_range(4):
        first = tl.where(tokens[0] >= 0, rows[0][i], before[i][0])
        second = tl.where(tokens[1] >= 0, rows[1][i], before[i][1])
        third = tl.where(tokens[2] >= 0, rows[2][i], before[i][2])
        fourth = tl.where(tokens[3] >= 0, rows[3][i], before[i][3])
        four = tl.join(tl.join(first, third), tl.join(second, fourth))
        written = (of_sector >= 0) & (group * 4 + i < WORDS)
        tl.store(to + i * 128, tl.reshape(four, (32 * GROUPS, 4)), mask=written[:, None])


@triton.jit
def _load_slot(row_to_slot_ptr, row, num_rows):
    return tl.load(row_to_slot_ptr + row, mask=row < num_rows, other=-1)


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
    live quantises rows that are in their place and skips the padding. global_scale float32: (1,) or
    (num_tokens,); None for each row's own, which is then written to out.global_scales (rows,).
    saturated, a (1,) int64, grows by the blocks, of written rows, that did not fit. out is
    (rows, K // 2) uint8 codes and E4M3 block scales of block_scales_shape; scratch uint8,
    scratch_size bytes for swizzled scales; both made here if None.
    """
    num_tokens, K = x.shape
    assert x.dtype == torch.bfloat16 and x.is_contiguous(), (x.dtype, x.stride())
    assert K % NVFP4_BLOCK == 0, f"K {K} is not a multiple of {NVFP4_BLOCK}"
    rows = num_tokens if layout is None else len(layout.row_to_slot)
    policy = _policy(global_scale, num_tokens)
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
    swizzles = swizzled and config.swizzles and row_to_slot is not None
    if swizzles:
        if scratch is None:
            scratch = torch.empty(scratch_size(num_tokens, K), dtype=torch.uint8, device=x.device)
        assert scratch.numel() >= scratch_size(num_tokens, K), scratch.shape
        order, scales = TOKENS, scratch
    _quantize_kernel[(num_tokens,)](
        x.view(torch.int32),
        layout.slot_to_row if layout else None,
        live,
        global_scale,
        out.codes.view(torch.int64),
        scales,
        out.global_scales,
        saturated,
        NUM_BLOCKS=K // NVFP4_BLOCK,
        SCALE_COLUMNS=scales_shape[1],
        TOP_K=top_k,
        BLOCKS=config.blocks,
        CHUNKS=triton.cdiv(scales_shape[1], config.blocks),
        POLICY=policy,
        ORDER=order,
        launch_pdl=has_pdl,
        num_warps=config.num_warps,
    )
    if swizzles:
        words = scales_shape[1] // SWIZZLE_COLUMNS
        _swizzle_kernel[(triton.cdiv(words, 4 * SWIZZLE_GROUPS), scales_shape[0] // SWIZZLE_ROWS)](
            scales.view(torch.int32),
            row_to_slot,
            out.block_scales.view(torch.int32),
            rows,
            TOP_K=top_k,
            WORDS=words,
            GROUPS=SWIZZLE_GROUPS,
            HAS_LAYOUT=layout is not None,
            launch_pdl=has_pdl,
            num_warps=SWIZZLE_GROUPS,
        )
    return out


def _policy(global_scale: torch.Tensor | None, num_tokens: int) -> int:
    if global_scale is None:
        return OWN
    assert global_scale.dtype == torch.float32, global_scale.dtype
    if global_scale.numel() == 1:
        return PER_LAYER
    assert global_scale.shape == (num_tokens,), (global_scale.shape, num_tokens)
    return PER_ROW


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
