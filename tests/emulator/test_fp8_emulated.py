"""FC1 of sm90 on FP8 WGMMA in the emulator, against plain torch on what its operands are."""

import functools
from typing import NamedTuple

import pytest
import torch
from dsv4_kernels.reference import unpack_e2m1
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.arguments import example_arguments
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.sm90.spec import Gemm, Sm90Config
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK

from tests.emulator.ptx_emulator.host import EmulatedFunction, emulate
from tests.support.layers import aligned
from tests.support.sm90_e4m3 import (
    codes_in_order,
    gate_up_rows,
    permuted_columns,
    scales_in_order,
)

INTERMEDIATE, K, LIMIT = 128, 512, 10.0
CONFIGS = {
    "cluster": (Sm90Config(1, 2, (16, 32), 128, cluster=2), (20, 0, 5)),
    "three-warpgroups": (Sm90Config(1, 3, (16, 32), 256), (1, 40, 8)),
    "two-row-blocks": (Sm90Config(2, 2, (16,), 256), (9, 33, 0)),
}
GRID = 4


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


@functools.cache
def compiled(gemm: Gemm) -> EmulatedFunction:
    return emulate(Dsv4GroupedGemmSm90(gemm), *example_arguments(gemm), arch="sm_90a")


def run(gemm: Gemm, problem: Problem, counts: tuple[int, ...], mode: str) -> torch.Tensor:
    rows = problem.offsets[-1]
    order = gate_up_rows(2 * INTERMEDIATE)
    out = aligned(torch.full((rows, INTERMEDIATE), float("nan"), dtype=torch.bfloat16))
    flags = aligned(torch.zeros(GRID * sm90.FLAGS, dtype=torch.int32))
    partials = aligned(torch.full((GRID * sm90.MOST_PARTIALS,), float("nan")))
    arguments = [
        torch.stack([codes_in_order(codes[order]) for codes in problem.codes]),
        torch.stack([scales_in_order(s[order], gemm.scale_block) for s in problem.scales]),
        problem.global_scales,
        permuted_columns(problem.x.view(torch.uint8)),
        out,
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(problem.offsets, dtype=torch.int32),
        torch.arange(rows, dtype=torch.int32),
        torch.full((rows,), float("nan")),  # no routing weight is read
    ]
    arguments = [part if part is out else aligned(part) for part in arguments]
    scales = aligned(problem.row_scales)
    end = (partials, flags, LIMIT, rows, GRID, None, scales)
    compiled(gemm).run(*arguments, *end, mode=mode, seed=0, num_sms=GRID)
    assert not flags.any(), "flags are left set"
    return out


@pytest.mark.parametrize("block", [MXFP4_BLOCK, NVFP4_BLOCK], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize("mode", ["eager", "random"])
@pytest.mark.parametrize(("config", "counts"), CONFIGS.values(), ids=CONFIGS)
def test_fc1_of_fp8_rows(config, counts, mode, block):
    gemm = Gemm("fc1", len(counts), 2 * INTERMEDIATE, K, 2, False, config, block, "fp8")
    problem = make_problem(counts, block)
    out = run(gemm, problem, counts, mode)
    for expert, count in enumerate(counts):
        first = problem.offsets[expert]
        ours = out[first : first + count].float()
        oracle = expected(problem, expert, block, count)
        # bf16's rounding is 1.7e-3 of a row; 13 bits of WGMMA's sums add as much at most.
        assert (ours - oracle).norm() <= 4e-3 * oracle.norm(), expert
        assert out[first + count : problem.offsets[expert + 1]].isnan().all(), "padding rows"
