"""START HERE: the routed experts of one rank, from the router's ids to the summed output.

    layout -> [quantise and place] -> FC1, SwiGLU, routing weight, [quantise] -> FC2 -> combine

    y[t] = sum over local slots j of W2_e h,  e = routing.ids[t, j],
    h = routing.weights[t, j] * silu(min(W1_e x[t], L)) * clamp(W3_e x[t], -L, L)

The bracketed steps exist in W4A4 only. `run_kernels` is these calls in order; `moe` is what a
model calls. Everything between the two ends lives in a workspace that all layers share, cut up by
`workspace.py`. Nothing here synchronises, allocates or looks at a value on the device, the
`reference` backend excepted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dsv4_kernels import workspace as arena
from dsv4_kernels.types import (
    NVFP4_BLOCK,
    ActivationAmax,
    ActivationScales,
    ExpertWeights,
    MoeShape,
    QuantizedRows,
    Routing,
)


@dataclass(frozen=True)
class Backend:
    """One way to run the layer. `supports` and `tile` are pure and need no GPU."""

    name: str
    # (shape, compute capability or None without a GPU) -> why it cannot run the layer, or None
    supports: Callable[[MoeShape, tuple[int, int] | None], str | None]
    # Checkpoint layout -> this backend's, in place; called once, at load.
    prepare: Callable[[ExpertWeights], ExpertWeights]
    # (shape, num_tokens) -> rows that a group is padded to; 0 if it needs no workspace at all
    tile: Callable[[MoeShape, int], int]
    # (hidden_states, routing, layer, workspace, expert_map, out): `run_kernels`, or the oracle
    run: Callable[..., None]
    # (x, routing weights, layout, layer, out=h), x being hidden_states, or placed rows, quantised
    # or not.
    # h is bf16 in W4A16 and where layer.activation_scales.fc2 is None, otherwise QuantizedRows.
    fc1: Callable[..., None] | None = None
    # (h, layout, layer, out=rows)
    fc2: Callable[..., None] | None = None
    # (shape, num_tokens) -> whether fc1 wants bf16 rows placed as the layout says, not by token
    places_rows: Callable[[MoeShape, int], bool] | None = None
    # (shape, device): all that serving would otherwise compile or allocate; called at load
    compile: Callable[[MoeShape, torch.device], None] | None = None


@dataclass(frozen=True)
class MoeLayer:
    """One layer's routed experts on one rank, ready to run; made by `prepare_layer`."""

    backend: Backend
    shape: MoeShape
    weights: ExpertWeights
    limit: float | None  # swiglu_limit
    activation_scales: ActivationScales | None  # None exactly in W4A16
    saturated: torch.Tensor  # (1,) int64 on the device: NVFP4 blocks that did not fit, so far
    amax: ActivationAmax | None = None  # recorded while calibrating, see `recording_layer`


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
        layer.backend.run(hidden_states, routing, layer, workspace, expert_map, out)
    return out


