"""Calls of a whole layer on random tokens, wherever its weights are: GPU, emulator or oracle."""

from dataclasses import replace

import torch
from dsv4_kernels import moe
from dsv4_kernels.backends import Backend
from dsv4_kernels.types import MoeLayer, MoeShape, Routing


def lazy(backend: Backend) -> Backend:
    """Which compiles what a call launches, instead of all that any call may: two dozen kernels."""
    return replace(backend, compile_layer=None)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU at a multiple of 256 bytes, as GPU allocations are."""
    size = tensor.numel() * tensor.element_size()
    room = torch.empty(size + 256, dtype=torch.uint8)
    start = -room.data_ptr() % 256
    copy = room[start : start + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def random_call(
    num_tokens: int,
    shape: MoeShape,
    seed: int,
    skew: str = "even",
    *,
    first: int = 0,
    device: str = "cpu",
) -> tuple[torch.Tensor, Routing]:
    """Hidden states (num_tokens, hidden) bf16 and routing of a rank whose experts begin at first.

    skew: "even"; "one-expert", a local one in every slot; "few-experts", top_k local ones;
    "none-local", which needs a first; "padding", of the tokens' second half.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_tokens, shape.hidden, device=device, generator=generator).bfloat16()
    keys = torch.rand(num_tokens, shape.num_experts, device=device, generator=generator)
    if skew == "few-experts":
        keys[:, first : first + shape.top_k] += 1
    ids = keys.topk(shape.top_k, dim=1).indices.int()
    if skew == "one-expert":
        ids[:] = first + 3
    elif skew == "none-local":
        ids[:] = first - 1
    elif skew == "padding":
        ids[num_tokens // 2 :] = -1
    weights = torch.rand(num_tokens, shape.top_k, device=device, generator=generator) + 0.1
    return x, Routing(weights / weights.sum(1, keepdim=True) * 1.5, ids)


def workspace_of(layer: MoeLayer) -> torch.Tensor:
    """Poisoned: NaN as bf16, as E4M3 and as fp32."""
    poison = torch.full((moe.workspace_bytes(layer.backend, layer.shape),), 0xFF, dtype=torch.uint8)
    device = layer.weights.w13.device
    return aligned(poison) if device.type == "cpu" else poison.to(device)


def run(
    layer: MoeLayer,
    x: torch.Tensor,
    routing: Routing,
    expert_map: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    workspace = workspace_of(layer) if workspace is None else workspace
    out = torch.full_like(x, torch.nan)
    return moe.moe(x, routing, layer, workspace, expert_map=expert_map, out=out)


def rounding_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, over what one rounding to bf16 and fp32 sums in another order allow."""
    error = (out.float() - exact).abs()
    return float((error / (exact.abs() * 2**-8 + exact.abs().max() * 1e-5)).max())


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the error over the norm of what is expected."""
    expected = expected.float()
    return float((out.float() - expected).norm() / expected.norm().clamp(min=1e-30))
