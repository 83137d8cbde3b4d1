"""START HERE: the routed experts of one rank, from the router's ids to the summed output.

    layout -> [quantise] -> FC1, SwiGLU, routing weight, [quantise] -> FC2 -> combine

    y[t] = sum over local slots j of W2_e h,  e = routing.ids[t, j],
    h = routing.weights[t, j] * silu(min(W1_e x[t], L)) * clamp(W3_e x[t], -L, L)

W4A4 and W4A8 (4-bit weights; activations in NVFP4 or FP8) have the steps in brackets, W4A16 (bf16
activations) does not. In W4A8 the routing weight multiplies W2_e h instead, in FC2. Tokens that
other ranks have quantised (`packed_tokens`) are not quantised again. `run_kernels` has these calls
in order; `moe` is what a model calls. What lies between ids and output is in a workspace that all
layers share (`workspace.py`). Nothing here synchronises, allocates or reads a value from the
device, except the `reference` backend.
"""

from dataclasses import replace

import torch

from dsv4_kernels import workspace as arena
from dsv4_kernels.backends import REFERENCE, Backend
from dsv4_kernels.packed_tokens import is_packed, row_bytes, unpack_tokens
from dsv4_kernels.padding import padded_shape, padded_weights
from dsv4_kernels.types import (
    ActivationAmax,
    ActivationScales,
    ExpertLayout,
    ExpertWeights,
    Fp8Rows,
    MoeLayer,
    MoeShape,
    QuantizedRows,
    Routing,
    fp8_h_scale,
)


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

    hidden_states (num_tokens, hidden) bf16, or what `pack_tokens` made of them; routing with global
    ids; workspace uint8, at least `workspace_bytes` of it; expert_map (num_experts,) int32 from
    global to local ids, -1 for foreign experts, None when all are local; out (num_tokens, hidden)
    bf16, also returned, must not overlap the workspace. ValueError for more tokens than the layer
    was sized for.
    """
    num_tokens = len(hidden_states)
    _check_call(hidden_states, routing, layer, expert_map, out)
    if num_tokens > 0:
        run = layer.backend.run or run_kernels
        run(hidden_states, routing, layer, workspace, expert_map, out)
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
    from dsv4_kernels.rows.combine import combine
    from dsv4_kernels.rows.expert_layout import expert_layout

    shape, num_tokens = layer.shape, len(hidden_states)
    tile = layer.backend.tile(shape, num_tokens)
    buffers = arena.carve(workspace, shape, tile, num_tokens)
    layout = expert_layout(
        routing.ids,
        shape.num_local_experts,
        expert_map,
        tile,
        out=buffers.layout,
        scratch=buffers.layout_scratch,
    )
    x = fc1_input(hidden_states, layout, layer, buffers)
    run_gemms(x, routing.weights, layout, layer, buffers, out=buffers.rows)
    combine(buffers.rows, layout.slot_to_row, out=out)


def fc1_input(
    hidden_states: torch.Tensor, layout: ExpertLayout, layer: MoeLayer, buffers: arena.Buffers
) -> torch.Tensor | QuantizedRows | Fp8Rows:
    """The tokens in the rows of the layout, or in their own order where FC1 gathers its rows;
    quantised in W4A4 and W4A8."""
    from dsv4_kernels.rows.fp8_quantize import fp8_quantize
    from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize
    from dsv4_kernels.rows.place_codes import place_codes
    from dsv4_kernels.rows.place_rows import place_rows

    slot_to_row, saturated = layout.slot_to_row, layer.saturated
    num_tokens = len(hidden_states)
    gathers = not layer.backend.places_rows(layer.shape, num_tokens)
    if isinstance(buffers.x, Fp8Rows):
        if is_packed(hidden_states):
            tokens = unpack_tokens(hidden_states, layer)
            assert isinstance(tokens, Fp8Rows), type(tokens)
            return tokens if gathers else place_rows(tokens, slot_to_row, out=buffers.x)
        if not gathers:
            return fp8_quantize(hidden_states, slot_to_row, saturated=saturated, out=buffers.x)
        in_order = Fp8Rows(*(part[:num_tokens] for part in buffers.x))
        return fp8_quantize(hidden_states, early=True, saturated=saturated, out=in_order)
    if isinstance(buffers.x, QuantizedRows):
        if is_packed(hidden_states):
            tokens = unpack_tokens(hidden_states, layer)
            assert isinstance(tokens, QuantizedRows), type(tokens)
            return place_codes(tokens, slot_to_row, out=buffers.x)
        assert layer.activation_scales is not None
        return nvfp4_quantize(
            hidden_states,
            layer.activation_scales.fc1,
            layout,
            swizzled=True,
            saturated=saturated,
            scratch=buffers.quantize_scratch,
            out=buffers.x,
        )
    if gathers:
        return hidden_states
    # FC2 writes these rows when FC1 has read them.
    return place_rows(hidden_states, slot_to_row, out=buffers.rows)


def run_gemms(
    x: torch.Tensor | QuantizedRows | Fp8Rows,
    routing_weights: torch.Tensor,
    layout: ExpertLayout,
    layer: MoeLayer,
    buffers: arena.Buffers,
    *,
    out: torch.Tensor,
    num_tokens: int | None = None,
) -> None:
    """FC1 and FC2, and between them h's quantisation where each row has its own scale. num_tokens
    as for the backend's fc1."""
    from dsv4_kernels.rows.fp8_quantize import fp8_quantize
    from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize

    backend = layer.backend
    h = buffers.h if buffers.h_bf16 is None else buffers.h_bf16
    assert backend.fc1 is not None and backend.fc2 is not None, backend.name
    backend.fc1(x, routing_weights, layout, layer, out=h, num_tokens=num_tokens)
    if buffers.h_bf16 is not None and isinstance(buffers.h, Fp8Rows):
        live, saturated = layout.row_to_slot, layer.saturated
        h = fp8_quantize(h, live=live, ordered=True, saturated=saturated, out=buffers.h)
    elif buffers.h_bf16 is not None:
        assert isinstance(buffers.h, QuantizedRows), type(buffers.h)
        h = nvfp4_quantize(
            h,
            None,
            live=layout.row_to_slot,
            swizzled=True,
            saturated=layer.saturated,
            scratch=buffers.quantize_scratch,
            out=buffers.h,
        )
    slot_weights = routing_weights if layer.shape.fp8 else None
    backend.fc2(h, layout, layer, out=out, routing_weights=slot_weights, num_tokens=num_tokens)


