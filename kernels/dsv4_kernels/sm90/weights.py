"""Checkpoint layout -> sm90 kernels' layout, in place, a chunk of experts at a time.

Weights are cut into blocks of 64 rows by 64 columns; a block's codes are 2048 contiguous
bytes and its scales 256 (MXFP4: 128), and blocks follow one another along K, then along the rows:

    codes   (rows / 64, K / 64, 128 threads, 4 steps)     one 32-bit word
    scales  (rows / 64, K / 64, 32 row pairs, 2 pairs of steps)   one 32-bit word
    MXFP4   (rows / 64, K / 64, 32 row pairs)             one 32-bit word

A step is WGMMA's K = 16. Thread t = 32 w + l of a warpgroup owns eight codes a step, its fragment
of A in registers: register i = 0..3 holds row 16 w + l // 4 + 8 (i % 2), columns
8 (i // 2) + 2 (l % 4) + {0, 1}. In the word, the first column's code is in the low half and the
second's in the high half, at these bits of it (s = sign, e1 e0 = exponent, m = mantissa; but
register 2's signs lie each in the other half):

    register 0: s 15, e1 e0 m 8 7 6      register 2: s 3, e1 e0 m 12 11 10
    register 1: s  9, e1 e0 m 2 1 0      register 3: s 13, e1 14, e0 5, m 4

`ptx.widen` takes each register by a shift or rotation under one mask. Shifts alone cannot, because
the mask does not tile a word; so register 3 is ((word << 2) ^ (word >> 6)) under the mask, and its
bits are stored such that this gives its codes. A step costs four shifts and four masks.

Scales: a row pair is rows 16 w + r and 16 w + r + 8, at index 8 w + r. A scale takes 8 bits, E4M3
without sign but with a fifth exponent bit, so that 2^-9 .. 448 are all normal numbers; 2^x has
exponent x + 22. In the word of steps 2 i and 2 i + 1, the first step's are at bits 11:4 (row) and
27:20 (row + 8), and a rotation by 8 brings the second's there. Zero has no encoding: a zero scale
becomes 0 and the codes that it scales zeros, which is the same matrix.

MXFP4's scale of two steps is such a byte without mantissa, and a word holds those of steps 0 and 1,
then those of 2 and 3. Its exponent counts from the lowest power of a window of 31, which ends at
the largest scale of the expert (fc1: of its gate or its up) that has a code other than zero; the
global scale takes the window's place, a power of two. A block under the window is rounded to the
E2M1 values of the window's lowest scale, to nearest even, an error of at most 2^-32 of the largest
scale. A block of zeros stays one under any scale.

fc1's rows are permuted first: in each block, rows 16 w + r are gate rows 32 b + 8 w + r, and rows
16 w + r + 8 the up rows of the same number, so that one thread owns both operands of SwiGLU.

W4A8 has another order, for `e4m3`'s widening:

    codes   (rows / 64, K / 64, 32 row pairs, 4 lanes, row half, 2)   one 32-bit word
    scales  (rows / 64, K / 64, 32 row pairs, blocks of K, row half)   one byte

Lane q's two words of a row have the codes of columns 16 q .. 16 q + 15, whose magnitudes stay where
the checkpoint has them; code i's sign is at bit 8 i + 7, or 8 (i - 4) + 3 from i = 4 on. Scales are
NVFP4's bytes, under which zero is a scale like another; MXFP4's count from a window of 15 powers,
and an error is at most 2^-16 of the largest. fc1's gate and up rows 32 b + 8 w + r are the columns
that h has there (`Fp8Rows`). Where h ends in the middle of a block of K, lane q has columns 8 q ..
8 q + 7 of the half in its first word, with their scale, and zeros in its second.
"""

import math

import torch
import triton
import triton.language as tl

from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights

# Experts that are copied and then shuffled at a time; 190 MiB of scratch at V4-Pro's sizes.
CHUNK = 8
# K blocks of a program, at most: 128 bytes of a row.
_K_BLOCKS = 4
# Powers of two of MXFP4's window under its largest, and the exponent of the power of two that the
# kernel takes the lowest for.
_WINDOW = {False: (30, 22), True: (14, 5)}


