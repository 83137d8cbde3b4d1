"""Layout: expert ids -> the row of every (token, slot), groups padded to a tile, in slot order.

    count[e]  = slots whose expert is local and e
    offset[e] = sum over e' < e of count[e'] rounded up to the tile
    row[slot] = offset[e] + number of earlier slots of the same expert

Slots are token * top_k + j. Each program owns `steps` runs of STEP slots. What came before its
first slot it counts itself up to ONE_LAUNCH_SLOTS slots, in one launch and with nothing shared;
beyond that, a first launch leaves every program's counts in a scratch buffer. Within a run, a
slot's rank is counted by comparing it with the run's earlier slots. No atomics: the order of rows
is the order of slots, whatever the GPU does first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.types import ExpertLayout, capacity

MAX_LOCAL_EXPERTS = 512
ONE_LAUNCH_SLOTS = 4096
MAX_PROGRAMS = 128
COUNTS_AT_ONCE = tl.constexpr(8)


class Config(NamedTuple):
    step: int  # slots that are ranked at once
    steps: int  # runs of `step` slots per program
    programs: int  # that own slots
    num_warps: int
    counted_before: bool  # two launches


def choose_config(num_slots: int) -> Config:
    """Small runs at small batches, where ranking is most of the time; then 128 programs."""
    if num_slots <= 64:
        return Config(step=64, steps=1, programs=1, num_warps=4, counted_before=False)
    if num_slots <= ONE_LAUNCH_SLOTS:
        return Config(128, 1, triton.cdiv(num_slots, 128), num_warps=4, counted_before=False)
    steps = triton.cdiv(num_slots, 256 * MAX_PROGRAMS)
    return Config(256, steps, triton.cdiv(num_slots, 256 * steps), 8, counted_before=True)


def scratch_size(num_tokens: int, top_k: int, num_local_experts: int) -> int:
    """int32 elements of scratch that suffice for a layout of up to so many tokens.

    0 where one launch does it. Fewer tokens may have more programs than more tokens have, so it
    is for the most programs there can be.
    """
    if not choose_config(num_tokens * top_k).counted_before:
        return 0
    return MAX_PROGRAMS * num_local_experts


@triton.jit
def _local_experts(ids_ptr, map_ptr, slots, num_slots, map_size, NUM_LOCAL, HAS_MAP: tl.constexpr):
    """int32 local experts of slots, NUM_LOCAL where there is none."""
    experts = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1)
    if HAS_MAP:
        known = (experts >= 0) & (experts < map_size)
        experts = tl.load(map_ptr + experts, mask=known, other=-1)
    return tl.where((experts >= 0) & (experts < NUM_LOCAL), experts, NUM_LOCAL).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "map_size", "steps"])
def _count_kernel(
    ids_ptr,
    map_ptr,
    block_counts_ptr,  # (programs, NUM_LOCAL)
    num_slots,
    map_size,
    steps,
    NUM_LOCAL: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HAS_MAP: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    program = tl.program_id(0)
    counts = tl.zeros([EXPERT_BLOCK], tl.int32)
    for step in range(0, steps):
        slots = (program * steps + step) * STEP + tl.arange(0, STEP)
        local = _local_experts(ids_ptr, map_ptr, slots, num_slots, map_size, NUM_LOCAL, HAS_MAP)
        counts += tl.histogram(local, EXPERT_BLOCK, mask=local < NUM_LOCAL)
    experts = tl.arange(0, EXPERT_BLOCK)
    tl.store(block_counts_ptr + program * NUM_LOCAL + experts, counts, mask=experts < NUM_LOCAL)


@triton.jit(do_not_specialize=["num_slots", "map_size", "steps", "num_blocks", "num_tiles"])
def _layout_kernel(
    ids_ptr,
    map_ptr,
    block_counts_ptr,
    slot_to_row_ptr,
    row_to_slot_ptr,
    counts_ptr,
    offsets_ptr,
    tile_to_expert_ptr,
    num_slots,
    map_size,
    steps,
    num_blocks,
    num_tiles,
    NUM_LOCAL: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MAP: tl.constexpr,
    COUNTED: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERT_BLOCK)

    # Phase 1: rows of each expert before this program's slots, and in all.
    total = tl.zeros([EXPERT_BLOCK], tl.int32)
    before = tl.zeros([EXPERT_BLOCK], tl.int32)
    if COUNTED:
        for first in range(0, num_blocks, COUNTS_AT_ONCE):
            blocks = first + tl.arange(0, COUNTS_AT_ONCE)[:, None]
            counts = tl.load(
                block_counts_ptr + blocks * NUM_LOCAL + experts[None, :],
                mask=(blocks < num_blocks) & (experts[None, :] < NUM_LOCAL),
                other=0,
            )
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where(blocks < program, counts, 0), axis=0)
    else:
        for first in range(0, num_slots, STEP):
            slots = first + tl.arange(0, STEP)
            local = _local_experts(ids_ptr, map_ptr, slots, num_slots, map_size, NUM_LOCAL, HAS_MAP)
            counts = tl.histogram(local, EXPERT_BLOCK, mask=local < NUM_LOCAL)
            total += counts
            before += tl.where(first < program * steps * STEP, counts, 0)

    # Phase 2: groups. Experts beyond NUM_LOCAL are empty and end where the last group ends.
    padded = (total + TILE - 1) // TILE * TILE
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded
    num_rows = tl.sum(padded, axis=0)
    if program == 0:
        tl.store(counts_ptr + experts, total, mask=experts < NUM_LOCAL)
        tl.store(offsets_ptr + experts, starts, mask=experts < NUM_LOCAL)
        tl.store(offsets_ptr + NUM_LOCAL, num_rows)

    # Phase 3: rows of this program's slots.
    running = starts + before
    index = tl.arange(0, STEP)
    for step in range(0, steps):
        slots = (program * steps + step) * STEP + index
        local = _local_experts(ids_ptr, map_ptr, slots, num_slots, map_size, NUM_LOCAL, HAS_MAP)
        is_local = local < NUM_LOCAL
        # Summed along axis 0, which a thread mostly has to itself.
        earlier = (local[:, None] == local[None, :]) & (index[:, None] < index[None, :])
        rank = tl.sum(earlier.to(tl.int32), axis=0)
        row = rank + tl.gather(running, tl.where(is_local, local, 0), axis=0)
        tl.store(slot_to_row_ptr + slots, tl.where(is_local, row, -1), mask=slots < num_slots)
        tl.store(row_to_slot_ptr + row, slots, mask=is_local)
        running += tl.histogram(local, EXPERT_BLOCK, mask=is_local)

    # Phase 4: tiles to experts, and -1 to the rows that no slot has, a stripe per program.
    for first in range(program * TILES, num_tiles, tl.num_programs(0) * TILES):
        tiles = first + tl.arange(0, TILES)
        is_live = tiles * TILE < num_rows
        expert = tl.sum((ends[:, None] <= tiles[None, :] * TILE).to(tl.int32), axis=0)
        expert = tl.where(is_live, expert, 0)
        live_end = tl.where(is_live, tl.gather(starts + total, expert, axis=0), 0)
        in_layout = tiles < num_tiles
        tl.store(tile_to_expert_ptr + tiles, tl.where(is_live, expert, -1), mask=in_layout)
        rows = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        is_padding = in_layout[:, None] & (rows >= live_end[:, None])
        tl.store(row_to_slot_ptr + rows, tl.full([TILES, TILE], -1, tl.int32), mask=is_padding)


def make_layout(
    num_tokens: int, top_k: int, num_local_experts: int, tile: int, device: torch.device
) -> ExpertLayout:
    """An uninitialised layout of the capacity that any routing fits in."""
    rows = capacity(num_tokens, top_k, num_local_experts, tile)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    return ExpertLayout(
        slot_to_row=empty(num_tokens, top_k),
        row_to_slot=empty(rows),
        counts=empty(num_local_experts),
        offsets=empty(num_local_experts + 1),
        tile_to_expert=empty(rows // tile),
    )


def expert_layout(
    ids: torch.Tensor,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    tile: int,
    *,
    out: ExpertLayout | None = None,
    scratch: torch.Tensor | None = None,
) -> ExpertLayout:
    """Rows for every local (token, slot): bit-equal to `reference.expert_layout`.

    ids (num_tokens, top_k) int32 or int64 global, anything out of range takes no row; expert_map
    (num_experts,) int32 from global to local, -1 for foreign experts, None when all are local;
    tile a power of two. Everything in `out` is written, the rows and tiles that are not alive
    with -1; scratch int32, `scratch_size` of it, not shared with a call that runs concurrently.
    Both are made here if None.
    """
    num_tokens, top_k = ids.shape
    num_slots = ids.numel()
    assert 1 <= num_local_experts <= MAX_LOCAL_EXPERTS, num_local_experts
    assert tile > 0 and tile & (tile - 1) == 0, f"tile {tile} is not a power of two"
    assert ids.dtype in (torch.int32, torch.int64), ids.dtype
    assert ids.is_contiguous(), ids.stride()
    if out is None:
        out = make_layout(num_tokens, top_k, num_local_experts, tile, ids.device)
    assert out.slot_to_row.shape == ids.shape, out.slot_to_row.shape
    assert out.offsets.shape == (num_local_experts + 1,), out.offsets.shape
    assert len(out.row_to_slot) == len(out.tile_to_expert) * tile, len(out.row_to_slot)
    rows = capacity(num_tokens, top_k, num_local_experts, tile)
    assert len(out.row_to_slot) >= rows, f"{len(out.row_to_slot)} rows, capacity {rows}"
    if num_slots == 0:
        return _empty_layout(out)
    config = choose_config(num_slots)
    common = {
        "NUM_LOCAL": num_local_experts,
        "EXPERT_BLOCK": max(32, triton.next_power_of_2(num_local_experts)),
        "STEP": config.step,
        "HAS_MAP": expert_map is not None,
        "launch_pdl": supports_pdl(ids),
        "num_warps": config.num_warps,
    }
    map_size = len(expert_map) if expert_map is not None else 0
    if config.counted_before:
        size = scratch_size(num_tokens, top_k, num_local_experts)
        if scratch is None:
            scratch = torch.empty(size, dtype=torch.int32, device=ids.device)
        assert scratch.dtype == torch.int32 and scratch.numel() >= size, (scratch.shape, size)
        _count_kernel[(config.programs,)](
            ids, expert_map, scratch, num_slots, map_size, config.steps, **common
        )
    _layout_kernel[(config.programs,)](
        ids,
        expert_map,
        scratch,
        *out,
        num_slots,
        map_size,
        config.steps,
        config.programs,
        len(out.tile_to_expert),
        TILE=tile,
        TILES=min(64, max(16, 1024 // tile)),
        COUNTED=config.counted_before,
        **common,
    )
    return out


def _empty_layout(out: ExpertLayout) -> ExpertLayout:
    out.counts.zero_()
    out.offsets.zero_()
    out.row_to_slot.fill_(-1)
    out.tile_to_expert.fill_(-1)
    return out
