"""The two grouped GEMMs of the experts on compute capability 9.0: shape -> config -> launch.

    fc1: h[row]   = w_row * silu(min(g, L)) * clamp(u, -L, L),   g = W1_e x, u = W3_e x   (bf16)
    fc2: out[row] = W2_e h[row]                                                           (bf16)

W4A16: NVFP4 weights, in `weights_sm90`'s order, are widened to bf16 exactly; sums are fp32. e and
the token of a row are ExpertLayout's: rows that exist are written, padding rows are not. The
routing weight multiplies in fp32, before the rounding to bf16. Nothing here synchronises,
allocates or compiles once `compile_layer` has run for the layer's shape.

Both GEMMs of a device share one buffer of partial sums and its flags, so calls must follow one
another, as they do on one stream: two streams must not run layers at the same time.
"""

import functools
import math

import torch
from cuda.bindings import driver
from cutlass import BFloat16, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_ptr

from dsv4_kernels.compiled import compiled
from dsv4_kernels.grouped_gemm_sm90_kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.grouped_gemm_sm90_spec import Gemm, Sm90Config
from dsv4_kernels.types import ExpertLayout, ExpertWeights, MoeShape

GATHERED_ROWS = 14  # an expert, at most, where fc1 gathers
# Of 256 weight rows by the largest tile_n that choose_config names, per thread block.
MOST_PARTIALS = 256 * 144
_FLAGS = 16  # per thread block: one a consumer warp
_DTYPES = {
    torch.uint8: Uint8,
    torch.float8_e4m3fn: Uint8,
    torch.bfloat16: BFloat16,
    torch.float32: Float32,
    torch.int32: Int32,
}


def unsupported(shape: MoeShape) -> str | None:
    """Why these kernels cannot run the layer, or None."""
    if shape.quantize_activations:
        return (
            "compute capability 9.0 has no FP4 arithmetic, so activations stay in bf16: set "
            "activations to bf16"
        )
    for name in ("hidden", "intermediate"):
        size = getattr(shape, name)
        if size % 64:
            return (
                f"{name} size {size} of this rank is not a multiple of 64: use a smaller "
                "tensor-parallel size or expert parallelism"
            )
    return None


def choose_config(shape: MoeShape, num_tokens: int, k: int) -> Sm90Config:
    """By the rows that an expert gets if routing is even, for weights with k columns.

    Few rows: the weights' bytes bind, and then the instructions that widen them; 16 warps share
    that work and long stages spread what a stage costs. Many rows: the tensor cores bind, and two
    warpgroups of 128 rows each read an expert's rows of x half as often. tile_n is four sizes about
    what a tile will hold: with more, ptxas runs out of registers and makes WGMMA wait.
    """
    rows = num_tokens * shape.top_k / shape.num_experts
    if rows <= GATHERED_ROWS:
        return Sm90Config(1, 4, (8, 16, 24, 32), _tile_k(k, 256))
    if rows <= 36:
        return Sm90Config(1, 4, (24, 32, 40, 48), _tile_k(k, 128))
    parts = math.ceil((rows + 1.25 * math.sqrt(rows)) / 144)
    # One and a half standard deviations more than the even share still fit.
    most = rows / parts + 1.5 * math.sqrt(rows) / parts
    most = min(144, math.ceil(most / 16) * 16)
    return Sm90Config(2, 2, (most - 24, most - 16, most - 8, most), _tile_k(k, 128))


def _tile_k(k: int, most: int) -> int:
    return next(tile for tile in (256, 128, 64) if tile <= most and k % tile == 0)


def places_rows(shape: MoeShape, num_tokens: int) -> bool:
    """Whether fc1 wants rows as the layout says. Two warps gather rows by token fast enough for
    the small tiles, whose time goes to weights; large ones want TMA, and a copy pays."""
    return num_tokens * shape.top_k / shape.num_experts > GATHERED_ROWS


@functools.lru_cache(maxsize=4096)
def gemms(shape: MoeShape, num_tokens: int) -> tuple[Gemm, Gemm]:
    """(fc1, fc2) of a layer at a number of tokens."""
    sizes = {"fc1": (2 * shape.intermediate, shape.hidden)}
    sizes["fc2"] = (shape.hidden, shape.intermediate)
    gather = {"fc1": not places_rows(shape, num_tokens), "fc2": False}
    return tuple(
        Gemm(
            op,
            shape.num_local_experts,
            m,
            k,
            shape.top_k,
            gather[op],
            choose_config(shape, num_tokens, k),
        )
        for op, (m, k) in sizes.items()
    )


