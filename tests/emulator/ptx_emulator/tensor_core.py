"""How Hopper's tensor cores add: the sum of one k16 step of wgmma, bit for bit.

The PTX ISA leaves order and precision open. What an H200 answered (`tests/data/instructions.npz`)
has one explanation: the sixteen products, exact, and the accumulator are cut toward zero below
2^-25 of the largest exponent among them, a product's being the sum of its factors' exponents; they
are added without further error, and the sum is cut toward zero to float32. So, with c the
accumulator and m = max(|c|, max_k 2^(exponents of a_k and b_k)), a step is off by less than
17 * 2^-25 * m + 2^-23 * |sum|: never rounded up in magnitude, and not within half a unit as a chain
of fused multiply-adds would be.

A k32 step of e4m3 (`tests/data/wgmma_e4m3.npz`) is the same with 33 terms, cut below 2^-13 of the
largest exponent; a subnormal factor's exponent is -6; and the sum keeps 13 bits of fraction.
"""

import numpy as np

from tests.emulator.ptx_emulator.numerics import CANONICAL_NAN, toward_zero

# Kept below the largest exponent.
FRACTION_BITS = {"bf16": 25, "f16": 25, "e4m3": 13}
# Of the sum, as float32 bits.
_KEPT = {"bf16": 0xFFFFFFFF, "f16": 0xFFFFFFFF, "e4m3": 0xFFFFFC00}
_NONE = -600  # exponent of a zero: below what two factors can add up to


def _exponents(values: np.ndarray, least: int = -126) -> np.ndarray:
    """floor(log2 |v|) of float32, of subnormals the smallest normal's, of zeros _NONE."""
    field = values.view(np.uint32) >> np.uint32(23) & np.uint32(255)
    exponents = np.maximum(field, np.uint32(127 + least)).astype(np.int16) - np.int16(127)
    return np.where(values == 0, np.int16(_NONE), exponents)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, kind: str) -> np.ndarray:
    """(m, k) and (n, k) float32 that hold numbers of that kind, (m, n) float32 or None:
    a bᵀ + c."""
    a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    least = -6 if kind == "e4m3" else -126
    largest = (_exponents(a, least)[:, :, None] + _exponents(b, least)[:, None, :]).max(axis=0)
    if c is not None:
        np.maximum(largest, _exponents(c), out=largest)
    # 2^(fraction bits - largest), written as float64 bits: what is kept becomes an integer.
    scale = ((1023 + FRACTION_BITS[kind] - largest.astype(np.int64)) << 52).view(np.float64)
    with np.errstate(all="ignore"):
        terms = a[:, :, None].astype(np.float64) * b[:, None, :]
        terms *= scale
        total = np.trunc(terms, out=terms).sum(axis=0)
        if c is not None:
            total += np.trunc(c * scale)
        # A sum of zeros is a positive zero, whatever their signs.
        result = toward_zero(total / scale) + np.float32(0)
    result = (result.view(np.uint32) & np.uint32(_KEPT[kind])).view(np.float32)
    nan = np.isnan(result)
    return np.where(nan, CANONICAL_NAN, result) if nan.any() else result
