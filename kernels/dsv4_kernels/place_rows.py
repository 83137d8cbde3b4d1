"""Copies of every token's row, at each of its rows in the layout: out[slot_to_row[t, j]] = x[t].

x (num_tokens, hidden) bf16, slot_to_row (num_tokens, top_k) int32 with -1 where the expert is not
local, out (capacity, hidden) bf16, of which the rows that exist are written. A block copies a
stretch of one token's columns, read once, to all its rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs


class Config(NamedTuple):
    block: int  # columns
    num_warps: int


def choose_config(hidden: int) -> Config:
    """16 bytes a thread; blocks of one token follow one another in memory."""
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
    values = tl.load(x_ptr + token * HIDDEN + columns, mask=columns < HIDDEN)
    for slot in tl.static_range(TOP_K):
        row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
        width = tl.where(row >= 0, HIDDEN, 0)
        tl.store(out_ptr + row * HIDDEN + columns, values, mask=columns < width)


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
    config = choose_config(hidden)
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
