"""The two grouped GEMMs of the experts on compute capability 10.0: shape -> config -> launch.

    fc1: h[row]   = w_row * silu(min(g, L)) * clamp(u, -L, L),   g = W1_e x, u = W3_e x
    fc2: out[row] = W2_e h[row]                                                        (bf16)

NVFP4 times NVFP4 with fp32 sums. e and the rows are ExpertLayout's: rows that exist are written;
padding rows of out may be. fc1 writes NVFP4, its block scales in 128x4 blocks, exactly as
`reference.nvfp4_quantize` would from the fp32 h; or bf16, for the `token` policy, whose global
scale needs whole rows. Block scales of weights are in `weights`'s order. Nothing here
synchronises or allocates, nor compiles what `compile_gemm` already has.
"""

import functools
import math

import cuda.bindings.driver as cuda
import torch
from cutlass import BFloat16, Float32, Int32, Int64, Uint8

from dsv4_kernels.compiled import Kernel, arch_of, compiled
from dsv4_kernels.sm100.compile import compile_now
from dsv4_kernels.sm100.heuristic import all_gemms
from dsv4_kernels.sm100.kernel import pointer
from dsv4_kernels.sm100.spec import CONFIGS, Gemm
from dsv4_kernels.types import ExpertLayout, MoeLayer, MoeShape, QuantizedRows

_DTYPES = {
    torch.uint8: Uint8,
    torch.float8_e4m3fn: Uint8,
    torch.bfloat16: BFloat16,
    torch.float32: Float32,
    torch.int32: Int32,
    torch.int64: Int64,
}


@functools.cache
def compile_gemm(gemm: Gemm, arch: str = "sm_100a"):
    """The specialisation's launcher, from the kernel cache or compiled; needs no GPU."""
    return compiled(Kernel(compile_now, gemm, arch))


def compile_layer(shape: MoeShape, device: torch.device) -> None:
    """Compile all that calls of up to shape.max_num_tokens will use."""
    _, arch = _device(device)
    for gemm in all_gemms(shape):
        compile_gemm(gemm, arch)


@functools.cache
def _device(device: torch.device) -> tuple[int, str]:
    """Its multiprocessors, and what to compile for."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, arch_of((properties.major, properties.minor))


def launch(gemm: Gemm, arguments: tuple, limit: float | None) -> None:
    """Run a specialisation on torch tensors, in the order of the kernel's `__call__`."""
    device = arguments[0].device
    pointers = [
        pointer(_DTYPES[a.dtype], a.data_ptr()) if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]
    num_sms, arch = _device(device)
    clusters = num_sms // gemm.config.num_ctas
    stream = cuda.CUstream(torch.cuda.current_stream(device).cuda_stream)
    limit = Float32(math.inf if limit is None else limit)
    compile_gemm(gemm, arch)(*pointers, limit, Int32(clusters), stream)


def fc1(
    x: QuantizedRows,
    routing_weights: torch.Tensor,
    layout: ExpertLayout,
    layer: MoeLayer,
    *,
    out: QuantizedRows | torch.Tensor,
    num_tokens: int | None = None,
) -> None:
    """h of every row that exists: x (capacity, hidden) -> out (capacity, intermediate).

    routing_weights (num_tokens, top_k) float32. out is QuantizedRows if the layer's scales.fc2
    says with which global scales, else bf16; layer.saturated grows by the blocks that did not fit.
    """
    weights, scales = layer.weights, layer.activation_scales
    quantize = isinstance(out, QuantizedRows)
    assert quantize == (scales.fc2 is not None), scales
    gemm = _specialise("fc1", layout, layer, scales.fc1 is None, quantize)
    launch(
        gemm,
        (
            weights.w13,
            weights.w13_block_scales,
            weights.w13_global_scales,
            x.codes,
            x.block_scales,
            x.global_scales if scales.fc1 is None else scales.fc1,
            Int32(len(x.codes)),
            layout.counts,
            layout.offsets,
            layout.tile_to_expert,
            out.codes if quantize else out,
            out.block_scales if quantize else None,
            scales.fc2 if quantize else None,
            layout.row_to_slot,
            routing_weights,
            layer.saturated if quantize else None,
        ),
        layer.limit,
    )


def fc2(
    h: QuantizedRows,
    layout: ExpertLayout,
    layer: MoeLayer,
    *,
    out: torch.Tensor,
    routing_weights: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> None:
    """Rows for `combine`: h (capacity, intermediate) -> out (capacity, hidden) bf16."""
    assert routing_weights is None, "fc1 has multiplied by them"
    weights, scales = layer.weights, layer.activation_scales
    gemm = _specialise("fc2", layout, layer, scales.fc2 is None, False)
    launch(
        gemm,
        (
            weights.w2,
            weights.w2_block_scales,
            weights.w2_global_scales,
            h.codes,
            h.block_scales,
            h.global_scales if scales.fc2 is None else scales.fc2,
            Int32(len(h.codes)),
            layout.counts,
            layout.offsets,
            layout.tile_to_expert,
            out,
            *(None,) * 5,
        ),
        None,
    )


def _specialise(op, layout, layer, scale_per_row, quantize) -> Gemm:
    """The Gemm of a call; its config is that of the layout's tile."""
    capacity = len(layout.row_to_slot)
    tile = capacity // len(layout.tile_to_expert)
    weights, batched = layer.weights, layer.shape.batch_rows > 0
    sizes = (weights.intermediate, weights.hidden)
    out_features, k = sizes if op == "fc1" else sizes[::-1]
    local = weights.num_local_experts
    return Gemm(op, local, out_features, k, CONFIGS[tile], quantize, scale_per_row, batched)
