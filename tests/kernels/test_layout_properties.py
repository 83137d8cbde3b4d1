"""What any expert layout must be, whoever computes it, for any routing and placement.

Every (token, slot) that some rank owns has exactly one row there, inside its expert's range and in
slot order; nothing is shared, nothing is dropped, and the capacity is never exceeded.
"""

from typing import NamedTuple

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.rows import expert_layout
from dsv4_kernels.types import ExpertLayout, capacity
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

RANKS = (1, 2, 4, 8)
SKEWS = ("distinct", "one-expert", "one-rank", "repeated", "none", "any-integer")


class Case(NamedTuple):
    """One batch of ids, and the expert map of every rank."""

    ids: torch.Tensor  # (num_tokens, top_k) int32 or int64
    num_local: int
    maps: list[torch.Tensor | None]  # per rank, global -> local
    tile: int


def placement(name: str, num_experts: int, ranks: int, generator: torch.Generator) -> list:
    """expert_map of every rank; with "shuffled", experts are anywhere, as EPLB leaves them."""
    order = torch.arange(num_experts)
    if name == "round-robin":
        order = order.view(-1, ranks).T.flatten()
    elif name == "shuffled":
        order = torch.randperm(num_experts, generator=generator)
    maps = []
    for local in order.view(ranks, -1):
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        maps.append(expert_map)
    return maps


def make_ids(skew: str, size: tuple[int, int], num_experts: int, ranks: int, generator):
    num_tokens, top_k = size
    if skew == "distinct":
        keys = torch.rand(num_tokens, max(num_experts, top_k), generator=generator)
        ids = keys.argsort(1)[:, :top_k]
        return torch.where(ids < num_experts, ids, -1)
    if skew == "one-expert":
        one = int(torch.randint(0, num_experts, (1,), generator=generator))
        return torch.full(size, one)
    if skew == "none":
        return torch.full(size, -1)
    high = num_experts // ranks if skew == "one-rank" else num_experts
    low = 0
    if skew == "any-integer":
        low, high = -(2**31), 2**31
    return torch.randint(low, high, size, generator=generator)


@st.composite
def cases(draw) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ranks = draw(st.sampled_from(RANKS))
    num_local = draw(st.integers(1, 12))
    num_experts = ranks * num_local
    size = draw(st.sampled_from([0, 1, 2, 3, 7, 16, 33])), draw(st.sampled_from([1, 2, 6, 16]))
    ids = make_ids(draw(st.sampled_from(SKEWS)), size, num_experts, ranks, generator)
    name = draw(st.sampled_from(["linear", "round-robin", "shuffled"]))
    maps = placement(name, num_experts, ranks, generator)
    if ranks == 1 and draw(st.booleans()):
        maps = [None]
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return Case(ids.to(dtype), num_local, maps, draw(st.sampled_from([1, 8, 64, 128])))


ALL_ON_ONE = Case(torch.full((33, 6), 3, dtype=torch.int32), 4, placement("linear", 8, 2, None), 8)


def local_ids(case: Case, expert_map: torch.Tensor | None) -> list[int]:
    """The local expert of every flat slot, -1 for none."""
    num_experts = case.num_local if expert_map is None else len(expert_map)
    local = list(range(num_experts)) if expert_map is None else expert_map.tolist()
    return [local[i] if 0 <= i < num_experts else -1 for i in case.ids.flatten().tolist()]