def prepare_weights(
    weights: ExpertWeights, rounding: torch.Tensor | None = None, fp8: bool = False
) -> ExpertWeights:
    """Rewrite the four big tensors in place; shapes stay, the meaning of the bytes is above.

    Block scales must be 0 or positive numbers, MXFP4's below 255 (NaN): who loads a checkpoint
    looks. Rows of both matrices and their K are multiples of 64 (`padding`).
    Three launches a matrix and chunk.

    MXFP4 takes two launches a matrix more, multiplies the global scales, and rounding (1,) float32
    grows to the largest error of a weight, over the largest scale of its expert: 0 if all is exact.
    """
    matrices = (
        (weights.w13, weights.w13_block_scales, weights.w13_global_scales, weights.intermediate),
        (weights.w2, weights.w2_block_scales, weights.w2_global_scales, 0),
    )
    chunk = min(CHUNK, weights.num_local_experts)
    words = max(codes[:chunk].nbytes + scales[:chunk].nbytes for codes, scales, *_ in matrices) // 4
    scratch = torch.empty(words, dtype=torch.int32, device=weights.w13.device)
    for codes, scales, global_scales, gate_rows in matrices:
        assert codes.is_contiguous() and scales.is_contiguous() and global_scales.is_contiguous()
        largest = _largest_scales(codes, scales, gate_rows) if scales.dtype == torch.uint8 else None
        for first in range(0, len(codes), chunk):
            part = slice(first, first + chunk)
            window = None
            if largest is not None:
                window = (largest[part], global_scales[part], rounding)
            half_block = fp8 and not gate_rows and weights.intermediate % 64 > 0
            _shuffle(codes[part], scales[part], gate_rows, window, scratch, fp8, half_block)
    return weights


