"""MXFP4 weights of every scale and code, and each weight as the sm90 kernel multiplies by it."""

from typing import NamedTuple

import torch
from dsv4_kernels import reference
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.weights import prepare_weights
from dsv4_kernels.types import ExpertLayout, ExpertWeights, MoeShape

from tests.support.layers import aligned
from tests.support.sm90_problems import ROW_TILE, layer_of

SIZE = 64  # of hidden and intermediate
WINDOW = 31  # powers of two that an expert's scales may span without a rounding


class Multiplied(NamedTuple):
    weights: torch.Tensor  # (experts, 64, 64) bf16, times 2^-power of the expert
    rounding: float


def multiplied(
    w2: torch.Tensor, scales: torch.Tensor, power: list[int], device: str = "cpu"
) -> Multiplied:
    """W2 as fc2 has it, column by column: each row of h has one element, 2^-power of its expert.

    w2 (experts, 64, 32) and scales (experts, 64, 2) uint8.
    """
    experts = len(w2)
    shape = MoeShape(experts, experts, 1, SIZE, SIZE, SIZE * experts, False, weight_format="mxfp4")
    prepared = ExpertWeights(
        torch.zeros(experts, 2 * SIZE, SIZE // 2, dtype=torch.uint8),
        torch.zeros(experts, 2 * SIZE, SIZE // 32, dtype=torch.uint8),
        torch.ones(experts, 2),
        w2,
        scales,
        torch.ones(experts),
    )
    prepared = ExpertWeights(*(aligned(tensor).to(device) for tensor in prepared))
    rounding = torch.zeros(1, device=device)
    prepare_weights(prepared, rounding)
    ids = torch.arange(experts, dtype=torch.int32).repeat_interleave(SIZE)[:, None]
    layout = reference.expert_layout(ids, experts, None, ROW_TILE)
    layout = ExpertLayout(*(aligned(tensor).to(device) for tensor in layout))
    scale = torch.exp2(-torch.tensor(power, dtype=torch.float32))
    h = aligned((torch.eye(SIZE) * scale[:, None, None]).flatten(0, 1).bfloat16()).to(device)
    out = aligned(torch.full((len(h), SIZE), float("nan"), dtype=torch.bfloat16)).to(device)
    sm90.fc2(h, layout, layer_of(prepared, shape), out=out)
    return Multiplied(out.cpu().unflatten(0, (experts, SIZE)).transpose(1, 2), float(rounding))


def exact(w2: torch.Tensor, scales: torch.Tensor, power: list[int]) -> torch.Tensor:
    """What `multiplied` must be, float64."""
    codes = reference.unpack_e2m1(w2).double().unflatten(-1, (-1, 32))
    exponent = scales.double() - 127 - torch.tensor(power)[:, None, None]
    return torch.ldexp(codes, exponent[..., None]).flatten(-2)


def every_code(rows: int) -> torch.Tensor:
    """(rows, 32) bytes: each block of 32 has the 16 codes twice, each row from another on."""
    code = (torch.arange(SIZE)[None, :] + torch.arange(rows)[:, None]) % 16
    return (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8)


def every_scale() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(w2, scales, powers): all 255 bytes under all 16 codes, as nine experts of a window each, the
    last of 7 powers."""
    experts = -(-255 // WINDOW)
    places = torch.arange(SIZE * 2) * 37 % (SIZE * 2)
    scales = torch.empty(experts, SIZE, 2, dtype=torch.uint8)
    for expert in range(experts):
        window = torch.arange(WINDOW * expert, min(WINDOW * (expert + 1), 255))
        scales[expert].view(-1)[places] = window.repeat(SIZE * 2)[: SIZE * 2].to(torch.uint8)
    # bf16 and float32 end at 2^128, and below 2^-126 bf16 has fewer bits.
    powers = [-12] + [0] * (experts - 2) + [12]
    return every_code(SIZE).repeat(experts, 1, 1), scales, powers
