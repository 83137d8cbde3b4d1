"""The layer in plain fp32 PyTorch, one function per op: the oracle, and the `reference` backend.

Formulas: DeepSeek-V4 report section 2.1 and its reference code; NVFP4 as NVIDIA ModelOpt defines
it, MXFP4 as the OCP's MX specification does. Kernels are compared with this file; it shares no code
with them.
"""

import torch
import torch.nn.functional as F

from dsv4_kernels.types import (
    E2M1_MAX,
    E4M3_MAX,
    MXFP4_BLOCK,
    NUM_IMAGE_TOKEN_IDS,
    NVFP4_BLOCK,
    NVFP4_MAX,
    ActivationAmax,
    ActivationScales,
    ExpertLayout,
    ExpertWeights,
    Fp8Rows,
    ImageBias,
    QuantizedRows,
    Routing,
    capacity,
)

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FINITE_MAX = torch.finfo(torch.float32).max


def router_scores(logits: torch.Tensor) -> torch.Tensor:
    """sqrt(softplus(logits)) in fp32, exact far below zero. NaN scores as -1, under every number.

    (num_tokens, num_experts) any float -> float32. softplus(z) = max(z, 0) + log1p(exp(-|z|)).
    Below -17, log1p(e) = e to fp32's last bit and sqrt(exp(z)) = exp(z / 2): with the root taken
    in the exponent, scores stay normal numbers down to z = -174 and above 0 down to z = -206,
    where sqrt(softplus) would be gone at -103 (and log(1 + exp(z)) at -16.6). +inf scores as the
    largest finite number, -inf as 0.
    """
    z = logits.float()
    softplus = z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    scores = torch.where(z < -17, torch.exp(z / 2), softplus.sqrt())
    return torch.where(z.isnan(), -1.0, scores.clamp(max=_FINITE_MAX))


def top_experts(scores: torch.Tensor, bias: torch.Tensor | None, top_k: int) -> torch.Tensor:
    """(num_tokens, top_k) int64 ids by descending score + bias, ties to the lower id.

    A NaN logit (score -1) comes after every number, with another NaN logit to the lower id. A NaN
    in the bias counts as -inf.
    """
    assert top_k <= scores.shape[1], f"{top_k} of {scores.shape[1]} experts"
    selection = scores if bias is None else scores + bias.float()
    selection = torch.where(selection.isnan() | (scores < 0), -torch.inf, selection)
    order = torch.argsort(selection, dim=1, descending=True, stable=True)
    # Numbers of -inf are before the NaN logits, which sort equal to them by value.
    is_nan = (scores < 0).to(torch.int8).gather(1, order)
    return order.gather(1, torch.argsort(is_nan, dim=1, stable=True))[:, :top_k]


def router_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    image_bias: ImageBias | None = None,
    padding: torch.Tensor | None = None,
    scaling: float = 1.0,
    hash_weights: str = "scored",
    ids_dtype: torch.dtype = torch.int32,
) -> Routing:
    """Expert ids and weights of every token: dense by scores plus bias, or hash by token id.

    logits (num_tokens, num_experts); bias (num_experts,) selects only; table (vocab, top_k) int
    of expert ids with token_ids (num_tokens,) int. A token id outside the table, negative ones
    (padding) included, gives a row of -1 and 0; an expert id outside [0, num_experts) gives that
    slot -1 and 0, and the other slots share the weight. With image_bias, rows whose token id is an
    image's select by score plus that bias instead, whatever the layer. Rows where padding
    (num_tokens,) bool is true get -1 and 0.

    Weights are the selected scores over their sum, times scaling, in slot order; if every selected
    score is 0 (or NaN), the slots share equally. An id that a table's row repeats keeps both its
    slots. hash_weights "uniform" gives the hashed rows equal shares whatever the scores.
    """
    assert hash_weights in ("scored", "uniform"), hash_weights
    scores = router_scores(logits)
    uniform = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
    if table is None:
        ids = top_experts(scores, bias, top_k)
    else:
        assert token_ids is not None, "hash routing needs token ids"
        assert table.shape[1] == top_k, f"a table of {table.shape[1]} ids a token, top_k {top_k}"
        known = ((token_ids >= 0) & (token_ids < len(table)))[:, None]
        ids = torch.where(known, table[token_ids.long().clamp(0, len(table) - 1)].long(), -1)
        ids = torch.where((ids >= 0) & (ids < scores.shape[1]), ids, -1)
        uniform |= hash_weights == "uniform"
    if image_bias is not None:
        assert token_ids is not None, "the image bias needs token ids"
        offset = (token_ids.long() - image_bias.first_token_id)[:, None]
        is_image = (offset >= 0) & (offset < NUM_IMAGE_TOKEN_IDS)
        ids = torch.where(is_image, top_experts(scores, image_bias.bias, top_k), ids)
        uniform &= ~is_image
    if padding is not None:
        ids = ids.masked_fill(padding[:, None], -1)
    selected = scores.gather(1, ids.clamp(min=0)).clamp(min=0).masked_fill(uniform, 1.0)
    return Routing(_shares(selected, ids >= 0) * scaling, ids.to(ids_dtype))


