"""Layout: expert ids -> the row of every (token, slot), groups padded to a tile, in slot order.

    count[e]  = slots whose expert is local and e
    offset[e] = sum over e' < e of count[e'] rounded up to the tile
    row[slot] = offset[e] + number of earlier slots of the same expert

Slot token * top_k + j. Placing programs rank `steps` runs of STEP slots each, by comparing a slot
with those before it; filler programs write tile_to_expert and the padding rows. Up to
one_launch_slots, every program histograms all slots itself, in one launch. Beyond, a first launch
writes a histogram per block of slots to the scratch, and the second launch ranks slots within their
blocks before its PDL wait. No atomics: rows are in slot order, deterministically.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import release_dependents, supports_pdl, wait_for_inputs
from dsv4_kernels.types import ExpertLayout, capacity

MAX_LOCAL_EXPERTS = 512
MAX_BLOCKS = 128
MAX_FILLERS = 128
UNROLL = tl.constexpr(16)  # independent loads of counts in flight


class Config(NamedTuple):
    step: int  # slots ranked at a time
    steps: int  # runs of `step` slots per program
    parts: int  # programs per block of slots, which share a histogram
    blocks: int
    num_warps: int
    tiles: int  # that a filler writes at a time
    rows: int = 0  # histograms read at a time; 0: one launch


def choose_config(num_slots: int, expert_block: int) -> Config:
    """Few slots: few a program. Many: few blocks, whose histograms every program must add up.

    us on an H200, a hash layer's router included. 128 tokens of top 6, 256 experts: 3.6 with 8
    slots a program, 3.8 with 16. 512 tokens: 4.0 with 32 slots in blocks of 256, 4.3 in blocks of
    128. 2048 tokens: 5.9 with 64 slots in blocks of 256, 6.9 with 32, 6.2 with blocks of 128. Wide
    histograms are read one at a time, so that sums stay within threads; short ones together.
    """
    if num_slots <= one_launch_slots(expert_block):
        num_warps = 2 if num_slots <= 64 else 8
        return Config(8, 1, 1, triton.cdiv(num_slots, 8), num_warps, tiles=8)
    if num_slots <= 4096:
        return Config(32, 1, 8, triton.cdiv(num_slots, 256), num_warps=4, tiles=16, rows=1)
    if num_slots <= 16384 and expert_block >= 256:
        return Config(64, 1, 4, triton.cdiv(num_slots, 256), num_warps=4, tiles=16, rows=1)
    steps = triton.cdiv(num_slots, 128 * MAX_BLOCKS)
    blocks = triton.cdiv(num_slots, 128 * steps)
    rows = 1 if expert_block >= 256 else 512 // expert_block  # 16 bytes a thread
    return Config(128, steps, 1, blocks, num_warps=4, tiles=16, rows=rows)


def one_launch_slots(expert_block: int) -> int:
    """Slots up to which one launch is faster.

    On an H200, a hash layer's router included, 128 tokens of top 6 and 384 experts take 4.5 us in
    two launches and 5.8 in one; 8 tokens take 3.5 in one.
    """
    return 1024 if expert_block <= 256 else 64


def choose_expert_block(num_local_experts: int) -> int:
    return max(32, triton.next_power_of_2(num_local_experts))


def slots_at_once(num_slots: int) -> int:
    """Slots that the one launch is compiled for: few sizes."""
    return next((size for size in (64, 128, 512) if num_slots <= size), 1024)


def scratch_size(num_tokens: int, top_k: int, num_local_experts: int) -> int:
    """int32 elements of scratch that a layout needs, or one of fewer tokens; 0 for one launch."""
    num_slots = num_tokens * top_k
    if num_slots <= one_launch_slots(choose_expert_block(num_local_experts)):
        return 0
    return min(triton.cdiv(num_slots, 128), MAX_BLOCKS) * num_local_experts


@triton.jit
def _load_map(map_ptr, map_size, MAP_BLOCK: tl.constexpr):
    """(MAP_BLOCK,) global -> local expert, -1 beyond the map; read before the PDL wait."""
    experts = tl.arange(0, MAP_BLOCK)
    if map_ptr is None:
        local = experts
    else:
        local = tl.load(map_ptr + experts, mask=experts < map_size, other=-1)
    return local


@triton.jit
def _load_ids(ids_ptr, slots, end, CACHE: tl.constexpr):
    """Ids of slots below end, -1 beyond."""
    return tl.load(ids_ptr + slots, mask=slots < end, other=-1, cache_modifier=CACHE)


@triton.jit
def _to_local(ids, map_ptr, expert_map, NUM_LOCAL: tl.constexpr, MAP_BLOCK: tl.constexpr):
    """int32 local experts of global ids, -1 where there is none."""
    if map_ptr is None:
        local = tl.where((ids >= 0) & (ids < NUM_LOCAL), ids, -1).to(tl.int32)
    else:
        known = (ids >= 0) & (ids < MAP_BLOCK)
        local = tl.gather(expert_map, tl.where(known, ids, 0).to(tl.int32), axis=0)
        local = tl.where(known & (local >= 0) & (local < NUM_LOCAL), local, -1)
    return local


@triton.jit
def _ranks(earlier_local, earlier_slots, local, slots):
    """int32, for each slot: how many earlier slots have its expert."""
    same = earlier_local[:, None] == local[None, :]
    is_earlier = same & (earlier_slots[:, None] < slots[None, :])
    return tl.sum(is_earlier.to(tl.int32), axis=0)


@triton.jit
def _place(slot_to_row_ptr, row_to_slot_ptr, slots, end, local, rank, first_rows):
    """Write each slot's row, the first of its expert plus its rank, and each row's slot."""
    row = rank + tl.gather(first_rows, tl.maximum(local, 0), axis=0)
    tl.store(slot_to_row_ptr + slots, tl.where(local >= 0, row, -1), mask=slots < end)
    tl.store(row_to_slot_ptr + row, slots, mask=local >= 0)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_counts(
    block_counts_ptr,
    blocks,
    own_block,
    NUM_LOCAL: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(EXPERT_BLOCK,) int32 each: histogram of all blocks, and of those before own_block."""
    experts = tl.arange(0, EXPERT_BLOCK)[None, :]
    total = tl.zeros([ROWS, EXPERT_BLOCK], tl.int32)
    before = tl.zeros([ROWS, EXPERT_BLOCK], tl.int32)
    rows = tl.arange(0, ROWS)[:, None] + tl.zeros_like(total)
    for first in range(0, blocks, UNROLL * ROWS):
        for i in tl.static_range(UNROLL):
            block = first + i * ROWS + rows
            in_range = (block < blocks) & (experts < NUM_LOCAL)
            offsets = block * NUM_LOCAL + experts
            counts = tl.load(block_counts_ptr + offsets, mask=in_range, other=0)
            total += counts
            before += tl.where(block < own_block, counts, 0)
    if ROWS == 1:
        return total.reshape([EXPERT_BLOCK]), before.reshape([EXPERT_BLOCK])
    return tl.reduce((total, before), 0, _add_pairs)


