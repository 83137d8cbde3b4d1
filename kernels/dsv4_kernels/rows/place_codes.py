"""Copies of every token's NVFP4 row, at each of its rows in the layout, block scales swizzled.

    out.codes[slot_to_row[t, j]] = x.codes[t], and so for block scales and global scales

What `nvfp4_quantize` gives with a layout, bit for bit, of tokens that were quantised before they
came here. A program copies a token's row to all its rows; a token without any is not read. Block
scales go to the 128x4 blocks that `nvfp4_quantize` describes, a word of four at a time.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.rows.slots import rows_of_token
from dsv4_kernels.types import NVFP4_BLOCK, QuantizedRows


@triton.jit
def _place_codes_kernel(
    codes_in_ptr,  # int64: a block each
    scales_in_ptr,  # int32: four block scales each
    gs_in_ptr,
    slot_to_row_ptr,
    codes_ptr,
    scales_ptr,
    gs_ptr,
    NUM_BLOCKS: tl.constexpr,
    CODES_STRIDE: tl.constexpr,  # of x's rows, like the next two
    SCALES_STRIDE: tl.constexpr,
    GS_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    WORDS: tl.constexpr = NUM_BLOCKS // 4
    token = tl.program_id(0).to(tl.int64)
    block, word = tl.arange(0, BLOCKS), tl.arange(0, BLOCKS // 4)
    rows, last = rows_of_token(slot_to_row_ptr, token, TOP_K)
    if last >= 0:
        codes = tl.load(codes_in_ptr + token * CODES_STRIDE + block, mask=block < NUM_BLOCKS)
        scales = tl.load(scales_in_ptr + token * SCALES_STRIDE + word, mask=word < WORDS)
        for slot in tl.static_range(TOP_K):
            row = rows[slot]
            if row >= 0:
                tl.store(codes_ptr + row * NUM_BLOCKS + block, codes, mask=block < NUM_BLOCKS)
                place = row // 128 * (WORDS * 128) + row % 32 * 4 + row % 128 // 32
                tl.store(scales_ptr + place + word * 128, scales, mask=word < WORDS)
                if gs_in_ptr is not None:
                    tl.store(gs_ptr + row, tl.load(gs_in_ptr + token * GS_STRIDE))


def place_codes(
    x: QuantizedRows, slot_to_row: torch.Tensor, *, out: QuantizedRows
) -> QuantizedRows:
    """x (num_tokens, K) with row-major block scales, its parts maybe of longer rows; slot_to_row
    (num_tokens, top_k) int32, -1 where the expert is not local; out (rows, K) with block scales
    swizzled. K a multiple of 64. Global scales are copied where x has one a token, out (rows,).
    Rows that no slot has are left as they are; returns out.
    """
    num_tokens, blocks = x.block_scales.shape
    top_k = slot_to_row.shape[1]
    has_gs = x.global_scales.shape == (num_tokens,) and len(out.global_scales) > 0
    assert blocks % 4 == 0, f"K {blocks * NVFP4_BLOCK} is not a multiple of 64"
    assert x.codes.shape == (num_tokens, blocks * 8), x.codes.shape
    assert x.codes.stride(1) == x.block_scales.stride(1) == 1, x.codes.stride()
    assert slot_to_row.dtype == torch.int32 and slot_to_row.is_contiguous(), slot_to_row.dtype
    assert len(slot_to_row) == num_tokens, (slot_to_row.shape, num_tokens)
    assert out.codes.shape[1] == blocks * 8, out.codes.shape
    assert out.block_scales.shape[0] >= len(out.codes), out.block_scales.shape
    assert out.block_scales.shape[1] == blocks, out.block_scales.shape
    assert out.codes.is_contiguous() and out.block_scales.is_contiguous(), out.codes.stride()
    if num_tokens == 0:
        return out
    codes, scales = x.codes.view(torch.int64), x.block_scales.view(torch.int32)
    size = triton.next_power_of_2(blocks)
    _place_codes_kernel[(num_tokens,)](
        codes,
        scales,
        x.global_scales if has_gs else None,
        slot_to_row,
        out.codes.view(torch.int64),
        out.block_scales.view(torch.int32),
        out.global_scales,
        NUM_BLOCKS=blocks,
        CODES_STRIDE=codes.stride(0),
        SCALES_STRIDE=scales.stride(0),
        GS_STRIDE=x.global_scales.stride(0),
        TOP_K=top_k,
        BLOCKS=size,
        launch_pdl=supports_pdl(slot_to_row),
        num_warps=max(1, size // 128),
    )
    return out