@functools.cache
def all_gemms(shape: MoeShape) -> list[Gemm]:
    """Every specialisation that calls of up to shape.max_num_tokens need."""
    found = {}
    for num_tokens in range(1, shape.max_num_tokens + 1):
        found |= dict.fromkeys(gemms(shape, num_tokens))
    return list(found)


def example_arguments(gemm: Gemm) -> tuple:
    """What `cute.compile` is given for a specialisation: types and alignments."""
    return (
        *(_pointer(dtype, 1 << 20) for dtype in (Uint8, Uint8, Float32, BFloat16, BFloat16)),
        *(_pointer(dtype, 1 << 20) for dtype in (Int32, Int32, Int32, Float32, Float32, Int32)),
        Float32(math.inf),
        Int32(1),
        Int32(1),
        driver.CUstream(0),
    )


def _pointer(dtype, address: int):
    align = 4 if dtype in (Int32, Float32) else 16
    return make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)


@functools.cache
def compile_gemm(gemm: Gemm, arch: str = "sm_90a"):
    """The specialisation's launcher, from an object that was loaded or compiled; needs no GPU."""

    def compile_now():
        options = f"--gpu-arch={arch}"
        return cute.compile(Dsv4GroupedGemmSm90(gemm), *example_arguments(gemm), options=options)

    return compiled(repr(gemm), arch, compile_now)


def compile_layer(shape: MoeShape, device: torch.device) -> None:
    """Compile and allocate all that calls of up to shape.max_num_tokens will use on the device."""
    _fix_up(device)
    for gemm in all_gemms(shape):
        compile_gemm(gemm)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _fix_up(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial sums, flags) of the device's thread blocks; every launch leaves the flags zero."""
    blocks = _num_sms(device)
    partials = torch.empty(blocks * MOST_PARTIALS, dtype=torch.float32, device=device)
    return partials, torch.zeros(blocks * _FLAGS, dtype=torch.int32, device=device)


def launch(gemm: Gemm, tensors: tuple[torch.Tensor, ...], limit: float | None) -> None:
    """Run a specialisation on torch tensors, in the order of the kernel's `__call__`."""
    device = tensors[0].device
    assert gemm.config.tile_m * gemm.config.tile_n[-1] <= MOST_PARTIALS, gemm.config
    pointers = (_pointer(_DTYPES[t.dtype], t.data_ptr()) for t in (*tensors, *_fix_up(device)))
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    limit = math.inf if limit is None else limit
    num_rows = Int32(len(tensors[3]))
    compile_gemm(gemm)(*pointers, Float32(limit), num_rows, Int32(_num_sms(device)), stream)


def fc1(
    x: torch.Tensor,
    routing_weights: torch.Tensor,
    layout: ExpertLayout,
    weights: ExpertWeights,
    shape: MoeShape,
    limit: float | None,
    *,
    out: torch.Tensor,
) -> None:
    """h of every row that exists: x (num_tokens, hidden) bf16, or (capacity, hidden) where
    `places_rows` says so, -> out (capacity, intermediate) bf16.

    routing_weights (num_tokens, top_k) float32.
    """
    assert x.dtype == out.dtype == torch.bfloat16, (x.dtype, out.dtype)
    assert x.is_contiguous() and out.is_contiguous() and routing_weights.is_contiguous()
    gemm, _ = gemms(shape, len(routing_weights))
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
        limit,
    )


def fc2(
    h: torch.Tensor,
    layout: ExpertLayout,
    weights: ExpertWeights,
    shape: MoeShape,
    *,
    out: torch.Tensor,
) -> None:
    """Rows for `combine`: h (capacity, intermediate) bf16 -> out (capacity, hidden) bf16."""
    assert h.dtype == out.dtype == torch.bfloat16, (h.dtype, out.dtype)
    assert h.is_contiguous() and out.is_contiguous()
    _, gemm = gemms(shape, len(layout.slot_to_row))
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
            weights.w2_global_scales,  # fc2 reads no routing weights
        ),
        None,
    )
