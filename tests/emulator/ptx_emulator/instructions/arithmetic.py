"""Integer, floating-point and predicate arithmetic (PTX ISA 9.0, 9.7.1 to 9.7.7)."""

from collections.abc import Callable

import numpy as np

from tests.emulator.ptx_emulator.instructions.floating import (
    F32,
    PACKED,
    SCALAR_HALF,
    float_function,
    flushed,
    half_function,
    halves,
    pairs,
)
from tests.emulator.ptx_emulator.operands import Binder, dtype_of
from tests.emulator.ptx_emulator.program import PLAIN, Step

_INTEGER = ("s16", "u16", "s32", "u32", "s64", "u64", "b16", "b32", "b64")


def map_operands(binder: Binder, function: Callable, *kinds: str) -> Step:
    """d = function(a, b, ...) with operands of these types."""
    write = binder.write(binder.operands[0])
    reads = [binder.read(o, k) for o, k in zip(binder.operands[1:], kinds, strict=True)]
    if len(reads) == 1:
        first = reads[0]
        return Step(PLAIN, lambda gang, mask: write(gang, function(first(gang)), mask), None)
    if len(reads) == 2:
        first, second = reads

        def two(gang, mask):
            write(gang, function(first(gang), second(gang)), mask)

        return Step(PLAIN, two, None)

    def many(gang, mask):
        write(gang, function(*[read(gang) for read in reads]), mask)

    return Step(PLAIN, many, None)


def _check_modifiers(binder: Binder, *allowed: str) -> None:
    for part in binder.parts[1:-1]:
        if part not in allowed:
            raise binder.unsupported(f"(modifier .{part})")


_BITS = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}


def compile_arithmetic(binder: Binder) -> Step:
    """add, sub, mul, fma, min, max, abs, neg on every type."""
    name, kind = binder.parts[0], binder.parts[-1]
    arity = len(binder.operands) - 1
    rounding = ("rn", "ftz", "sat", "NaN", "relu", "lo", "wrapping")
    if kind == "f32":
        magnitudes = ("abs",) if arity == 3 or binder.has("xorsign") else ()
        _check_modifiers(binder, *rounding, "xorsign", *magnitudes)
        return map_operands(binder, float_function(binder, name), *["f32"] * arity)
    if kind == "f32x2":
        _check_modifiers(binder, "rn", "ftz")
        function = float_function(binder, name)

        def both(*operands):
            halves = [np.ascontiguousarray(x).view(np.float32) for x in operands]
            return np.ascontiguousarray(function(*halves)).view(np.uint64)

        return map_operands(binder, both, *["b64"] * arity)
    if kind in PACKED:
        _check_modifiers(binder, "rn", "NaN", "relu")
        return map_operands(binder, pairs(half_function(binder, name, kind)), *["b32"] * arity)
    if kind in SCALAR_HALF:
        _check_modifiers(binder, "rn", "NaN", "relu")
        return map_operands(binder, half_function(binder, name, kind), *["b16"] * arity)
    if kind == "f64":
        function = {**F32, "fma": lambda a, b, c: a * b + c}[name]
        return map_operands(binder, function, *["f64"] * arity)
    if kind not in _INTEGER:
        raise binder.unsupported()
    if name == "mul" or name == "mad":
        return _compile_multiply(binder, kind)
    _check_modifiers(binder)
    if name == "abs":
        return map_operands(binder, np.abs, kind)
    if name == "neg":
        return map_operands(binder, np.negative, kind)
    if name not in _BITS:
        raise binder.unsupported()
    return map_operands(binder, _BITS[name], kind, kind)


def _high_half_64(a, b, signed: bool):
    """The upper 64 bits of a 64 x 64 bit product."""
    mask = np.uint64(0xFFFFFFFF)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & mask, x >> 32, y & mask, y >> 32
    low = x0 * y0
    middle = x1 * y0 + (low >> 32)
    cross = x0 * y1 + (middle & mask)
    high = x1 * y1 + (middle >> 32) + (cross >> 32)
    if signed:
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
        return high.view(np.int64)
    return high


def _compile_multiply(binder: Binder, kind: str) -> Step:
    """mul and mad: .lo, .hi, .wide."""
    form = binder.parts[1]
    dtype = dtype_of(kind)
    size = dtype.itemsize
    signed = kind[0] == "s"
    big = np.dtype(f"{dtype.kind}8")

    def multiply(a, b):
        if form == "lo":
            return a * b
        if form == "hi" and size == 8:
            return _high_half_64(a, b, signed)
        product = a.astype(big) * b.astype(big)
        if form == "hi":
            return (product >> big.type(8 * size)).astype(dtype)
        return product.astype(f"{dtype.kind}{2 * size}")

    if form not in ("lo", "hi", "wide") or len(binder.parts) != 3:
        raise binder.unsupported()
    if binder.parts[0] == "mul":
        return map_operands(binder, multiply, kind, kind)
    sum_kind = f"{kind[0]}{16 * size}" if form == "wide" else kind
    return map_operands(binder, lambda a, b, c: multiply(a, b) + c, kind, kind, sum_kind)


