"""What router_topk and gate_route share: scores, selection and shares on the device, and checks.

    score = sqrt(softplus(z)),  softplus(z) = max(z, 0) + log1p(exp(-|z|))

With t = exp(-|z| / 2), which is a normal number down to |z| = 174: exp(-|z|) = t * t, and below
z = -17, where log1p(e) = e to fp32's last bit, the score is t itself. log1p is the series of
2 atanh(e / (2 + e)), whose argument is at most 1/3. Everything is within 4 ulp of the exact value;
logits below -174, whose scores are no normal numbers, score 0.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from dsv4_kernels.types import MAX_EXPERTS, MAX_TOP_K, NUM_IMAGE_TOKEN_IDS, ImageBias, Routing

CHUNK = 128  # experts side by side: four per thread of a warp, one 16-byte load
FINITE_MAX = tl.constexpr(3.4028234663852886e38)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal number; exp2 of less is 0 on a GPU
LOG2_E = tl.constexpr(1.4426950216293335)  # fp32's nearest; LOG2_E_LOW is what it lacks
LOG2_E_LOW = tl.constexpr(1.925963033500011e-08)
LN_2 = tl.constexpr(0.6931471805599453)

# Of a micro-batch or of a rank's shard of a sequence these start at any token: a kernel that is
# compiled for their alignment would be compiled again while serving.
SLICED = ["token_ids_ptr", "padding_ptr"]

# Selection keys: float bits made to sort as int32. No float maps to the two lowest.
KEY_NONE = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(-(2**31) + 1)
NO_EXPERT = tl.constexpr(2**30)


@triton.jit
def _exp_minus(x):
    """exp(-x) for x >= 0, to 2 ulp, 0 below the normal numbers.

    exp2 of the rounded exponent alone would be off by up to x / ln 2 half ulps.
    """
    x = tl.minimum(x, 110.0)  # exp(-110) is 0, and 0 * inf would be NaN
    exponent = x * -LOG2_E
    excess = tl.fma(x, LOG2_E_LOW, tl.fma(x, LOG2_E, exponent))
    power = tl.exp2(exponent)
    return tl.fma(power, excess * -LN_2, power)


@triton.jit
def router_scores(z):
    """sqrt(softplus(z)) of float32, at most the largest finite number; 0 for NaN."""
    root = _exp_minus(0.5 * tl.abs(z))
    power = root * root
    # 1 / (2 + power): the square of rsqrt, and a Newton step; a division is twice as long.
    divisor = 2.0 + power
    reciprocal = tl.rsqrt(divisor)
    reciprocal = reciprocal * reciprocal
    reciprocal = reciprocal * tl.fma(-divisor, reciprocal, 2.0)
    s = power * reciprocal
    s2 = s * s
    series = tl.fma(s2, 0.07692307692, 0.09090909091)
    series = tl.fma(s2, series, 0.11111111111)
    series = tl.fma(s2, series, 0.14285714286)
    series = tl.fma(s2, series, 0.2)
    series = tl.fma(s2, series, 0.33333333333)
    series = tl.fma(s2, series, 1.0)
    softplus = tl.fma(2.0 * s, series, tl.maximum(z, 0.0))
    return tl.minimum(tl.where(z < -17.0, root, tl.sqrt(softplus)), FINITE_MAX)


@triton.jit
def load_bias(bias_ptr, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """CHUNKS tensors (1, WIDTH) of the selection's bias; -inf for NaN."""
    bias = ()
    for chunk in tl.static_range(CHUNKS):
        experts = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(bias_ptr + experts, mask=experts < NUM_EXPERTS, other=0.0).to(tl.float32)
        bias = bias + (tl.where(values == values, values, float("-inf")),)
    return bias


@triton.jit
def selection_keys(logits, selection, in_range):
    """int32 in the order of selection; NaN logits come after every number, then what is no expert.

    Float bits sort as integers once the negative ones have their other bits flipped.
    """
    bits = selection.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(logits == logits, keys, KEY_NAN)
    return tl.where(in_range, keys, KEY_NONE)