def run_kernels(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    workspace: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The layer on a GPU, one call a step, each into its part of the workspace."""
    from dsv4_kernels.combine import combine
    from dsv4_kernels.expert_layout import expert_layout
    from dsv4_kernels.nvfp4_quantize import nvfp4_quantize
    from dsv4_kernels.place_rows import place_rows

    backend, shape, num_tokens = layer.backend, layer.shape, len(hidden_states)
    tile = backend.tile(shape, num_tokens)
    buffers = arena.carve(workspace, shape, tile, num_tokens)
    layout = expert_layout(
        routing.ids,
        shape.num_local_experts,
        expert_map,
        tile,
        out=buffers.layout,
        scratch=buffers.layout_scratch,
    )
    x: torch.Tensor | QuantizedRows = hidden_states
    if layer.activation_scales is not None:
        x = nvfp4_quantize(
            hidden_states,
            layer.activation_scales.fc1,
            layout,
            swizzled=True,
            saturated=layer.saturated,
            out=buffers.x,
        )
    elif backend.places_rows is not None and backend.places_rows(shape, num_tokens):
        # FC2 writes these rows when FC1 has read them.
        x = place_rows(hidden_states, layout.slot_to_row, out=buffers.rows)
    h = buffers.h if buffers.h_bf16 is None else buffers.h_bf16
    assert backend.fc1 is not None and backend.fc2 is not None, backend.name
    backend.fc1(x, routing.weights, layout, layer, out=h)
    if buffers.h_bf16 is not None:
        h = nvfp4_quantize(
            h,
            None,
            live=layout.row_to_slot,
            swizzled=True,
            saturated=layer.saturated,
            out=buffers.h,
        )
    backend.fc2(h, layout, layer, out=buffers.rows)
    combine(buffers.rows, layout.slot_to_row, out=out)


def _run_reference(
    hidden_states: torch.Tensor,
    routing: Routing,
    layer: MoeLayer,
    workspace: torch.Tensor,
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
            amax=layer.amax,
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


def _supports_sm90(shape: MoeShape, capability: tuple[int, int] | None) -> str | None:
    from dsv4_kernels.grouped_gemm_sm90 import unsupported

    if capability is not None and capability[0] != 9:
        major, minor = capability
        return f"it is made for compute capability 9.0, and this GPU has {major}.{minor}"
    return _supports_nvfp4(shape) or unsupported(shape)


def _shuffle_sm90(weights: ExpertWeights) -> ExpertWeights:
    from dsv4_kernels.weights_sm90 import shuffle_sm90

    return shuffle_sm90(weights)


def _places_rows_sm90(shape: MoeShape, num_tokens: int) -> bool:
    from dsv4_kernels.grouped_gemm_sm90 import places_rows

    return places_rows(shape, num_tokens)


def _compile_sm90(shape: MoeShape, device: torch.device) -> None:
    from dsv4_kernels.grouped_gemm_sm90 import compile_layer

    compile_layer(shape, device)


def _fc1_sm90(x, routing_weights, layout, layer: MoeLayer, *, out: torch.Tensor) -> None:
    from dsv4_kernels.grouped_gemm_sm90 import fc1

    fc1(x, routing_weights, layout, layer.weights, layer.shape, layer.limit, out=out)


def _fc2_sm90(h, layout, layer: MoeLayer, *, out: torch.Tensor) -> None:
    from dsv4_kernels.grouped_gemm_sm90 import fc2

    fc2(h, layout, layer.weights, layer.shape, out=out)


SM90 = Backend(
    name="sm90",
    supports=_supports_sm90,
    prepare=_shuffle_sm90,
    tile=lambda shape, num_tokens: 8,
    run=run_kernels,
    fc1=_fc1_sm90,
    fc2=_fc2_sm90,
    places_rows=_places_rows_sm90,
    compile=_compile_sm90,
)


def _supports_sm100(shape: MoeShape, capability: tuple[int, int] | None) -> str | None:
    from dsv4_kernels.grouped_gemm_sm100_spec import unsupported

    if capability is not None and capability[0] != 10:
        return (
            f"it is for compute capability 10 and this GPU has {capability[0]}.{capability[1]}: "
            "set backend to auto"
        )
    return unsupported(shape)


def _prepare_sm100(weights: ExpertWeights) -> ExpertWeights:
    from dsv4_kernels.weights_sm100 import swizzle_sm100

    return swizzle_sm100(weights)


def _tile_sm100(shape: MoeShape, num_tokens: int) -> int:
    from dsv4_kernels.grouped_gemm_sm100_spec import choose_config

    return choose_config(shape, num_tokens).tile


def _compile_sm100(shape: MoeShape, device: torch.device) -> None:
    from dsv4_kernels.grouped_gemm_sm100 import compile_layer

    compile_layer(shape, device)


def _fc1_sm100(x, routing_weights, layout, layer, *, out) -> None:
    from dsv4_kernels.grouped_gemm_sm100 import fc1

    weights, scales, limit = layer.weights, layer.activation_scales, layer.limit
    fc1(x, routing_weights, layout, weights, scales, limit, layer.saturated, out=out)


def _fc2_sm100(h, layout, layer, *, out) -> None:
    from dsv4_kernels.grouped_gemm_sm100 import fc2

    fc2(h, layout, layer.weights, layer.activation_scales, out=out)


SM100 = Backend(
    name="sm100",
    supports=_supports_sm100,
    prepare=_prepare_sm100,
    tile=_tile_sm100,
    run=run_kernels,
    fc1=_fc1_sm100,
    fc2=_fc2_sm100,
    compile=_compile_sm100,
)
BACKENDS = {backend.name: backend for backend in (REFERENCE, SM90, SM100)}
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
    per_row = activation_scales is not None and activation_scales.fc2 is None
    assert per_row or None not in (activation_scales or ()), "FC1 alone has no scale per row"
    shape = shape._replace(scale_per_row=per_row)
    saturated = torch.zeros(1, dtype=torch.int64, device=weights.w13.device)
    if backend.compile is not None and weights.w13.is_cuda:
        backend.compile(shape, weights.w13.device)
    return MoeLayer(backend, shape, backend.prepare(weights), limit, activation_scales, saturated)


def recording_layer(layer: MoeLayer) -> MoeLayer:
    """The same layer, recording what its GEMMs read; ValueError where its backend cannot."""
    if layer.backend.name != REFERENCE.name:
        raise ValueError(
            f"the {layer.backend.name} backend does not record activations: calibrate with backend "
            f"set to {REFERENCE.name}"
        )
    device = layer.weights.w13.device
    sizes = (1, layer.weights.num_local_experts)
    return replace(
        layer, amax=ActivationAmax(*(torch.zeros(size, device=device) for size in sizes))
    )


def workspace_bytes(backend: Backend, shape: MoeShape) -> int:
    """Bytes of workspace in which any call of up to shape.max_num_tokens fits; 0 for none."""
    if backend.tile(shape, 1) == 0:
        return 0
    return arena.workspace_bytes(shape, backend.tile)


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
