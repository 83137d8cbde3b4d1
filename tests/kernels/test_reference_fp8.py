"""The oracle's W4A8: E4M3 rows by their definition, and the layer token by token."""

import math

import numpy as np
import pytest
import torch
from bench.inputs import random_weights
from dsv4_kernels import moe, reference
from dsv4_kernels.backends import BACKENDS, choose_backend
from dsv4_kernels.types import ActivationScales, ExpertWeights, MoeShape, Routing, fp8_h_scale

from tests.kernels.test_reference import E4M3, bf16, e2m1, e4m3, make_rows, nearest


def own_scale(row: list[float]) -> float:
    """Under which the largest number of the row is 448."""
    amax = max((abs(v) for v in row if not math.isnan(v)), default=0.0)
    if amax == 0:
        return 1.0
    return max(float(np.float32(min(amax, 3.4e38)) / np.float32(448)), 2.0**-100)


def code_of(value: float, scale: float) -> float:
    """What E4M3 holds of the value times the scale's inverse, to nearest even, at most 448."""
    if math.isnan(value):
        return value
    inverse = float(np.float32(1) / np.float32(scale))
    magnitude = min(float(np.float32(min(abs(value) * inverse, 500.0))), 448.0)
    return math.copysign(E4M3[nearest(magnitude, E4M3)], value)


@pytest.mark.parametrize("scale", [None, 0.25, 2.0**-20], ids=["row", "0.25", "2^-20"])
@pytest.mark.parametrize(
    "kind", ["normal", "all-zero-block", "negative-zero", "subnormal-values", "inf-and-nan"]
    + ["too-large", "scale-ties"]
)  # fmt: skip
def test_fp8_is_the_format(kind, scale):
    x = make_rows(kind)
    given = None if scale is None else torch.tensor([scale])
    codes, scales, saturated = reference.fp8_quantize(x, given)
    overflows = 0
    for row, ours, used in zip(x.tolist(), codes.float().tolist(), scales.tolist(), strict=True):
        assert used == (own_scale(row) if scale is None else scale)
        want = [code_of(v, used) for v in row]
        np.testing.assert_array_equal(np.array(ours), np.array(want))
        assert [math.copysign(1, v) for v in ours] == [math.copysign(1, v) for v in want]
        overflows += sum(abs(v) / used > 464 for v in row)
    assert saturated == overflows
    if scale is None and kind != "inf-and-nan":
        assert saturated == 0


def test_a_row_s_own_scale_makes_its_largest_exact():
    amax = torch.cat((torch.logspace(-25, 38, 1000), 448 * torch.exp2(torch.arange(-90, 100.0))))
    codes, scales, _ = reference.fp8_quantize(torch.stack((amax, -amax / 3), 1), None)
    assert (codes[:, 0].float() == 448).all()
    torch.testing.assert_close(codes[:, 0].float() * scales, amax, rtol=1e-6, atol=0)


