"""The routed experts on rows that the dispatch has grouped by expert, as DeepEP's low latency does.

    [quantise] -> FC1, SwiGLU, [quantise] -> FC2

    out[e, i] = W2_e h,  h = silu(min(W1_e x[e, i], L)) * clamp(W3_e x[e, i], -L, L),  i < counts[e]

The GEMMs and the arena are `moe`'s. Rows stay where they are, nothing is summed, and the routing
weight multiplies when the rows are back at their tokens: FC1 has a weight of one for every row.
"""

import functools

import torch

from dsv4_kernels import workspace as arena
from dsv4_kernels.moe import run_gemms
from dsv4_kernels.types import Fp8Rows, MoeLayer, QuantizedRows, Routing


def batched_moe(
    x: torch.Tensor,
    counts: torch.Tensor,
    num_tokens: int,
    layer: MoeLayer,
    workspace: torch.Tensor,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """The layer on x (num_local_experts, batch_rows, hidden) bf16, of which the first counts
    (num_local_experts,) int32 rows of each expert exist.

    num_tokens, of all ranks, chooses the tiles and may be an estimate. workspace as for `moe`; out
    is like x, also returned, and undefined in rows that do not exist.
    """
    shape = layer.shape
    size = (shape.num_local_experts, shape.batch_rows, shape.hidden)
    assert x.shape == out.shape == size, (x.shape, out.shape, size)
    assert x.dtype == out.dtype == torch.bfloat16, (x.dtype, out.dtype)
    assert x.is_contiguous() and out.is_contiguous(), (x.stride(), out.stride())
    assert counts.shape == (shape.num_local_experts,), counts.shape
    assert 1 <= num_tokens <= shape.max_num_tokens, (num_tokens, shape.max_num_tokens)
    rows, out_rows = x.flatten(0, 1), out.flatten(0, 1)
    ones = _ones(len(rows), x.device)
    if layer.backend.run is not None:
        routing = Routing(ones, _ids(counts, shape.batch_rows))
        layer.backend.run(rows, routing, layer, workspace, None, out_rows)
    else:
        _run_kernels(rows, ones, counts, num_tokens, layer, workspace, out_rows)
    return out


def _run_kernels(
    rows: torch.Tensor,
    ones: torch.Tensor,
    counts: torch.Tensor,
    num_tokens: int,
    layer: MoeLayer,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    from dsv4_kernels.rows.batched_layout import batched_layout
    from dsv4_kernels.rows.fp8_quantize import fp8_quantize
    from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize

    tile = layer.backend.tile(layer.shape, num_tokens)
    buffers = arena.carve(workspace, layer.shape, tile, num_tokens)
    layout = batched_layout(counts, tile, out=buffers.layout)
    live, saturated = layout.row_to_slot, layer.saturated
    x: torch.Tensor | QuantizedRows | Fp8Rows = rows
    if isinstance(buffers.x, Fp8Rows):
        x = fp8_quantize(rows, live=live, saturated=saturated, out=buffers.x)
    elif layer.activation_scales is not None:
        x = nvfp4_quantize(
            rows,
            layer.activation_scales.fc1,
            live=live,
            swizzled=True,
            saturated=saturated,
            scratch=buffers.quantize_scratch,
            out=buffers.x,
        )
    run_gemms(x, ones, layout, layer, buffers, out=out, num_tokens=num_tokens)


@functools.cache
def _ones(num_rows: int, device: torch.device) -> torch.Tensor:
    """Routing weights; made before a graph is captured, by the call that warms up."""
    return torch.ones((num_rows, 1), dtype=torch.float32, device=device)


def _ids(counts: torch.Tensor, batch_rows: int) -> torch.Tensor:
    """(num_local_experts * batch_rows, 1): the expert of every row, -1 where there is none."""
    experts = torch.arange(len(counts), device=counts.device)[:, None]
    exists = torch.arange(batch_rows, device=counts.device) < counts[:, None]
    return torch.where(exists, experts, -1).view(-1, 1)
