"""The layout of rows that came grouped: row i of expert e is e * batch_rows + i, i < counts[e].

counts (num_local_experts,) int32 -> row_to_slot (num_local_experts * batch_rows,) int32, the row
itself or -1 where there is none; offsets (num_local_experts + 1,) int32, e * batch_rows, and last
the rows of all live tiles; tile_to_expert, of which as many as live tiles are written, in order:
not the expert but the tile's first row over the tile. A GEMM that goes through the tiles by that
list does not visit those without rows, which may be nearly all. A program does one expert.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.types import ExpertLayout

BLOCK = 1024


@triton.jit
def _layout_kernel(
    counts_ptr,
    row_to_slot_ptr,
    offsets_ptr,
    tiles_ptr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,  # of an expert
    TILE: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PADDED)
    tiles = tl.cdiv(tl.load(counts_ptr + experts, mask=experts < EXPERTS, other=0), TILE)
    before = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    count = tl.load(counts_ptr + expert)
    tl.store(offsets_ptr + expert, expert * ROWS)
    if expert == EXPERTS - 1:
        tl.store(offsets_ptr + EXPERTS, tl.sum(tiles, axis=0) * TILE)
    for first in range(0, ROWS, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = expert * ROWS + i
        tl.store(row_to_slot_ptr + row, tl.where(i < count, row, -1), mask=i < ROWS)
        live = i < tl.cdiv(count, TILE)
        tl.store(tiles_ptr + before + i, expert * (ROWS // TILE) + i, mask=live)


def batched_layout(counts: torch.Tensor, tile: int, *, out: ExpertLayout) -> ExpertLayout:
    """out, with its slot_to_row as row_to_slot, and counts; all contiguous."""
    experts = len(counts)
    rows = len(out.row_to_slot) // experts
    assert counts.dtype == torch.int32 and counts.is_contiguous(), (counts.dtype, counts.stride())
    assert out.row_to_slot.shape == (experts * rows,), (out.row_to_slot.shape, experts)
    assert out.offsets.shape == (experts + 1,), out.offsets.shape
    _layout_kernel[(experts,)](
        counts,
        out.row_to_slot,
        out.offsets,
        out.tile_to_expert,
        EXPERTS=experts,
        ROWS=rows,
        TILE=tile,
        EXPERTS_PADDED=triton.next_power_of_2(experts),
        BLOCK=BLOCK,
        launch_pdl=supports_pdl(counts),
    )
    return out._replace(slot_to_row=out.row_to_slot[:, None], counts=counts)