def _largest_scales(codes: torch.Tensor, scales: torch.Tensor, gate_rows: int) -> torch.Tensor:
    """(experts, halves) int32, of MXFP4: the largest byte of a block that is not all zeros; fc1 has
    two halves, gate and up, and fc2 one."""
    experts, rows, _ = scales.shape
    halves = 2 if gate_rows else 1
    largest = torch.zeros((experts, halves), dtype=torch.int32, device=codes.device)
    k_blocks = codes.shape[2] // 32
    at_once = math.gcd(rows // halves, 64)  # 32 where gate and up share a block
    _largest_scales_kernel[(rows // at_once, experts)](
        codes.view(torch.int32),
        scales.view(torch.int16),
        largest,
        ROWS=rows,
        AT_ONCE=at_once,
        K_BLOCKS=k_blocks,
        BLOCKS=_blocks_at_once(k_blocks),
        HALVES=halves,
    )
    return largest


def _shuffle(
    codes: torch.Tensor,
    scales: torch.Tensor,
    gate_rows: int,
    window: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    scratch: torch.Tensor,
    fp8: bool,
    half_block: bool,
) -> None:
    """A chunk's codes (E, R, K // 2) and scales (E, R, K // 16 or K // 32); scratch holds both, as
    int32. gate_rows is R // 2 for fc1, 0 for fc2; window is (largest scales, global scales,
    rounding) of MXFP4; half_block: the last 32 columns are padding."""
    experts, rows, k_blocks = len(codes), codes.shape[1], codes.shape[2] // 32
    block = NVFP4_BLOCK if window is None else MXFP4_BLOCK
    assert rows % 64 == 0 and scales.shape == (experts, rows, k_blocks * 64 // block), scales.shape
    sources = []
    for tensor in (codes, scales):
        words = tensor.view(-1).view(torch.int32)
        source, scratch = scratch[: len(words)], scratch[len(words) :]
        sources.append(source.copy_(words))
    # A row's scales of one block of K: four bytes, or two.
    sources[1] = sources[1].view(torch.int32 if window is None else torch.int16)
    largest, global_scales, rounding = window or (None, None, None)
    blocks = _blocks_at_once(k_blocks)
    _shuffle_kernel[(rows // 64 * (k_blocks // blocks), experts)](
        *sources,
        codes.view(-1).view(torch.int32),
        scales.view(-1).view(torch.int32),
        largest,
        global_scales,
        rounding if rounding is None else rounding.view(torch.int32),
        ROWS=rows,
        K_BLOCKS=k_blocks,
        BLOCKS=blocks,
        GATE_ROWS=gate_rows,
        MXFP4=window is not None,
        FP8=fp8,
        HALF_BLOCK=half_block,
        WINDOW=_WINDOW[fp8][0],
        LOWEST=_WINDOW[fp8][1],
    )


def _blocks_at_once(k_blocks: int) -> int:
    """The largest power of two that divides them, of those a program may have."""
    return min(_K_BLOCKS, k_blocks & -k_blocks)


@triton.jit
def _largest_scales_kernel(
    codes_ptr,
    scales_ptr,
    largest_ptr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """A program looks at AT_ONCE rows."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    word = tl.arange(0, 8)
    largest = tl.zeros([AT_ONCE, BLOCKS], dtype=tl.int32)
    for k_block in range(0, K_BLOCKS, BLOCKS):
        at = (expert * ROWS + row)[:, None] * K_BLOCKS + k_block + tl.arange(0, BLOCKS)[None, :]
        scale = _scale_of_word(tl.load(scales_ptr + at))
        codes = tl.load(codes_ptr + at[:, :, None] * 8 + word[None, None, :])
        live = tl.where(codes & 0x77777777 != 0, scale, 0)
        largest = tl.maximum(largest, tl.max(live, axis=2))
    half = tl.program_id(0) * AT_ONCE // (ROWS // HALVES)
    tl.atomic_max(largest_ptr + expert * HALVES + half, tl.max(largest))


@triton.jit
def _scale_of_word(scales):
    """MXFP4's two scales of 64 columns, int16 -> the byte of each of their eight words of codes."""
    word = tl.arange(0, 8)
    return scales[:, :, None].to(tl.int32) >> (word // 4 * 8)[None, None, :] & 0xFF


@triton.jit
def _shuffle_kernel(
    source_codes_ptr,
    source_scales_ptr,
    codes_ptr,
    scales_ptr,
    largest_ptr,
    global_scales_ptr,
    rounding_ptr,
    ROWS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    MXFP4: tl.constexpr,
    FP8: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """A program makes BLOCKS blocks that follow one another along K: 32 row pairs, 64 columns."""
    expert = tl.program_id(1).to(tl.int64)
    row_block = tl.program_id(0) // (K_BLOCKS // BLOCKS)
    k_block = tl.program_id(0) % (K_BLOCKS // BLOCKS) * BLOCKS + tl.arange(0, BLOCKS)
    pair, step = tl.arange(0, 32), tl.arange(0, 4)
    if GATE_ROWS > 0:
        row, to_second = row_block * 32 + pair, GATE_ROWS
        if FP8:
            of_lane = tl.where(row < GATE_ROWS // 64 * 64, 16, 8)
            row = row // 64 * 64 + row % 16 // 4 * of_lane + row % 64 // 16 * 4 + row % 4
    else:
        row, to_second = row_block * 64 + pair // 8 * 16 + pair % 8, 8

    # Read: scales (32, BLOCKS), those of four steps in each; codes (32, BLOCKS, 4 steps), of which
    # the left are columns 0 .. 7 of a step, the right 8 .. 15, and column pair c is in byte c.
    first = (expert * ROWS + row)[:, None] * K_BLOCKS + k_block[None, :]
    second = first + to_second * K_BLOCKS
    first_scales = tl.load(source_scales_ptr + first)
    second_scales = tl.load(source_scales_ptr + second)
    first_codes = _codes(source_codes_ptr, first)
    second_codes = _codes(source_codes_ptr, second)
    if MXFP4:
        HALVES: tl.constexpr = 2 if GATE_ROWS > 0 else 1
        lowest_ptr = largest_ptr + expert * HALVES
        first_lowest = tl.maximum(tl.load(lowest_ptr) - WINDOW, 0)
        second_lowest = tl.maximum(tl.load(lowest_ptr + HALVES - 1) - WINDOW, 0)
        first_codes = _into_window(first_codes, first_scales, first_lowest, rounding_ptr, WINDOW)
        second_codes = _into_window(
            second_codes, second_scales, second_lowest, rounding_ptr, WINDOW
        )
        if tl.program_id(0) == 0:
            _move_window(global_scales_ptr + expert * HALVES, first_lowest + LOWEST)
            if GATE_ROWS > 0:
                _move_window(global_scales_ptr + expert * HALVES + 1, second_lowest + LOWEST)
    elif not FP8:
        first_codes = _live_codes(first_codes, first_scales)
        second_codes = _live_codes(second_codes, second_scales)

    # Write.
    block = (expert * (ROWS // 64) + row_block) * K_BLOCKS + k_block
    out = block[None, :] * 32 + pair[:, None]
    if FP8:
        word = tl.arange(0, 8)
        place = (word // 2 * 4 + word % 2)[None, None, :]
        if HALF_BLOCK:
            is_half = (k_block == K_BLOCKS - 1)[None, :]
            place = tl.where(is_half[:, :, None], (word % 4 * 4 + word // 4)[None, None, :], place)
            first_scales = tl.where(is_half, _spread(first_scales, MXFP4), first_scales)
            second_scales = tl.where(is_half, _spread(second_scales, MXFP4), second_scales)
        at = out[:, :, None] * 16 + place
        tl.store(codes_ptr + at, _with_signs_apart(first_codes))
        tl.store(codes_ptr + at + 2, _with_signs_apart(second_codes))
    else:
        first_left, first_right = tl.split(tl.reshape(first_codes, [32, BLOCKS, 4, 2]))
        second_left, second_right = tl.split(tl.reshape(second_codes, [32, BLOCKS, 4, 2]))
        for c in tl.static_range(4):
            word = _code_word(
                first_left >> (8 * c),
                second_left >> (8 * c),
                first_right >> (8 * c),
                second_right >> (8 * c),
            )
            tl.store(codes_ptr + (out[:, :, None] * 4 + c) * 4 + step[None, None, :], word)
    if MXFP4:
        first_low = _exponent(first_scales, first_lowest, WINDOW)
        first_high = _exponent(first_scales >> 8, first_lowest, WINDOW)
        second_low = _exponent(second_scales, second_lowest, WINDOW)
        second_high = _exponent(second_scales >> 8, second_lowest, WINDOW)
        if FP8:
            word = first_low | second_low << 8 | first_high << 16 | second_high << 24
        else:
            word = _scale_word(first_low << 3, first_high << 3, second_low << 3, second_high << 3)
        tl.store(scales_ptr + out, word)
    elif FP8:
        for i in tl.static_range(2):
            first, second = first_scales >> (16 * i), second_scales >> (16 * i)
            word = first & 0xFF | (second & 0xFF) << 8 | (first & 0xFF00) << 8
            tl.store(scales_ptr + out * 2 + i, word | (second & 0xFF00) << 16)
    else:
        for i in tl.static_range(2):
            word = _scale_word(
                _five_bit_exponent(first_scales >> (16 * i)),
                _five_bit_exponent(first_scales >> (16 * i + 8)),
                _five_bit_exponent(second_scales >> (16 * i)),
                _five_bit_exponent(second_scales >> (16 * i + 8)),
            )
            tl.store(scales_ptr + out * 2 + i, word)


@triton.jit
def _codes(codes_ptr, at):
    """The eight words of each block and row, two a step: (32, BLOCKS, 8)."""
    return tl.load(codes_ptr + at[:, :, None] * 8 + tl.arange(0, 8)[None, None, :])


@triton.jit
def _spread(scales, MXFP4: tl.constexpr):
    """The scales of 32 columns and of 32 zeros -> of four lanes with eight columns each: two bytes
    or, of MXFP4, one, each twice."""
    low = scales & 0xFF
    if MXFP4:
        return low | low << 8
    high = scales >> 8 & 0xFF
    return low | low << 8 | high << 16 | high << 24


@triton.jit
def _with_signs_apart(codes):
    """Words of eight codes: the signs of the first four at bits 7, 15, 23 and 31, of the others at
    3, 11, 19 and 27."""
    word = codes & 0x77777777
    for i in tl.static_range(8):
        sign = codes >> (4 * i + 3) & 1
        word |= sign << (8 * i + 7 if i < 4 else 8 * i - 29)
    return word


@triton.jit
def _live_codes(codes, scales):
    """NVFP4: 0 where a step's scale is."""
    scale = scales[:, :, None] >> (tl.arange(0, 8) // 2 * 8)[None, None, :] & 0xFF
    return tl.where(scale == 0, 0, codes)


@triton.jit
def _into_window(codes, scales, lowest, rounding_ptr, WINDOW: tl.constexpr):
    """MXFP4: what is scaled by less than the lowest byte, rounded to what that scale can have."""
    below = tl.maximum(lowest - _scale_of_word(scales), 0)
    shift = tl.minimum(below, 5)  # 6.0 is 0 from there on
    rounded = codes & -0x77777778  # signs
    left = tl.zeros_like(codes)
    for i in tl.static_range(8):
        # In halves: 0, 1, 2, 3, 4, 6, 8 or 12 -> at most 6, and never 5.
        code = codes >> (4 * i) & 7
        value = tl.where(code < 5, code, tl.where(code < 7, 2 * code - 4, 12))
        new = (value + (1 << shift >> 1) - 1 + (value >> shift & 1)) >> shift
        left = tl.maximum(left, tl.abs(value - (new << shift)))
        rounded |= (new - (new > 4)) << (4 * i)
    if rounding_ptr is not None:
        # Of half a code's unit, 2^-below of the lowest scale, itself 2^-WINDOW of the largest.
        power = (tl.maximum(126 - WINDOW - below, 1) << 23).to(tl.float32, bitcast=True)
        error = tl.max(tl.where(below > 0, left.to(tl.float32) * power, 0.0))
        # Floats that are not negative are ordered as their bits are.
        tl.atomic_max(rounding_ptr, error.to(tl.int32, bitcast=True), mask=error > 0)
    return tl.where(below > 0, rounded, codes)


@triton.jit
def _exponent(scale, lowest, WINDOW: tl.constexpr):
    """MXFP4's byte in the window, 0 .. WINDOW. A block of zeros may have any scale: it takes one of
    the window's."""
    return tl.minimum(tl.maximum((scale.to(tl.int32) & 0xFF) - lowest, 0), WINDOW)


@triton.jit
def _move_window(global_scale_ptr, exponent):
    """A lowest scale of 2^-LOWEST in the kernel becomes 2^(lowest - 127), so exponent, of float32,
    is lowest + LOWEST: from 2^-105 to 2^119 (W4A8: 2^-122 to 2^118), with which sums are multiplied
    in float32."""
    power = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(global_scale_ptr, tl.load(global_scale_ptr) * power)


@triton.jit
def _code_word(byte0, byte1, byte2, byte3):
    """A thread's codes of a step: byte i, the lowest of its word, is register i's."""
    codes = _code_pair(byte0)
    word = (codes & 0x80008) << 12 | (codes & 0x70007) << 6
    codes = _code_pair(byte1)
    word |= (codes & 0x80008) << 6 | codes & 0x70007
    codes = _code_pair(byte2)
    word |= (codes & 0x00008) << 16 | (codes & 0x80000) >> 16 | (codes & 0x70007) << 10
    codes = _code_pair(byte3)
    word |= (codes & 0x80008) << 10 | (codes & 0x40004) << 12 | (codes & 0x30003) << 4
    # Register 3: each of its bits is XORed with the one that the other shift brings there.
    word ^= (word & 0x00400040) << 8
    word ^= (word & 0x10001000) >> 8
    word ^= (word & (1 << 29)) >> 8
    word ^= (word & (1 << 21)) >> 8
    word ^= (word & (1 << 13)) >> 8
    return word


@triton.jit
def _code_pair(byte):
    """The low code at bits 3:0, the high one at 19:16."""
    return byte & 0xF | (byte & 0xF0) << 12


@triton.jit
def _scale_word(row0, row1, next0, next1):
    """Of a row pair's bytes, the first of the row and of the row 8 below (next), then the second
    of both."""
    return row0 << 4 | row1 << 12 | next0 << 20 | next1 << 28 | next1 >> 4


@triton.jit
def _five_bit_exponent(scale):
    """E4M3, the lowest byte -> byte with a fifth exponent bit. Below 8 it is subnormal, n * 2^-9,
    and n as float32 has the bits."""
    scale = scale & 0xFF
    subnormal = (scale.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - 912
    return tl.where(scale == 0, 0, tl.where(scale < 8, subnormal, scale + 120))
