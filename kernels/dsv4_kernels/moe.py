"""START HERE: the routed experts of one rank, from the router's ids to the summed output.

    layout -> [quantise and place] -> FC1, SwiGLU, routing weight, [quantise] -> FC2 -> combine

    y[t] = sum over local slots j of W2_e h,  e = routing.ids[t, j],
    h = routing.weights[t, j] * silu(min(W1_e x[t], L)) * clamp(W3_e x[t], -L, L)

The bracketed steps exist in W4A4 only. Everything between the two ends lives in a workspace that
all layers share; `workspace_bytes` is the one place that says how large it is, and whoever
allocates (vLLM's workspace manager, a test) asks it. Nothing here synchronises, allocates or
looks at a value on the device, the `reference` backend excepted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from dsv4_kernels.types import (
    NVFP4_BLOCK,
    ActivationScales,
    ExpertLayout,
    ExpertWeights,
    QuantizedRows,
    Routing,
    capacity,
)

ALIGNMENT = 256  # bytes; TMA asks for 128, a cache line pair is 256


class MoeShape(NamedTuple):
    """What a layer's kernels and buffers are chosen and sized by, on one rank."""

    num_experts: int  # global, redundant (EPLB) copies included
    num_local_experts: int
    top_k: int
    hidden: int
    intermediate: int  # of this rank, if tensor-parallel
    max_num_tokens: int  # in one call, all dispatched ranks' tokens together
    quantize_activations: bool  # W4A4; otherwise W4A16
    scale_per_row: bool = False  # of x or h: `token`, and `warmup` of a layer without a limit


class Buffers(NamedTuple):
    """A workspace, carved: what the steps of the layer hand to one another."""

    layout: ExpertLayout
    x: QuantizedRows | None  # (capacity, hidden), W4A4 only
    h: QuantizedRows | torch.Tensor  # (capacity, intermediate); bf16 in W4A16
    rows: torch.Tensor  # (capacity, hidden) bf16, what `combine` sums


@dataclass(frozen=True)
class Backend:
    """One way to run the layer. `supports` and `tile` are pure and need no GPU.

    Row tile 0 says that the backend lays nothing out in the workspace.
    """

    name: str
    # (shape, compute capability or None without a GPU) -> why it cannot run the layer, or None
    supports: Callable[[MoeShape, tuple[int, int] | None], str | None]
    # Checkpoint layout -> this backend's, in place; called once, at load.
    prepare: Callable[[ExpertWeights], ExpertWeights]
    # (shape, num_tokens) -> row tile; never falls as num_tokens grows
    tile: Callable[[MoeShape, int], int]
    # (hidden_states, routing, layer, buffers, expert_map, out)
    run: Callable[..., None]


@dataclass(frozen=True)
class MoeLayer:
    """One layer's routed experts on one rank, ready to run; made by `prepare_layer`."""

    backend: Backend
    shape: MoeShape
    weights: ExpertWeights
    limit: float | None  # swiglu_limit
    activation_scales: ActivationScales | None  # None exactly in W4A16
    saturated: torch.Tensor  # (1,) int64 on the device: NVFP4 blocks that did not fit, so far


