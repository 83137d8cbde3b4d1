"""Random weights and tokens of one layer, for benches and tests: always the same of a seed."""

from typing import NamedTuple

import torch
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights, MoeShape, Routing

LIMIT = 10.0  # swiglu_limit of the released models
BYTES_PER_SECOND = 4.3e12  # of weights from memory: measured on an H200
OPERATIONS_PER_SECOND = 790e12  # of bf16 WGMMA: measured there
MAX_SETS = 64


class Inputs(NamedTuple):
    x: torch.Tensor
    routing: Routing
    local_rows: int
    experts_hit: int


def random_weights(
    shape: MoeShape, device: str = "cuda", *, equal_scales: bool = False
) -> ExpertWeights:
    """Gate and up differ in their global scales, unless equal: what vLLM takes for granted."""
    generator = torch.Generator(device).manual_seed(0)
    local, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate

    def codes(rows: int, k: int) -> torch.Tensor:
        size = (local, rows, k // 2)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)

    def scales(rows: int, k: int) -> torch.Tensor:
        size = (local, rows, k // 16)
        uniform = torch.rand(size, device=device, generator=generator)
        return (uniform * 200 + 24).to(torch.float8_e4m3fn)

    def factors(*size: int) -> torch.Tensor:
        if equal_scales:
            return torch.full(size, 1e-4, device=device)
        return 1e-4 * (0.5 + torch.rand(size, device=device, generator=generator))

    return ExpertWeights(
        codes(2 * inter, hidden),
        scales(2 * inter, hidden),
        factors(local, 2),
        codes(hidden, inter),
        scales(hidden, inter),
        factors(local),
    )


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


def expert_map(num_experts: int, num_local: int, device: str = "cuda") -> torch.Tensor | None:
    """The first experts are local; None where all are."""
    if num_local == num_experts:
        return None
    ids = torch.arange(num_experts, dtype=torch.int32, device=device)
    return torch.where(ids < num_local, ids, -1)


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
