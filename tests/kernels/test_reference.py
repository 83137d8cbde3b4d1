"""The oracle against the formulas, written out once more as loops over float64 numbers.

Nothing here shares code with `reference`. Where the format itself is defined by fp32 arithmetic
(NVFP4's two divisions), the loops divide in fp32 too, and compare bits.
"""

import math

import numpy as np
import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import reference
from dsv4_kernels.types import ActivationScales, ExpertWeights, ImageBias, MoeShape, Routing

FLOAT32_MAX = float(np.finfo(np.float32).max)


def score(z: float) -> float:
    """sqrt(log(1 + e^z)) in float64, which underflows at -745 only."""
    if z == math.inf:
        return FLOAT32_MAX
    if z == -math.inf:
        return 0.0
    return math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z))))


def choose(row: list[float], bias: list[float], top_k: int) -> list[int]:
    """Greedy: the best remaining expert, first of equals; NaN only when no number is left.

    A NaN in the bias counts as -inf.
    """
    left, chosen = list(range(len(row))), []
    bias = [-math.inf if math.isnan(b) else b for b in bias]
    for _ in range(top_k):
        numbers = [e for e in left if not math.isnan(row[e])]
        best = left[0] if not numbers else numbers[0]
        for e in numbers:
            if score(row[e]) + bias[e] > score(row[best]) + bias[best]:
                best = e
        chosen.append(best)
        left.remove(best)
    return chosen


def shares(row: list[float], chosen: list[int], scaling: float) -> list[float]:
    scores = [0.0 if e < 0 or math.isnan(row[e]) else score(row[e]) for e in chosen]
    if sum(scores) == 0:
        scores = [1.0 if e >= 0 else 0.0 for e in chosen]
    total = sum(scores)
    return [s / total * scaling if total else 0.0 for s in scores]


