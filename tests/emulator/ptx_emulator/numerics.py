"""Number formats below 32 bits as tables and vectorised conversions.

Encodings: PTX ISA 9.0, "Alternate floating point data formats" and "cvt";
E2M1, E4M3, E5M2 and UE8M0 as in the OCP Microscaling Formats specification 1.0.
"""

import numpy as np


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Every non-negative code's value, special values not treated."""
    codes = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    return np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)


def _with_sign(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, -values]).astype(np.float32)


_E2M1_POSITIVE = _minifloat(2, 1, 1)
_E4M3_POSITIVE = _minifloat(4, 3, 7)
_E4M3_POSITIVE[0x7F] = np.nan
_E5M2_POSITIVE = _minifloat(5, 2, 15)
_E5M2_POSITIVE[0x7C] = np.inf
_E5M2_POSITIVE[0x7D:] = np.nan

E2M1 = _with_sign(_E2M1_POSITIVE)  # (16,) float32
E4M3 = _with_sign(_E4M3_POSITIVE)  # (256,) float32
E5M2 = _with_sign(_E5M2_POSITIVE)  # (256,) float32
CANONICAL_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
UE8M0 = np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32)  # (256,)

# Of atomics and reductions.
FUNCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def unpack_e2m1(codes: np.ndarray) -> np.ndarray:
    """(..., n) uint8, two codes a byte, low nibble first -> (..., 2 n) float32."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return E2M1[pairs.reshape(*codes.shape[:-1], -1)]


def _encode(values: np.ndarray, table: np.ndarray, sign_bit: int) -> np.ndarray:
    """Codes of the nearest table values, ties to the even code, saturating at the largest."""
    magnitude = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    below_is_nearer = magnitude - low < high - magnitude
    tie = magnitude - low == high - magnitude
    code = np.where(below_is_nearer | (tie & (above % 2 == 1)), above - 1, above)
    code = np.where(magnitude >= table[-1], len(table) - 1, code)
    return (code | (np.signbit(values) * sign_bit)).astype(np.uint8)


def to_e2m1(values: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite to e2m1: NaN becomes the largest positive value."""
    return np.where(np.isnan(values), np.uint8(0x7), _encode(values, _E2M1_POSITIVE, 8))


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite to e4m3: NaN becomes 0x7f."""
    return np.where(np.isnan(values), np.uint8(0x7F), _encode(values, _E4M3_POSITIVE[:0x7F], 128))


def to_e5m2(values: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite to e5m2: NaN becomes 0x7f."""
    return np.where(np.isnan(values), np.uint8(0x7F), _encode(values, _E5M2_POSITIVE[:0x7C], 128))


def to_ue8m0(values: np.ndarray, round_up: bool) -> np.ndarray:
    """cvt.{rz,rp}.satfinite to ue8m0; zero and negative values give the smallest code."""
    mantissa, exponent = np.frexp(np.maximum(values, 0).astype(np.float64))
    exponent = exponent - 1 + (mantissa > 0.5 if round_up else 0)
    code = np.where(values > 0, np.clip(exponent + 127, 0, 254), 0)
    return np.where(np.isnan(values), 255, code).astype(np.uint8)


def to_bf16(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 -> bf16 bits (uint16); NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> 16).astype(np.uint16))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_f16(values: np.ndarray) -> np.ndarray:
    """float32 -> f16 bits (uint16); NaN becomes 0x7fff."""
    bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def from_f16(bits: np.ndarray) -> np.ndarray:
    """f16 bits (uint16) -> float32."""
    return bits.view(np.float16).astype(np.float32)


def toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 -> float32, cut; an infinity from 2^128 on."""
    nearest = values.astype(np.float32)
    beyond = (np.abs(nearest) > np.abs(values)) & (np.abs(values) < 2.0**128)
    return (nearest.view(np.uint32) - beyond.astype(np.uint32)).view(np.float32)


def to_bf16_from_f64(values: np.ndarray) -> np.ndarray:
    """float64 -> bf16 bits with one rounding (to nearest even), for fma in bf16."""
    with np.errstate(all="ignore"):
        # Round to odd at float32 keeps the second rounding exact: float32 has 16 bits to spare.
        single = toward_zero(values)
        inexact = (single != values) & np.isfinite(single)
    return to_bf16((single.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32))


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, an inexact sum made odd: rounding it again is as rounding the exact one."""
    total = a + b
    error = (a - (total - b)) + (b - (total - (total - b)))
    bits = total.view(np.int64)
    grows = (error > 0) == (total > 0)
    adjust = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return np.where(adjust, np.where(grows, bits + 1, bits - 1), bits).view(np.float64)
