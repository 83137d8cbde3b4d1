"""Floating-point instructions and their modifiers on arrays (PTX ISA 9.0, 9.7.3 and 9.7.4)."""

import functools
from collections.abc import Callable

import numpy as np

from tests.emulator.ptx_emulator.numerics import (
    CANONICAL_NAN,
    add_to_odd,
    from_bf16,
    from_f16,
    to_bf16,
    to_bf16_from_f64,
    to_f16,
)
from tests.emulator.ptx_emulator.operands import Binder

PACKED = {"bf16x2": (from_bf16, to_bf16), "f16x2": (from_f16, to_f16)}
SCALAR_HALF = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}


def _nan_aware(function: Callable, choose: Callable) -> Callable:
    """min or max where a NaN operand gives the other one, as PTX has it without .NaN."""

    def apply(a, b):
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, choose(a, b)))

    return apply


F32 = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": _nan_aware(np.minimum, np.minimum),
    "max": _nan_aware(np.maximum, np.maximum),
    "abs": np.abs,
    "neg": np.negative,
}
F32_NAN = {"min": np.minimum, "max": np.maximum}


def flushed(function: Callable) -> Callable:
    """.ftz: subnormal inputs and results become zeros of the same sign."""

    def flush(x):
        return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)

    return lambda *operands: flush(function(*[flush(x) for x in operands]))


def _saturated(function: Callable) -> Callable:
    def saturate(*operands):
        result = function(*operands)
        return np.where(np.isnan(result), np.float32(0), np.clip(result, 0, 1)).astype(np.float32)

    return saturate


def _fma32(a, b, c):
    """One rounding: the product of two float32 is exact in float64."""
    return add_to_odd(a.astype(np.float64) * b, c.astype(np.float64)).astype(np.float32)


def float_function(binder: Binder, name: str) -> Callable:
    if name == "fma":
        function = _fma32
    elif binder.has("NaN"):
        function = F32_NAN[name]
    else:
        function = F32[name]
    if binder.has("xorsign"):
        function = _xorsign(function)
    elif name in ("min", "max"):
        function = _of_three(function, np.abs if binder.has("abs") else np.asarray)
    if binder.has("ftz"):
        function = flushed(function)
    if binder.has("sat"):
        function = _saturated(function)
    return function if name in ("abs", "neg") else _with_one_nan(function)


def _with_one_nan(function: Callable) -> Callable:
    """A NaN result has the bits 7fffffff, whatever its operands' are."""

    def apply(*operands):
        result = function(*operands)
        nan = np.isnan(result)
        return np.where(nan, CANONICAL_NAN, result) if nan.any() else result

    return apply


def _xorsign(function: Callable) -> Callable:
    """min or max of two magnitudes, negative where one of the operands alone is."""

    def apply(a, b):
        magnitude = function(np.abs(a), np.abs(b))
        return np.where(np.signbit(a) ^ np.signbit(b), -magnitude, magnitude)

    return apply


def _of_three(function: Callable, prepare: Callable) -> Callable:
    """min and max of two or, since PTX 8.8, three operands, or of their magnitudes."""
    return lambda *operands: functools.reduce(function, map(prepare, operands))


def halves(function: Callable, unpack: Callable, pack: Callable) -> Callable:
    """Lift a float32 function to 16-bit floats held as bits; exact but for the final rounding."""
    return lambda *operands: pack(function(*[unpack(x) for x in operands]))


def pairs(function: Callable) -> Callable:
    """Lift a function on uint16 arrays to both halves of uint32 registers."""

    def apply(*operands):
        halves = [np.ascontiguousarray(x).view(np.uint16) for x in operands]
        return np.ascontiguousarray(function(*halves)).view(np.uint32)

    return apply


def _fma_half(pack_wide: Callable, unpack: Callable) -> Callable:
    def apply(a, b, c):
        product = unpack(a).astype(np.float64) * unpack(b)
        return pack_wide(add_to_odd(product, unpack(c).astype(np.float64)))

    return apply


def _relu(function: Callable) -> Callable:
    def apply(*operands):
        result = function(*operands)
        return np.where(result > 0, result, np.float32(0))

    return apply


def half_function(binder: Binder, name: str, kind: str) -> Callable:
    unpack, pack = (PACKED | SCALAR_HALF)[kind]
    if name == "fma":
        if binder.has("relu", "sat"):
            raise binder.unsupported()
        wide = to_bf16_from_f64 if kind.startswith("bf16") else _f16_from_f64
        return _fma_half(wide, unpack)
    function = (F32_NAN if binder.has("NaN") else F32)[name]
    if binder.has("relu"):
        function = _relu(function)
    return halves(function, unpack, pack)


def _f16_from_f64(values):
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))
