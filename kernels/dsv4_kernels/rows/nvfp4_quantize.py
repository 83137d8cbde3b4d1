"""NVFP4: bf16 rows -> packed E2M1 codes and E4M3 block scales, in the rows of a layout.

    block scale = e4m3(max|block| / 6 / gs)          16 values, gs the global scale
    code        = e2m1(x / (block scale * gs))       both to nearest even; a zero scale: zero codes

gs is per layer, per row, or the row's own, max|row| / 2688 (`token`). A program reads one token's
row into registers, a block of 16 a thread and chunk, quantises it once on the fast path of
`nvfp4_blocks` (again, on the slow one, if a block is not plain), and writes it to the row of each
local slot; tokens without one are not read. Bit-equal to `reference.nvfp4_quantize`.

Block scales are written row-major, or as the 128x4 blocks that tcgen05 reads: the scale of row r
and block c is at byte ((r // 128) * ceil(K / 64) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4
+ c % 4. Where the layout's tile is a multiple of 128, no block spans two experts. A row owns 4
bytes of a 32-byte sector: with many tokens, scales first go to a scratch buffer, row-major by
token, and a second launch writes whole sectors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsv4_kernels.pdl import supports_pdl, wait_for_inputs
from dsv4_kernels.rows.nvfp4_blocks import (
    INF,
    LEAST_GS,
    MOST_GS,
    four_columns,
    largest_bits,
    largest_number,
    load_blocks,
    quantize_any,
    quantize_plain,
)
from dsv4_kernels.types import NVFP4_BLOCK, ExpertLayout, QuantizedRows

SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4
# Source of a row's global scale.
PER_LAYER, PER_ROW, OWN = 0, 1, 2
_PER_ROW, _OWN = tl.constexpr(PER_ROW), tl.constexpr(OWN)
# Order of block scales: row-major, swizzled, or row-major by token (the scratch).
ROWS, SWIZZLED, TOKENS = 0, 1, 2
_SWIZZLED, _TOKENS = tl.constexpr(SWIZZLED), tl.constexpr(TOKENS)
SWIZZLE_GROUPS = 4  # of 16 columns of scales, in a program


class Config(NamedTuple):
    blocks: int  # of 16 values, in a chunk; one a thread
    num_warps: int
    swizzles: bool  # scales in a second launch


def choose_config(scale_columns: int, num_tokens: int) -> Config:
    """The fewer tokens, the more threads a row; up to eight chunks a row.

    us on an H200 (Triton 3.9), 7168 columns, 6 slots, layer scale, row-major, with chunks of 64,
    128 and 256 blocks. 8192 tokens, all experts local: 84.0, 84.2, 86.4; one in eight local: 30.0,
    28.9, 35.4. 512 tokens, one in eight local: 5.9, 4.9, 4.1; 128 tokens: 3.6, 3.0, 2.8.
    """
    many = num_tokens >= 1024
    blocks = max(128 if many else 256, triton.next_power_of_2(triton.cdiv(scale_columns, 8)))
    blocks = min(blocks, triton.next_power_of_2(scale_columns))
    return Config(blocks, num_warps=max(1, blocks // 32), swizzles=many)


@triton.jit
def _own_scale(row_ptr, largest, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """max|row| / 2688, given largest_bits of the chunks; NaN counts as 0."""
    of_row = largest[0]
    for i in tl.static_range(1, len(largest)):
        of_row = tl.maximum(of_row, largest[i])
    of_row = tl.max(of_row, axis=0)
    amax = of_row.to(tl.float32, bitcast=True)
    if of_row > INF:
        numbers = tl.zeros([BLOCKS], tl.float32)
        for first in range(0, NUM_BLOCKS, BLOCKS):
            blocks = load_blocks(row_ptr, first + tl.arange(0, BLOCKS), NUM_BLOCKS)
            numbers = tl.maximum(numbers, largest_number(blocks))
        amax = tl.max(numbers, axis=0)
    gs = tl.maximum(tl.div_rn(tl.minimum(amax, 3.4e38), 2688.0), 7.888609052210118e-31)
    return tl.where(amax > 0, gs, 1.0)


@triton.jit
def _plain_row(words, largest, gs, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """A row's chunks -> (codes, scales' bits, whether all blocks are plain)."""
    gs_inverse = tl.div_rn(1.0, gs)
    exceptions = tl.zeros([BLOCKS], tl.int32)
    codes = ()
    scales = ()
    for i in tl.static_range(len(words)):
        chunk_codes, chunk_scales, plain = quantize_plain(words[i], largest[i], gs, gs_inverse)
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        exceptions = tl.where(plain | (block >= NUM_BLOCKS), exceptions, 1)
        codes = codes + (chunk_codes,)
        scales = scales + (chunk_scales,)
    is_plain = tl.max(exceptions, axis=0) == 0
    return codes, scales, is_plain & (gs >= LEAST_GS) & (gs <= MOST_GS)


@triton.jit
def _any_row(row_ptr, gs, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """A row -> (codes, scales' bits, number of saturated blocks)."""
    codes = ()
    scales = ()
    for _ in tl.static_range(CHUNKS):
        codes = codes + (tl.zeros([BLOCKS], tl.int64),)
        scales = scales + (tl.zeros([BLOCKS], tl.int32),)
    num_saturated = tl.zeros([BLOCKS], tl.int32)
    for chunk in range(CHUNKS):  # not unrolled: the slow path is rare
        words = load_blocks(row_ptr, chunk * BLOCKS + tl.arange(0, BLOCKS), NUM_BLOCKS)
        chunk_codes, chunk_scales, saturated = quantize_any(words, gs)
        codes = codes[1:] + (chunk_codes,)
        scales = scales[1:] + (chunk_scales,)
        num_saturated += saturated
    return codes, scales, tl.sum(num_saturated, axis=0)


@triton.jit
def _store_codes(row_ptr, codes, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    for i in tl.static_range(len(codes)):
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        tl.store(row_ptr + block, codes[i], mask=block < NUM_BLOCKS)


@triton.jit
def _store_scales(
    scales_ptr,
    row,
    scales,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ORDER: tl.constexpr,
):
    for i in tl.static_range(len(scales)):
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        if ORDER == _SWIZZLED:
            place = (row // 128) * (COLUMNS * 128) + row % 32 * 16 + row % 128 // 32 * 4
            place = place + block // 4 * 512 + block % 4
        else:
            place = row * STRIDE + block
        tl.store(scales_ptr + place, scales[i].to(tl.uint8), mask=block < COLUMNS)


@triton.jit
def _quantize_kernel(
    x_ptr,  # (tokens, K // 2) int32: two bf16, the even column in the low half
    slot_to_row_ptr,
    live_ptr,
    gs_in_ptr,
    codes_ptr,  # int64: a block each
    scales_ptr,
    gs_out_ptr,
    saturated_ptr,
    NUM_BLOCKS: tl.constexpr,  # K // 16
    SCALE_COLUMNS: tl.constexpr,  # of a row of block scales, padding included
    CODES_STRIDE: tl.constexpr,  # of rows, like the next two
    SCALES_STRIDE: tl.constexpr,  # of block scales that are not swizzled
    GS_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    LIVE: tl.constexpr,  # columns of live
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCKS, in a row of block scales
    POLICY: tl.constexpr,
    ORDER: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    wait_for_inputs(launch_pdl)
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * (NUM_BLOCKS * 8)

    # Phase 1: number of rows to write; a token without any is not read.
    num_rows = 1
    if slot_to_row_ptr is not None:
        num_rows = 0
        for i in tl.static_range(TOP_K):
            num_rows += (tl.load(slot_to_row_ptr + token * TOP_K + i) >= 0).to(tl.int32)
    elif live_ptr is not None:
        num_rows = 0
        for i in tl.static_range(LIVE):
            is_live = (tl.load(live_ptr + token * LIVE + i) >= 0).to(tl.int32)
            num_rows = tl.maximum(num_rows, is_live)
    if num_rows > 0:
        # Phase 2: load the row.
        words = ()
        largest = ()
        for i in tl.static_range(CHUNKS):
            block = i * BLOCKS + tl.arange(0, BLOCKS)
            words = words + (load_blocks(row_ptr, block, NUM_BLOCKS),)
        for i in tl.static_range(CHUNKS):
            largest = largest + (largest_bits(words[i]),)

        # Phase 3: quantise on the fast path, again on the slow one if a block is not plain.
        if POLICY == _OWN:
            gs = _own_scale(row_ptr, largest, NUM_BLOCKS, BLOCKS)
        elif POLICY == _PER_ROW:
            gs = tl.load(gs_in_ptr + token)
        else:
            gs = tl.load(gs_in_ptr)
        codes, scales, is_plain = _plain_row(words, largest, gs, NUM_BLOCKS, BLOCKS)
        num_saturated = tl.zeros([], tl.int32)
        if not is_plain:
            codes, scales, num_saturated = _any_row(row_ptr, gs, NUM_BLOCKS, BLOCKS, CHUNKS)
        if saturated_ptr is not None:
            if num_saturated > 0:
                count = (num_saturated * num_rows).to(tl.int64)
                tl.atomic_add(saturated_ptr, count, sem="relaxed")

        # Phase 4: write row by row: chunk by chunk took 5 % longer on an H200.
        if ORDER == _TOKENS:
            _store_scales(scales_ptr, token, scales, SCALE_COLUMNS, SCALES_STRIDE, BLOCKS, ORDER)
        for slot in range(TOP_K):
            row = token
            if slot_to_row_ptr is not None:
                row = tl.load(slot_to_row_ptr + token * TOP_K + slot).to(tl.int64)
            if row >= 0:
                if POLICY == _OWN:
                    tl.store(gs_out_ptr + row * GS_STRIDE, gs)
                _store_codes(codes_ptr + row * CODES_STRIDE, codes, NUM_BLOCKS, BLOCKS)
                if ORDER != _TOKENS:
                    _store_scales(
                        scales_ptr, row, scales, SCALE_COLUMNS, SCALES_STRIDE, BLOCKS, ORDER
                    )


@triton.jit(do_not_specialize=["num_rows"])
def _swizzle_kernel(
    per_token_ptr,  # (tokens, WORDS) int32: four block scales each
    row_to_slot_ptr,
    scales_ptr,
    num_rows,
    TOP_K: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,  # of four words, in a program
    HAS_LAYOUT: tl.constexpr,
    launch_pdl: tl.constexpr,
):
    """Scratch -> 128x4 blocks of the scales of 128 rows; padding rows keep theirs.

    A thread has four words of four rows 32 apart, which are half a sector a word. Sectors with
    padding rows among others are read, merged and written whole: on an H200 (Triton 3.9), 8192
    tokens of 7168, all experts local, quantise in 91 us; with partial writes, in 95.
    """
    tile = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, 32 * GROUPS)
    row, group = place // GROUPS, tl.program_id(0) * GROUPS + place % GROUPS
    word = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    to = scales_ptr + tile * (WORDS * 128) + group * 512 + row * 4
    to = to[:, None] + tl.arange(0, 4)[None, :]

    # Phase 1, before the PDL wait: reads nothing that the first launch writes.
    tokens = ()
    sector_slot = tl.full([32 * GROUPS], -1, tl.int32)
    for i in tl.static_range(4):
        token = tile * 128 + i * 32 + row
        slot = _load_slot(row_to_slot_ptr, token, num_rows)
        neighbour = _load_slot(row_to_slot_ptr, tile * 128 + i * 32 + (row ^ 1), num_rows)
        sector_slot = tl.maximum(sector_slot, tl.maximum(slot, neighbour))
        if HAS_LAYOUT:
            token = (slot // TOP_K).to(tl.int64)
        tokens = tokens + (tl.where(slot >= 0, token, -1),)
    least = tl.minimum(tl.minimum(tokens[0], tokens[1]), tl.minimum(tokens[2], tokens[3]))
    written = ()
    before = ()
    for i in tl.static_range(4):
        written = written + ((sector_slot >= 0) & (group * 4 + i < WORDS),)
        kept = (written[i] & (least < 0))[:, None]
        before = before + (four_columns(tl.load(to + i * 128, mask=kept, other=0)),)
    wait_for_inputs(launch_pdl)

    # Phase 2: transpose, four words of each row -> four rows of each word.
    rows = ()
    for i in tl.static_range(4):
        exists = (tokens[i][:, None] >= 0) & (word < WORDS)
        words = tl.load(per_token_ptr + tokens[i][:, None] * WORDS + word, mask=exists, other=0)
        rows = rows + (four_columns(words),)
    for i in tl.static_range(4):
        first = tl.where(tokens[0] >= 0, rows[0][i], before[i][0])
        second = tl.where(tokens[1] >= 0, rows[1][i], before[i][1])
        third = tl.where(tokens[2] >= 0, rows[2][i], before[i][2])
        fourth = tl.where(tokens[3] >= 0, rows[3][i], before[i][3])
        four = tl.join(tl.join(first, third), tl.join(second, fourth))
        tl.store(to + i * 128, tl.reshape(four, (32 * GROUPS, 4)), mask=written[i][:, None])


@triton.jit
def _load_slot(row_to_slot_ptr, row, num_rows):
    return tl.load(row_to_slot_ptr + row, mask=row < num_rows, other=-1)


def scratch_size(num_tokens: int, K: int) -> int:
    """Bytes of `nvfp4_quantize`'s scratch."""
    columns = block_scales_shape(1, K, swizzled=True)[1]
    return num_tokens * columns if choose_config(columns, num_tokens).swizzles else 0


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
    scratch: torch.Tensor | None = None,
    out: QuantizedRows | None = None,
) -> QuantizedRows:
    """NVFP4 of every row of x: what `reference.nvfp4_quantize` says, on the GPU.

    x (num_tokens, K) bf16, contiguous, K a multiple of 16. With a layout, token t's codes and
    scales go to every row slot_to_row[t, j] >= 0, and rows that no slot has are left as they are;
    without, row i goes to row i, unless all of live[i] is negative, live (num_tokens,) or
    (num_tokens, any): row_to_slot as live quantises rows that are in their place and skips the
    padding, and expert ids skip tokens that have none. global_scale float32, finite and positive:
    (1,) or, without a layout, (num_tokens,); None for each row's own, which is then written to
    out.global_scales (rows,). saturated, a (1,) int64, grows by the blocks, of written rows, that
    did not fit. out is (rows, K // 2) uint8 codes and E4M3 block scales of block_scales_shape, not
    swizzled maybe parts of longer rows; scratch uint8, scratch_size bytes for swizzled scales; both
    made here if None.
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
    assert out.codes.stride(1) == out.block_scales.stride(1) == 1, out.codes.stride()
    assert not swizzled or out.block_scales.is_contiguous(), out.block_scales.stride()
    assert live is None or (layout is None and len(live) == num_tokens), live.shape
    assert live is None or live.is_contiguous(), live.stride()
    assert policy != OWN or out.global_scales.shape == (rows,), out.global_scales.shape
    if num_tokens == 0:
        return out
    has_pdl = supports_pdl(x)
    top_k = 1 if layout is None else layout.slot_to_row.shape[1]
    config = choose_config(scales_shape[1], num_tokens)
    codes = out.codes.view(torch.int64)
    order, scales = SWIZZLED if swizzled else ROWS, out.block_scales.view(torch.uint8)
    scales_stride = scales.stride(0)
    row_to_slot = live if layout is None else layout.row_to_slot
    swizzles = swizzled and config.swizzles and row_to_slot is not None
    if swizzles:
        if scratch is None:
            scratch = torch.empty(scratch_size(num_tokens, K), dtype=torch.uint8, device=x.device)
        assert scratch.numel() >= scratch_size(num_tokens, K), scratch.shape
        order, scales, scales_stride = TOKENS, scratch, scales_shape[1]
    _quantize_kernel[(num_tokens,)](
        x.view(torch.int32),
        layout.slot_to_row if layout else None,
        live,
        global_scale,
        codes,
        scales,
        out.global_scales,
        saturated,
        NUM_BLOCKS=K // NVFP4_BLOCK,
        SCALE_COLUMNS=scales_shape[1],
        CODES_STRIDE=codes.stride(0),
        SCALES_STRIDE=scales_stride,
        GS_STRIDE=out.global_scales.stride(0),
        TOP_K=top_k,
        LIVE=1 if live is None else live[0].numel(),
        BLOCKS=config.blocks,
        CHUNKS=triton.cdiv(scales_shape[1], config.blocks),
        POLICY=policy,
        ORDER=order,
        launch_pdl=has_pdl,
        num_warps=config.num_warps,
    )
    if swizzles:
        words = scales_shape[1] // SWIZZLE_COLUMNS
        _swizzle_kernel[(triton.cdiv(words, 4 * SWIZZLE_GROUPS), scales_shape[0] // SWIZZLE_ROWS)](
            scales.view(torch.int32),
            row_to_slot,
            out.block_scales.view(torch.int32),
            rows,
            TOP_K=top_k,
            WORDS=words,
            GROUPS=SWIZZLE_GROUPS,
            HAS_LAYOUT=layout is not None,
            launch_pdl=has_pdl,
            num_warps=SWIZZLE_GROUPS,
        )
    return out


def _policy(global_scale: torch.Tensor | None, layout: ExpertLayout | None, num_tokens: int) -> int:
    if global_scale is None:
        return OWN
    assert global_scale.dtype == torch.float32, global_scale.dtype
    if global_scale.numel() == 1:
        return PER_LAYER
    assert layout is None, (
        f"{len(global_scale)} global scales of rows, which a layout has elsewhere"
    )
    assert global_scale.shape == (num_tokens,), (global_scale.shape, num_tokens)
    return PER_ROW


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
