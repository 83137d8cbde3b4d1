"""expert_layout against the oracle: all five tensors bit-equal, padding included."""

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.expert_layout import (
    MAX_BLOCKS,
    ONE_LAUNCH_SLOTS,
    choose_config,
    choose_expert_block,
    expert_layout,
    make_layout,
    scratch_size,
)
from dsv4_kernels.types import ExpertLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("num_tokens", [10, 800], ids=["one_launch", "two_launches"])
@pytest.mark.parametrize("expert", [0, 17, 31, 40, -1, 2**31 - 1])
def test_any_skew(expert, num_tokens):
    """All slots on one expert: local, foreign (40), absent, or no expert at all."""
    ids = torch.full((num_tokens, 6), expert, dtype=torch.int32)
    check(ids, 32, local_map(64, list(range(32))), tile=16)
    check(ids, 32, None, tile=64)


@pytest.mark.parametrize("num_slots", [64, 65, ONE_LAUNCH_SLOTS, ONE_LAUNCH_SLOTS + 1])
def test_sizes_around_the_changes_of_plan(num_slots):
    ids = torch.randint(-1, 50, (num_slots, 1), generator=torch.Generator().manual_seed(0))
    check(ids.int(), 33, local_map(49, list(range(5, 38))), tile=32)


@pytest.mark.parametrize("num_local", [20, 200], ids=["parts_of_a_block", "whole_blocks"])
def test_a_block_that_several_programs_share(num_local):
    """Experts repeat within a program's slots, within its block, and across blocks."""
    num_slots = 1300
    config = choose_config(num_slots, choose_expert_block(num_local))
    assert config.counted_before and (config.parts > 1) == (num_local == 20)
    ids = torch.randint(
        -1, num_local + 9, (num_slots, 1), generator=torch.Generator().manual_seed(0)
    )
    check(ids.int(), num_local, local_map(num_local + 9, list(range(num_local))), tile=16)


def test_programs_with_several_runs_of_slots():
    num_slots = 128 * MAX_BLOCKS + 100
    ids = torch.randint(0, 40, (num_slots, 1), generator=torch.Generator().manual_seed(0))
    assert choose_config(num_slots, 64).steps == 2
    check(ids.int(), 40, None, tile=8)


@pytest.mark.parametrize("expert_block", [32, 64, 256, 512])
@pytest.mark.parametrize("num_slots", [1, 6, 1025, 4096, 4097, 49152, 6 * 2**16, 8 * 2**20])
def test_every_slot_has_a_program(num_slots, expert_block):
    config = choose_config(num_slots, expert_block)
    span = config.parts * config.steps * config.step
    assert num_slots <= config.blocks * span < num_slots + span
    assert config.blocks <= MAX_BLOCKS
    assert config.parts == 1 or config.steps == 1


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