def _shares(selected: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """selected over the sum of its live slots, 0 elsewhere; equal shares if all of them are 0."""
    selected = selected.masked_fill(~live, 0.0)
    # Divide by the largest first: a sum of huge or tiny scores neither overflows nor vanishes.
    largest = selected.amax(1, keepdim=True)
    selected = torch.where(largest > 0, selected / largest, live.float())
    return selected / selected.sum(1, keepdim=True).clamp(min=1.0)


def expert_layout(
    ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None, tile: int
) -> ExpertLayout:
    """Rows for every local (token, slot): grouped by expert, padded to the tile, in slot order.

    ids (num_tokens, top_k) global, -1 where there is none; expert_map (num_experts,) int32 from
    global to local, -1 for foreign experts, None when all are local.
    """
    num_tokens, top_k = ids.shape
    local = ids.long()
    if expert_map is not None:
        known = (local >= 0) & (local < len(expert_map))
        local = torch.where(known, expert_map[local.clamp(0, len(expert_map) - 1)].long(), -1)
    flat = local.flatten()
    flat = torch.where((flat >= 0) & (flat < num_local_experts), flat, num_local_experts)
    counts = torch.bincount(flat, minlength=num_local_experts + 1)[:num_local_experts]
    padded = (counts + tile - 1) // tile * tile
    offsets = F.pad(padded.cumsum(0), (1, 0))
    rows = capacity(num_tokens, top_k, num_local_experts, tile)
    order = torch.argsort(flat, stable=True)[: int(counts.sum())]
    first_slot = F.pad(counts.cumsum(0), (1, 0))
    expert = flat[order]
    row = offsets[expert] + torch.arange(len(order), device=ids.device) - first_slot[expert]
    slot_to_row = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=ids.device)
    row_to_slot = torch.full((rows,), -1, dtype=torch.int32, device=ids.device)
    slot_to_row[order] = row.int()
    row_to_slot[row] = order.int()
    tiles = torch.arange(rows // tile, device=ids.device) * tile
    tile_to_expert = torch.searchsorted(offsets, tiles, right=True) - 1
    tile_to_expert = torch.where(tiles < offsets[-1], tile_to_expert, -1)
    return ExpertLayout(
        slot_to_row.view(num_tokens, top_k),
        row_to_slot,
        counts.int(),
        offsets.int(),
        tile_to_expert.int(),
    )


def unpack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """(..., K // 2) uint8 -> (..., K) float32; low nibble first, bit 3 is the sign."""
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    signed = E2M1_VALUES + tuple(-v for v in E2M1_VALUES)
    return torch.tensor(signed, dtype=torch.float32, device=codes.device)[nibbles]


def nvfp4_dequantize(
    codes: torch.Tensor, block_scales: torch.Tensor, global_scale: torch.Tensor | float
) -> torch.Tensor:
    """(..., K // 2) uint8, (..., K // 16) E4M3, broadcastable float32 -> (..., K) float32."""
    blocks = unpack_e2m1(codes).unflatten(-1, (-1, NVFP4_BLOCK))
    return (blocks * block_scales.float()[..., None]).flatten(-2) * global_scale


def mxfp4_dequantize(codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    """(..., K // 2) uint8, (..., K // 32) uint8 -> (..., K) float32: E2M1 code * 2^(byte - 127).

    A byte of 255 is NaN. Values of 2^128 and more, of bytes 253 and 254, are infinite.
    """
    blocks = unpack_e2m1(codes).unflatten(-1, (-1, MXFP4_BLOCK))
    values = torch.ldexp(blocks.double(), block_scales[..., None].double() - 127).float()
    return values.masked_fill((block_scales == 255)[..., None], torch.nan).flatten(-2)


def _unit_weights(
    codes: torch.Tensor, block_scales: torch.Tensor, fp8: bool
) -> tuple[torch.Tensor, float]:
    """(rows, K) float32, without the global scale, and a power of two that products with them are
    multiplied by: MXFP4's are over the largest scale of a block that is not all zeros, so that none
    overflows.

    fp8: rounded to E4M3, NVFP4's at an eighth of their size and MXFP4's with the largest scale as
    64, of which scales down to a 2^-14th are exact.
    """
    if block_scales.dtype != torch.uint8:
        unit = nvfp4_dequantize(codes, block_scales, 1.0)
        return (_rounded_to_e4m3(unit / 8) * 8 if fp8 else unit), 1.0
    blocks = unpack_e2m1(codes).unflatten(-1, (-1, MXFP4_BLOCK))
    largest = int(block_scales.masked_fill((blocks == 0).all(-1), 0).max())
    scales = torch.exp2((block_scales.double() - largest).clamp(max=0)).float()
    unit = (blocks * scales[..., None]).flatten(-2)
    return (_rounded_to_e4m3(unit * 64) / 64 if fp8 else unit), 2.0 ** (largest - 127)


def _rounded_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """To nearest even, float32; none is over 448."""
    return values.to(torch.float8_e4m3fn).float()


def nvfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """The global scale at which amax is the largest representable value; 1 where amax is 0.

    amax counts as 3.4e38 at most (bf16 ends below), so that 2688 times the scale is finite, and
    the scale is 2^-100 at least, so that its products with block scales are normal numbers.
    """
    amax = amax.float().clamp(max=3.4e38)
    scale = amax / torch.full_like(amax, NVFP4_MAX)
    return torch.where(amax > 0, scale.clamp(min=2.0**-100), 1.0)


def nvfp4_quantize(
    x: torch.Tensor, global_scale: torch.Tensor | None
) -> tuple[QuantizedRows, torch.Tensor]:
    """NVFP4 of every row of x and the number of saturated blocks.

    x (rows, K) float; global_scale (1,) or (rows,) float32, None for one per row from its own
    amax. block scale = e4m3(amax_block / 6 / gs), code = e2m1(x / (block scale * gs)), both to
    nearest even; a zero scale gives zero codes. A block is saturated when its scale would round
    to more than 448, or when it holds inf or NaN; inf becomes a signed 6 and NaN +6 (what the
    hardware's cvt.rn.satfinite does).
    """
    x = x.float()
    if global_scale is None:
        global_scale = nvfp4_global_scale(x.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(1))
    gs = global_scale.float().reshape(-1, 1)
    blocks = x.unflatten(1, (-1, NVFP4_BLOCK))
    amax = blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(2)
    # A division by a Python number is a product with its rounded inverse on a GPU.
    quotient = amax / torch.full_like(amax, E2M1_MAX) / gs
    # 464 is the tie between 448 and the next E4M3 step, and goes to 448.
    saturated = (quotient > 464) | ~blocks.isfinite().all(2)
    block_scales = quotient.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    scale = (block_scales.float() * gs)[:, :, None]
    scaled = torch.where(scale > 0, blocks / scale, 0.0)
    scaled = torch.where(blocks.isnan() & (scale > 0), E2M1_MAX, scaled)
    magnitude = scaled.abs().clamp(max=E2M1_MAX)
    # E2M1 steps: 0.5 below 2, 1 below 4, 2 above; torch.round goes to even.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (magnitude / step).round() * step
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=x.device)
    code = torch.bucketize(rounded, values)
    code = (code + 8 * torch.signbit(scaled)).to(torch.uint8).flatten(1)
    packed = code[:, 0::2] | (code[:, 1::2] << 4)
    return QuantizedRows(packed, block_scales, global_scale.float()), saturated.sum()


def fp8_scale(amax: torch.Tensor) -> torch.Tensor:
    """A 448th of amax; 1 where amax is 0.

    amax counts as 3.4e38 at most, and the scale is 2^-100 at least. The largest value is exact so,
    and those near it lie where E4M3's steps are smallest beside its numbers: of rows with loud
    channels, a power of two would cost 1 to 2 % more error.
    """
    amax = amax.float()
    scale = amax.clamp(max=3.4e38) / torch.full_like(amax, E4M3_MAX)
    return torch.where(amax > 0, scale.clamp(min=2.0**-100), 1.0)


def fp8_quantize(
    x: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 of every row of x (rows, K) float8_e4m3fn, the rows' scales (rows,) float32, and the
    number of saturated values.

    scale (1,) float32 or None for each row's own, `fp8_scale` of its amax. Codes are x times the
    scale's inverse, each rounded to float32, to nearest even. A value is saturated where that would
    be more than 448, and becomes a signed 448, an infinity too; NaN stays NaN and counts as 0 for
    the scale.
    """
    x = x.float()
    if scale is None:
        scale = fp8_scale(x.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(1))
    scale = scale.float().expand(len(x))
    quotient = x * (torch.ones_like(scale) / scale)[:, None]
    saturated = quotient.abs() > 464  # the tie between 448 and the next step goes to 448
    codes = quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale, saturated.sum()


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), fp32."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def combine(rows: torch.Tensor, slot_to_row: torch.Tensor) -> torch.Tensor:
    """Sum of each token's rows in slot order, fp32; zero for a token with no local expert.

    rows (capacity, hidden) bf16 -> (num_tokens, hidden) bf16. The routing weight is in the rows
    already.
    """
    out = torch.zeros(len(slot_to_row), rows.shape[1], dtype=torch.float32, device=rows.device)
    for slot in slot_to_row.long().unbind(1):
        term = rows[slot.clamp(min=0)].float()
        out = torch.where((slot >= 0)[:, None], out + term, out)
    return out.to(rows.dtype)


def fc1(
    x: torch.Tensor,
    weights: ExpertWeights,
    expert: int,
    slot_weights: torch.Tensor,
    limit: float | None,
    fp8: bool = False,
) -> torch.Tensor:
    """One expert's first GEMM with SwiGLU and routing weight: (rows, hidden) -> (rows, inter)."""
    unit, power = _unit_weights(weights.w13[expert], weights.w13_block_scales[expert], fp8)
    gate, up = (x @ unit.T * power).chunk(2, dim=1)
    gate_scale, up_scale = weights.w13_global_scales[expert].unbind()
    return swiglu(gate * gate_scale, up * up_scale, limit) * slot_weights[:, None]


def fc2(h: torch.Tensor, weights: ExpertWeights, expert: int, fp8: bool = False) -> torch.Tensor:
    """One expert's second GEMM: (rows, inter) -> (rows, hidden)."""
    unit, power = _unit_weights(weights.w2[expert], weights.w2_block_scales[expert], fp8)
    return (h @ unit.T) * power * weights.w2_global_scales[expert]


def moe(
    hidden_states: torch.Tensor | QuantizedRows | Fp8Rows,
    routing: Routing,
    weights: ExpertWeights,
    *,
    expert_map: torch.Tensor | None = None,
    limit: float | None = None,
    activation_scales: ActivationScales | None = None,
    fp8: bool = False,
    saturated: torch.Tensor | None = None,
    amax: ActivationAmax | None = None,
) -> torch.Tensor:
    """The routed experts of one rank: (num_tokens, hidden) bf16 -> (num_tokens, hidden) bf16.

    With activation_scales both GEMMs' inputs are quantised to NVFP4 (W4A4), and `saturated`, a
    (1,) int64 counter, grows by the blocks that did not fit; without, they are bf16 (W4A16). The
    routing weight multiplies the activation before W2. That product is rounded once, to NVFP4 or
    bf16, but to bf16 and then NVFP4 where each row has its own scale. W2's rows are bf16, summed
    in fp32. `amax` grows in place by what both GEMMs' inputs are before they are rounded.

    With fp8 both GEMMs' inputs, and the weights, are E4M3 (W4A8): x with a scale a row, and W2's
    input with activation_scales.fc2 of its expert or, where there are none, with a scale a row. The
    routing weight then multiplies W2's sums, and `saturated` grows by values.

    hidden_states may be NVFP4 or E4M3 rows already, these with columns in order: x is what they
    stand for.
    """
    is_quantized = not isinstance(hidden_states, torch.Tensor)
    if isinstance(hidden_states, Fp8Rows):
        hidden_states = hidden_states.codes.float() * hidden_states.scales[:, None]
    elif isinstance(hidden_states, QuantizedRows):
        codes, block_scales, gs = hidden_states
        hidden_states = nvfp4_dequantize(codes, block_scales, gs.reshape(-1, 1))
    assert not fp8 or activation_scales is None or activation_scales.fc1 is None
    layout = expert_layout(routing.ids, weights.num_local_experts, expert_map, tile=1)
    rows = torch.zeros(
        len(layout.row_to_slot),
        hidden_states.shape[1],
        dtype=torch.bfloat16,
        device=hidden_states.device,
    )

    def round_input(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if fp8:
            x = x.bfloat16() if scale is None else x
            values, row_scales, overflow = fp8_quantize(x, scale)
            if saturated is not None:
                saturated.add_(overflow)
            return values.float() * row_scales[:, None]
        if activation_scales is None:
            return x.bfloat16().float()
        # A row's own scale is known when the row is: until then it is kept in bf16.
        x = x.bfloat16() if scale is None else x
        (codes, block_scales, gs), overflow = nvfp4_quantize(x, scale)
        if saturated is not None:
            saturated.add_(overflow)
        return nvfp4_dequantize(codes, block_scales, gs.reshape(-1, 1))

    for expert, (start, count) in enumerate(
        zip(layout.offsets.tolist(), layout.counts.tolist(), strict=False)
    ):
        if count == 0:
            continue
        slots = layout.row_to_slot[start : start + count].long()
        fc1_scale = fc2_scale = None
        if activation_scales is not None:
            fc1_scale = activation_scales.fc1
            if activation_scales.fc2 is not None:
                fc2_scale = activation_scales.fc2[expert : expert + 1]
        tokens = hidden_states[slots // routing.ids.shape[1]]
        x = tokens if is_quantized else round_input(tokens, fc1_scale)
        slot_weights = routing.weights.flatten()[slots]
        before, after = slot_weights, None
        if fp8:
            before, after = torch.ones_like(slot_weights), slot_weights[:, None]
        h = fc1(x, weights, expert, before, limit, fp8)
        if amax is not None:
            amax.fc1[0] = torch.maximum(amax.fc1[0], tokens.float().abs().amax())
            amax.fc2[expert] = torch.maximum(amax.fc2[expert], h.float().abs().amax())
        y = fc2(round_input(h, fc2_scale), weights, expert, fp8)
        rows[start : start + count] = (y if after is None else y * after).bfloat16()
    return combine(rows, layout.slot_to_row)
