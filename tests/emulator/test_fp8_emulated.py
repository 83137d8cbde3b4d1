"""sm90 on FP8 WGMMA in the emulator: FC1 against plain torch on what its operands are, and the
layer from checkpoint weights against the oracle."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from dsv4_kernels import moe
from dsv4_kernels.backends import REFERENCE, SM90
from dsv4_kernels.reference import unpack_e2m1
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.spec import Gemm, LayerConfig, Sm90Config
from dsv4_kernels.types import (
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    ExpertWeights,
    MoeLayer,
    Routing,
    fp8_h_scale,
)

from tests.emulator.sm90_emulation import Emulation
from tests.support.layers import aligned
from tests.support.layers import run as run_layer
from tests.support.sm90_e4m3 import (
    codes_in_order,
    gate_up_rows,
    permuted_columns,
    scales_in_order,
)
from tests.support.sm90_problems import Problem as LayerProblem
from tests.support.sm90_problems import make_inputs, use_choice

INTERMEDIATE, K, LIMIT = 128, 512, 10.0
THREE_WARPGROUPS = Sm90Config(1, 3, (16, 32), 256)
CONFIGS = {
    "cluster": (Sm90Config(1, 2, (16, 32), 128, cluster=2), False, (20, 0, 40)),
    "three-warpgroups": (THREE_WARPGROUPS, False, (1, 40, 8)),
    "two-row-blocks": (Sm90Config(2, 2, (16,), 256), False, (9, 33, 0)),
    "gather": (THREE_WARPGROUPS, True, (1, 40, 8)),
    "gather, two-row-blocks": (Sm90Config(2, 2, (16,), 256), True, (9, 33, 0)),
}


class Problem(NamedTuple):
    codes: torch.Tensor  # (experts, rows, K / 2) uint8
    scales: torch.Tensor  # (experts, rows, K / block) uint8, indices of the table
    global_scales: torch.Tensor  # (experts, 2) float32
    x: torch.Tensor  # (rows, K) E4M3, placed
    row_scales: torch.Tensor  # (rows,) float32
    offsets: list[int]


def make_problem(counts: tuple[int, ...], block: int) -> Problem:
    generator = torch.Generator().manual_seed(block)
    size = (len(counts), 2 * INTERMEDIATE, K // 2)
    codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    low, high = (0, 15) if block == MXFP4_BLOCK else (32, 96)
    size = (*size[:2], K // block)
    scales = torch.randint(low, high, size, dtype=torch.uint8, generator=generator)
    if block == NVFP4_BLOCK:
        scales[:, 0, :4] = torch.tensor([0, 1, 126, 5], dtype=torch.uint8)
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + -(-count // 8) * 8)
    x = torch.randn(offsets[-1], K, generator=generator)
    row_scales = x.abs().amax(1) / 448
    x = (x / row_scales[:, None]).to(torch.float8_e4m3fn)
    factors = (torch.rand(len(counts), 2, generator=generator) + 0.5) * 2.0**-6
    return Problem(codes, scales, factors, x, row_scales, offsets)


def expected(problem: Problem, expert: int, block: int, count: int) -> torch.Tensor:
    """h of an expert's rows, before it is rounded to bf16."""
    scales = problem.scales[expert]
    if block == MXFP4_BLOCK:
        scales = torch.exp2(scales.float() - 5)
    else:
        scales = scales.view(torch.float8_e4m3fn).float()
    blocks = unpack_e2m1(problem.codes[expert]).unflatten(-1, (-1, block))
    # Weights are rounded to E4M3, an eighth of their size: exactly, those of MXFP4.
    weights = (blocks * scales[..., None] / 8).to(torch.float8_e4m3fn).float().flatten(1) * 8
    rows = slice(problem.offsets[expert], problem.offsets[expert] + count)
    x = problem.x[rows].float() * problem.row_scales[rows, None]
    gate, up = (x @ weights.T).chunk(2, dim=1)
    scale_g, scale_u = problem.global_scales[expert]
    gate, up = (gate * scale_g).clamp(max=LIMIT), (up * scale_u).clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(gate) * up


def run(
    gemm: Gemm, problem: Problem, counts: tuple[int, ...], emulation: Emulation
) -> torch.Tensor:
    rows = problem.offsets[-1]
    x = aligned(permuted_columns(problem.x.view(torch.uint8)))
    row_scales, slots = aligned(problem.row_scales), torch.arange(rows)
    if gemm.gather:  # each row is a token's, its second slot or its first, and part of a longer one
        tokens = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
        slots = gemm.top_k * tokens + slots % gemm.top_k
        x = aligned(torch.nn.functional.pad(x[tokens.argsort()], (0, 16), value=0x7F))[:, :K]
        row_scales = aligned(row_scales[tokens.argsort(), None].repeat(1, 3))[:, 0]
    order = gate_up_rows(2 * INTERMEDIATE)
    dtype = torch.bfloat16 if gemm.h_row_scales else torch.float8_e4m3fn
    out = aligned(torch.full((rows, INTERMEDIATE), float("nan")).to(dtype))
    arguments = [
        torch.stack([codes_in_order(codes[order]) for codes in problem.codes]),
        torch.stack([scales_in_order(s[order], gemm.scale_block) for s in problem.scales]),
        problem.global_scales,
        x,
        out,
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(problem.offsets, dtype=torch.int32),
        slots.int(),
        torch.full((rows * gemm.top_k,), float("nan")),  # no routing weight is read
    ]
    arguments = [part if part is out or part is x else aligned(part) for part in arguments]
    emulation.launch(gemm, tuple(arguments), LIMIT, (row_scales, fp8_h_scale(LIMIT)))
    return out


