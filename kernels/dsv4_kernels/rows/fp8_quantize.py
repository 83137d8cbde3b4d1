"""E4M3: bf16 rows -> codes and a scale a row, in FP8 WGMMA's columns.

    scale = max|row| / 448, of which the inverse is rounded to float32
    code  = e4m3(x * inverse)        to nearest even

A program quantises one row, and writes it where it was or, of a token, to the row of each local
slot; a token without one is not read. Of each 64 columns the 16 words of four codes are transposed
as a 4 x 4 matrix (`Fp8Rows`), which gives a thread of WGMMA whole blocks of the weights' scales
(`sm90.e4m3`). Values and scales are bit-equal to `reference.fp8_quantize`.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import release_dependents, supports_pdl, wait_for_inputs
from dsv4_kernels.types import Fp8Rows


@triton.jit
def _e4m3(x, INTERPRETED: tl.constexpr):
    """float32 of at most 448 -> E4M3, to nearest even, as int8: the interpreter's cast does not
    round so."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Below 2^-6 in steps of 2^-9, the last bit of a float32 of 2^14.
        steps = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
        normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3)
        code = tl.where(magnitude < (121 << 23), steps, normal)
        return (code | (bits >> 24 & 0x80)).to(tl.int8)
    else:
        return x.to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def _row_of(slot_to_row_ptr, live_ptr, token, slot, TOP_K: tl.constexpr, LIVE: tl.constexpr):
    """Where a token's slot goes, int64; -1 for nowhere."""
    row = token
    if slot_to_row_ptr is not None:
        row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
    elif live_ptr is not None:
        last = tl.load(live_ptr + token * LIVE)
        for i in tl.static_range(1, LIVE):
            last = tl.maximum(last, tl.load(live_ptr + token * LIVE + i))
        row = tl.where(last >= 0, token, -1)
    return row


@triton.jit
def _quantize_kernel(
    x_ptr,
    slot_to_row_ptr,
    live_ptr,
    codes_ptr,
    scales_ptr,
    saturated_ptr,
    K: tl.constexpr,
    CODES_STRIDE: tl.constexpr,  # of rows, like the next
    SCALES_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    LIVE: tl.constexpr,  # columns of live
    BLOCK: tl.constexpr,
    ORDERED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EARLY: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    if EARLY:
        release_dependents(launch_pdl)
    else:
        wait_for_inputs(launch_pdl)
    token = tl.program_id(0).to(tl.int64)
    rows = ()
    last = tl.full([], -1, tl.int64)
    for slot in tl.static_range(TOP_K):
        row = _row_of(slot_to_row_ptr, live_ptr, token, slot, TOP_K, LIVE)
        rows = rows + (row,)  # type: ignore[assignment]
        last = tl.maximum(last, row)
    if last >= 0:
        column = tl.arange(0, BLOCK)
        CACHE: tl.constexpr = ".cg" if EARLY else ""  # past L1, which may hold stale lines
        x = tl.load(x_ptr + token * K + column, mask=column < K, other=0.0, cache_modifier=CACHE)
        x = x.to(tl.float32)
        amax = tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=0)
        scale = tl.maximum(tl.div_rn(tl.minimum(amax, 3.4e38), 448.0), 7.888609052210118e-31)
        scale = tl.where(amax > 0, scale, 1.0)
        inverse = tl.div_rn(1.0, scale)
        bounded = tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)
        codes = _e4m3(bounded, INTERPRETED)
        codes = tl.where(x == x, codes, 0x7F)
        if not ORDERED:
            codes = tl.permute(tl.reshape(codes, (BLOCK // 64, 4, 4, 4)), (0, 2, 1, 3))
            codes = tl.reshape(codes, (BLOCK,))
        num_rows = 0
        for slot in tl.static_range(TOP_K):
            if rows[slot] >= 0:
                codes_row = codes_ptr + rows[slot] * CODES_STRIDE
                tl.store(codes_row + column, codes, mask=column < K)
                tl.store(scales_ptr + rows[slot] * SCALES_STRIDE, scale)
                num_rows += 1
        if saturated_ptr is not None:
            infinite = tl.sum((tl.abs(x) == float("inf")).to(tl.int32), axis=0)
            if infinite > 0:
                tl.atomic_add(saturated_ptr, (infinite * num_rows).to(tl.int64))
    if EARLY:  # whoever waits for this kernel relies on the one before it, too
        wait_for_inputs(launch_pdl, releases=False)


def fp8_quantize(
    x: torch.Tensor,
    slot_to_row: torch.Tensor | None = None,
    *,
    live: torch.Tensor | None = None,
    ordered: bool = False,
    early: bool = False,
    saturated: torch.Tensor | None = None,
    out: Fp8Rows,
) -> Fp8Rows:
    """E4M3 of every row of x; returns out.

    x (num_tokens, K) bf16, contiguous, K a multiple of 64 unless ordered. With slot_to_row
    (num_tokens, top_k) int32, token t goes to every row slot_to_row[t, j] >= 0, and rows that no
    slot has are left as they are; without, row i goes to row i, unless all of live[i] is negative,
    live (num_tokens,) or (num_tokens, any): row_to_slot as live quantises rows that are in their
    place and skips the padding, and expert ids skip tokens that have none. ordered: x's columns are
    in the order of Fp8Rows already. early: before the launch right before has ended, which may then
    neither write x nor read out, and has waited for what did (`pdl`). saturated, a (1,) int64,
    grows by the infinities of written rows, which become a signed 448; NaN stays NaN. out's parts
    may be of longer rows.
    """
    num_tokens, K = x.shape
    assert x.dtype == torch.bfloat16 and x.is_contiguous(), (x.dtype, x.stride())
    assert ordered or K % 64 == 0, f"K {K} is not a multiple of 64"
    assert out.codes.dtype == torch.float8_e4m3fn, out.codes.dtype
    assert out.codes.stride(1) == 1, out.codes.stride()
    assert out.codes.shape == (*out.scales.shape, K), (out.codes.shape, out.scales.shape, K)
    assert slot_to_row is None or (live is None and len(slot_to_row) == num_tokens)
    assert slot_to_row is not None or len(out.codes) == num_tokens, (out.codes.shape, num_tokens)
    assert live is None or len(live) == num_tokens, (live.shape, num_tokens)
    assert not early or (slot_to_row is None and live is None), "rows are in the layout"
    assert live is None or live.is_contiguous(), live.stride()
    if num_tokens == 0:
        return out
    block = triton.next_power_of_2(K)
    _quantize_kernel[(num_tokens,)](
        x,
        slot_to_row,
        live,
        out.codes.view(torch.int8),
        out.scales,
        saturated,
        K=K,
        CODES_STRIDE=out.codes.stride(0),
        SCALES_STRIDE=out.scales.stride(0),
        TOP_K=1 if slot_to_row is None else slot_to_row.shape[1],
        LIVE=1 if live is None else live[0].numel(),
        BLOCK=block,
        ORDERED=ordered,
        INTERPRETED=x.device.type == "cpu",
        EARLY=early,
        launch_pdl=supports_pdl(x),
        num_warps=min(8, max(1, block // 256)),
    )
    return out
