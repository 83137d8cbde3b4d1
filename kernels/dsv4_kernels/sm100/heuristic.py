"""Which kernels run a call of the sm100 grouped GEMMs: by the rows of an expert. Pure Python."""

import functools

from dsv4_kernels.sm100.spec import CONFIGS, Config, Gemm
from dsv4_kernels.types import MoeShape, rows_per_expert


def unsupported_reason(shape: MoeShape) -> str | None:
    """Why these kernels cannot run the layer, or None."""
    if shape.weight_format != "nvfp4":
        return (
            f"it multiplies NVFP4 weights, and this layer's are {shape.weight_format.upper()}, "
            "which vLLM's own kernels take with MXFP8 activations: leave the layer to vLLM"
        )
    if shape.fp8:
        return "it multiplies NVFP4 activations, and fp8 is for sm90: set activations to auto"
    if not shape.quantize_activations:
        return (
            "it multiplies NVFP4 activations, and this layer keeps them in bf16: set activations "
            "to auto"
        )
    if shape.hidden % 128:
        return (
            f"hidden size {shape.hidden} is not a multiple of 128: choose vLLM's own experts with "
            "--moe-backend"
        )
    if shape.batch_rows % 64:
        return (
            f"the dispatch gives each expert room for {shape.batch_rows} rows, which is not a "
            "multiple of 64: choose a max_num_batched_tokens which is, or another "
            "--all2all-backend"
        )
    return None


def padded_intermediate(size: int, fp8: bool = False) -> tuple[int, int]:
    """A tile of weights has 64 rows of the gate and 64 of the up; block scales lie in blocks of 64
    columns."""
    size = -(-size // 64) * 64
    return size, size


def choose_config(shape: MoeShape, num_tokens: int) -> Config:
    """By the rows that an expert gets if routing is even.

    Each tile reads all of an expert's weights, from L2 after the first, so a tile should hold
    what an expert usually gets; N follows the rows that exist, so a large tile costs padding and
    shared memory only. Up to about 350 rows an expert is bound by reading its weights once (9
    PFLOP/s over 8 TB/s, at 0.5625 bytes a weight); beyond, by the tensor cores, which two CTAs
    and 256 tokens keep fed with half the shared-memory traffic of one and 128. An expert's rows in
    a batch are whole tiles.
    """
    rows = rows_per_expert(shape, num_tokens)
    if rows <= 40 or shape.batch_rows % 128:
        return CONFIGS[64]
    # A pair takes 256 weight rows: 128 gate and 128 up, or 256 of hidden.
    inter, _ = padded_intermediate(shape.intermediate)
    if rows <= 160 or inter % 128 or shape.hidden % 256 or shape.batch_rows % 256:
        return CONFIGS[128]
    return CONFIGS[256]


def tile(shape: MoeShape, num_tokens: int) -> int:
    """Rows that a group is padded to."""
    return choose_config(shape, num_tokens).tile


def places_rows(shape: MoeShape, num_tokens: int) -> bool:
    """Never: the quantiser places the rows that fc1 reads."""
    return False


def gemms(shape: MoeShape, tile: int, fc1_per_row: bool) -> tuple[Gemm, Gemm]:
    """(fc1, fc2) of a layer at one tile; fc1_per_row: whether x has one global scale per row."""
    local, hidden = shape.num_local_experts, shape.hidden
    inner, _ = padded_intermediate(shape.intermediate)
    per_row, config, batched = shape.scale_per_row, CONFIGS[tile], shape.batch_rows > 0
    return (
        Gemm("fc1", local, inner, hidden, config, not per_row, fc1_per_row, batched),
        Gemm("fc2", local, hidden, inner, config, False, per_row, batched),
    )


@functools.cache
def all_gemms(shape: MoeShape) -> tuple[Gemm, ...]:
    """Every specialisation that calls of up to shape.max_num_tokens need.

    With a scale per row into FC2, x may have one per row or one in all (`token`, `warmup`).
    """
    tiles = {choose_config(shape, tokens).tile for tokens in range(1, shape.max_num_tokens + 1)}
    policies = (False, True) if shape.scale_per_row else (False,)
    found = [gemm for t in sorted(tiles) for p in policies for gemm in gemms(shape, t, p)]
    return tuple(dict.fromkeys(found))