@pytest.mark.parametrize("block", [MXFP4_BLOCK, NVFP4_BLOCK], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize("mode", ["eager", "random"])
@pytest.mark.parametrize("h", ["bf16", "e4m3"])
@pytest.mark.parametrize(("config", "gather", "counts"), CONFIGS.values(), ids=CONFIGS)
def test_fc1_of_fp8_rows(config, gather, counts, h, mode, block):
    shape = (len(counts), 2 * INTERMEDIATE, K, 2)
    gemm = Gemm("fc1", *shape, gather, config, block, "fp8", h == "bf16")
    problem = make_problem(counts, block)
    emulation = Emulation(mode=mode)
    out = run(gemm, problem, counts, emulation)
    assert emulation.spills[0], "no tile is split"
    for expert, count in enumerate(counts):
        first = problem.offsets[expert]
        ours = out[first : first + count].float()
        oracle = permuted_columns(expected(problem, expert, block, count))
        if h == "bf16":
            # bf16's rounding is 1.7e-3 of a row; 13 bits of WGMMA's sums add as much at most.
            assert (ours - oracle).norm() <= 4e-3 * oracle.norm(), expert
        else:
            scale = fp8_h_scale(LIMIT)
            error = (ours * scale - oracle).abs()
            # Half a step of E4M3, and what the sums err by, which SwiGLU multiplies by up to 10.
            bound = (
                oracle.abs() * 2.0**-4 + 2.0**-10 * scale + 1e-2 * oracle.abs().max(1)[0][:, None]
            )
            assert (error <= bound).all(), expert
        padding = out[first + count : problem.offsets[expert + 1]].float()
        assert padding.isnan().all(), "padding rows"


CLUSTER = Sm90Config(2, 2, (16, 32), 128, cluster=2)
TILES = {
    "cluster": (CLUSTER, replace(CLUSTER, tile_k=64)),
    "one-group-a-stage": (CLUSTER, Sm90Config(1, 3, (16, 32), 64, cluster=2)),
}


def layer_of(backend, problem: LayerProblem, weights: ExpertWeights) -> MoeLayer:
    shape = problem.shape._replace(fp8=True)
    copy = ExpertWeights(*(aligned(tensor) for tensor in weights))
    return moe.prepare_layer(backend, shape, copy, limit=problem.limit, activation_scales=None)


LAYERS = [(160, "mxfp4", 10.0), (160, "nvfp4", None), (192, "nvfp4", 10.0), (320, "mxfp4", 40.0)]


@pytest.mark.parametrize(("intermediate", "weight_format", "limit"), LAYERS, ids=str)
def test_the_layer_is_the_oracle(monkeypatch, intermediate, weight_format, limit):
    """Stages of an even or odd number of blocks, of which the last may be half empty."""
    check_layer(monkeypatch, intermediate, weight_format, limit)


@pytest.mark.parametrize("configs", TILES.values(), ids=TILES)
def test_the_layer_of_large_tiles_is_the_oracle(monkeypatch, keep_sm90_choice, configs):
    use_choice(lambda shape, num_tokens: LayerConfig(False, *configs))
    fc1, fc2 = check_layer(monkeypatch, 192, "mxfp4", 10.0)
    assert fc1 and fc2, "no tile is split"


def check_layer(
    monkeypatch, intermediate: int, weight_format: str, limit: float | None
) -> list[int]:
    """Returns how many blocks spilled, of each GEMM. A sum's last bits decide on which side of a
    rounding point an E4M3 of h falls, a step of 2^-3 at most: one may be most of a token, of few
    tokens."""
    emulation = Emulation(mode="random", num_sms=6)
    monkeypatch.setattr(sm90, "launch", emulation.launch)
    problem = LayerProblem("fp8", 16, 4, 2, 256, intermediate, limit, weight_format=weight_format)
    inputs = make_inputs(problem)
    weights = inputs.weights
    if weight_format == "mxfp4":
        bytes_ = [scales.clamp(min=118) for scales in (weights[1], weights[4])]
        weights = weights._replace(w13_block_scales=bytes_[0], w2_block_scales=bytes_[1])
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(16, 4, generator=generator).argsort(1)[:, :2].int()
    ids[3] = -1
    routing = Routing(inputs.routing_weights, ids)
    ours = run_layer(layer_of(SM90, problem, weights), inputs.x, routing).float()
    oracle = run_layer(layer_of(REFERENCE, problem, weights), inputs.x, routing).float()
    assert not ours[3].any()
    error = (ours - oracle).norm(dim=1)
    assert (error <= 2.0**-3 * oracle.norm(dim=1)).all()
    assert (error > 2.0**-6 * oracle.norm(dim=1)).sum() <= 2
    return emulation.spills
