"""The sm90 grouped GEMMs in the PTX emulator, against the oracle."""

import time

import pytest
import torch
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.spec import Sm90Config

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.sm90_emulation import PRODUCED, emulated
from tests.support.sm90_problems import (
    PROBLEMS,
    Problem,
    check,
    make_inputs,
    run,
    run_and_check,
    use_config,
)

MODES = [("eager", 0), ("lazy", 0), ("random", 1)]
MODE_IDS = [mode for mode, _ in MODES]


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
@pytest.mark.parametrize(("mode", "seed"), MODES, ids=MODE_IDS)
def test_equals_the_oracle(emulation, problem, op, mode, seed):
    emulation.mode, emulation.seed = mode, seed
    run_and_check(problem, op)
    assert emulation.spills[0], "no tile is split"


def test_the_problems_have_every_width_of_a_stage_and_of_a_tile():
    chosen = [gemm.config for p in PROBLEMS for gemm in sm90.gemms(p.shape, p.num_tokens)]
    assert {config.tile_k for config in chosen} == {64, 128, 192, 256}
    assert {config.warpgroups for config in chosen} == {2, 3, 4}
    assert {config.m_blocks for config in chosen} == {1, 2}


def test_the_result_does_not_depend_on_the_order_of_blocks(emulation):
    """A tile that several blocks work on is summed in the order of K all the same, whether all are
    resident or one at a time."""
    problem, emulation.blocks = PROBLEMS[1], 5
    results = []
    for emulation.mode, emulation.seed in MODES:
        for emulation.num_sms in (5, 1):
            results.append(run(problem, make_inputs(problem), "fc2").nan_to_num())
    assert all(emulation.spills), "no tile is split"
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_fc2_loads_its_first_weights_before_it_waits_for_fc1(emulation, monkeypatch):
    """All that `PRODUCED` names it reads afterwards: every other test checks that."""
    problem = PROBLEMS[0]
    monkeypatch.setitem(PRODUCED, "fc2", ("codes",))
    with pytest.raises(Finding, match="of codes .* before griddepcontrol.wait"):
        run(problem, make_inputs(problem), "fc2")


# Each with another number of 64 x 64 blocks a stage, or of steps in a group of WGMMAs.
TILES = {
    "one block a stage": Sm90Config(1, 2, (16, 32), 64),
    "four steps": Sm90Config(1, 2, (16, 32), 128),
    "two row blocks": Sm90Config(2, 2, (16, 32), 64),
    "of the fewest rows": Sm90Config(2, 3, (8, 16), 128),
}


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("config", TILES.values(), ids=TILES)
def test_registers_are_not_overwritten_under_wgmma(emulation, keep_sm90_choice, config, op):
    problem = Problem("tiles", 40, 2, 1, 384, 256, counts=(7, 33))
    use_config(config)
    emulation.mode = "lazy"
    run_and_check(problem, op)
    assert emulation.spills[0], "no tile is split"


CLUSTERS = {
    "128 rows": Sm90Config(1, 2, (16, 32, 48), 64, cluster=2),
    "256 rows": Sm90Config(2, 2, (24, 32), 64, cluster=2),
}


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("config", CLUSTERS.values(), ids=CLUSTERS)
@pytest.mark.parametrize("mode", ["eager", "lazy", "random", "starved"])
def test_a_cluster_shares_rows(emulation, keep_sm90_choice, config, mode, op):
    """With 640 weight rows, of which the last tile of a cluster lacks some, and parts of tiles."""
    problem = Problem("cluster", 75, 4, 1, 384 if op == "fc1" else 640, 320, counts=(33, 0, 41, 1))
    use_config(config)
    emulation.mode, emulation.num_sms = mode, 8
    run_and_check(problem, op)
    assert emulation.spills[0], "no tile is split"


@pytest.mark.parametrize(("mode", "seed"), MODES, ids=MODE_IDS)
def test_a_tile_in_more_parts_than_a_warp_has_lanes(emulation, mode, seed):
    """37 stages of one tile, a stage or none to each of 38 blocks."""
    problem = Problem("parts", 1, 2, 1, 37 * 64, 64)
    emulation.mode, emulation.seed, emulation.num_sms = mode, seed, 38
    run_and_check(problem, "fc1")
    assert emulation.spills == [36]


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("blocks", [78, 114], ids=["h20", "h100-pcie"])
def test_the_grids_of_other_gpus(emulation, blocks, op):
    """With one resident block, which waits for those that have ended. Of fc2 many blocks have no
    work: they wait for the kernel before as well."""
    problem = Problem("grid", 1, 4, 2, 1024, 1024)
    emulation.blocks, emulation.num_sms = blocks, 1
    run_and_check(problem, op)
    assert emulation.spills[0], "no tile is split"
    assert emulation.statistics[0].counts["griddepcontrol.wait"] >= blocks


def test_four_experts_and_a_k_of_1024_take_less_than_ten_seconds(emulation):
    problem = Problem("speed", 64, 4, 2, 1024, 512)
    inputs = make_inputs(problem)
    gemm, _ = sm90.gemms(problem.shape, problem.num_tokens)
    emulated(gemm)
    start = time.process_time()
    out = run(problem, inputs, "fc1")
    seconds = time.process_time() - start
    instructions = emulation.statistics[0].warp_instructions
    print(f"{seconds:.1f} s of processor time, {instructions} warp-instructions")
    check(problem, inputs, "fc1", out)
    assert seconds < 10
