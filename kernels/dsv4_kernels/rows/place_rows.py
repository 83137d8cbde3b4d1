"""Copies of every token's row, at each of its rows in the layout: out[slot_to_row[t, j]] = x[t].

x (num_tokens, hidden) bf16, slot_to_row (num_tokens, top_k) int32 with -1 where the expert is not
local, out (capacity, hidden) bf16, of which the rows that exist are written. A program copies a
token's row, or a stretch of it, to all its rows; a token without any is not read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs


class Config(NamedTuple):
    block: int  # columns
    num_warps: int


def choose_config(hidden: int, num_tokens: int) -> Config:
    """Whole rows from 1024 tokens on: less waiting for where they go. Otherwise 16 bytes a thread.

    On an H200, 8192 tokens of 7168 with 6 slots, of which one in eight is local: 42 us with whole
    rows, 71 with 1024 columns.
    """
    if num_tokens >= 1024:
        return Config(min(8192, triton.next_power_of_2(hidden)), num_warps=8)
    block = min(1024, triton.next_power_of_2(hidden))
    return Config(block, max(1, block // 256))


@triton.jit
def _place_kernel(
    x_ptr,
    slot_to_row_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    blocks = tl.cdiv(HIDDEN, BLOCK)
    token = tl.program_id(0).to(tl.int64) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rows = ()
    last = tl.full([], -1, tl.int64)
    for slot in tl.static_range(TOP_K):
        row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
        rows = rows + (row,)
        last = tl.maximum(last, row)
    if last >= 0:
        values = tl.load(x_ptr + token * HIDDEN + columns, mask=columns < HIDDEN)
        for slot in tl.static_range(TOP_K):
            if rows[slot] >= 0:
                tl.store(out_ptr + rows[slot] * HIDDEN + columns, values, mask=columns < HIDDEN)


def place_rows(x: torch.Tensor, slot_to_row: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """All contiguous; returns out."""
    num_tokens, hidden = x.shape
    assert x.dtype == out.dtype == torch.bfloat16, (x.dtype, out.dtype)
    assert slot_to_row.dtype == torch.int32, slot_to_row.dtype
    assert slot_to_row.shape[0] == num_tokens, (slot_to_row.shape, num_tokens)
    assert out.shape[1] == hidden, (out.shape, hidden)
    assert x.is_contiguous() and slot_to_row.is_contiguous() and out.is_contiguous()
    if num_tokens == 0:
        return out
    config = choose_config(hidden, num_tokens)
    _place_kernel[(num_tokens * triton.cdiv(hidden, config.block),)](
        x,
        slot_to_row,
        out,
        HIDDEN=hidden,
        TOP_K=slot_to_row.shape[1],
        BLOCK=config.block,
        launch_pdl=supports_pdl(x),
        num_warps=config.num_warps,
    )
    return out
