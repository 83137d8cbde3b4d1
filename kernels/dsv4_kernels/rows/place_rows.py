"""Copies of every token's row, at each of its rows in the layout: out[slot_to_row[t, j]] = x[t].

x (num_tokens, hidden) bf16, or E4M3 with a scale a row, slot_to_row (num_tokens, top_k) int32 with
-1 where the expert is not local, out (capacity, hidden) like x, of which the rows that exist are
written. A program copies a token's row, or a stretch of it, to all its rows; a token without any is
not read.
"""

from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.rows.slots import rows_of_token
from dsv4_kernels.types import Fp8Rows

Rows = TypeVar("Rows", torch.Tensor, Fp8Rows)


class Config(NamedTuple):
    block: int  # columns, of two bytes
    num_warps: int


def choose_config(num_columns: int, num_tokens: int) -> Config:
    """Whole rows from 1024 tokens on: less waiting for where they go. Otherwise 16 bytes a thread.

    On an H200, 8192 tokens of 7168 with 6 slots, of which one in eight is local: 42 us with whole
    rows, 71 with 1024 columns.
    """
    if num_tokens >= 1024:
        return Config(min(8192, triton.next_power_of_2(num_columns)), num_warps=8)
    block = min(1024, triton.next_power_of_2(num_columns))
    return Config(block, max(1, block // 256))


@triton.jit
def _place_kernel(
    x_ptr,  # int16: a bf16 or two E4M3
    scales_in_ptr,
    slot_to_row_ptr,
    out_ptr,
    scales_ptr,
    COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,  # of rows, like the next
    SCALES_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    blocks = tl.cdiv(COLUMNS, BLOCK)
    token = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    rows, last = rows_of_token(slot_to_row_ptr, token, TOP_K)
    if last >= 0:
        values = tl.load(x_ptr + token * X_STRIDE + columns, mask=columns < COLUMNS)
        for slot in tl.static_range(TOP_K):
            if rows[slot] >= 0:
                tl.store(out_ptr + rows[slot] * COLUMNS + columns, values, mask=columns < COLUMNS)
                if scales_in_ptr is not None:
                    if block == 0:
                        scale = tl.load(scales_in_ptr + token * SCALES_STRIDE)
                        tl.store(scales_ptr + rows[slot], scale)


def place_rows(x: Rows, slot_to_row: torch.Tensor, *, out: Rows) -> Rows:
    """All contiguous, but that parts of Fp8Rows x may be of longer rows; returns out."""
    codes, scales = x if isinstance(x, Fp8Rows) else (x, None)
    out_codes, out_scales = out if isinstance(out, Fp8Rows) else (out, None)
    num_tokens, hidden = codes.shape
    dtype = torch.bfloat16 if scales is None else torch.float8_e4m3fn
    assert codes.dtype == out_codes.dtype == dtype, (codes.dtype, out_codes.dtype)
    assert slot_to_row.dtype == torch.int32 and slot_to_row.is_contiguous(), slot_to_row.dtype
    assert slot_to_row.shape[0] == num_tokens, (slot_to_row.shape, num_tokens)
    assert out_codes.shape[1] == hidden, (out_codes.shape, hidden)
    assert out_codes.is_contiguous(), out_codes.stride()
    assert codes.stride(1) == 1, codes.stride()
    assert scales is None or scales.shape == (num_tokens,), scales.shape
    assert out_scales is None or out_scales.shape == (len(out_codes),), out_scales.shape
    if num_tokens == 0:
        return out
    pairs = codes.view(torch.int16)
    columns = pairs.shape[1]
    config = choose_config(columns, num_tokens)
    _place_kernel[(num_tokens * triton.cdiv(columns, config.block),)](
        pairs,
        scales,
        slot_to_row,
        out_codes.view(torch.int16),
        out_scales,
        COLUMNS=columns,
        X_STRIDE=pairs.stride(0),
        SCALES_STRIDE=1 if scales is None else scales.stride(0),
        TOP_K=slot_to_row.shape[1],
        BLOCK=config.block,
        launch_pdl=supports_pdl(codes),
        num_warps=config.num_warps,
    )
    return out
