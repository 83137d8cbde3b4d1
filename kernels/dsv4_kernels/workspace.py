"""The arena of a call: how large it is, and which part of it is what. The one place that says so.

Whoever allocates (vLLM's workspace manager, a test) asks `workspace_bytes`, once, for the most
tokens of a call; `carve` makes typed views of its bytes for a call of any size. All layers share
the arena: nothing in it outlives the call.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch

from dsv4_kernels.types import NVFP4_BLOCK, ExpertLayout, Fp8Rows, MoeShape, QuantizedRows, capacity

ALIGNMENT = 256  # bytes; TMA asks for 128
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Buffers(NamedTuple):
    """A workspace, carved: what the steps of the layer hand to one another.

    rows overlap x, h_bf16 and the quantiser's scratch: nobody reads those any more when FC2 writes
    the first of rows.
    """

    layout: ExpertLayout
    layout_scratch: torch.Tensor  # int32
    x: QuantizedRows | Fp8Rows | None  # (capacity, hidden), not in W4A16
    h: QuantizedRows | Fp8Rows | torch.Tensor  # (capacity, intermediate); bf16 in W4A16
    h_bf16: torch.Tensor | None  # what h is quantised from where each row has its own scale
    quantize_scratch: torch.Tensor | None  # uint8, W4A4 only; of x, then of h
    rows: torch.Tensor  # (capacity, hidden) bf16, what `combine` sums


def _specs(shape: MoeShape, tile: int, num_tokens: int) -> tuple[Spec, Spec, Spec]:
    """Shape and dtype of every buffer at num_tokens, by name.

    What FC2 still reads, what it does not, and what it writes: the last two share their bytes.
    """
    from dsv4_kernels.rows.expert_layout import scratch_size
    from dsv4_kernels.rows.nvfp4_quantize import scratch_size as quantize_scratch_size

    local, top_k = shape.num_local_experts, shape.top_k
    rows = capacity(num_tokens, top_k, local, tile)
    tiles = rows // tile
    if shape.batch_rows:
        # Each row is a token's only slot, and FC2 writes the output itself.
        rows, num_tokens, top_k = local * shape.batch_rows, local * shape.batch_rows, 1
        tiles = local * -(-shape.batch_rows // tile)
    stays: Spec = {
        "slot_to_row": ((num_tokens, top_k), torch.int32),
        "row_to_slot": ((rows,), torch.int32),
        "counts": ((local,), torch.int32),
        "offsets": ((local + 1,), torch.int32),
        "tile_to_expert": ((tiles,), torch.int32),
        "layout_scratch": ((scratch_size(num_tokens, top_k, local),), torch.int32),
    }
    before_fc2: Spec = {}
    h_bf16 = ((rows, shape.intermediate), torch.bfloat16)
    if shape.fp8:
        before_fc2 = _fp8_spec("x", rows, shape.hidden, True)
        stays |= _fp8_spec("h", rows, shape.intermediate, shape.scale_per_row)
        if shape.scale_per_row:
            before_fc2["h_bf16"] = h_bf16
    elif shape.quantize_activations:
        before_fc2 = _quantized_spec("x", rows, shape.hidden, shape.scale_per_row)
        stays |= _quantized_spec("h", rows, shape.intermediate, shape.scale_per_row)
        scratch = quantize_scratch_size(num_tokens, shape.hidden)
        if shape.scale_per_row:
            before_fc2["h_bf16"] = h_bf16
            scratch = max(scratch, quantize_scratch_size(rows, shape.intermediate))
        before_fc2["quantize_scratch"] = ((scratch,), torch.uint8)
    else:
        stays["h"] = h_bf16
    summed = 0 if shape.batch_rows else rows
    return stays, before_fc2, {"rows": ((summed, shape.hidden), torch.bfloat16)}


def _quantized_spec(name: str, rows: int, width: int, scale_per_row: bool) -> Spec:
    """QuantizedRows, with block scales in 128x4 blocks: both of their sides rounded up."""
    scales = (-(-rows // 128) * 128, -(-width // (4 * NVFP4_BLOCK)) * 4)
    return {
        f"{name}_codes": ((rows, width // 2), torch.uint8),
        f"{name}_block_scales": (scales, torch.float8_e4m3fn),
        f"{name}_global_scales": ((rows if scale_per_row else 0,), torch.float32),
    }


def _fp8_spec(name: str, rows: int, width: int, scale_per_row: bool) -> Spec:
    return {
        f"{name}_codes": ((rows, width), torch.float8_e4m3fn),
        f"{name}_scales": ((rows if scale_per_row else 0,), torch.float32),
    }


@functools.cache
def workspace_bytes(shape: MoeShape, tile: Callable[[MoeShape, int], int]) -> int:
    """Bytes in which any call of up to shape.max_num_tokens fits.

    tile is the backend's, of a shape and a number of tokens. Sizes grow with the tokens while the
    tile stays, so only the last number of tokens before each change of tile matters.
    """
    tiles = [tile(shape, num_tokens) for num_tokens in range(1, shape.max_num_tokens + 1)]
    changes = [a != b for a, b in zip(tiles, tiles[1:] + [-1], strict=True)]
    last = [num_tokens for num_tokens, change in enumerate(changes, start=1) if change]
    return max(call_bytes(shape, tiles[num_tokens - 1], num_tokens) for num_tokens in last)


def call_bytes(shape: MoeShape, tile: int, num_tokens: int) -> int:
    """Bytes of one call's buffers, each rounded up to the alignment."""
    return _plan(shape, tile, num_tokens)[1]


