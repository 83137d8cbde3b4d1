"""expert_layout against the oracle: all five tensors bit-equal, padding included."""

import pytest
import torch
import triton.language as tl
from dsv4_kernels import reference
from dsv4_kernels.route.router_topk import router_topk
from dsv4_kernels.rows import expert_layout as op
from dsv4_kernels.rows.expert_layout import (
    MAX_BLOCKS,
    choose_config,
    choose_expert_block,
    expert_layout,
    make_layout,
    one_launch_slots,
    scratch_size,
)
from dsv4_kernels.types import ExpertLayout, Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_loads_in_the_interpreter(monkeypatch):
    """It takes 10 ms for each, those of no block included."""
    if DEVICE == "cpu":
        monkeypatch.setattr(op, "UNROLL", tl.constexpr(2))


def random_ids(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    keys = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return keys.argsort(1)[:, :top_k].int()


def local_map(num_experts: int, local: list[int]) -> torch.Tensor:
    """Global to local ids; local lists the global ids that are owned, in local order."""
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
    expert_map[torch.tensor(local)] = torch.arange(len(local), dtype=torch.int32)
    return expert_map


def check(ids: torch.Tensor, num_local: int, expert_map: torch.Tensor | None, tile: int):
    """Into outputs and scratch that start as garbage."""
    out = make_layout(*ids.shape, num_local, tile, torch.device(DEVICE))
    for tensor in out:
        tensor.fill_(-12345)
    scratch = torch.full((scratch_size(*ids.shape, num_local),), 777, dtype=torch.int32)
    device_map = expert_map.to(DEVICE) if expert_map is not None else None
    expert_layout(ids.to(DEVICE), num_local, device_map, tile, out=out, scratch=scratch.to(DEVICE))
    expected = reference.expert_layout(ids, num_local, expert_map, tile)
    for name, ours, theirs in zip(ExpertLayout._fields, out, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs), name


@pytest.mark.parametrize("tile", [1, 16, 128])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 256, 6), (1, 256, 6), (11, 384, 6), (33, 300, 16), (64, 512, 8), (5, 1, 1)],
)
def test_all_experts_local(num_tokens, num_experts, top_k, tile):
    check(random_ids(num_tokens, num_experts, top_k), num_experts, None, tile)


PLACEMENTS = {
    "linear": list(range(96, 144)),
    "round_robin": list(range(2, 384, 8)),
    "eplb": torch.randperm(384, generator=torch.Generator().manual_seed(0))[:48].tolist(),
    "one_expert": [200],
}


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_expert_parallel_ranks(num_tokens, placement, ids_dtype):
    local = PLACEMENTS[placement]
    ids = random_ids(num_tokens, 384, 6).to(ids_dtype)
    check(ids, len(local), local_map(384, local), tile=16)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [10, 200], ids=["one_launch", "two_launches"])
@pytest.mark.parametrize("expert", [0, 17, 31, 40, -1, 2**31 - 1])
def test_any_skew(expert, num_tokens):
    """All slots on one expert: local, foreign (40), absent, or no expert at all."""
    ids = torch.full((num_tokens, 6), expert, dtype=torch.int32)
    check(ids, 32, local_map(64, list(range(32))), tile=16)
    check(ids, 32, None, tile=64)


@pytest.mark.parametrize("num_slots", [64, 65, 1024, 1025])
def test_sizes_around_the_changes_of_plan(num_slots):
    ids = torch.randint(-1, 50, (num_slots, 1), generator=torch.Generator().manual_seed(0))
    check(ids.int(), 33, local_map(49, list(range(5, 38))), tile=32)


@pytest.mark.parametrize("num_local", [256, 257])
def test_few_slots_of_many_experts_are_counted_before(num_local):
    """And need scratch, whatever number of tokens it was asked for."""
    num_slots = one_launch_slots(256)
    counted_before = choose_config(num_slots, choose_expert_block(num_local)).rows > 0
    assert counted_before == (num_local == 257) == (scratch_size(num_slots, 1, num_local) > 0)
    for slots in (64, 65, 300):
        check(random_ids(slots, num_local, 1), num_local, None, tile=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_slots", "num_local", "step", "parts"),
    [(1300, 20, 32, 8), (4200, 300, 64, 4), (4200, 20, 128, 1)],
    ids=["eight_programs", "four_programs", "one_program"],
)
def test_blocks_that_one_or_several_programs_place(num_slots, num_local, step, parts):
    """Experts repeat within a program's slots, within its block, and across blocks."""
    config = choose_config(num_slots, choose_expert_block(num_local))
    assert config.rows > 0 and (config.step, config.parts) == (step, parts)
    ids = torch.randint(
        -1, num_local + 9, (num_slots, 1), generator=torch.Generator().manual_seed(0)
    )
    check(ids.int(), num_local, local_map(num_local + 9, list(range(num_local))), tile=16)