def moe(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    workspace: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """The layer on this rank's experts: what the other ranks own takes no row and adds nothing.

    hidden_states (num_tokens, hidden) bf16; routing with global ids; workspace uint8, at least
    `workspace_bytes` of it; expert_map (num_experts,) int32 from global to local ids, -1 for
    foreign experts, None when all are local; out (num_tokens, hidden) bf16, also returned, must
    not overlap the workspace. ValueError for more tokens than the layer was sized for.
    """
    num_tokens = len(hidden_states)
    _check_call(hidden_states, routing, layer, expert_map, out)
    if num_tokens > 0:
        buffers = carve(workspace, layer.backend, layer.shape, num_tokens)
        layer.backend.run(hidden_states, routing, layer, buffers, expert_map, out)
    return out


def _run_reference(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    buffers: Buffers | None,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    from dsv4_kernels import reference

    out.copy_(
        reference.moe(
            hidden_states,
            routing,
            layer.weights,
            expert_map=expert_map,
            limit=layer.limit,
            activation_scales=layer.activation_scales,
            saturated=layer.saturated,
        )
    )


def _supports_nvfp4(shape: MoeShape) -> str | None:
    """What no backend can do: NVFP4 scales 16 values at a time, along hidden and intermediate."""
    for name in ("hidden", "intermediate"):
        size = getattr(shape, name)
        if size <= 0 or size % NVFP4_BLOCK:
            return (
                f"{name} size {size} of this rank is not a positive multiple of the NVFP4 block, "
                f"{NVFP4_BLOCK}: use a tensor-parallel size that divides it evenly"
            )
    return None


REFERENCE = Backend(
    name="reference",
    supports=lambda shape, capability: _supports_nvfp4(shape),
    prepare=lambda weights: weights,
    tile=lambda shape, num_tokens: 0,
    run=_run_reference,
)
BACKENDS = {backend.name: backend for backend in (REFERENCE,)}
# The backend that `auto` means, by the major compute capability; `reference` without a GPU.
AUTO = {9: "sm90", 10: "sm100"}


def choose_backend(name: str, shape: MoeShape, capability: tuple[int, int] | None) -> Backend:
    """The backend of that name, or the capability's own for "auto"; ValueError says why not."""
    if name == "auto":
        if capability is not None and capability[0] not in AUTO:
            raise ValueError(
                f"no backend is made for compute capability {capability[0]}.{capability[1]} "
                f"(there are {_listed(AUTO.values())}): set backend to reference to run slowly"
            )
        name = "reference" if capability is None else AUTO[capability[0]]
    if name not in BACKENDS:
        raise ValueError(f"there is no {name} backend in this build: use {_listed(BACKENDS)}")
    reason = BACKENDS[name].supports(shape, capability)
    if reason is not None:
        raise ValueError(f"the {name} backend cannot run this layer: {reason}")
    return BACKENDS[name]


def _listed(names) -> str:
    return " or ".join(names)


def prepare_layer(
    backend: Backend,
    shape: MoeShape,
    weights: ExpertWeights,
    *,
    limit: float | None,
    activation_scales: ActivationScales | None,
) -> MoeLayer:
    """A layer ready for `moe`. Its weights are shuffled in place: keep only the result's."""
    assert weights.num_local_experts == shape.num_local_experts, weights.w13.shape
    assert weights.hidden == shape.hidden, weights.w13.shape
    assert weights.intermediate == shape.intermediate, weights.w2.shape
    assert (activation_scales is not None) == shape.quantize_activations, shape
    shape = shape._replace(scale_per_row=None in (activation_scales or ()))
    saturated = torch.zeros(1, dtype=torch.int64, device=weights.w13.device)
    return MoeLayer(backend, shape, backend.prepare(weights), limit, activation_scales, saturated)


def _spec(backend: Backend, shape: MoeShape, num_tokens: int) -> dict[str, tuple]:
    """Shape and dtype of every buffer of the layer at num_tokens, by name."""
    tile = backend.tile(shape, num_tokens)
    if tile == 0:
        return {}
    rows = capacity(num_tokens, shape.top_k, shape.num_local_experts, tile)
    spec: dict[str, tuple] = {
        "slot_to_row": ((num_tokens, shape.top_k), torch.int32),
        "row_to_slot": ((rows,), torch.int32),
        "counts": ((shape.num_local_experts,), torch.int32),
        "offsets": ((shape.num_local_experts + 1,), torch.int32),
        "tile_to_expert": ((rows // tile,), torch.int32),
    }
    if shape.quantize_activations:
        for name, width in (("x", shape.hidden), ("h", shape.intermediate)):
            spec[f"{name}_codes"] = ((rows, width // 2), torch.uint8)
            spec[f"{name}_block_scales"] = (block_scales_shape(rows, width), torch.float8_e4m3fn)
            if shape.scale_per_row:
                spec[f"{name}_global_scales"] = ((rows,), torch.float32)
    else:
        spec["h"] = ((rows, shape.intermediate), torch.bfloat16)
    spec["rows"] = ((rows, shape.hidden), torch.bfloat16)
    return spec


def block_scales_shape(rows: int, width: int) -> tuple[int, int]:
    """Of E4M3 block scales in 128x4 blocks: both sides of (rows, width // 16) rounded up."""
    return -(-rows // 128) * 128, -(-width // (4 * NVFP4_BLOCK)) * 4


def workspace_bytes(backend: Backend, shape: MoeShape, num_tokens: int | None = None) -> int:
    """Bytes of workspace that `moe` needs at num_tokens, by default the most it is sized for."""
    num_tokens = shape.max_num_tokens if num_tokens is None else num_tokens
    return sum(map(_aligned_bytes, _spec(backend, shape, num_tokens).values()))


def _aligned_bytes(entry: tuple) -> int:
    size, dtype = entry
    return -(-prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def carve(
    workspace: torch.Tensor, backend: Backend, shape: MoeShape, num_tokens: int
) -> Buffers | None:
    """Typed views of a uint8 workspace, each at a multiple of 256 bytes; None without any."""
    spec = _spec(backend, shape, num_tokens)
    if not spec:
        return None
    needed = workspace_bytes(backend, shape, num_tokens)
    if workspace.numel() < needed:
        raise ValueError(
            f"{num_tokens} tokens need {needed} bytes of MoE workspace and were given "
            f"{workspace.numel()}: allocate workspace_bytes(...)"
        )
    assert workspace.dtype == torch.uint8, workspace.dtype
    views, start = {}, 0
    for name, (size, dtype) in spec.items():
        end = start + prod(size) * dtype.itemsize
        views[name] = workspace[start:end].view(dtype).view(size)
        start += _aligned_bytes((size, dtype))
    layout = ExpertLayout(*(views[field] for field in ExpertLayout._fields))
    if not shape.quantize_activations:
        return Buffers(layout, None, views["h"], views["rows"])
    x, h = (
        QuantizedRows(
            views[f"{name}_codes"],
            views[f"{name}_block_scales"],
            views.get(f"{name}_global_scales"),
        )
        for name in ("x", "h")
    )
    return Buffers(layout, x, h, views["rows"])


def _check_call(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    num_tokens, shape = len(hidden_states), layer.shape
    if num_tokens > shape.max_num_tokens:
        raise ValueError(
            f"{num_tokens} tokens in one call, and the MoE buffers were sized for "
            f"{shape.max_num_tokens}: raise max_num_batched_tokens"
        )
    assert hidden_states.shape == (num_tokens, shape.hidden), hidden_states.shape
    assert hidden_states.dtype == torch.bfloat16, hidden_states.dtype
    assert out.shape == hidden_states.shape and out.dtype == torch.bfloat16, (out.shape, out.dtype)
    assert routing.ids.shape == (num_tokens, shape.top_k), routing.ids.shape
    assert routing.weights.shape == routing.ids.shape, routing.weights.shape
    assert routing.weights.dtype == torch.float32, routing.weights.dtype
    assert expert_map is not None or shape.num_local_experts == shape.num_experts, shape
