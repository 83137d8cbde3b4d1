"""The two grouped GEMMs of the experts on compute capability 9.0: shape -> config -> launch.

    fc1: h[row]   = w_row * silu(min(g, L)) * clamp(u, -L, L),   g = W1_e x, u = W3_e x   (bf16)
    fc2: out[row] = W2_e h[row]                                                           (bf16)

W4A16: NVFP4 or MXFP4 weights, in `weights`'s order, are widened to bf16 exactly; sums are fp32. e
and the token of a row are ExpertLayout's: rows that exist are written, padding rows are not. The
routing weight multiplies in fp32, before the rounding to bf16. Nothing here synchronises,
allocates or compiles once `compile_layer` has run for the layer's shape.

W4A8: x and h are E4M3, weights become E4M3 (NVFP4's rounded, MXFP4's exact), and the routing weight
multiplies fc2's sums. All h have one scale, under which no clamped one is over 448 (`fp8_h_scale`);
without a limit fc1 leaves h in bf16, and `fp8_quantize` gives each row its own.

Both GEMMs of a device share one buffer of partial sums and its flags, so calls must follow one
another, as they do on one stream: two streams must not run layers at the same time.
"""

import functools
import math

import torch
from cuda.bindings import driver
from cutlass import Float32, Int32

from dsv4_kernels.compiled import Kernel, compiled
from dsv4_kernels.sm90.arguments import pointer, pointer_types
from dsv4_kernels.sm90.compile import compile_now
from dsv4_kernels.sm90.heuristic import all_gemms, gemms
from dsv4_kernels.sm90.spec import FLAGS, MOST_PARTIALS, Gemm
from dsv4_kernels.types import ExpertLayout, Fp8Rows, MoeLayer, MoeShape, fp8_h_scale

H200_SMS = 132  # multiprocessors of an H200 or H100 (SXM): what is meant where there is no GPU


@functools.cache
def compile_gemm(gemm: Gemm, arch: str = "sm_90a"):
    """The specialisation's launcher, from the kernel cache or compiled; needs no GPU."""
    return compiled(Kernel(compile_now, gemm, arch))


def compile_layer(shape: MoeShape, device: torch.device) -> None:
    """Compile and allocate all that calls of up to shape.max_num_tokens will use on the device."""
    _fix_up(device)
    for gemm in all_gemms(shape):
        compile_gemm(gemm)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H200 where tensors lie on the CPU, as in the emulator."""
    if device.type == "cpu":
        return H200_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _fix_up(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial sums, flags) of the device's thread blocks; every launch leaves the flags zero."""
    blocks = num_sms(device)
    partials = torch.empty(blocks * MOST_PARTIALS, dtype=torch.float32, device=device)
    return partials, torch.zeros(blocks * FLAGS, dtype=torch.int32, device=device)


def num_blocks(gemm: Gemm, multiprocessors: int) -> int:
    """Thread blocks of a launch: whole clusters, all resident at once if alone."""
    return multiprocessors // gemm.config.cluster * gemm.config.cluster


def launch(
    gemm: Gemm,
    tensors: tuple[torch.Tensor, ...],
    limit: float | None,
    scales: tuple[torch.Tensor, float] | None = None,
) -> None:
    """Run a specialisation on torch tensors, in the order of the kernel's `__call__`; scales are
    fp8's row_scales and h_scale."""
    device = tensors[0].device
    assert gemm.config.tile_m * gemm.config.tile_n[-1] <= MOST_PARTIALS, gemm.config
    tensors = (*tensors, *_fix_up(device))
    types = pointer_types(gemm)
    pointers = [pointer(t, x.data_ptr()) for t, x in zip(types, tensors, strict=True)]
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    limit = math.inf if limit is None else limit
    num_rows = Int32(len(tensors[3]))
    blocks = Int32(num_blocks(gemm, num_sms(device)))
    of_fp8 = ()
    if scales is not None:
        row_scales, h_scale = scales
        strides = (Int32(row_scales.stride(0)), Int32(tensors[3].stride(0)))
        of_fp8 = (pointer(Float32, row_scales.data_ptr()), *strides, Float32(h_scale))
    compile_gemm(gemm)(*pointers, Float32(limit), num_rows, blocks, stream, *of_fp8)