def make_logits(kind: str, num_tokens: int, num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    noise = torch.randn(num_tokens, num_experts, generator=generator)
    coin = torch.rand(num_tokens, num_experts, generator=generator)
    if kind == "random":
        return noise * 3
    if kind == "both-80":
        return torch.where(coin < 0.5, -80.0, 80.0) + noise
    if kind == "around-17":
        return noise * 0.5 - 17
    if kind == "far-below-zero":
        return noise * 3 - 100
    if kind == "infinities":
        inf = torch.where(coin < 0.02, torch.inf, -torch.inf)
        return torch.where((coin < 0.02) | (coin > 0.9), inf, noise)
    if kind == "some-nan":
        return torch.where(coin < 0.4, torch.nan, noise)
    if kind == "more-nan-than-numbers":
        return torch.where(coin < 0.99, torch.nan, torch.where(coin < 0.995, -torch.inf, noise))
    if kind == "all-equal":
        return torch.full((num_tokens, num_experts), 0.5)
    assert kind == "many-ties", kind
    return (noise * 2).round() / 2


KINDS = [
    "random",
    "both-80",
    "around-17",
    "far-below-zero",
    "infinities",
    "some-nan",
    "more-nan-than-numbers",
    "all-equal",
    "many-ties",
]


@pytest.mark.parametrize("top_k", [1, 6, 16])
@pytest.mark.parametrize("num_experts", [6, 32, 144, 256, 384, 512])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_dense_routing_is_the_formula(dtype, kind, num_experts, top_k):
    if top_k > num_experts:
        with pytest.raises(AssertionError, match=f"{top_k} of {num_experts} experts"):
            reference.router_topk(torch.zeros(1, num_experts), top_k)
        return
    num_tokens = 3
    logits = make_logits(kind, num_tokens, num_experts)
    # Multiples of 1/8 keep equal scores equal after the bias; it is drawn apart from the logits.
    bias = None if "ties" in kind else torch.arange(num_experts) % 3 / 8
    routing = reference.router_topk(logits, top_k, bias=bias, scaling=2.5, ids_dtype=dtype)
    assert routing.ids.dtype == dtype
    for token, row in enumerate(logits.tolist()):
        expected = choose(row, [0.0] * num_experts if bias is None else bias.tolist(), top_k)
        assert routing.ids[token].tolist() == expected
        weights = routing.weights[token].double().numpy()
        np.testing.assert_allclose(weights, shares(row, expected, 2.5), rtol=1e-6, atol=1e-37)
    assert routing.weights.isfinite().all()


def test_an_expert_that_the_bias_excludes_comes_before_a_nan_logit():
    num_experts = 16
    logits = make_logits("some-nan", 8, num_experts)
    bias = torch.arange(num_experts) / 8
    bias[::3], bias[1::5] = -torch.inf, torch.nan
    routing = reference.router_topk(logits, num_experts, bias=bias)
    for token, row in enumerate(logits.tolist()):
        expected = choose(row, bias.tolist(), num_experts)
        assert routing.ids[token].tolist() == expected
        np.testing.assert_allclose(routing.weights[token], shares(row, expected, 1.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("weighting", ["scored", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_hash_routing_is_the_table(kind, weighting, token_dtype, dtype):
    num_experts, top_k, vocab = 32, 6, 11
    generator = torch.Generator().manual_seed(3)
    # Some rows repeat an expert, and one names experts that do not exist.
    table = torch.randint(0, num_experts, (vocab, top_k), generator=generator)
    table[4] = table[4, 0]
    table[5, 1:4] = torch.tensor([-3, num_experts, 2**40])
    token_ids = torch.tensor([0, 4, 5, 10, -1, -(2**31), 11, 2**31 - 1]).to(token_dtype)
    logits = make_logits(kind, len(token_ids), num_experts)
    routing = reference.router_topk(
        logits,
        top_k,
        table=table,
        token_ids=token_ids,
        scaling=1.5,
        hash_weights=weighting,
        ids_dtype=dtype,
    )
    assert routing.ids.dtype == dtype
    for token, (token_id, row) in enumerate(zip(token_ids.tolist(), logits.tolist(), strict=True)):
        expected = table[token_id].tolist() if 0 <= token_id < vocab else [-1] * top_k
        expected = [e if 0 <= e < num_experts else -1 for e in expected]
        assert routing.ids[token].tolist() == expected
        flat = [0.0] * num_experts if weighting == "uniform" else row
        weights = routing.weights[token].double().numpy()
        np.testing.assert_allclose(weights, shares(flat, expected, 1.5), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("layer", ["dense", "hash"])
def test_image_tokens_select_by_their_own_bias(layer):
    num_experts, top_k, first = 32, 6, 20
    generator = torch.Generator().manual_seed(5)
    text, image = torch.rand(2, num_experts, generator=generator)
    table = torch.randint(0, num_experts, (64, top_k), generator=generator)
    token_ids = torch.arange(18, 28)  # 20 to 24 are the image's
    logits = make_logits("random", len(token_ids), num_experts)
    routing = reference.router_topk(
        logits,
        top_k,
        bias=text if layer == "dense" else None,
        table=table if layer == "hash" else None,
        token_ids=token_ids,
        image_bias=ImageBias(image, first),
        hash_weights="uniform",
    )
    for token, row in enumerate(logits.tolist()):
        is_image = 20 <= token_ids[token] < 25
        bias = image if is_image else text
        expected = choose(row, bias.tolist(), top_k)
        if layer == "hash" and not is_image:
            expected, row = table[token_ids[token]].tolist(), [0.0] * num_experts
        assert routing.ids[token].tolist() == expected
        np.testing.assert_allclose(routing.weights[token], shares(row, expected, 1.0), rtol=1e-6)


def test_scores_are_exact_over_the_whole_range():
    z = torch.cat((torch.linspace(-174, 90, 20001), torch.linspace(-17.01, -16.99, 2001)))
    expected = np.array([score(value) for value in z.double().tolist()])
    np.testing.assert_allclose(reference.router_scores(z).double(), expected, rtol=2.0**-22)


def test_scores_never_fall_as_logits_rise():
    """Selection by logits and by scores must agree across the seam at -17, ulp by ulp."""
    seam = np.float32(-17.0) + np.arange(-2000, 2000, dtype=np.float32) * np.float32(2.0**-19)
    scores = reference.router_scores(torch.from_numpy(seam))
    falls = (scores.diff() < 0).sum()
    assert scores.diff().min() >= -(2.0**-23) * scores.max(), f"{falls} steps fall"


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_routing_of_few_tokens(num_tokens):
    routing = reference.router_topk(torch.zeros(num_tokens, 32), 6)
    assert routing.ids.shape == routing.weights.shape == (num_tokens, 6)


# NVFP4, from its definition: sign, two bits of exponent, one of mantissa; E4M3 with bias 7.


def e2m1(code: int) -> float:
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if code & 8 else magnitude


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nearest(value: float, candidates: list[float]) -> int:
    """Index of the nearest non-negative candidate, of two the even index; the last saturates."""
    best = 0
    for index, candidate in enumerate(candidates):
        gain = abs(value - candidates[best]) - abs(value - candidate)
        if gain > 0 or (gain == 0 and index % 2 == 0):
            best = index
    return best


E2M1 = [e2m1(code) for code in range(8)]
E4M3 = [e4m3(byte) for byte in range(127)]  # 127 is NaN


def quantize_block(block: list[float], gs: float) -> tuple[list[int], int, bool]:
    """16 fp32 numbers -> codes, scale byte, saturated; NaN and inf as the docstring promises."""
    f32 = np.float32
    finite = [abs(v) for v in block if not math.isnan(v)]
    with np.errstate(over="ignore"):
        quotient = f32(f32(max(finite, default=0.0)) / f32(6)) / f32(gs)
    scale_byte = nearest(float(quotient), E4M3) if quotient < 448 else 126
    scale = f32(E4M3[scale_byte]) * f32(gs)
    codes = []
    for value in block:
        if scale == 0:
            codes.append(0)
        elif math.isnan(value):
            codes.append(7)
        else:
            with np.errstate(over="ignore"):
                magnitude = min(float(abs(f32(value) / scale)), 6.0)
            codes.append(nearest(magnitude, E2M1) + (8 if math.copysign(1, value) < 0 else 0))
    saturated = bool(quotient > 464) or not all(map(math.isfinite, block))
    return codes, scale_byte, saturated


def make_rows(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(6, 64, generator=generator)
    if kind == "all-zero-block":
        x[:, 16:32] = 0.0
        x[2] = 0.0
    elif kind == "negative-zero":
        x[:, ::3] = -0.0
        x[1] = -0.0
    elif kind == "subnormal-scales":
        x *= torch.tensor([2.0**-6, 2.0**-8, 2.0**-9, 2.0**-10, 2.0**-12, 1.0])[:, None]
    elif kind == "subnormal-values":
        x *= 1e-39
    elif kind == "ties":
        # Every midpoint of E2M1 under a block scale of exactly 1, and exact codes.
        ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
        x = torch.cat((ties, -ties)).repeat(6, 4)
    elif kind == "scale-ties":
        # amax / 6 at the midpoints of E4M3 neighbours, normal and subnormal.
        steps = torch.tensor([1.0625, 1.1875, 2.0**-9 * 1.5, 2.0**-9 * 2.5, 2.0**-10, 17.0])
        x = x.clamp(-1, 1)
        x[:, ::16] = 6 * steps[:, None]
    elif kind == "inf-and-nan":
        x[0, 3], x[1, 20], x[2, 40], x[3, :] = torch.inf, -torch.inf, torch.nan, torch.nan
        x[4, 16:32] = 0.0
        x[4, 17] = torch.nan
    elif kind == "too-large":
        x *= torch.tensor([448.0, 460.0, 1e4, 1e30, 1e38, 1.0])[:, None]
    return x


@pytest.mark.parametrize("gs", [1.0, 0.0317, 2.0**-30, None], ids=["1", "0.0317", "2^-30", "token"])
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "all-zero-block",
        "negative-zero",
        "subnormal-scales",
        "subnormal-values",
        "ties",
        "scale-ties",
        "inf-and-nan",
        "too-large",
    ],
)
def test_nvfp4_is_the_format(kind, gs):
    x = make_rows(kind)
    scale = None if gs is None else torch.tensor([gs])
    rows, saturated = reference.nvfp4_quantize(x, scale)
    used = rows.global_scales.expand(len(x)).tolist()
    expected_saturated = 0
    for r, row in enumerate(x.tolist()):
        for b in range(len(row) // 16):
            codes, scale_byte, overflow = quantize_block(row[16 * b : 16 * b + 16], used[r])
            packed = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
            assert rows.codes[r, 8 * b : 8 * b + 8].tolist() == packed, (r, b)
            assert rows.block_scales.view(torch.uint8)[r, b] == scale_byte, (r, b)
            expected_saturated += overflow
    assert saturated == expected_saturated
    assert reference.nvfp4_dequantize(*rows[:2], rows.global_scales[:, None]).isfinite().all()


def test_nvfp4_divides_by_6_and_then_by_the_global_scale():
    """At ties of E4M3, where one rounding more or less, or a reciprocal, shows."""
    generator = torch.Generator().manual_seed(13)
    gs = torch.exp2(torch.rand(400, generator=generator) * 8 - 6)
    x = torch.rand(400, 16, generator=generator) * gs[:, None]
    x[:, 5] = 6 * 1.0625 * gs
    x[1::2, 5] = x[1::2, 5].nextafter(torch.tensor(0.0))
    rows, _ = reference.nvfp4_quantize(x, gs)
    expected = [quantize_block(row, float(g))[1] for row, g in zip(x.tolist(), gs, strict=True)]
    assert rows.block_scales.view(torch.uint8).flatten().tolist() == expected


def test_a_scale_per_row_never_saturates_a_finite_row():
    x = torch.logspace(-44, 38, 64)[:, None] * torch.linspace(-3.4, 1, 64)
    x[-1, -1] = torch.finfo(torch.float32).max
    rows, saturated = reference.nvfp4_quantize(x, None)
    assert reference.nvfp4_dequantize(*rows[:2], rows.global_scales[:, None]).isfinite().all()
    assert saturated == 0
    assert (rows.global_scales > 0).all()


@pytest.mark.parametrize("code", range(16))
def test_dequantize_reads_the_low_nibble_first(code):
    packed = torch.tensor([[code | 2 << 4] * 8], dtype=torch.uint8)
    scales = torch.tensor([[1.75]]).to(torch.float8_e4m3fn)
    values = reference.nvfp4_dequantize(packed, scales, 0.5)
    assert values[0, 0::2].tolist() == [e2m1(code) * 1.75 * 0.5] * 8
    assert values[0, 1::2].tolist() == [1.0 * 1.75 * 0.5] * 8


def mxfp4_value(code: int, byte: int) -> float:
    return math.ldexp(e2m1(code), byte - 127)


def test_mxfp4_is_the_format():
    """Each code under each byte, in the second of two blocks; float32 ends at 2^128."""
    for byte in range(255):
        packed = torch.tensor([[0x77] * 16 + [c | (15 - c) << 4 for c in range(16)]])
        scales = torch.tensor([[127, byte]], dtype=torch.uint8)
        values = reference.mxfp4_dequantize(packed.to(torch.uint8), scales)[0]
        assert values[:32].tolist() == [6.0] * 32
        expected = [mxfp4_value(code, byte) for c in range(16) for code in (c, 15 - c)]
        assert values[32:].tolist() == torch.tensor(expected, dtype=torch.float64).float().tolist()
    nan = reference.mxfp4_dequantize(packed.to(torch.uint8), torch.full_like(scales, 255))
    assert nan.isnan().all()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("byte", [0, 254])
def test_the_scale_of_zeros_is_nothing_to_mxfp4(byte, fp8):
    generator = torch.Generator().manual_seed(0)

    def layer(scale_of_zeros):
        codes = [torch.randint(0, 256, size, generator=generator) for size in ((1, 64, 32),) * 2]
        scales = [torch.randint(110, 116, (1, 64, 2), generator=generator) for _ in codes]
        for tensor, scale in zip(codes, scales, strict=True):
            tensor[:, 5, :16] = 0x80  # 0 and -0
            scale[:, 5, 0] = scale_of_zeros
        w13, w2 = (tensor.to(torch.uint8) for tensor in (codes[0], codes[1][:, :, :16]))
        s13, s2 = (tensor.to(torch.uint8) for tensor in (scales[0], scales[1][:, :, :1]))
        ones = torch.ones(1, 2), torch.ones(1)
        weights = ExpertWeights(w13, s13, ones[0], w2, s2, ones[1])
        x = torch.randn(4, 64, generator=generator).bfloat16()
        routing = Routing(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32))
        return reference.moe(x, routing, weights, limit=10.0, fp8=fp8)

    expected = layer(112)
    generator.manual_seed(0)
    assert expected.any() and torch.equal(layer(byte), expected)


@pytest.mark.parametrize("byte", [0, 20, 127, 254])
def test_products_with_mxfp4_are_finite_where_they_can_be(byte):
    """Weights of 6 * 2^127 are infinite in float32, and their products with small numbers not."""
    power = max(-60, min(60, 127 - byte))
    weights = ExpertWeights(
        w13=torch.full((1, 128, 32), 0x27, dtype=torch.uint8),  # 6 and 1, in turn
        w13_block_scales=torch.full((1, 128, 2), byte, dtype=torch.uint8),
        w13_global_scales=torch.tensor([[1.0, 0.5]]),
        w2=torch.full((1, 64, 32), 0x27, dtype=torch.uint8),
        w2_block_scales=torch.full((1, 64, 2), byte, dtype=torch.uint8),
        w2_global_scales=torch.tensor([0.5]),
    )
    x = torch.zeros(2, 64)
    x[0, 0] = x[1, 1] = 2.0**power
    out = reference.fc2(x, weights, 0)
    expected = [math.ldexp(value, byte - 127 + power - 1) for value in (6.0, 1.0)]
    assert out[:, 0].tolist() == expected
    gated = reference.fc1(x, weights, 0, torch.ones(2), limit=3.0)
    gates = [value * 2 for value in expected]
    for row, gate in zip(gated[:, 0].tolist(), gates, strict=True):
        clamped = min(gate, 3.0)
        silu = clamped / (1 + math.exp(-clamped))
        assert row == pytest.approx(silu * min(gate / 2, 3.0), rel=1e-6)


# The whole layer, token by token and slot by slot.


def bf16(value: float) -> float:
    """Round to nearest even on the upper 16 bits of the fp32 number."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def matrix(codes: np.ndarray, scale_bytes: np.ndarray, global_scale: float) -> np.ndarray:
    rows, half = codes.shape
    values = np.zeros((rows, 2 * half))
    for r in range(rows):
        for k in range(2 * half):
            nibble = int(codes[r, k // 2]) >> 4 * (k % 2) & 15
            values[r, k] = e2m1(nibble) * e4m3(int(scale_bytes[r, k // 16])) * global_scale
    return values


def rounded(values: list[float], gs: float | None, quantise: bool) -> np.ndarray:
    if not quantise:
        return np.array([bf16(v) for v in values])
    values = [float(np.float32(v)) for v in values]
    if gs is None:
        values = [bf16(v) for v in values]
        gs = float(np.float32(max(map(abs, values))) / np.float32(2688))
    result = []
    for b in range(len(values) // 16):
        codes, scale_byte, _ = quantize_block(values[16 * b : 16 * b + 16], gs)
        result += [e2m1(code) * e4m3(scale_byte) * gs for code in codes]
    return np.array(result)


def literal_layer(x, routing, weights, expert_map, limit, scales) -> np.ndarray:
    quantise = scales is not None
    local_experts, inter = weights.num_local_experts, weights.intermediate
    w13, w2 = [], []
    for e in range(local_experts):
        bytes13 = weights.w13_block_scales[e].view(torch.uint8).numpy()
        bytes2 = weights.w2_block_scales[e].view(torch.uint8).numpy()
        gate_gs, up_gs = weights.w13_global_scales[e].tolist()
        gate = matrix(weights.w13[e, :inter].numpy(), bytes13[:inter], gate_gs)
        up = matrix(weights.w13[e, inter:].numpy(), bytes13[inter:], up_gs)
        w13.append((gate, up))
        w2.append(matrix(weights.w2[e].numpy(), bytes2, float(weights.w2_global_scales[e])))
    out = np.zeros(tuple(x.shape))
    for token, row in enumerate(x.double().tolist()):
        for slot, global_id in enumerate(routing.ids[token].tolist()):
            e = expert_map[global_id] if 0 <= global_id < len(expert_map) else -1
            if e < 0:
                continue
            fc1_gs = None if not quantise or scales.fc1 is None else float(scales.fc1)
            fc2_gs = None if not quantise or scales.fc2 is None else float(scales.fc2[e])
            row_q = rounded(row, fc1_gs, quantise)
            h = []
            for g, u in zip(w13[e][0] @ row_q, w13[e][1] @ row_q, strict=True):
                if limit is not None:
                    g, u = min(g, limit), max(-limit, min(u, limit))
                weight = float(routing.weights[token, slot])
                h.append(g / (1 + math.exp(-g)) * u * weight)
            y = w2[e] @ rounded(h, fc2_gs, quantise)
            out[token] += [bf16(v) for v in y]
    return out


POLICIES = {
    "w4a16": None,
    "w4a4-static": ActivationScales(torch.tensor([0.002]), torch.tensor([0.003, 0.01, 0.005])),
    "w4a4-token": ActivationScales(None, None),
}


@pytest.mark.parametrize("limit", [None, 0.5], ids=["no-limit", "limit-0.5"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_layer_is_the_formula(policy, limit):
    """Gate and up have different global scales, ids are global, and foreign and padding ids add 0.

    Tolerance: the loops sum in float64, the oracle in fp32; where the two fall on different sides
    of a rounding point, one bf16 step of one summand (2^-8) or one E2M1 step of one of 32 inputs.
    """
    generator = torch.Generator().manual_seed(11)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return torch.empty(size).uniform_(low, high, generator=generator)

    shape = MoeShape(3, 3, 2, 32, 16, 7, False)
    weights = random_weights(shape, "cpu", seed=11, scale_bytes=(8, 64), gain=1.2)
    expert_map = torch.tensor([-1, 2, 0, -1, 1], dtype=torch.int32)
    ids = torch.tensor([[1, 2], [4, 0], [0, 3], [-1, -1], [2, 4], [7, 1], [2, 2]])
    routing = Routing(uniform(0.1, 1, *ids.shape), ids)
    x = torch.randn(len(ids), shape.hidden, generator=generator).bfloat16()
    args = (x, routing, weights)
    expected = literal_layer(*args, expert_map.tolist(), limit, POLICIES[policy])
    actual = reference.moe(
        *args, expert_map=expert_map, limit=limit, activation_scales=POLICIES[policy]
    )
    assert (actual[2:4] == 0).all()
    error = np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max()
    assert error < (2.0**-7 if policy == "w4a16" else 2.0**-6), error
