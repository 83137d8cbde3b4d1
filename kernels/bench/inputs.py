"""Random weights and tokens of one layer, for benches and tests: always the same of a seed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights, MoeShape, Routing

LIMIT = 10.0  # swiglu_limit of the released models
BYTES_PER_SECOND = 4.3e12  # of weights from memory: measured on an H200
OPERATIONS_PER_SECOND = 790e12  # of bf16 WGMMA: measured there
MAX_SETS = 64
CHECKED_ROWS = 128  # of local experts; the error of a few rows is a matter of chance


class Inputs(NamedTuple):
    x: torch.Tensor
    routing: Routing
    local_rows: int
    experts_hit: int


def random_weights(
    shape: MoeShape,
    device: str = "cuda",
    *,
    seed: int = 0,
    scale_bytes: tuple[int, int] | None = None,
    odd_bytes: Sequence[int] = (),
    gain: float | None = None,
    equal_scales: bool = False,
) -> ExpertWeights:
    """In the checkpoint's layout.

    scale_bytes: the block scales' first and last byte, about a trained layer's if None (E4M3's from
    24 to 224, MXFP4's from 2^-9 to 2^-6); odd_bytes: each is one block's in 997. Global scales are
    gain / sqrt(K) times 0.5 to 1.5; with no gain, those of MXFP4, which has none, are 1. Gate and
    up differ in theirs unless equal_scales, which vLLM's backends take for granted.
    """
    generator = torch.Generator(device).manual_seed(seed)
    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate
    mxfp4 = shape.weight_format == "mxfp4"
    block = MXFP4_BLOCK if mxfp4 else NVFP4_BLOCK
    first, last = scale_bytes or ((118, 121) if mxfp4 else (92, 118))

    def random(end: int, *size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(end, size, dtype=dtype, device=device, generator=generator)

    def matrix(rows: int, k: int, *halves: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = random(256, local, rows, k // 2)
        scales = first + random(last + 1 - first, local, rows, k // block)
        odd = random(997, *scales.shape, dtype=torch.int16) if odd_bytes else None
        for i, byte in enumerate(odd_bytes):
            scales.masked_fill_(odd == i, byte)
        if gain is None and mxfp4:
            factors = torch.ones(local, *halves, device=device)
        else:
            factors = torch.rand((local, *halves), device=device, generator=generator) + 0.5
            factors *= (2.0**-7 if gain is None else gain) * k**-0.5
        return codes, scales if mxfp4 else scales.view(torch.float8_e4m3fn), factors

    w13, w2 = matrix(2 * inter, hidden, 2), matrix(hidden, inter)
    if equal_scales:
        w13[2][:, 1] = w13[2][:, 0]
    return ExpertWeights(*w13, *w2)


def random_inputs(shape: MoeShape, num_tokens: int, seed: int, device: str = "cuda") -> Inputs:
    """Tokens and their routing, each expert as likely as another."""
    generator = torch.Generator(device).manual_seed(seed * 100_003 + num_tokens)
    scores = torch.rand((num_tokens, shape.num_experts), device=device, generator=generator)
    ids = scores.topk(shape.top_k, dim=1).indices.int()
    weights = torch.rand(ids.shape, device=device, generator=generator)
    size = (num_tokens, shape.hidden)
    x = torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)
    local = ids[ids < shape.num_local_experts]
    return Inputs(x, Routing(weights, ids), local.numel(), local.unique().numel())


def cold_inputs(shape: MoeShape, num_tokens: int) -> list[Inputs]:
    """As many as together touch twice the L2 cache's bytes of weights; two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    expert_bytes = 3 * shape.hidden * shape.intermediate * 9 // 16
    found: list[Inputs] = []
    touched = 0
    while len(found) < 2 or (touched < 2 * cache and len(found) < MAX_SETS):
        found.append(random_inputs(shape, num_tokens, len(found)))
        touched += found[-1].experts_hit * expert_bytes
    return found


def checked_inputs(shape: MoeShape, num_tokens: int, device: str = "cuda") -> list[Inputs]:
    """As many as together have CHECKED_ROWS rows."""
    found: list[Inputs] = []
    while sum(each.local_rows for each in found) < CHECKED_ROWS:
        found.append(random_inputs(shape, num_tokens, len(found), device))
    return found


def expert_map(
    num_experts: int, num_local: int, device: str = "cuda", *, first: int = 0
) -> torch.Tensor | None:
    """num_local experts from the first on are local; None where all are."""
    if num_local == num_experts:
        return None
    local = torch.arange(num_experts, dtype=torch.int32, device=device) - first
    return torch.where((local >= 0) & (local < num_local), local, -1)


def floor_us(shape: MoeShape, inputs: list[Inputs]) -> float:
    """Of a call, in W4A16: what its weights' bytes or its operations take, whichever is longer."""
    weights = 3 * shape.hidden * shape.intermediate  # of one expert
    block = MXFP4_BLOCK if shape.weight_format == "mxfp4" else NVFP4_BLOCK
    weight_bytes = weights * (1 / 2 + 1 / block)
    times = (
        max(
            each.experts_hit * weight_bytes / BYTES_PER_SECOND,
            each.local_rows * 2 * weights / OPERATIONS_PER_SECOND,
        )
        for each in inputs
    )
    return sum(times) / len(inputs) * 1e6
