"""MXFP4 weights through the load-time shuffle and the sm90 GEMMs in the PTX emulator."""

import pytest
import torch
from dsv4_kernels.sm90.spec import Sm90Config

from tests.support.mxfp4_weights import SIZE, WINDOW, every_code, every_scale, exact, multiplied
from tests.support.sm90_problems import PROBLEMS, Problem, run_and_check, use_config


def test_every_scale_byte_and_code_is_exact(emulation):
    w2, scales, powers = every_scale()
    assert set(scales.flatten().tolist()) == set(range(255))
    got = multiplied(w2, scales, powers)
    assert got.rounding == 0
    assert torch.equal(got.weights.double(), exact(w2, scales, powers))


def test_what_lies_below_the_window_is_rounded_into_it_and_reported(emulation):
    """40 powers in one expert: the window takes the upper 31."""
    largest = 130
    rows = torch.arange(SIZE * 2).view(SIZE, 2)
    scales = (largest - rows % 40).to(torch.uint8)[None]
    w2 = every_code(SIZE)[None]
    got = multiplied(w2, scales, [0])
    want = exact(w2, scales, [0])
    inside = (scales >= largest - WINDOW + 1).repeat_interleave(32, dim=2)
    assert torch.equal(got.weights.double()[inside], want[inside])
    # To nearest, ties to even, in steps of half the lowest scale.
    step = 2.0 ** (largest - WINDOW + 1 - 127 - 1)
    rounded = (want / step).round() * step
    assert torch.equal(got.weights.double()[~inside], rounded[~inside])
    error = float((rounded - want)[~inside].abs().max())
    assert got.rounding == error / 2.0 ** (largest - 127)
    assert 0 < got.rounding <= 2.0**-32


def test_blocks_of_zeros_do_not_move_the_window(emulation):
    """Neither those above it nor those below it, of either zero."""
    scales = torch.full((1, SIZE, 2), 20, dtype=torch.uint8)
    scales[0, ::4], scales[0, 1::4] = 254, 0
    w2 = every_code(SIZE)[None].clone()
    w2[0, ::4], w2[0, 1::4] = 0x80, 0x08
    power = [-100]
    got = multiplied(w2, scales, power)
    assert got.rounding == 0
    want = exact(w2, scales, power)
    assert bool(want[0, 2::4].any()) and not want[0, :2].any()
    assert torch.equal(got.weights.double(), want)


def test_an_expert_of_zeros_is_zero(emulation):
    scales = torch.tensor([0, 254], dtype=torch.uint8).view(2, 1, 1).expand(2, SIZE, 2)
    got = multiplied(torch.zeros(2, SIZE, SIZE // 2, dtype=torch.uint8), scales, [0, 0])
    assert got.rounding == 0
    assert not got.weights.any()


MXFP4_PROBLEMS = [problem._replace(weight_format="mxfp4") for problem in PROBLEMS]


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("problem", MXFP4_PROBLEMS, ids=[p.name for p in MXFP4_PROBLEMS])
@pytest.mark.parametrize("mode", ["lazy", "random"])
def test_equals_the_oracle(emulation, problem, op, mode):
    emulation.mode = mode
    run_and_check(problem, op)
    assert emulation.spills[0], "no tile is split"


TILES = {
    "four steps": Sm90Config(1, 2, (16, 32), 128),
    "two row blocks": Sm90Config(2, 2, (16, 32), 64),
    "cluster": Sm90Config(1, 2, (16, 32, 48), 64, cluster=2),
}


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("config", TILES.values(), ids=TILES)
def test_every_kind_of_tile_equals_the_oracle(emulation, keep_sm90_choice, config, op):
    problem = Problem("tiles", 40, 2, 1, 384, 256, counts=(7, 33), weight_format="mxfp4")
    use_config(config)
    emulation.mode, emulation.num_sms = "lazy", 10
    run_and_check(problem, op)
    assert emulation.spills[0], "no tile is split"
