"""The grouped GEMMs in exact arithmetic, and what float32 roundings on the way can make of them.

Products of E2M1 and E4M3 values are exact in float64, and so are sums of a few thousand of them. So
an interval says where the value before the last rounding may be, and a bf16 value or an NVFP4 code
is either the only one possible, or one of those on both sides of a boundary in that interval.
"""

from typing import NamedTuple

import torch
from dsv4_kernels.reference import unpack_e2m1
from dsv4_kernels.types import ExpertWeights

ULP = 2.0**-24  # of one rounding to float32, relative
BLOCK = 16


class Interval(NamedTuple):
    low: torch.Tensor  # float64
    high: torch.Tensor


class Allowed(NamedTuple):
    """Of every block and of every value, the least and the greatest that rounding can give."""

    scales: Interval  # E4M3 bytes, int
    codes: Interval  # E2M1 values
    ambiguous: torch.Tensor  # bool: more than one code, or more than one scale of its block


def dequantize_unit(codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    """Codes times block scales, exact: (..., K // 2) uint8, (..., K // 16) E4M3 -> float64."""
    blocks = unpack_e2m1(codes).double().unflatten(-1, (-1, BLOCK))
    return (blocks * block_scales.float().double()[..., None]).flatten(-2)


def fc1_interval(
    x: torch.Tensor,  # (rows, hidden) float64, without its global scale
    x_scale: torch.Tensor,  # (1,) or (rows,)
    weights: ExpertWeights,
    expert: int,
    slot_weights: torch.Tensor,
    limit: float,
    roundings: int,
) -> Interval:
    """h of one expert's rows, whose sums were rounded so many times on their way."""
    unit = dequantize_unit(weights.w13[expert], weights.w13_block_scales[expert])
    of_row = weights.w13_global_scales[expert].double().repeat_interleave(len(unit) // 2)
    sums, error = _sums(x, unit, x_scale.double()[:, None] * of_row, roundings)
    gate, up = sums.chunk(2, dim=1)
    gate_error, up_error = error.chunk(2, dim=1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    silu = gate * torch.sigmoid(gate)
    # |silu'| < 1.1; six roundings, and those of the exponent grow with it.
    silu_error = 1.1 * gate_error + silu.abs() * (6 + 2 * gate.abs()) * ULP
    weight = slot_weights.double()[:, None]
    h = silu * up * weight
    error = up.abs() * silu_error + silu.abs() * up_error + silu_error * up_error
    error = error * weight.abs() + h.abs() * (4 * ULP)
    return Interval(h - error, h + error)


def fc2_interval(
    h: torch.Tensor,  # (rows, intermediate) float64, without its global scale
    h_scale: torch.Tensor,  # (1,) or (rows,)
    weights: ExpertWeights,
    expert: int,
    roundings: int,
) -> Interval:
    """One expert's rows before they are rounded to bf16."""
    unit = dequantize_unit(weights.w2[expert], weights.w2_block_scales[expert])
    scale = h_scale.double()[:, None] * weights.w2_global_scales[expert].double()
    sums, error = _sums(h, unit, scale, roundings)
    return Interval(sums - error, sums + error)


def _sums(x, unit, scales, roundings: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled sums, and their error: no partial sum is larger than the sum of magnitudes."""
    sums, magnitudes = x @ unit.T * scales, x.abs() @ unit.abs().T * scales
    return sums, magnitudes * (roundings * ULP) + sums.abs() * (3 * ULP)


def assert_bf16(result: torch.Tensor, interval: Interval) -> None:
    """Each is what a value of the interval rounds to, to nearest even."""
    low, high = (bound.float().bfloat16() for bound in interval)
    bad = ~((low <= result) & (result <= high))
    assert not bad.any(), (result[bad][:5], low[bad][:5], high[bad][:5], int(bad.sum()))


def allowed(h: Interval, global_scale: torch.Tensor, scale_bytes: torch.Tensor) -> Allowed:
    """What NVFP4 of values in an interval may be: codes of those scales (rows, columns // 16)."""
    gs = global_scale.double()[:, None]
    low, high = (bound.unflatten(1, (-1, BLOCK)) for bound in h)
    # Of magnitudes, the least is 0 where the interval has both signs.
    least = torch.minimum(low.abs(), high.abs()) * (low * high > 0)
    largest = Interval(least.amax(2), torch.maximum(low.abs(), high.abs()).amax(2))
    scales = Interval(*(_to_e4m3(q / 6 / gs) for q in _widen(largest)))
    scale = (scale_bytes.view(torch.float8_e4m3fn).float().double() * gs)[:, :, None]
    quotients = (torch.where(scale > 0, bound / scale, 0.0) for bound in (low, high))
    codes = Interval(*(_to_e2m1(q).flatten(1) for q in _widen(Interval(*quotients))))
    one_scale = (scales.low == scales.high).repeat_interleave(BLOCK, 1)
    return Allowed(scales, codes, (codes.low != codes.high) | ~one_scale)


def _widen(interval: Interval) -> Interval:
    """By three roundings of a division and of the scale in it."""
    low, high = interval
    return Interval(low - low.abs() * (3 * ULP), high + high.abs() * (3 * ULP))


def _to_e4m3(value: torch.Tensor) -> torch.Tensor:
    """Bytes of values that are not negative, to nearest even, 448 at most."""
    return value.clamp(max=448).float().to(torch.float8_e4m3fn).view(torch.uint8).int()


def _to_e2m1(value: torch.Tensor) -> torch.Tensor:
    """To the nearest E2M1 value, ties to even."""
    size = value.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round() * step * value.sign()
