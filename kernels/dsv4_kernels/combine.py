"""Combine: the sum of every token's rows, in slot order.

    out[t] = bf16(sum over j of float(rows[slot_to_row[t, j]]))     slots without a row add nothing

The routing weight is in the rows already. A program sums BLOCK columns of one token or two: the
loads of all their slots are independent and in flight together; the sum is in fp32, in slot order,
so that two runs are bit-equal. Equal to `reference.combine` bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs


class Config(NamedTuple):
    tokens: int  # per program
    block: int  # columns per program
    num_warps: int


def choose_config(hidden: int, num_tokens: int) -> Config:
    """Blocks of 1024 columns, 8 per thread and row, divide 4096, 5120 and 7168 evenly."""
    block = min(1024, triton.next_power_of_2(hidden))
    return Config(2 if num_tokens >= 1024 else 1, block, num_warps=max(1, block // 256))


@triton.jit
def round_to_bf16(x):
    """float32 to the nearest bfloat16, to even, as float32: the interpreter's cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    rows_ptr,
    slot_to_row_ptr,
    out_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    blocks = (HIDDEN + BLOCK - 1) // BLOCK
    tokens = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_batch = tokens < num_tokens
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(slot_to_row_ptr + tokens * TOP_K + slot, mask=in_batch, other=-1)
        ptrs = rows_ptr + row.to(tl.int64) * HIDDEN + columns
        term = tl.load(ptrs, mask=(row >= 0) & (columns < HIDDEN), other=0.0)
        total += term.to(tl.float32)
    out = round_to_bf16(total).to(tl.bfloat16)
    tl.store(out_ptr + tokens * HIDDEN + columns, out, mask=in_batch & (columns < HIDDEN))


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
    grid = (triton.cdiv(num_tokens, config.tokens) * triton.cdiv(hidden, config.block),)
    _combine_kernel[grid](
        rows,
        slot_to_row,
        out,
        num_tokens,
        HIDDEN=hidden,
        TOP_K=top_k,
        TOKENS=config.tokens,
        BLOCK=config.block,
        launch_pdl=supports_pdl(rows),
        num_warps=config.num_warps,
    )
    return out
