"""Layout: expert ids -> the row of every (token, slot), groups padded to a tile, in slot order.

    count[e]  = slots whose expert is local and e
    offset[e] = sum over e' < e of count[e'] rounded up to the tile
    row[slot] = offset[e] + number of earlier slots of the same expert

Slots are token * top_k + j. The first programs own `steps` runs of STEP slots each and place them;
the programs after those write the tiles' experts and the rows that no slot has. What comes before
its slots every program counts itself up to ONE_LAUNCH_SLOTS slots, in one launch and with nothing
shared; beyond that, a first launch leaves the counts of every block of slots in a scratch buffer.
Within a block, a slot's rank is counted by comparing it with the slots before it. No atomics: the
order of rows is the order of slots, whatever the GPU does first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import release_dependents, supports_pdl, wait_for_inputs
from dsv4_kernels.types import ExpertLayout, capacity

MAX_LOCAL_EXPERTS = 512
ONE_LAUNCH_SLOTS = 1024
MAX_BLOCKS = 128
MAX_FILLERS = 128
TILES = 16  # that a filler writes at once


class Config(NamedTuple):
    step: int  # slots that are ranked at once
    steps: int  # runs of `step` slots per program
    parts: int  # programs per block, whose slots are counted together
    blocks: int
    num_warps: int
    counted_before: bool  # two launches


def choose_config(num_slots: int, expert_block: int) -> Config:
    """Programs of 32 slots while few experts keep the counts short; else blocks that are fewer.

    us on an H200, a hash layer's router included. 512 tokens of top 6: 48 experts 4.3 with 32 slots
    a program, 5.0 with 128; 256 experts 5.1 and 4.9. 2048 tokens, 256 experts: 6.9 with 96 blocks,
    6.7 with 48. Four warps: with eight, barriers cost more than the work that they share.
    """
    if num_slots <= ONE_LAUNCH_SLOTS:
        return Config(32, 1, 1, triton.cdiv(num_slots, 32), num_warps=4, counted_before=False)
    if num_slots <= 4096 and expert_block < 256:
        return Config(32, 1, 4, triton.cdiv(num_slots, 128), num_warps=4, counted_before=True)
    max_blocks = 64 if 4096 < num_slots <= 16384 and expert_block >= 256 else MAX_BLOCKS
    steps = triton.cdiv(num_slots, 128 * max_blocks)
    return Config(128, steps, 1, triton.cdiv(num_slots, 128 * steps), 4, counted_before=True)


def choose_expert_block(num_local_experts: int) -> int:
    return max(32, triton.next_power_of_2(num_local_experts))


def counts_at_once(expert_block: int, blocks: int) -> int:
    """Blocks whose counts a program adds up at once: all, while they fit in its registers."""
    if expert_block == 512:
        return 16
    return min(triton.next_power_of_2(blocks), 16384 // expert_block)


def slots_at_once(num_slots: int) -> int:
    """Slots that are counted at once: of few sizes, each of which is compiled."""
    return next((size for size in (64, 128, 512) if num_slots <= size), 1024)


def scratch_size(num_tokens: int, top_k: int, num_local_experts: int) -> int:
    """int32 elements of scratch that a layout needs, or one of fewer tokens; 0 for one launch."""
    num_slots = num_tokens * top_k
    if num_slots <= ONE_LAUNCH_SLOTS:
        return 0
    return min(triton.cdiv(num_slots, 128), MAX_BLOCKS) * num_local_experts


@triton.jit
def _load_map(map_ptr, map_size, MAP_BLOCK: tl.constexpr):
    """(MAP_BLOCK,) local expert of every global one, -1 beyond the map; read before the wait."""
    experts = tl.arange(0, MAP_BLOCK)
    if map_ptr is None:
        local = experts
    else:
        local = tl.load(map_ptr + experts, mask=experts < map_size, other=-1)
    return local


@triton.jit
def _to_local(experts, expert_map, NUM_LOCAL: tl.constexpr, MAP_BLOCK: tl.constexpr):
    """int32 local experts of global ids, NUM_LOCAL where there is none."""
    known = (experts >= 0) & (experts < MAP_BLOCK)
    local = tl.gather(expert_map, tl.where(known, experts, 0).to(tl.int32), axis=0)
    return tl.where(known & (local >= 0) & (local < NUM_LOCAL), local, NUM_LOCAL)


@triton.jit
def _local_experts(
    ids_ptr, expert_map, slots, end, NUM_LOCAL: tl.constexpr, MAP_BLOCK: tl.constexpr
):
    """int32 local experts of slots below end, NUM_LOCAL where there is none."""
    experts = tl.load(ids_ptr + slots, mask=slots < end, other=-1)
    return _to_local(experts, expert_map, NUM_LOCAL, MAP_BLOCK)


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
        local = _local_experts(ids_ptr, expert_map, slots, end, NUM_LOCAL, MAP_BLOCK)
        counts += tl.histogram(local, EXPERT_BLOCK, mask=local < NUM_LOCAL)
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
    AT_ONCE: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    COUNTED: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    expert_map = _load_map(map_ptr, map_size, MAP_BLOCK)
    wait_for_inputs(launch_pdl, not COUNTED)
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERT_BLOCK)
    index = tl.arange(0, STEP)
    programs = blocks * PARTS
    own = program * steps * STEP
    own_ids = tl.load(ids_ptr + own + index, mask=own + index < num_slots, other=-1)
    if PARTS > 1:
        # The block's slots before this program's.
        others = program // PARTS * PARTS * STEP + tl.arange(0, PARTS * STEP)
        earlier_ids = tl.load(ids_ptr + others, mask=others < own, other=-1)

    # Phase 1: rows of each expert before this program's slots, and in all.
    total = tl.zeros([EXPERT_BLOCK], tl.int32)
    before = tl.zeros([EXPERT_BLOCK], tl.int32)
    if COUNTED:
        for first in range(0, blocks, AT_ONCE):
            block = first + tl.arange(0, AT_ONCE)[:, None]
            counts = tl.load(
                block_counts_ptr + block * NUM_LOCAL + experts[None, :],
                mask=(block < blocks) & (experts[None, :] < NUM_LOCAL),
                other=0,
            )
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where(block < program // PARTS, counts, 0), axis=0)
    else:
        for first in range(0, num_slots, AT_ONCE):
            slots = first + tl.arange(0, AT_ONCE)
            local = _local_experts(ids_ptr, expert_map, slots, num_slots, NUM_LOCAL, MAP_BLOCK)
            total += tl.histogram(local, EXPERT_BLOCK, mask=local < NUM_LOCAL)
            if (first < own) & (program < programs):
                earlier = (local < NUM_LOCAL) & (slots < own)
                before += tl.histogram(local, EXPERT_BLOCK, mask=earlier)

    # Phase 2: groups. Experts beyond NUM_LOCAL are empty and end where the last group ends.
    padded = (total + TILE - 1) // TILE * TILE
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded

    if program < programs:
        # Phase 3: rows of this program's slots.
        running = starts + before
        for step in range(0, steps):
            slots = own + step * STEP + index
            local = _to_local(own_ids, expert_map, NUM_LOCAL, MAP_BLOCK)
            if step + 1 < steps:
                following = slots + STEP
                own_ids = tl.load(ids_ptr + following, mask=following < num_slots, other=-1)
            is_local = local < NUM_LOCAL
            # Summed along axis 0, which a thread mostly has to itself.
            is_earlier = (local[:, None] == local[None, :]) & (index[:, None] < index[None, :])
            rank = tl.sum(is_earlier.to(tl.int32), axis=0)
            if PARTS > 1:
                others_local = _to_local(earlier_ids, expert_map, NUM_LOCAL, MAP_BLOCK)
                same = others_local[:, None] == local[None, :]
                rank += tl.sum(same.to(tl.int32), axis=0)
            row = rank + tl.gather(running, tl.where(is_local, local, 0), axis=0)
            tl.store(slot_to_row_ptr + slots, tl.where(is_local, row, -1), mask=slots < num_slots)
            tl.store(row_to_slot_ptr + row, slots, mask=is_local)
            if step + 1 < steps:
                running += tl.histogram(local, EXPERT_BLOCK, mask=is_local)
    else:
        # Phase 4: the groups; tiles to experts; -1 to the rows that no slot has.
        num_rows = tl.sum(padded, axis=0)
        if program == programs:
            tl.store(counts_ptr + experts, total, mask=experts < NUM_LOCAL)
            tl.store(offsets_ptr + experts, starts, mask=experts < NUM_LOCAL)
            tl.store(offsets_ptr + NUM_LOCAL, num_rows)
        stride = (tl.num_programs(0) - programs) * TILES
        for first in range((program - programs) * TILES, num_tiles, stride):
            tiles = first + tl.arange(0, TILES)
            is_live = tiles * TILE < num_rows
            expert = tl.sum((ends[:, None] <= tiles[None, :] * TILE).to(tl.int32), axis=0)
            expert = tl.where(is_live, expert, 0)
            live_end = tl.where(is_live, tl.gather(starts + total, expert, axis=0), 0)
            in_layout = tiles < num_tiles
            tl.store(tile_to_expert_ptr + tiles, tl.where(is_live, expert, -1), mask=in_layout)
            rows = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            is_padding = in_layout[:, None] & (rows >= live_end[:, None])
            nobody = tl.full([TILES, TILE], -1, tl.int32)
            tl.store(row_to_slot_ptr + rows, nobody, mask=is_padding)
    if COUNTED:
        release_dependents(launch_pdl)


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
    if config.counted_before:
        size = scratch_size(ids.shape[0], ids.shape[1], num_local_experts)
        if scratch is None:
            scratch = torch.empty(size, dtype=torch.int32, device=ids.device)
        assert scratch.dtype == torch.int32 and scratch.numel() >= size, (scratch.shape, size)
        span = config.parts * config.steps * config.step
        _count_kernel[(config.blocks,)](
            ids,
            expert_map,
            scratch,
            num_slots,
            map_size,
            span,
            AT_ONCE=slots_at_once(span),
            **common,
        )
        at_once = counts_at_once(expert_block, config.blocks)
    else:
        at_once = slots_at_once(num_slots)
    fillers = min(MAX_FILLERS, triton.cdiv(num_tiles, TILES))
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
        TILE=tile,
        TILES=TILES,
        COUNTED=config.counted_before,
        **common,
    )


def _empty_layout(out: ExpertLayout) -> ExpertLayout:
    out.counts.zero_()
    out.offsets.zero_()
    out.row_to_slot.fill_(-1)
    out.tile_to_expert.fill_(-1)
    return out