class _View(NamedTuple):
    name: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # in elements of the dtype


@functools.lru_cache(maxsize=4096)
def _plan(shape: MoeShape, tile: int, num_tokens: int) -> tuple[list[_View], int]:
    """Where every buffer is, and how many bytes that takes: the groups of `_specs` in order, the
    last two from the same byte."""
    plan: list[_View] = []
    stays, *either = _specs(shape, tile, num_tokens)
    shared = _place(plan, stays, 0)
    return plan, max(_place(plan, spec, shared) for spec in either)


def _place(plan: list[_View], spec: Spec, start: int) -> int:
    """Append a spec's buffers from a byte on; the byte where they end."""
    for name, (size, dtype) in spec.items():
        stride = (*size[1:], 1)  # of one or two dimensions
        plan.append(_View(name, dtype, size, stride, start // dtype.itemsize))
        start += -(-prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return start


def carve(workspace: torch.Tensor, shape: MoeShape, tile: int, num_tokens: int) -> Buffers:
    """Typed views of a uint8 workspace, each at a multiple of 256 bytes from its start."""
    plan, needed = _plan(shape, tile, num_tokens)
    if workspace.numel() < needed:
        raise ValueError(
            f"{num_tokens} tokens need {needed} bytes of MoE workspace and were given "
            f"{workspace.numel()}: allocate workspace_bytes(...)"
        )
    assert workspace.dtype == torch.uint8, workspace.dtype
    # One view a type and one a buffer: a call without a graph waits for these.
    typed = {dtype: workspace[:needed].view(dtype) for dtype in {view.dtype for view in plan}}
    views = {
        name: typed[dtype].as_strided(size, stride, typed[dtype].storage_offset() + start)
        for name, dtype, size, stride, start in plan
    }
    rows_of = Fp8Rows if shape.fp8 else QuantizedRows
    quantized = {
        name: rows_of(*(views[f"{name}_{field}"] for field in rows_of._fields))
        for name in ("x", "h")
        if f"{name}_codes" in views
    }
    return Buffers(
        ExpertLayout(*(views[field] for field in ExpertLayout._fields)),
        views["layout_scratch"],
        quantized.get("x"),
        quantized["h"] if quantized else views["h"],
        views.get("h_bf16"),
        views.get("quantize_scratch"),
        views["rows"],
    )
