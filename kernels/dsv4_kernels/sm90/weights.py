"""Checkpoint layout -> kernel layout, in place, a chunk of experts at a time.

sm90. Weights are cut into blocks of 64 rows by 64 columns; a block's codes are 2048 contiguous
bytes and its scales 256, and blocks follow one another along K, then along the rows:

    codes   (rows / 64, K / 64, 128 threads, 4 steps)     one 32-bit word
    scales  (rows / 64, K / 64, 32 row pairs, 2 pairs of steps)   one 32-bit word

Thread t = 32 w + l of the warpgroup owns, of each step (16 columns), the eight codes of WGMMA's
register operand: register i = 0..3 holds row 16 w + l // 4 + 8 (i % 2), columns
8 (i // 2) + 2 (l % 4) + {0, 1}. In the word, the first column's code is in the low half and the
second's in the high half, at these bits of it (s = sign, e1 e0 = exponent, m = mantissa; but
register 2's signs lie each in the other half):

    register 0: s 15, e1 e0 m 8 7 6      register 2: s 3, e1 e0 m 12 11 10
    register 1: s  9, e1 e0 m 2 1 0      register 3: s 13, e1 14, e0 5, m 4

Three shifts of a word, under one mask each, cannot give all of its bits: the mask does not tile
them. Four can, if register 3 is ((word << 2) ^ (word >> 6)) under the mask: its bits are changed so
that this gives its codes. A step costs four shifts and four masks.

Scales: a row pair is rows 16 w + r and 16 w + r + 8, at index 8 w + r. A scale takes 8 bits, E4M3
without its sign but with a fifth exponent bit, so that 2^-9 .. 448 are all normal numbers: exponent
x + 22, then 3 bits of mantissa. In the word of steps 2 i and 2 i + 1, the first step's are at bits
11:4 (row) and 27:20 (row + 8), and a rotation by 8 brings the second's there. Zero has no such
number: a zero scale becomes 0, and the codes it scales become zeros, which is the same matrix.

fc1's rows are permuted first: in each block, rows 16 w + r are gate rows 32 b + 8 w + r, and rows
16 w + r + 8 the up rows of the same number, so that one thread owns both operands of SwiGLU.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.types import ExpertWeights

# Experts that are copied and then shuffled at a time; 190 MiB of scratch at V4-Pro's sizes.
CHUNK = 8
# K blocks of a program, at most: 128 bytes of a row.
_K_BLOCKS = 4


def shuffle_sm90(weights: ExpertWeights) -> ExpertWeights:
    """Rewrite the four big tensors in place; shapes stay, the meaning of the bytes is above.

    Block scales must be 0 or positive numbers: who loads a checkpoint looks. Rows of both matrices
    and their K are multiples of 64 (`grouped_gemm_sm90.unsupported`). Three launches a matrix and
    chunk.
    """
    matrices = (
        (weights.w13, weights.w13_block_scales, weights.intermediate),
        (weights.w2, weights.w2_block_scales, 0),
    )
    chunk = min(CHUNK, weights.num_local_experts)
    words = max(codes[:chunk].nbytes + scales[:chunk].nbytes for codes, scales, _ in matrices) // 4
    scratch = torch.empty(words, dtype=torch.int32, device=weights.w13.device)
    for codes, scales, gate_rows in matrices:
        assert codes.is_contiguous() and scales.is_contiguous()
        parts = (tensor.view(torch.int32).split(chunk) for tensor in (codes, scales))
        for code_words, scale_words in zip(*parts, strict=True):
            _shuffle(code_words, scale_words, gate_rows, scratch)
    return weights


def _shuffle(
    codes: torch.Tensor, scales: torch.Tensor, gate_rows: int, scratch: torch.Tensor
) -> None:
    """codes (E, R, K // 8) and scales (E, R, K // 64) int32, of four bytes each; scratch holds
    both. gate_rows is R // 2 for fc1, 0 for fc2."""
    experts, rows, k_blocks = scales.shape
    assert codes.shape == (experts, rows, k_blocks * 8) and rows % 64 == 0, codes.shape
    source_codes, source_scales = scratch[: codes.numel() + scales.numel()].split(
        (codes.numel(), scales.numel())
    )
    source_codes.view_as(codes).copy_(codes)
    source_scales.view_as(scales).copy_(scales)
    # The largest power of two that divides them.
    blocks = min(_K_BLOCKS, k_blocks & -k_blocks)
    _shuffle_kernel[(rows // 64 * (k_blocks // blocks), experts)](
        source_codes,
        source_scales,
        codes,
        scales,
        ROWS=rows,
        K_BLOCKS=k_blocks,
        BLOCKS=blocks,
        GATE_ROWS=gate_rows,
    )


@triton.jit
def _shuffle_kernel(
    source_codes_ptr,
    source_scales_ptr,
    codes_ptr,
    scales_ptr,
    ROWS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATE_ROWS: tl.constexpr,
):
    """A program makes BLOCKS blocks that follow one another along K: 32 row pairs, 64 columns."""
    expert = tl.program_id(1).to(tl.int64)
    row_block = tl.program_id(0) // (K_BLOCKS // BLOCKS)
    k_block = tl.program_id(0) % (K_BLOCKS // BLOCKS) * BLOCKS + tl.arange(0, BLOCKS)
    pair, step = tl.arange(0, 32), tl.arange(0, 4)
    if GATE_ROWS > 0:
        row, to_second = row_block * 32 + pair, GATE_ROWS
    else:
        row, to_second = row_block * 64 + pair // 8 * 16 + pair % 8, 8

    # Read: scales (32, BLOCKS), a word of four steps' each; codes (32, BLOCKS, 4 steps), of which
    # the left are columns 0 .. 7 of a step, the right 8 .. 15, and column pair c is in byte c.
    first = (expert * ROWS + row)[:, None] * K_BLOCKS + k_block[None, :]
    second = first + to_second * K_BLOCKS
    first_scales = tl.load(source_scales_ptr + first)
    second_scales = tl.load(source_scales_ptr + second)
    first_left, first_right = _live_codes(source_codes_ptr, first, first_scales, BLOCKS)
    second_left, second_right = _live_codes(source_codes_ptr, second, second_scales, BLOCKS)

    # Write.
    block = (expert * (ROWS // 64) + row_block) * K_BLOCKS + k_block
    out = block[None, :] * 32 + pair[:, None]
    for c in tl.static_range(4):
        word = _code_word(
            first_left >> (8 * c),
            second_left >> (8 * c),
            first_right >> (8 * c),
            second_right >> (8 * c),
        )
        tl.store(codes_ptr + (out[:, :, None] * 4 + c) * 4 + step[None, None, :], word)
    for i in tl.static_range(2):
        word = _scale_word(first_scales >> (16 * i), second_scales >> (16 * i))
        tl.store(scales_ptr + out * 2 + i, word)


@triton.jit
def _live_codes(codes_ptr, at, scales, BLOCKS: tl.constexpr):
    """The two words of each step, (32, BLOCKS, 4); 0 where the step's scale is."""
    word = tl.arange(0, 8)
    codes = tl.load(codes_ptr + at[:, :, None] * 8 + word[None, None, :])
    scale = scales[:, :, None] >> (word // 2 * 8)[None, None, :] & 0xFF
    return tl.split(tl.reshape(tl.where(scale == 0, 0, codes), [32, BLOCKS, 4, 2]))


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
    # Every bit of register 3's takes in what the other shift brings to its place.
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
def _scale_word(first, second):
    """Of a row pair's E4M3 bytes of two steps, the lowest two of each word."""
    word = _five_bit_exponent(first & 0xFF) << 4 | _five_bit_exponent(second & 0xFF) << 20
    last = _five_bit_exponent(second >> 8 & 0xFF)
    return word | _five_bit_exponent(first >> 8 & 0xFF) << 12 | last << 28 | last >> 4


@triton.jit
def _five_bit_exponent(scale):
    """E4M3 byte -> byte with a fifth exponent bit. Below 8 it is subnormal, n * 2^-9, and n as
    float32 has the bits."""
    subnormal = (scale.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - 912
    return tl.where(scale == 0, 0, tl.where(scale < 8, subnormal, scale + 120))
