"""Combine: the sum of every token's rows, in slot order.

    out[t] = bf16(sum over j of float(rows[slot_to_row[t, j]]))     slots without a row add nothing

The routing weight is in the rows already. A program sums BLOCK columns of one token, in fp32 and in
slot order, so that two runs are bit-equal. Of many tokens it has the whole row and leaves out the
slots without one, of which a rank of eight has seven in eight; of few tokens, where latency counts,
the loads of all slots are in flight together. Equal to `reference.combine` bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.rows.slots import rows_of_token


class Config(NamedTuple):
    block: int  # columns per program
    num_warps: int
    skips: bool  # slots without a row cost nothing, and slots are loaded one after another


def choose_config(hidden: int, num_tokens: int) -> Config:
    """Whole rows from 1024 tokens on, otherwise 1024 columns, 8 per thread and row.

    On an H200, 8192 tokens of 7168 with 6 slots, of which one in eight is local: 55 us with whole
    rows, 71 with all slots in flight; all local, 190 and 186. One token: 3.7 and 2.4.
    """
    if num_tokens >= 1024:
        return Config(min(8192, triton.next_power_of_2(hidden)), num_warps=4, skips=True)
    block = min(1024, triton.next_power_of_2(hidden))
    return Config(block, max(1, block // 256), skips=False)


@triton.jit
def round_to_bf16(x):
    """float32 to the nearest bfloat16, to even, as float32: the interpreter's cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _combine_kernel(
    rows_ptr,
    slot_to_row_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    SKIPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    blocks = (HIDDEN + BLOCK - 1) // BLOCK
    token = tl.program_id(0).to(tl.int64) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    rows, _ = rows_of_token(slot_to_row_ptr, token, TOP_K)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        row_ptrs = rows_ptr + rows[slot] * HIDDEN + columns
        if SKIPS:
            if rows[slot] >= 0:
                total += tl.load(row_ptrs, mask=columns < HIDDEN, other=0.0).to(tl.float32)
        else:
            width = tl.where(rows[slot] >= 0, HIDDEN, 0)
            total += tl.load(row_ptrs, mask=columns < width, other=0.0).to(tl.float32)
    if INTERPRETED:
        total = round_to_bf16(total)
    tl.store(out_ptr + token * HIDDEN + columns, total.to(tl.bfloat16), mask=columns < HIDDEN)


def combine(
    rows: torch.Tensor, slot_to_row: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(capacity, hidden) bf16, (num_tokens, top_k) int32 rows or -1 -> (num_tokens, hidden) bf16.

    Zero for a token with no row. All contiguous.
    """
    num_tokens, top_k = slot_to_row.shape
    hidden = rows.shape[1]
    if out is None:
        out = torch.empty(num_tokens, hidden, dtype=rows.dtype, device=rows.device)
    assert rows.dtype == out.dtype == torch.bfloat16, (rows.dtype, out.dtype)
    assert slot_to_row.dtype == torch.int32, slot_to_row.dtype
    assert out.shape == (num_tokens, hidden), out.shape
    assert rows.is_contiguous() and slot_to_row.is_contiguous() and out.is_contiguous()
    if num_tokens == 0:
        return out
    config = choose_config(hidden, num_tokens)
    _combine_kernel[(num_tokens * triton.cdiv(hidden, config.block),)](
        rows,
        slot_to_row,
        out,
        HIDDEN=hidden,
        TOP_K=top_k,
        BLOCK=config.block,
        SKIPS=config.skips,
        INTERPRETED=rows.device.type == "cpu",
        launch_pdl=supports_pdl(rows),
        num_warps=config.num_warps,
    )
    return out