def fc1(
    x: torch.Tensor | Fp8Rows,
    routing_weights: torch.Tensor,
    layout: ExpertLayout,
    layer: MoeLayer,
    *,
    out: torch.Tensor | Fp8Rows,
    num_tokens: int | None = None,
) -> None:
    """h of every row that exists: x (num_tokens, hidden) bf16, or (capacity, hidden) where
    `places_rows` says so, -> out (capacity, intermediate) bf16; W4A8: Fp8Rows of so many, which
    may be parts of longer rows where they are tokens, -> Fp8Rows of which the codes are written or,
    without a limit, bf16 with their columns.

    routing_weights (num_tokens, top_k) float32.
    """
    x, scales = _codes_and_scales(x, layer)
    out = out.codes if isinstance(out, Fp8Rows) else out
    weights = layer.weights
    gemm, _ = gemms(layer.shape, num_tokens or len(routing_weights))
    assert out.is_contiguous() and routing_weights.is_contiguous()
    if gemm.gather and layer.shape.fp8:
        assert x.stride(1) == 1 and x.stride(0) % 16 == 0, x.stride()
    else:
        assert x.is_contiguous(), x.stride()
    one_byte = layer.shape.fp8 and not layer.shape.scale_per_row
    assert out.dtype == (torch.float8_e4m3fn if one_byte else torch.bfloat16), out.dtype
    assert len(x) == (len(routing_weights) if gemm.gather else len(out)), x.shape
    launch(
        gemm,
        (
            weights.w13,
            weights.w13_block_scales,
            weights.w13_global_scales,
            x,
            out,
            layout.counts,
            layout.offsets,
            layout.row_to_slot,
            routing_weights,
        ),
        layer.limit,
        scales,
    )


def _codes_and_scales(
    x: torch.Tensor | Fp8Rows, layer: MoeLayer
) -> tuple[torch.Tensor, tuple[torch.Tensor, float] | None]:
    """What a GEMM reads, and `launch`'s scales."""
    if not layer.shape.fp8:
        assert isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16, type(x)
        return x, None
    assert isinstance(x, Fp8Rows), type(x)
    row_scales = x.scales if len(x.scales) else layer.weights.w2_global_scales  # not read
    return x.codes, (row_scales, fp8_h_scale(layer.limit) or 1.0)


def fc2(
    h: torch.Tensor | Fp8Rows,
    layout: ExpertLayout,
    layer: MoeLayer,
    *,
    out: torch.Tensor,
    routing_weights: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> None:
    """Rows for `combine`: h (capacity, intermediate) bf16 -> out (capacity, hidden) bf16; W4A8:
    Fp8Rows, of which no scales are read where there is a limit, times routing_weights.

    Must come right after `fc1` of the same layout: counts and offsets are read before the kernel
    before it has ended. They are not checked: a layout that another call has overwritten, as one
    of another size does in the same workspace, sends loads and stores anywhere.
    """
    h, scales = _codes_and_scales(h, layer)
    assert out.dtype == torch.bfloat16, out.dtype
    assert h.is_contiguous() and out.is_contiguous()
    weights = layer.weights
    assert (routing_weights is not None) == layer.shape.fp8, "W4A8 alone multiplies here"
    if routing_weights is None:
        routing_weights = weights.w2_global_scales  # not read
    _, gemm = gemms(layer.shape, num_tokens or len(layout.slot_to_row))
    launch(
        gemm,
        (
            weights.w2,
            weights.w2_block_scales,
            weights.w2_global_scales,
            h,
            out,
            layout.counts,
            layout.offsets,
            layout.row_to_slot,
            routing_weights,
        ),
        None,
        scales,
    )