def literal_layer(x, routing, weights, limit, fc2_scales) -> np.ndarray:
    """Sums in float64."""
    inter, mxfp4 = weights.intermediate, weights.w13_block_scales.dtype == torch.uint8

    def matrix(codes, scales, factor) -> np.ndarray:
        """Rounded to E4M3: NVFP4's an eighth of its size, MXFP4's is exact."""
        width = 32 if mxfp4 else 16
        values = np.zeros((len(codes), 2 * codes.shape[1]))
        for r, row in enumerate(codes.tolist()):
            for k in range(values.shape[1]):
                code = e2m1(row[k // 2] >> 4 * (k % 2) & 15)
                byte = int(scales.view(torch.uint8)[r, k // width])
                if mxfp4:
                    values[r, k] = code * 2.0 ** (byte - 127)
                else:
                    values[r, k] = 8 * code_of(code * e4m3(byte), 8.0)
        return values * factor

    out = np.zeros(tuple(x.shape))
    for token, row in enumerate(x.double().tolist()):
        scale = own_scale(row)
        quantised = np.array([code_of(v, scale) * scale for v in row])
        for slot, e in enumerate(routing.ids[token].tolist()):
            w13, scales = weights.w13[e], weights.w13_block_scales[e]
            gate_gs, up_gs = weights.w13_global_scales[e].tolist()
            gate = matrix(w13[:inter], scales[:inter], gate_gs) @ quantised
            up = matrix(w13[inter:], scales[inter:], up_gs) @ quantised
            if limit is not None:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            h = gate / (1 + np.exp(-gate)) * up
            if fc2_scales is None:
                h = np.array([bf16(v) for v in h])
                scale = own_scale(h.tolist())
            else:
                scale = float(fc2_scales[e])
            h = np.array([code_of(v, scale) * scale for v in h])
            w2 = matrix(
                weights.w2[e], weights.w2_block_scales[e], float(weights.w2_global_scales[e])
            )
            y = w2 @ h * float(routing.weights[token, slot])
            out[token] += [bf16(v) for v in y]
    return out


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("limit", [None, 0.5], ids=["no-limit", "limit-0.5"])
def test_the_layer_is_the_formula(limit, weight_format):
    """Tolerance as of W4A4: one E4M3 step of one of 64 inputs, or one bf16 step of one summand."""
    shape = MoeShape(3, 3, 2, 64, 32, 3, False, weight_format=weight_format)
    scale_bytes = (8, 64) if weight_format == "nvfp4" else (113, 127)
    weights = random_weights(shape, "cpu", seed=11, scale_bytes=scale_bytes, gain=1.2)
    generator = torch.Generator().manual_seed(11)
    ids = torch.tensor([[1, 2], [0, 1], [2, 2]])
    routing = Routing(torch.empty(ids.shape).uniform_(0.1, 1, generator=generator), ids)
    x = torch.randn(len(ids), shape.hidden, generator=generator).bfloat16()
    fc2 = None if limit is None else torch.tensor([2.0**-10, 2.0**-9, 2.0**-10])
    expected = literal_layer(x, routing, weights, limit, fc2)
    saturated = torch.zeros(1, dtype=torch.int64)
    actual = reference.moe(
        x,
        routing,
        weights,
        limit=limit,
        activation_scales=ActivationScales(None, fc2),
        fp8=True,
        saturated=saturated,
    )
    assert saturated == 0
    error = np.abs(actual.double().numpy() - expected).max() / np.abs(expected).max()
    assert error < 2.0**-6, error


@pytest.mark.parametrize("limit", [0.1, 0.5, 1.0, 7.0, 10.0, 448**0.5, 14.97, 15.0, 32.0])
def test_no_h_under_a_limit_is_over_448_of_its_scale(limit):
    gate = torch.cat((torch.linspace(-20, 20, 40001), torch.tensor([1e30, -1e30, limit])))
    largest = reference.swiglu(gate, torch.full_like(gate, 1e30), limit).abs().max()
    scale = fp8_h_scale(limit)
    assert largest <= 448 * scale * (1 + 1e-6)
    assert largest * 4 > 448 * scale, "a fourth of it would do"


@pytest.mark.parametrize("limit", [0, 1e-30, 10, 40.0, 1e3, 1e30, math.inf])
def test_any_limit_that_a_config_may_have(limit):
    """One of 0 leaves nothing; under a huge one's scale nothing would be left, either."""
    weights = ExpertWeights(
        torch.full((1, 64, 32), 0x21, dtype=torch.uint8),
        torch.ones(1, 64, 4).to(torch.float8_e4m3fn),
        torch.full((1, 2), 0.1),
        torch.full((1, 64, 16), 0x21, dtype=torch.uint8),
        torch.ones(1, 64, 2).to(torch.float8_e4m3fn),
        torch.full((1,), 0.1),
    )
    shape = MoeShape(1, 1, 1, 64, 32, 4, quantize_activations=False, fp8=True)
    layer = moe.prepare_layer(
        BACKENDS["reference"], shape, weights, limit=limit, activation_scales=None
    )
    routing = Routing(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32))
    x = (torch.linspace(0.5, 2, 4)[:, None] * torch.ones(4, 64)).bfloat16()
    out = moe.moe(x, routing, layer, torch.empty(0, dtype=torch.uint8), out=torch.empty_like(x))
    expected = reference.moe(x, routing, weights, limit=limit).float()
    assert layer.shape.scale_per_row == (limit > 32)
    if limit < 1e-20:
        assert (out == 0).all()
    else:
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_without_a_limit_h_has_a_scale_a_row():
    assert fp8_h_scale(None) is None


SHAPE = MoeShape(4, 4, 2, 128, 64, 8, False, fp8=True)


@pytest.mark.parametrize("limit", [10.0, None], ids=["limit", "no-limit"])
def test_tokens_of_any_size_saturate_nothing(limit):
    """An infinity counts."""
    generator = torch.Generator().manual_seed(3)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    def matrix(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = torch.rand(4, rows, k // 16, generator=generator) + 0.5
        return codes(4, rows, k // 2), scales.to(torch.float8_e4m3fn)

    weights = ExpertWeights(
        *matrix(128, 128), torch.full((4, 2), 0.05), *matrix(128, 64), torch.full((4,), 0.05)
    )
    layer = moe.prepare_layer(
        BACKENDS["reference"], SHAPE, weights, limit=limit, activation_scales=None
    )
    x = torch.randn(8, 128, generator=generator)
    ids = torch.rand(8, 4, generator=generator).argsort(1)[:, :2].int()
    routing = Routing(torch.full((8, 2), 0.5), ids)
    nothing = torch.empty(0, dtype=torch.uint8)
    for factor in (1, 30, 3000):
        tokens = (x * factor).bfloat16()
        out = moe.moe(tokens, routing, layer, nothing, out=torch.empty_like(tokens))
        plain = reference.moe(tokens, routing, weights, limit=limit)
        assert out.isfinite().all() and layer.saturated == 0
        # Where all is clamped, a gate's sign decides between 0 and the limit.
        error = (out.float() - plain.float()).norm() / plain.float().norm()
        assert error < (0.1 if factor == 1 or limit is None else 0.3), factor
    tokens[2, 5] = torch.inf
    out = moe.moe(tokens, routing, layer, nothing, out=torch.empty_like(tokens))
    assert layer.saturated >= 2


def test_who_cannot_says_what_to_set():
    with pytest.raises(ValueError, match="fp8 is for sm90.*set activations to"):
        choose_backend("auto", SHAPE, (10, 0))
