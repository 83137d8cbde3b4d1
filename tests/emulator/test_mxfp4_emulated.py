"""MXFP4 weights through the load-time shuffle and the sm90 GEMMs in the PTX emulator."""

from dataclasses import dataclass

import pytest
import torch
from dsv4_kernels import reference
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.spec import LayerConfig, Sm90Config
from dsv4_kernels.sm90.weights import shuffle_sm90
from dsv4_kernels.types import ExpertLayout, ExpertWeights, MoeShape

from tests.emulator.sm90_emulation import Emulation
from tests.emulator.test_emulator_sm90 import assert_rounded
from tests.support.sm90_problems import (
    PROBLEMS,
    ROW_TILE,
    Problem,
    aligned,
    expected,
    live_rows,
    make_inputs,
    run,
    use_choice,
)

SIZE = 64  # of hidden and intermediate where a weight at a time is looked at
WINDOW = 31


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    emulation = Emulation()
    monkeypatch.setattr(sm90, "launch", emulation.launch)
    return emulation


@dataclass
class Multiplied:
    weights: torch.Tensor  # (experts, 64, 64) bf16: what the kernel multiplies by, times 2^-power
    rounding: float


def multiplied(w2: torch.Tensor, scales: torch.Tensor, power: list[int]) -> Multiplied:
    """W2 as fc2 has it, column by column: each row of h has one element, 2^-power of its expert.

    w2 (experts, 64, 32) and scales (experts, 64, 2) uint8.
    """
    experts = len(w2)
    shape = MoeShape(experts, experts, 1, SIZE, SIZE, SIZE * experts, False, weight_format="mxfp4")
    prepared = ExpertWeights(
        torch.zeros(experts, 2 * SIZE, SIZE // 2, dtype=torch.uint8),
        torch.zeros(experts, 2 * SIZE, SIZE // 32, dtype=torch.uint8),
        torch.ones(experts, 2),
        w2.clone(),
        scales.clone(),
        torch.ones(experts),
    )
    prepared = ExpertWeights(*(aligned(tensor) for tensor in prepared))
    rounding = torch.zeros(1)
    shuffle_sm90(prepared, rounding)
    ids = torch.arange(experts, dtype=torch.int32).repeat_interleave(SIZE)[:, None]
    layout = reference.expert_layout(ids, experts, None, ROW_TILE)
    layout = ExpertLayout(*(aligned(tensor) for tensor in layout))
    scale = torch.exp2(-torch.tensor(power, dtype=torch.float32))
    h = aligned((torch.eye(SIZE) * scale[:, None, None]).flatten(0, 1).bfloat16())
    out = aligned(torch.full((len(h), SIZE), float("nan"), dtype=torch.bfloat16))
    sm90.fc2(h, layout, prepared, shape, out=out)
    return Multiplied(out.unflatten(0, (experts, SIZE)).transpose(1, 2), float(rounding))


def exact(w2: torch.Tensor, scales: torch.Tensor, power: list[int]) -> torch.Tensor:
    """float64."""
    codes = reference.unpack_e2m1(w2).double().unflatten(-1, (-1, 32))
    exponent = scales.double() - 127 - torch.tensor(power)[:, None, None]
    return torch.ldexp(codes, exponent[..., None]).flatten(-2)


def every_code(rows: int) -> torch.Tensor:
    """(rows, 32) bytes: each block of 32 has the 16 codes twice, each row from another on."""
    code = (torch.arange(SIZE)[None, :] + torch.arange(rows)[:, None]) % 16
    return (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8)


def test_every_scale_byte_and_code_is_exact(emulation):
    """All 255 bytes, as nine experts with a window each: eight of 31 powers and one of 7."""
    experts = -(-255 // WINDOW)
    scales = torch.empty(experts, SIZE, 2, dtype=torch.uint8)
    for expert in range(experts):
        bytes_ = torch.arange(WINDOW * expert, min(WINDOW * (expert + 1), 255))
        places = torch.arange(SIZE * 2) * 37 % SIZE * 2 + torch.arange(SIZE * 2) // SIZE
        scales[expert].view(-1)[places] = bytes_.repeat(SIZE * 2)[: SIZE * 2].to(torch.uint8)
    w2 = every_code(SIZE).expand(experts, -1, -1)
    # bf16 and float32 end at 2^128, and below 2^-126 bf16 has fewer bits.
    power = [-12] + [0] * (experts - 2) + [12]
    got = multiplied(w2, scales, power)
    assert set(scales.flatten().tolist()) == set(range(255))
    assert got.rounding == 0
    assert torch.equal(got.weights.double(), exact(w2, scales, power))


def test_the_oracle_is_exact_at_every_scale_byte():
    codes = torch.arange(256, dtype=torch.uint8).expand(255, -1)[:, :16]
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    values = reference.mxfp4_dequantize(codes, scales)
    unpacked = reference.unpack_e2m1(codes).double()
    assert torch.equal(values.double()[:253], torch.ldexp(unpacked, scales.double() - 127)[:253])


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
    inputs = make_inputs(problem)
    emulation.mode = mode
    out = run(problem, inputs, op)
    live = live_rows(inputs)
    assert_rounded(out[live], expected(problem, inputs, op)[live])
    assert out[~live].isnan().all(), "padding rows were written"


TILES = {
    "four steps": Sm90Config(1, 2, (16, 32), 128),
    "two row blocks": Sm90Config(2, 2, (16, 32), 64),
    "cluster": Sm90Config(1, 2, (16, 32, 48), 64, cluster=2),
}


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("config", TILES.values(), ids=TILES)
def test_every_kind_of_tile_equals_the_oracle(emulation, keep_sm90_choice, config, op):
    problem = Problem("tiles", 40, 2, 1, 384, 256, counts=(7, 33), weight_format="mxfp4")
    use_choice(lambda shape, num_tokens: LayerConfig(False, config, config))
    inputs = make_inputs(problem)
    emulation.mode, emulation.num_sms = "lazy", 4
    out = run(problem, inputs, op)
    live = live_rows(inputs)
    assert_rounded(out[live], expected(problem, inputs, op)[live])
