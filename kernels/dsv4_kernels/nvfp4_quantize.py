"""NVFP4: bf16 rows -> packed E2M1 codes and E4M3 block scales, in the rows of a layout.

    block scale = e4m3(max|block| / 6 / gs)          16 values, gs the global scale
    code        = e2m1(x / (block scale * gs))       both to nearest even; a zero scale: zero codes

gs comes per layer or per expert, or is the row's own, max|row| / 2688 (`token`), for which the
program reads its row twice, from L1 the second time. A program quantises one token once, a block of
columns at a time, and writes it to the row of each of its local slots: only tokens that have rows
are read. Codes and scales equal `reference.nvfp4_quantize` bit for bit: every quotient is IEEE's,
and the conversions are integer arithmetic on float bits, the same under Triton's interpreter as on
any GPU.

Block scales are written row-major, or as the 128x4 blocks that tcgen05 reads: the scale of row r
and block c is at byte ((r // 128) * ceil(K / 64) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4
+ c % 4. Groups of a layout whose tile is a multiple of 128 are swizzled each for itself.
Of each 32-byte sector of them a row has 4 bytes, which is what makes them slower to write.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.types import NVFP4_BLOCK, ExpertLayout, QuantizedRows

SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4
# Where the global scale of a row is.
PER_LAYER, PER_EXPERT, PER_ROW, OWN = 0, 1, 2, 3
_PER_EXPERT, _PER_ROW, _OWN = tl.constexpr(PER_EXPERT), tl.constexpr(PER_ROW), tl.constexpr(OWN)


class Config(NamedTuple):
    blocks: int  # of 16 values, at once
    num_warps: int


def choose_config(scale_columns: int) -> Config:
    """1024 values at a time, 16 per thread: 4096, 5120 and 7168 are multiples."""
    blocks = min(64, triton.next_power_of_2(scale_columns))
    return Config(blocks, num_warps=max(1, blocks // 32))


@triton.jit
def _e4m3(x):
    """0 <= x <= 448 to the nearest E4M3, to even: its bits and its value."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + 0x7FFFF + ((bits >> 20) & 1)
    # Below 2^-6 the step is 2^-9, fp32's own step at 2^14.
    shifted = x + 16384.0
    is_normal = x >= 0.015625
    code = tl.where(is_normal, (bits >> 20) - 960, shifted.to(tl.int32, bitcast=True) & 15)
    rounded = (bits & -0x100000).to(tl.float32, bitcast=True)
    return code, tl.where(is_normal, rounded, shifted - 16384.0)


@triton.jit
def _e2m1(negative_x, scale, negative_inverse, limit):
    """x / scale to the nearest E2M1, to even: 4-bit codes, int32. NaN becomes +limit.

    (blocks, n) over (blocks, 1). The quotient is IEEE's: x times 1 / scale, correctly rounded,
    corrected once by its exact remainder (Markstein). Operands come negated so that -0 stays -0.
    limit is 6, or 0 in a block whose scale is 0, where the inverse is 0 too.
    """
    quotient = negative_x * negative_inverse
    excess = tl.fma(quotient, scale, negative_x)
    exact = tl.fma(excess, negative_inverse, quotient)
    quotient = tl.where(tl.abs(quotient) < 8.0, exact, quotient)  # infinities have no remainder
    # minimum() takes the number where the other is NaN.
    value = tl.maximum(tl.minimum(quotient, limit), -limit)
    bits = value.to(tl.int32, bitcast=True)
    # Added to 2^22 times its power of two (1 at least), a number is rounded to one bit after the
    # leading one, and to multiples of 0.5 below 1; codes count these steps.
    power = tl.maximum(bits & 0x7F800000, 127 << 23) + (22 << 23)
    rounded = tl.abs(value) + power.to(tl.float32, bitcast=True)
    code = rounded.to(tl.int32, bitcast=True) - power + (power >> 22) - 2 * (127 + 22)
    sign = tl.where(limit > 0, 8, 0)
    return code | ((bits >> 28) & sign)


@triton.jit
def _quantize_blocks(even, odd, amax, gs):
    """(blocks, 8) values at even and odd columns -> bytes of codes, scales' bits, saturated."""
    quotient = tl.div_rn(tl.div_rn(amax, 6.0), gs)
    code, value = _e4m3(tl.minimum(quotient, 448.0))
    # Tiny scales are multiplied up with their values: remainders have to be normal numbers.
    up = tl.where(gs < 2.3283064365386963e-10, 1.8446744073709552e19, 1.0)
    scale = ((value * gs) * up)[:, None]
    is_live = scale > 0
    inverse = tl.where(is_live, tl.div_rn(-1.0, tl.where(is_live, scale, 1.0)), 0.0)
    limit = tl.where(is_live, 6.0, 0.0)
    low = _e2m1(even * -up, scale, inverse, limit)
    high = _e2m1(odd * -up, scale, inverse, limit)
    # 464 is the tie between 448 and the next E4M3 step, and goes to 448. Times 0, what is no
    # finite number leaves NaN.
    zero = tl.sum(even * 0.0 + odd * 0.0, axis=1)
    saturated = (quotient > 464.0) | (zero != zero)
    return low | (high << 4), code, saturated.to(tl.int32)