def check(layout: ExpertLayout, case: Case, local: list[int]) -> None:
    for tensor in layout:
        assert tensor.dtype == torch.int32
    slot_to_row = layout.slot_to_row.flatten().tolist()
    row_to_slot, offsets = layout.row_to_slot.tolist(), layout.offsets.tolist()
    assert layout.slot_to_row.shape == case.ids.shape
    assert len(row_to_slot) == capacity(*case.ids.shape, case.num_local, case.tile)
    assert offsets[0] == 0 and offsets[-1] <= len(row_to_slot)
    rows_seen: list[int] = []
    for expert, (count, start) in enumerate(zip(layout.counts.tolist(), offsets[:-1], strict=True)):
        slots = [slot for slot, owner in enumerate(local) if owner == expert]
        rows = [slot_to_row[slot] for slot in slots]
        assert count == len(slots)
        assert rows == list(range(start, start + count)), "in the expert's range, in slot order"
        assert [row_to_slot[row] for row in rows] == slots
        assert start % case.tile == 0
        assert offsets[expert + 1] - start == -(-count // case.tile) * case.tile
        tiles = layout.tile_to_expert[start // case.tile : offsets[expert + 1] // case.tile]
        assert (tiles == expert).all()
        rows_seen += rows
    assert len(set(rows_seen)) == len(rows_seen), "no row is shared"
    assert all((row < 0) == (owner < 0) for row, owner in zip(slot_to_row, local, strict=True))
    padding = set(range(len(row_to_slot))) - set(rows_seen)
    assert all(row_to_slot[row] == -1 for row in padding)
    assert (layout.tile_to_expert[offsets[-1] // case.tile :] == -1).all()


def on_device(ids, num_local, expert_map, tile) -> ExpertLayout:
    """The kernel's layout, of ids and a map that are moved to where it runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expert_map = None if expert_map is None else expert_map.to(device)
    layout = expert_layout.expert_layout(ids.to(device), num_local, expert_map, tile)
    return ExpertLayout(*(tensor.cpu() for tensor in layout))


IMPLEMENTATIONS = {"reference": (reference.expert_layout, 300), "triton": (on_device, 60)}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_local_slot_has_one_row(name):
    layout_of, examples = IMPLEMENTATIONS[name]
    no_pauses = [HealthCheck.too_slow]

    @given(case=cases())
    @example(case=ALL_ON_ONE)
    @settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=no_pauses
    )
    def check_all(case):
        check_ranks(layout_of, case)

    check_all()


def check_ranks(layout_of, case: Case) -> None:
    owners = [0] * case.ids.numel()
    for expert_map in case.maps:
        layout = layout_of(case.ids, case.num_local, expert_map, case.tile)
        local = local_ids(case, expert_map)
        check(layout, case, local)
        rows = layout.slot_to_row.flatten().tolist()
        owners = [n + (row >= 0) for n, row in zip(owners, rows, strict=True)]
    num_experts = case.num_local * len(case.maps)
    exists = [0 <= i < num_experts for i in case.ids.flatten().tolist()]
    assert owners == [int(e) for e in exists], "each expert that exists is on exactly one rank"


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_vllms_own_placements_uneven_ones_included(strategy, ranks):
    """10 experts on 3, 4 or 8 ranks: some ranks hold one more than others."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    generator = torch.Generator().manual_seed(ranks)
    ids = make_ids("distinct", (33, 6), 10, ranks, generator).int()
    rows = 0
    for rank in range(ranks):
        num_local, expert_map, _ = determine_expert_map(ranks, rank, 10, strategy)
        layout = reference.expert_layout(ids, num_local, expert_map, 8)
        case = Case(ids, num_local, [expert_map], 8)
        check(layout, case, local_ids(case, expert_map))
        rows += int(layout.counts.sum())
    assert rows == ids.numel()


@pytest.mark.parametrize("tile", [1, 8, 64, 128, 256])
@pytest.mark.parametrize("num_local", [1, 3, 48, 256])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64])
def test_the_capacity_is_reached_but_never_passed(num_tokens, num_local, tile):
    """The worst routing: as many groups as can exist, each one row over a whole tile."""
    top_k = 6
    slots = num_tokens * top_k
    groups = min(slots, num_local)
    spare = slots - groups
    # One row for each group, then whole tiles to the first.
    worst = groups * tile + spare // tile * tile
    rows = capacity(num_tokens, top_k, num_local, tile)
    assert rows % tile == 0
    assert worst <= rows < worst + 2 * tile