@triton.jit(do_not_specialize=["num_slots", "map_size", "span"])
def _count_kernel(
    ids_ptr,
    map_ptr,
    block_counts_ptr,  # (blocks, NUM_LOCAL)
    num_slots,
    map_size,
    span,  # slots per block
    NUM_LOCAL: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    MAP_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    expert_map = _load_map(map_ptr, map_size, MAP_BLOCK)
    wait_for_inputs(launch_pdl)
    block = tl.program_id(0)
    end = tl.minimum((block + 1) * span, num_slots)
    counts = tl.zeros([EXPERT_BLOCK], tl.int32)
    for first in range(block * span, end, AT_ONCE):
        slots = first + tl.arange(0, AT_ONCE)
        ids = _load_ids(ids_ptr, slots, end, "")
        local = _to_local(ids, map_ptr, expert_map, NUM_LOCAL, MAP_BLOCK)
        counts += tl.histogram(local, EXPERT_BLOCK, mask=local >= 0)
    experts = tl.arange(0, EXPERT_BLOCK)
    tl.store(block_counts_ptr + block * NUM_LOCAL + experts, counts, mask=experts < NUM_LOCAL)


@triton.jit(do_not_specialize=["num_slots", "map_size", "steps", "blocks", "num_tiles"])
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
    blocks,
    num_tiles,
    NUM_LOCAL: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    MAP_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,  # slots of a block, or all in one launch
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    COUNTED: tl.constexpr,
    SEVERAL_STEPS: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    expert_map = _load_map(map_ptr, map_size, MAP_BLOCK)
    if not COUNTED:
        wait_for_inputs(launch_pdl)
    program = tl.program_id(0)
    programs = blocks * PARTS
    experts = tl.arange(0, EXPERT_BLOCK)
    index = tl.arange(0, STEP)
    # Ids read before the PDL wait bypass L1, which may hold stale lines.
    CACHE: tl.constexpr = ".cg" if COUNTED else ""
    end = tl.minimum((program + 1) * steps * STEP, num_slots)
    slots = program * steps * STEP + index
    ids = _load_ids(ids_ptr, slots, end, CACHE)
    if COUNTED:
        own_block = program // PARTS
        local = tl.full([STEP], -1, tl.int32)
        rank = tl.zeros([STEP], tl.int32)
        # Phase 1, overlapping the first launch: ranks in the block. In a branch, or the compiler
        # moves it past the wait.
        if program < programs and not SEVERAL_STEPS:
            others = own_block * PARTS * steps * STEP + tl.arange(0, AT_ONCE)
            others_ids = _load_ids(ids_ptr, others, num_slots, CACHE)
            local = _to_local(ids, map_ptr, expert_map, NUM_LOCAL, MAP_BLOCK)
            others_local = _to_local(others_ids, map_ptr, expert_map, NUM_LOCAL, MAP_BLOCK)
            rank = _ranks(others_local, others, local, slots)

        # Phase 2: rows of each expert, in all and before this program's block.
        wait_for_inputs(launch_pdl, releases=False)
        total, before = _sum_counts(
            block_counts_ptr, blocks, own_block, NUM_LOCAL, EXPERT_BLOCK, ROWS
        )
    else:
        others = tl.arange(0, AT_ONCE)
        others_ids = _load_ids(ids_ptr, others, num_slots, CACHE)
        others_local = _to_local(others_ids, map_ptr, expert_map, NUM_LOCAL, MAP_BLOCK)
        total = tl.histogram(others_local, EXPERT_BLOCK, mask=others_local >= 0)
        before = tl.zeros([EXPERT_BLOCK], tl.int32)

    # Phase 3: padded groups. Experts beyond NUM_LOCAL are empty and end with the last group.
    padded = (total + TILE - 1) // TILE * TILE
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded
    if COUNTED and not SEVERAL_STEPS:
        release_dependents(launch_pdl)

    if program < programs:
        # Phase 4: rows of this program's slots.
        rows = starts + before
        if SEVERAL_STEPS:
            for _ in range(0, steps):
                local = _to_local(ids, map_ptr, expert_map, NUM_LOCAL, MAP_BLOCK)
                ids = _load_ids(ids_ptr, slots + STEP, end, CACHE)
                rank = _ranks(local, index, local, index)
                _place(slot_to_row_ptr, row_to_slot_ptr, slots, end, local, rank, rows)
                rows += tl.histogram(local, EXPERT_BLOCK, mask=local >= 0)
                slots += STEP
        else:
            if not COUNTED:
                local = _to_local(ids, map_ptr, expert_map, NUM_LOCAL, MAP_BLOCK)
                rank = _ranks(others_local, others, local, slots)
            _place(slot_to_row_ptr, row_to_slot_ptr, slots, end, local, rank, rows)
    else:
        # Phase 5: counts and offsets; tile_to_expert; -1 to padding rows.
        if program == programs:
            tl.store(counts_ptr + experts, total, mask=experts < NUM_LOCAL)
            tl.store(offsets_ptr, 0)
            tl.store(offsets_ptr + 1 + experts, ends, mask=experts < NUM_LOCAL)
        stride = (tl.num_programs(0) - programs) * TILES
        for first in range((program - programs) * TILES, num_tiles, stride):
            tiles = first + tl.arange(0, TILES)
            expert = tl.sum((ends[:, None] <= tiles[None, :] * TILE).to(tl.int32), axis=0)
            is_live = expert < EXPERT_BLOCK
            expert = tl.where(is_live, expert, 0)
            live_end = tl.where(is_live, tl.gather(starts + total, expert, axis=0), 0)
            in_layout = tiles < num_tiles
            tl.store(tile_to_expert_ptr + tiles, tl.where(is_live, expert, -1), mask=in_layout)
            rows = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            is_padding = in_layout[:, None] & (rows >= live_end[:, None])
            nobody = tl.full([TILES, TILE], -1, tl.int32)
            tl.store(row_to_slot_ptr + rows, nobody, mask=is_padding)


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
    _launch(ids, num_local_experts, expert_map, tile, out, scratch)
    return out


def _launch(
    ids: torch.Tensor,
    num_local_experts: int,
    expert_map: torch.Tensor | None,
    tile: int,
    out: ExpertLayout,
    scratch: torch.Tensor | None,
) -> None:
    num_slots, num_tiles = ids.numel(), len(out.tile_to_expert)
    expert_block = choose_expert_block(num_local_experts)
    config = choose_config(num_slots, expert_block)
    map_size = num_local_experts if expert_map is None else len(expert_map)
    common = {
        "NUM_LOCAL": num_local_experts,
        "EXPERT_BLOCK": expert_block,
        "MAP_BLOCK": triton.next_power_of_2(map_size),
        "launch_pdl": supports_pdl(ids),
        "num_warps": config.num_warps,
    }
    at_once = config.parts * config.step
    if config.rows > 0:
        size = scratch_size(ids.shape[0], ids.shape[1], num_local_experts)
        if scratch is None:
            scratch = torch.empty(size, dtype=torch.int32, device=ids.device)
        assert scratch.dtype == torch.int32 and scratch.numel() >= size, (scratch.shape, size)
        _count_kernel[(config.blocks,)](
            ids,
            expert_map,
            scratch,
            num_slots,
            map_size,
            config.steps * at_once,
            AT_ONCE=at_once,
            **common,
        )
    else:
        at_once = slots_at_once(num_slots)
    fillers = min(MAX_FILLERS, triton.cdiv(num_tiles, config.tiles))
    _layout_kernel[(config.blocks * config.parts + fillers,)](
        ids,
        expert_map,
        scratch,
        *out,
        num_slots,
        map_size,
        config.steps,
        config.blocks,
        num_tiles,
        AT_ONCE=at_once,
        STEP=config.step,
        PARTS=config.parts,
        ROWS=config.rows,
        TILE=tile,
        TILES=config.tiles,
        COUNTED=config.rows > 0,
        SEVERAL_STEPS=config.steps > 1,
        **common,
    )


def _empty_layout(out: ExpertLayout) -> ExpertLayout:
    out.counts.zero_()
    out.offsets.zero_()
    out.row_to_slot.fill_(-1)
    out.tile_to_expert.fill_(-1)
    return out