@triton.jit
def _load_blocks(row_ptr, block, num_blocks):
    """(blocks, 8) float32 at even and odd columns, and the largest magnitude of every block."""
    words = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    pairs = tl.load(row_ptr + words, mask=block[:, None] < num_blocks, other=0)
    even = (pairs << 16).to(tl.float32, bitcast=True)
    odd = (pairs & -0x10000).to(tl.float32, bitcast=True)
    # maximum() takes the number where the other is NaN.
    amax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
    return even, odd, tl.where(amax == amax, amax, 0.0)


@triton.jit
def _store_blocks(
    codes, scales, row, block, codes_ptr, scales_ptr, num_blocks, scale_columns, SWIZZLED
):
    """Blocks of one row; nothing where the row is negative."""
    words = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    limit = tl.where(row >= 0, num_blocks, 0)
    # Codes stream out; a sector of swizzled scales is filled by several tokens.
    tl.store(
        codes_ptr + row * num_blocks * 8 + words,
        codes.to(tl.uint8),
        mask=block[:, None] < limit,
        cache_modifier=".cs",
    )
    if SWIZZLED:
        place = (row // 128) * (scale_columns * 128) + row % 32 * 16 + row % 128 // 32 * 4
        scale_ptrs = scales_ptr + place + block // 4 * 512 + block % 4
    else:
        scale_ptrs = scales_ptr + row * scale_columns + block
    limit = tl.where(row >= 0, scale_columns, 0)
    tl.store(scale_ptrs, scales.to(tl.uint8), mask=block < limit, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["num_blocks", "scale_columns"])
def _quantize_kernel(
    x_ptr,  # (tokens, K // 2) int32: two bf16, the even column in the low half
    slot_to_row_ptr,
    live_ptr,
    tile_to_expert_ptr,
    gs_in_ptr,
    codes_ptr,
    scales_ptr,
    gs_out_ptr,
    saturated_ptr,
    num_blocks,  # K // 16
    scale_columns,  # of a row of block scales, padding included
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    POLICY: tl.constexpr,
    HAS_LAYOUT: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    SWIZZLED: tl.constexpr,
    COUNTS_SATURATED: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    token = tl.program_id(0).to(tl.int64)

    # Phase 1: the rows to write; none, and the token is not read.
    rows = ()
    num_rows = tl.zeros([], tl.int32)
    for slot in tl.static_range(TOP_K):
        row = token
        if HAS_LAYOUT:
            row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
        elif HAS_LIVE:
            row = tl.where(tl.load(live_ptr + token) >= 0, token, -1)
        rows = rows + (row,)
        num_rows += (row >= 0).to(tl.int32)
    if num_rows > 0:
        # Phase 2: the global scale, where it is the layer's or the row's.
        row_ptr = x_ptr + token * num_blocks * 8
        if POLICY == _OWN:
            largest = tl.zeros([BLOCKS], tl.float32)
            for first in range(0, num_blocks, BLOCKS):
                block = first + tl.arange(0, BLOCKS)
                _, _, amax = _load_blocks(row_ptr, block, num_blocks)
                largest = tl.maximum(largest, amax)
            row_amax = tl.minimum(tl.max(largest, axis=0), 3.4e38)
            gs = tl.maximum(tl.div_rn(row_amax, 2688.0), 7.888609052210118e-31)
            gs = tl.where(row_amax > 0, gs, 1.0)
            for slot in tl.static_range(TOP_K):
                if rows[slot] >= 0:
                    tl.store(gs_out_ptr + rows[slot], gs)
        elif POLICY == _PER_ROW:
            gs = tl.load(gs_in_ptr + token)
        elif POLICY != _PER_EXPERT:
            gs = tl.load(gs_in_ptr)

        # Phase 3: quantise, once unless the slots' experts have scales of their own, and write.
        num_saturated = tl.zeros([BLOCKS], tl.int32)
        for first in range(0, scale_columns, BLOCKS):
            start = first
            if SWIZZLED:
                # Tokens start at different columns, so that programs write to different places.
                pieces = (scale_columns + BLOCKS - 1) // BLOCKS
                start = (first // BLOCKS + tl.program_id(0)) % pieces * BLOCKS
            block = start + tl.arange(0, BLOCKS)
            even, odd, amax = _load_blocks(row_ptr, block, num_blocks)
            if POLICY != _PER_EXPERT:
                codes, scales, saturated = _quantize_blocks(even, odd, amax, gs)
                num_saturated += num_rows * saturated
            for slot in tl.static_range(TOP_K):
                row = rows[slot]
                if POLICY == _PER_EXPERT:
                    expert = tl.load(tile_to_expert_ptr + tl.maximum(row, 0) // TILE)
                    gs = tl.load(gs_in_ptr + tl.maximum(expert, 0))
                    codes, scales, saturated = _quantize_blocks(even, odd, amax, gs)
                    num_saturated += tl.where(row >= 0, saturated, 0)
                _store_blocks(
                    codes, scales, row, block,
                    codes_ptr, scales_ptr, num_blocks, scale_columns, SWIZZLED,
                )  # fmt: skip
        if COUNTS_SATURATED:
            count = tl.sum(num_saturated, axis=0)
            if count > 0:
                tl.atomic_add(saturated_ptr, count.to(tl.int64), sem="relaxed")


def block_scales_shape(rows: int, K: int, swizzled: bool) -> tuple[int, int]:
    """Of a tensor of E4M3 block scales; 128x4 blocks round both sides up."""
    columns = K // NVFP4_BLOCK
    if not swizzled:
        return rows, columns
    return _round_up(rows, SWIZZLE_ROWS), _round_up(columns, SWIZZLE_COLUMNS)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def nvfp4_quantize(
    x: torch.Tensor,
    global_scale: torch.Tensor | None,
    layout: ExpertLayout | None = None,
    *,
    live: torch.Tensor | None = None,
    swizzled: bool = False,
    saturated: torch.Tensor | None = None,
    out: QuantizedRows | None = None,
) -> QuantizedRows:
    """NVFP4 of every row of x: what `reference.nvfp4_quantize` says, on the GPU.

    x (num_tokens, K) bf16, contiguous, K a multiple of 16. With a layout, token t's codes and
    scales go to every row slot_to_row[t, j] >= 0, and rows that no slot has are left as they are;
    without, row i goes to row i, unless live (num_tokens,) int32 is negative there: row_to_slot as
    live quantises rows that are in their place and skips the padding. global_scale float32: (1,),
    or (num_local_experts,) with a layout, or (num_tokens,) without; None for each row's own, which
    is then written to out.global_scales (rows,). saturated, a (1,) int64, grows by the blocks, of
    written rows, that did not fit. out is (rows, K // 2) uint8 codes and E4M3 block scales of
    block_scales_shape; made here if None.
    """
    num_tokens, K = x.shape
    assert x.dtype == torch.bfloat16 and x.is_contiguous(), (x.dtype, x.stride())
    assert K % NVFP4_BLOCK == 0, f"K {K} is not a multiple of {NVFP4_BLOCK}"
    rows = num_tokens if layout is None else len(layout.row_to_slot)
    policy = _policy(global_scale, layout, num_tokens)
    if out is None:
        out = _make_out(rows, K, swizzled, global_scale, x.device)
    scales_shape = block_scales_shape(rows, K, swizzled)
    assert out.codes.shape == (rows, K // 2), (out.codes.shape, rows, K)
    assert out.block_scales.shape == scales_shape, (out.block_scales.shape, scales_shape)
    assert out.codes.is_contiguous() and out.block_scales.is_contiguous()
    assert live is None or (layout is None and live.shape == (num_tokens,)), live.shape
    assert policy != OWN or out.global_scales.shape == (rows,), out.global_scales.shape
    if num_tokens == 0:
        return out
    top_k = 1 if layout is None else layout.slot_to_row.shape[1]
    tile = 1 if layout is None else rows // max(1, len(layout.tile_to_expert))
    config = choose_config(scales_shape[1])
    _quantize_kernel[(num_tokens,)](
        x.view(torch.int32),
        layout.slot_to_row if layout else None,
        live,
        layout.tile_to_expert if layout else None,
        global_scale,
        out.codes,
        out.block_scales.view(torch.uint8),
        out.global_scales,
        saturated,
        K // NVFP4_BLOCK,
        scales_shape[1],
        TOP_K=top_k,
        TILE=tile,
        BLOCKS=config.blocks,
        POLICY=policy,
        HAS_LAYOUT=layout is not None,
        HAS_LIVE=live is not None,
        SWIZZLED=swizzled,
        COUNTS_SATURATED=saturated is not None,
        launch_pdl=supports_pdl(x),
        num_warps=config.num_warps,
    )
    return out


def _policy(global_scale: torch.Tensor | None, layout: ExpertLayout | None, num_tokens: int) -> int:
    if global_scale is None:
        return OWN
    assert global_scale.dtype == torch.float32, global_scale.dtype
    if global_scale.numel() == 1:
        return PER_LAYER
    if layout is None:
        assert global_scale.shape == (num_tokens,), (global_scale.shape, num_tokens)
        return PER_ROW
    assert global_scale.shape == layout.counts.shape, (global_scale.shape, layout.counts.shape)
    return PER_EXPERT


def _make_out(
    rows: int, K: int, swizzled: bool, global_scale: torch.Tensor | None, device: torch.device
) -> QuantizedRows:
    scales = torch.zeros(
        block_scales_shape(rows, K, swizzled), dtype=torch.uint8, device=device
    ).view(torch.float8_e4m3fn)
    if global_scale is None:
        global_scale = torch.ones(rows, dtype=torch.float32, device=device)
    return QuantizedRows(
        torch.zeros(rows, K // 2, dtype=torch.uint8, device=device), scales, global_scale
    )