@pytest.mark.slow
@pytest.mark.parametrize("num_local", [40, 300])
def test_programs_with_several_runs_of_slots(monkeypatch, num_local):
    monkeypatch.setattr(op, "MAX_BLOCKS", 20)
    monkeypatch.setattr(op, "one_launch_slots", lambda expert_block: 0)
    num_slots = 16384 + 100 if num_local == 300 else 2 * 20 * 128 - 200
    config = choose_config(num_slots, choose_expert_block(num_local))
    assert config.steps > 1 and config.rows > 0 and config.blocks * config.steps * 128 > num_slots
    ids = torch.randint(0, num_local, (num_slots, 1), generator=torch.Generator().manual_seed(0))
    check(ids.int(), num_local, None, tile=8)


@pytest.mark.parametrize("expert_block", [32, 64, 256, 512])
@pytest.mark.parametrize("num_slots", [1, 6, 1025, 4096, 4097, 49152, 6 * 2**16, 8 * 2**20])
def test_every_slot_has_a_program(num_slots, expert_block):
    config = choose_config(num_slots, expert_block)
    span = config.parts * config.steps * config.step
    assert num_slots <= config.blocks * span < num_slots + span
    assert config.blocks <= MAX_BLOCKS
    assert config.parts == 1 or config.steps == 1


@pytest.mark.slow
def test_everything_is_made_when_nothing_is_given():
    ids = random_ids(700, 60, 6)
    ours = expert_layout(ids.to(DEVICE), 60, None, 16)
    expected = reference.expert_layout(ids, 60, None, 16)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def test_a_wrong_call_is_refused_with_the_value():
    ids = random_ids(4, 60, 6).to(DEVICE)
    with pytest.raises(AssertionError, match="tile 24"):
        expert_layout(ids, 60, None, 24)
    small = make_layout(3, 6, 60, 16, torch.device(DEVICE))._replace(slot_to_row=ids)
    with pytest.raises(AssertionError, match="capacity"):
        expert_layout(ids, 60, None, 16, out=small)


@pytest.mark.gpu
@pytest.mark.parametrize("num_local", [48, 256, 384])
@pytest.mark.parametrize("num_tokens", [1, 32, 512, 2048, 8192, 65536])
def test_real_sizes(num_tokens, num_local):
    num_experts = 256 if num_local == 256 else 384
    expert_map = None if num_local != 48 else local_map(384, PLACEMENTS["eplb"])
    ids = random_ids(num_tokens, num_experts, 6)
    for tile in (8, 128):
        check(ids, num_local, expert_map, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [128, 512, 2048, 8192])
def test_ids_that_change_before_every_layout_of_a_graph(num_tokens):
    """The second launch reads ids before it waits: never those of the layer before."""
    logits = [torch.empty(num_tokens, 256, device=DEVICE) for _ in range(8)]
    weights = torch.empty(num_tokens, 6, device=DEVICE)
    routing = Routing(weights, torch.empty_like(weights, dtype=torch.int32))
    layouts = [make_layout(num_tokens, 6, 256, 64, weights.device) for _ in logits]
    scratch = torch.empty(scratch_size(num_tokens, 6, 256), dtype=torch.int32, device=DEVICE)

    def layers() -> None:
        for scores, out in zip(logits, layouts, strict=True):
            router_topk(scores, 6, out=routing)
            expert_layout(routing.ids, 256, None, 64, out=out, scratch=scratch)

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for _ in range(4):
        for scores in logits:
            scores.normal_()
        graph.replay()
        for scores, layout in zip(logits, layouts, strict=True):
            ids = router_topk(scores, 6).ids
            expected = reference.expert_layout(ids, 256, None, 64)
            assert all(torch.equal(a, b) for a, b in zip(layout, expected, strict=True))
