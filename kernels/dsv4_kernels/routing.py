"""What router_topk and gate_route share: scores, selection and shares on the device, and checks.

    score = sqrt(softplus(z)),  softplus(z) = max(z, 0) + log1p(exp(-|z|))

With t = exp(-|z| / 2), which is a normal number down to |z| = 174: exp(-|z|) = t * t, and below
z = -17, where log1p(e) = e to fp32's last bit, the score is t itself. log1p is the series of
2 atanh(e / (2 + e)), whose argument is at most 1/3. Everything is within 4 ulp of the exact value.
"""

import torch
import triton
import triton.language as tl

from dsv4_kernels.types import ImageBias, Routing

MAX_EXPERTS = 512
MAX_TOP_K = 16
FINITE_MAX = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950216293335)  # fp32's nearest; LOG2_E_LOW is what it lacks
LOG2_E_LOW = tl.constexpr(1.925963033500011e-08)
LN_2 = tl.constexpr(0.6931471805599453)

# Selection keys: float bits made to sort as int32. No float maps to the two lowest.
KEY_NONE = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(-(2**31) + 1)
NO_EXPERT = tl.constexpr(2**30)


@triton.jit
def _exp_negative(x):
    """exp(x) for x <= 0, to 2 ulp, denormals included: exp2 alone loses |x| / ln 2 half ulps."""
    x = tl.maximum(x, -110.0)  # exp(-110) is 0, and 0 * inf would be NaN
    exponent = x * LOG2_E
    lost = tl.fma(x, LOG2_E, -exponent)
    lost = tl.fma(x, LOG2_E_LOW, lost)
    power = tl.exp2(exponent)
    return tl.fma(power, lost * LN_2, power)


@triton.jit
def router_scores(z):
    """sqrt(softplus(z)) of float32, at most the largest finite number; NaN scores -1."""
    root = _exp_negative(-0.5 * tl.abs(z))
    power = root * root
    s = power / (2.0 + power)
    s2 = s * s
    series = tl.fma(s2, 0.07692307692, 0.09090909091)
    series = tl.fma(s2, series, 0.11111111111)
    series = tl.fma(s2, series, 0.14285714286)
    series = tl.fma(s2, series, 0.2)
    series = tl.fma(s2, series, 0.33333333333)
    series = tl.fma(s2, series, 1.0)
    softplus = tl.maximum(z, 0.0) + 2.0 * s * series
    score = tl.where(z < -17.0, root, tl.sqrt(softplus))
    return tl.where(z == z, tl.minimum(score, FINITE_MAX), -1.0)


@triton.jit
def select_experts(
    selection,
    is_nan,
    experts,
    num_experts,
    TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """(TOKENS, K_BLOCK) int32 ids by descending selection, ties to the lower id; -1 from TOP_K.

    selection and is_nan (of the logit) (TOKENS, E), experts (1, E). NaN logits come after every
    number, -inf included; a NaN of the bias counts as -inf.
    """
    selection = tl.where(selection == selection, selection, float("-inf"))
    bits = selection.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(is_nan, KEY_NAN, keys)
    keys = tl.where(experts < num_experts, keys, KEY_NONE)
    slots = tl.arange(0, K_BLOCK)[None, :]
    ids = tl.full([TOKENS, K_BLOCK], -1, tl.int32)
    for slot in tl.static_range(TOP_K):
        # Two integer reductions, which a warp does in one instruction each.
        best = tl.max(keys, axis=1, keep_dims=True)
        expert = tl.min(tl.where(keys == best, experts, NO_EXPERT), axis=1, keep_dims=True)
        ids = tl.where(slots == slot, expert, ids)
        keys = tl.where(experts == expert, KEY_NONE, keys)
    return ids


@triton.jit
def shares(scores, live, scaling):
    """(TOKENS, K_BLOCK): scores over the sum of the live ones, times scaling; 0 elsewhere.

    Divided by the largest first, so that no sum overflows or vanishes. All 0: equal shares.
    """
    scores = tl.where(live, tl.maximum(scores, 0.0), 0.0)
    largest = tl.max(scores, axis=1, keep_dims=True)
    equal = tl.where(live, 1.0, 0.0)
    scores = tl.where(largest > 0, tl.div_rn(scores, tl.where(largest > 0, largest, 1.0)), equal)
    total = tl.maximum(tl.sum(scores, axis=1, keep_dims=True), 1.0)
    return tl.div_rn(scores, total) * scaling


def check_routing(
    num_experts: int,
    top_k: int,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    image_bias: ImageBias | None,
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
    assert out.weights.shape == out.ids.shape, (out.weights.shape, out.ids.shape)
    assert out.weights.shape[1:] == (top_k,), out.weights.shape
    assert out.weights.dtype == torch.float32, out.weights.dtype
    assert out.ids.dtype in (torch.int32, torch.int64), out.ids.dtype
    assert out.weights.is_contiguous() and out.ids.is_contiguous()