@triton.jit
def select_experts(
    keys,
    TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """(TOKENS, K_BLOCK) int32 ids by descending key, ties to the lower id; -1 from TOP_K on.

    keys are CHUNKS tensors (TOKENS, WIDTH), expert chunk * WIDTH + column. Each column is sorted
    once; then the largest of the first row is taken TOP_K times, and its column moves up.
    """
    ids = ()
    for chunk in tl.static_range(CHUNKS):
        ids = ids + (chunk * WIDTH + tl.arange(0, WIDTH)[None, :] + tl.zeros_like(keys[0]),)
    for done in tl.static_range(CHUNKS - 1):
        for i in tl.static_range(CHUNKS - 1 - done):
            swap = keys[i + 1] > keys[i]  # not for equal keys: the lower id stays first
            pair = (tl.where(swap, keys[i + 1], keys[i]), tl.where(swap, keys[i], keys[i + 1]))
            keys = keys[:i] + pair + keys[i + 2 :]
            pair = (tl.where(swap, ids[i + 1], ids[i]), tl.where(swap, ids[i], ids[i + 1]))
            ids = ids[:i] + pair + ids[i + 2 :]
    slots = tl.arange(0, K_BLOCK)[None, :]
    selected = tl.full([TOKENS, K_BLOCK], -1, tl.int32)
    for slot in tl.static_range(TOP_K):
        # Two integer reductions, which a warp does in one instruction each.
        best = tl.max(keys[0], axis=1, keep_dims=True)
        expert = tl.min(tl.where(keys[0] == best, ids[0], NO_EXPERT), axis=1, keep_dims=True)
        selected = tl.where(slots == slot, expert, selected)
        taken = ids[0] == expert
        next_keys, next_ids = (), ()
        for chunk in tl.static_range(CHUNKS - 1):
            next_keys = next_keys + (tl.where(taken, keys[chunk + 1], keys[chunk]),)
            next_ids = next_ids + (tl.where(taken, ids[chunk + 1], ids[chunk]),)
        keys = next_keys + (tl.where(taken, KEY_NONE, keys[CHUNKS - 1]),)
        ids = next_ids + (ids[CHUNKS - 1],)
    return selected


@triton.jit
def shares(scores, live, scaling):
    """(TOKENS, K_BLOCK): scores over the sum of the live ones, times scaling; 0 elsewhere.

    Scaled by a power of two first, which brings the largest to [1, 4), so that no sum overflows or
    vanishes. All 0, or subnormal: equal shares.
    """
    scores = tl.where(live, scores, 0.0)
    largest = tl.max(scores, axis=1, keep_dims=True)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)
    scores = tl.where(largest >= SMALLEST, scores * unit, tl.where(live, 1.0, 0.0))
    total = tl.maximum(tl.sum(scores, axis=1, keep_dims=True), 1.0)
    return scores * tl.div_rn(scaling, total)


def specialisation(
    num_experts: int,
    top_k: int,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    image_bias: ImageBias | None,
    padding: torch.Tensor | None,
    hash_weights: str,
) -> dict[str, Any]:
    """What both kernels are compiled for. A token's experts are CHUNKS tensors of WIDTH."""
    width = min(CHUNK, triton.next_power_of_2(num_experts))
    return {
        "NUM_EXPERTS": num_experts,
        "WIDTH": width,
        "CHUNKS": triton.cdiv(num_experts, width),
        "TOP_K": top_k,
        "K_BLOCK": triton.next_power_of_2(top_k),
        "HAS_BIAS": bias is not None and table is None,
        "HAS_TABLE": table is not None,
        "HAS_IMAGE_BIAS": image_bias is not None,
        "HAS_PADDING": padding is not None,
        "NUM_IMAGE_IDS": NUM_IMAGE_TOKEN_IDS,
        "UNIFORM": table is not None and hash_weights == "uniform",
    }


def empty_routing(
    num_tokens: int, top_k: int, ids_dtype: torch.dtype, device: torch.device
) -> Routing:
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    return Routing(weights, torch.empty_like(weights, dtype=ids_dtype))


def check_routing(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    image_bias: ImageBias | None,
    padding: torch.Tensor | None,
    hash_weights: str,
    out: Routing,
) -> None:
    """What both routers ask of their arguments; AssertionError with the value."""
    assert 1 <= num_experts <= MAX_EXPERTS, f"{num_experts} experts, at most {MAX_EXPERTS}"
    assert 1 <= top_k <= min(MAX_TOP_K, num_experts), f"top_k {top_k} of {num_experts} experts"
    assert hash_weights in ("scored", "uniform"), hash_weights
    if table is not None:
        assert token_ids is not None, "hash routing needs token ids"
        assert table.shape[1] == top_k, f"a table of {table.shape[1]} ids a token, top_k {top_k}"
        assert table.is_contiguous(), table.stride()
    if image_bias is not None:
        assert token_ids is not None, "the image bias needs token ids"
    for row in (bias, image_bias.bias if image_bias else None):
        assert row is None or row.shape == (num_experts,), row.shape
        assert row is None or row.is_contiguous(), row.stride()
    assert token_ids is None or token_ids.is_contiguous(), token_ids.stride()
    assert token_ids is None or token_ids.shape == (num_tokens,), token_ids.shape
    assert padding is None or padding.shape == (num_tokens,), padding.shape
    assert padding is None or padding.dtype == torch.bool, padding.dtype
    assert out.weights.shape == out.ids.shape, (out.weights.shape, out.ids.shape)
    assert out.weights.shape[1:] == (top_k,), out.weights.shape
    assert out.weights.dtype == torch.float32, out.weights.dtype
    assert out.ids.dtype in (torch.int32, torch.int64), out.ids.dtype
    assert out.weights.is_contiguous() and out.ids.is_contiguous()