def compile_divide(binder: Binder) -> Step:
    """div and rem: integers truncate; f32 in every form is correctly rounded here.

    div.full and div.approx may be off by 2 ulp (PTX ISA, `div`); here they are not.
    """
    name, kind = binder.parts[0], binder.parts[-1]
    if kind in ("f32", "f64"):
        function = np.divide
        if binder.has("ftz"):
            function = flushed(np.divide)
        return map_operands(binder, function, kind, kind)
    ones = -1 if kind[0] == "s" else (1 << int(kind[1:])) - 1

    def divide(a, b):
        zero = b == 0
        safe = np.where(zero, np.ones(1, b.dtype), b)
        if kind[0] == "u":
            quotient = a // safe
        else:
            down = a // safe
            quotient = down + ((a % safe != 0) & ((a < 0) != (safe < 0)))
        quotient = quotient.astype(a.dtype)
        if name == "div":
            return np.where(zero, np.array(ones).astype(a.dtype), quotient)
        return np.where(zero, a, a - quotient * safe)

    return map_operands(binder, divide, kind, kind)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(binder: Binder, name: str, kind: str) -> Callable:
    """The function of setp, set: ordered, or unordered (`ltu` is true where one side is NaN)."""
    if kind in ("f32", "f64", "bf16", "f16"):
        unpack = SCALAR_HALF[kind][0] if kind in SCALAR_HALF else np.asarray
        if name == "num":
            return lambda a, b: ~(np.isnan(unpack(a)) | np.isnan(unpack(b)))
        if name == "nan":
            return lambda a, b: np.isnan(unpack(a)) | np.isnan(unpack(b))
        if name == "ne":
            return lambda a, b: (unpack(a) < unpack(b)) | (unpack(a) > unpack(b))
        if name in _COMPARE:
            return lambda a, b: _COMPARE[name](unpack(a), unpack(b))
        ordered = _COMPARE.get(name[:-1])
        if ordered is None or name[-1] != "u":
            raise binder.unsupported()
        return lambda a, b: (
            ordered(unpack(a), unpack(b)) | np.isnan(unpack(a)) | np.isnan(unpack(b))
        )
    name = _UNSIGNED_COMPARE.get(name, name)
    if name not in _COMPARE:
        raise binder.unsupported()
    return _COMPARE[name]


def compile_setp(binder: Binder) -> Step:
    """setp.cmp{.boolop}.type p{|q}, a, b{, c}."""
    parts = [p for p in binder.parts[1:] if p != "ftz"]
    compare = comparison(binder, parts[0], parts[-1])
    first, _, second = binder.operands[0].partition("|")
    write, write_not = binder.write(first), binder.write(second) if second else None
    a, b = (binder.read(o, parts[-1]) for o in binder.operands[1:3])
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    third = binder.read(binder.operands[3], "pred") if len(parts) == 3 else None

    def action(gang, mask):
        result = compare(a(gang), b(gang))
        inverse = ~result
        if third is not None:
            other = third(gang)
            result = combine[parts[1]](result, other)
            inverse = combine[parts[1]](inverse, other)
        write(gang, result, mask)
        if write_not is not None:
            write_not(gang, inverse, mask)

    return Step(PLAIN, action, None)


def compile_selp(binder: Binder) -> Step:
    kind = binder.parts[-1]
    write = binder.write(binder.operands[0])
    a, b = (binder.read(o, kind) for o in binder.operands[1:3])
    predicate = binder.read(binder.operands[3], "pred")

    def action(gang, mask):
        write(gang, np.where(predicate(gang), a(gang), b(gang)), mask)

    return Step(PLAIN, action, None)


def _float32(function: Callable) -> Callable:
    """Evaluate in float64 and round once."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


# The hardware's approximations have errors the ISA bounds (PTX ISA 9.0, 9.7.3): ex2 2 ulp, rcp
# and rsqrt 1 to 2 ulp, lg2 2^-22 absolute near 1, tanh 2^-11 relative, sin and cos 2^-20.5
# absolute. The emulator gives the correctly rounded value, so a kernel's result may differ from
# the hardware's by those bounds.
_APPROXIMATE = {
    "ex2": _float32(np.exp2),
    "lg2": _float32(np.log2),
    "rcp": _float32(lambda x: 1.0 / x),
    "rsqrt": _float32(lambda x: 1.0 / np.sqrt(x)),
    "sqrt": _float32(np.sqrt),
    "sin": _float32(np.sin),
    "cos": _float32(np.cos),
    "tanh": _float32(np.tanh),
}


def compile_transcendental(binder: Binder) -> Step:
    name, kind = binder.parts[0], binder.parts[-1]
    function = _APPROXIMATE[name]
    if kind in PACKED:
        return map_operands(binder, pairs(halves(function, *PACKED[kind])), "b32")
    if kind in SCALAR_HALF:
        return map_operands(binder, halves(function, *SCALAR_HALF[kind]), "b16")
    if kind != "f32":
        raise binder.unsupported()
    return map_operands(binder, flushed(function) if binder.has("ftz") else function, "f32")


def compile_dot_product(binder: Binder) -> Step:
    """dp4a.atype.btype: four products of bytes onto a 32-bit sum."""
    _, a_kind, b_kind = binder.parts

    def dot(a, b, c):
        x = np.ascontiguousarray(a).view(np.int8 if a_kind == "s32" else np.uint8).reshape(-1, 4)
        y = np.ascontiguousarray(b).view(np.int8 if b_kind == "s32" else np.uint8).reshape(-1, 4)
        return c + (x.astype(np.int32) * y.astype(np.int32)).sum(axis=1).astype(np.int32).view(
            np.uint32
        )

    return map_operands(binder, dot, "b32", "b32", "b32")


COMPILERS = {
    **dict.fromkeys(
        ["add", "sub", "mul", "mad", "fma", "min", "max", "abs", "neg"], compile_arithmetic
    ),
    **dict.fromkeys(["div", "rem"], compile_divide),
    **dict.fromkeys(_APPROXIMATE, compile_transcendental),
    "setp": compile_setp,
    "selp": compile_selp,
    "dp4a": compile_dot_product,
}