def prepare_layer(
    backend: Backend,
    shape: MoeShape,
    weights: ExpertWeights,
    *,
    limit: float | None,
    activation_scales: ActivationScales | None,
) -> MoeLayer:
    """A layer ready for `moe`. Weights are padded where the backend needs it and shuffled in
    place: afterwards use the result's only."""
    assert weights.num_local_experts == shape.num_local_experts, weights.w13.shape
    assert weights.hidden == shape.hidden, weights.w13.shape
    assert weights.intermediate == shape.intermediate, weights.w2.shape
    assert (weights.w13_block_scales.dtype == torch.uint8) == (shape.weight_format == "mxfp4")
    assert (activation_scales is not None) == shape.quantize_activations, shape
    assert not (shape.fp8 and shape.quantize_activations), shape
    per_row = activation_scales is not None and activation_scales.fc2 is None
    assert per_row or None not in (activation_scales or ()), "FC1 alone has no scale per row"
    if shape.fp8:
        per_row = fp8_h_scale(limit) is None
    shape = padded_shape(backend, shape)._replace(scale_per_row=per_row)
    weights = padded_weights(backend, weights, shape.fp8)
    device = weights.w13.device
    saturated = torch.zeros(1, dtype=torch.int64, device=device)
    rounding = torch.zeros(1, dtype=torch.float32, device=device)
    weights = backend.prepare_weights(weights, rounding, shape.fp8)
    if backend.compile_layer is not None and weights.w13.is_cuda:
        backend.compile_layer(shape, device)  # may wait for other processes, so it is last
    return MoeLayer(backend, shape, weights, limit, activation_scales, saturated, rounding)


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
    return arena.workspace_bytes(padded_shape(backend, shape), backend.tile)


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
    width = row_bytes(layer) if is_packed(hidden_states) else shape.hidden
    assert hidden_states.shape == (num_tokens, width), hidden_states.shape
    assert hidden_states.dtype in (torch.bfloat16, torch.uint8), hidden_states.dtype
    assert out.shape == (num_tokens, shape.hidden), out.shape
    assert out.dtype == torch.bfloat16, out.dtype
    assert routing.ids.shape == (num_tokens, shape.top_k), routing.ids.shape
    assert routing.weights.shape == routing.ids.shape, routing.weights.shape
    assert routing.weights.dtype == torch.float32, routing.weights.dtype
    assert expert_map is not None or shape.num_local_experts == shape.num_experts, shape
