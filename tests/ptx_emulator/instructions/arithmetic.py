"""Integer, bit, floating-point and predicate arithmetic (PTX ISA 9.0, 9.7.1 to 9.7.8)."""

import functools
from collections.abc import Callable

import numpy as np

from tests.ptx_emulator.numerics import (
    CANONICAL_NAN,
    add_to_odd,
    from_bf16,
    from_f16,
    to_bf16,
    to_bf16_from_f64,
    to_f16,
)
from tests.ptx_emulator.operands import Binder, dtype_of, is_literal, literal
from tests.ptx_emulator.program import PLAIN, Step

_INTEGER = ("s16", "u16", "s32", "u32", "s64", "u64", "b16", "b32", "b64")
_PACKED = {"bf16x2": (from_bf16, to_bf16), "f16x2": (from_f16, to_f16)}
_SCALAR_HALF = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}


def _map(binder: Binder, function: Callable, *kinds: str) -> Step:
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


def _nan_aware(function: Callable, choose: Callable) -> Callable:
    """min or max where a NaN operand gives the other one, as PTX has it without .NaN."""

    def apply(a, b):
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, choose(a, b)))

    return apply


_F32 = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": _nan_aware(np.minimum, np.minimum),
    "max": _nan_aware(np.maximum, np.maximum),
    "abs": np.abs,
    "neg": np.negative,
}
_F32_NAN = {"min": np.minimum, "max": np.maximum}
_BITS = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}


def _flushed(function: Callable) -> Callable:
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


def _float_function(binder: Binder, name: str) -> Callable:
    if name == "fma":
        function = _fma32
    elif binder.has("NaN"):
        function = _F32_NAN[name]
    else:
        function = _F32[name]
    if binder.has("xorsign"):
        function = _xorsign(function)
    elif name in ("min", "max"):
        function = _of_three(function, np.abs if binder.has("abs") else np.asarray)
    if binder.has("ftz"):
        function = _flushed(function)
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


def _halves(function: Callable, unpack: Callable, pack: Callable) -> Callable:
    """Lift a float32 function to 16-bit floats held as bits; exact but for the final rounding."""
    return lambda *operands: pack(function(*[unpack(x) for x in operands]))


def _pairs(function: Callable) -> Callable:
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


def _half_function(binder: Binder, name: str, kind: str) -> Callable:
    unpack, pack = (_PACKED | _SCALAR_HALF)[kind]
    if name == "fma":
        if binder.has("relu", "sat"):
            raise binder.unsupported()
        wide = to_bf16_from_f64 if kind.startswith("bf16") else _f16_from_f64
        return _fma_half(wide, unpack)
    function = (_F32_NAN if binder.has("NaN") else _F32)[name]
    if binder.has("relu"):
        function = _relu(function)
    return _halves(function, unpack, pack)


def _f16_from_f64(values):
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def compile_arithmetic(binder: Binder) -> Step:
    """add, sub, mul, fma, min, max, abs, neg on every type."""
    name, kind = binder.parts[0], binder.parts[-1]
    arity = len(binder.operands) - 1
    rounding = ("rn", "ftz", "sat", "NaN", "relu", "lo", "wrapping")
    if kind == "f32":
        magnitudes = ("abs",) if arity == 3 or binder.has("xorsign") else ()
        _check_modifiers(binder, *rounding, "xorsign", *magnitudes)
        return _map(binder, _float_function(binder, name), *["f32"] * arity)
    if kind == "f32x2":
        _check_modifiers(binder, "rn", "ftz")
        function = _float_function(binder, name)

        def both(*operands):
            halves = [np.ascontiguousarray(x).view(np.float32) for x in operands]
            return np.ascontiguousarray(function(*halves)).view(np.uint64)

        return _map(binder, both, *["b64"] * arity)
    if kind in _PACKED:
        _check_modifiers(binder, "rn", "NaN", "relu")
        return _map(binder, _pairs(_half_function(binder, name, kind)), *["b32"] * arity)
    if kind in _SCALAR_HALF:
        _check_modifiers(binder, "rn", "NaN", "relu")
        return _map(binder, _half_function(binder, name, kind), *["b16"] * arity)
    if kind == "f64":
        function = {**_F32, "fma": lambda a, b, c: a * b + c}[name]
        return _map(binder, function, *["f64"] * arity)
    if kind not in _INTEGER:
        raise binder.unsupported()
    if name == "mul" or name == "mad":
        return _compile_multiply(binder, kind)
    _check_modifiers(binder)
    if name == "abs":
        return _map(binder, np.abs, kind)
    if name == "neg":
        return _map(binder, np.negative, kind)
    if name not in _BITS:
        raise binder.unsupported()
    return _map(binder, _BITS[name], kind, kind)


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
        return _map(binder, multiply, kind, kind)
    sum_kind = f"{kind[0]}{16 * size}" if form == "wide" else kind
    return _map(binder, lambda a, b, c: multiply(a, b) + c, kind, kind, sum_kind)


def compile_divide(binder: Binder) -> Step:
    """div and rem: integers truncate; f32 in every form is correctly rounded here.

    div.full and div.approx may be off by 2 ulp (PTX ISA, `div`); here they are not.
    """
    name, kind = binder.parts[0], binder.parts[-1]
    if kind in ("f32", "f64"):
        function = np.divide
        if binder.has("ftz"):
            function = _flushed(np.divide)
        return _map(binder, function, kind, kind)
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

    return _map(binder, divide, kind, kind)


def compile_logic(binder: Binder) -> Step:
    """and, or, xor, not, cnot on predicates and bits."""
    name, kind = binder.parts[0], binder.parts[-1]
    bits = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    if name == "cnot":
        return _map(binder, lambda a: (a == 0).astype(a.dtype), kind)
    return _map(binder, bits[name], *[kind] * (len(binder.operands) - 1))


def compile_shift(binder: Binder) -> Step:
    """shl and shr: amounts beyond the width give 0, or the sign for shr.s."""
    name, kind = binder.parts[0], binder.parts[-1]
    width = 8 * dtype_of(kind).itemsize

    def shift(a, amount):
        within = np.minimum(amount, width - 1).astype(a.dtype)
        if name == "shr":
            shifted = a >> within
            beyond = a >> a.dtype.type(width - 1) if kind[0] == "s" else np.zeros(1, a.dtype)
        else:
            shifted, beyond = a << within, np.zeros(1, a.dtype)
        return np.where(amount >= width, beyond, shifted)

    amount = binder.operands[2]
    if is_literal(amount) and 0 <= literal(amount) < width:
        by = dtype_of(kind).type(literal(amount))
        function = np.left_shift if name == "shl" else np.right_shift
        write, read = binder.write(binder.operands[0]), binder.read(binder.operands[1], kind)
        return Step(PLAIN, lambda gang, mask: write(gang, function(read(gang), by), mask), None)
    return _map(binder, shift, kind, "u32")


def compile_funnel_shift(binder: Binder) -> Step:
    """shf.{l,r}.{wrap,clamp}.b32 d, low, high, amount."""
    left, wrap = binder.parts[1] == "l", binder.parts[2] == "wrap"

    def shift(low, high, amount):
        by = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        if left:
            return ((both << by) >> np.uint64(32)).astype(np.uint32)
        return (both >> by).astype(np.uint32)

    return _map(binder, shift, "b32", "b32", "u32")


def compile_lop3(binder: Binder) -> Step:
    """lop3.b32: the immediate is the truth table of (a, b, c)."""
    if len(binder.operands) != 5 or "|" in binder.operands[0]:
        raise binder.unsupported()
    table = literal(binder.operands[4])
    write = binder.write(binder.operands[0])
    reads = [binder.read(o, "b32") for o in binder.operands[1:4]]

    def action(gang, mask):
        operands = [read(gang) for read in reads]
        result = np.zeros(gang.lanes, np.uint32)
        for row in range(8):
            if table >> row & 1:
                a, b, c = (
                    x if row >> s & 1 else ~x for x, s in zip(operands, (2, 1, 0), strict=True)
                )
                result = result | (a & b & c)
        write(gang, result, mask)

    return Step(PLAIN, action, None)


def compile_prmt(binder: Binder) -> Step:
    """prmt.b32: four bytes out of eight; a selector's bit 3 replicates the sign bit."""
    if binder.parts != ["prmt", "b32"]:
        raise binder.unsupported()

    def permute(a, b, selector):
        lanes = len(selector)
        source = np.empty((lanes, 8), np.uint8)
        source[:, :4] = np.ascontiguousarray(a).view(np.uint8).reshape(lanes, 4)
        source[:, 4:] = np.ascontiguousarray(b).view(np.uint8).reshape(lanes, 4)
        nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        picked = source[np.arange(lanes)[:, None], nibbles & 7]
        sign = np.where(picked & 128, np.uint8(255), np.uint8(0))
        return np.where(nibbles & 8, sign, picked).view(np.uint32).reshape(lanes)

    return _map(binder, permute, "b32", "b32", "b32")


def compile_bit_field(binder: Binder) -> Step:
    """bfe and bfi: position and length modulo 256."""
    name, kind = binder.parts
    width = 8 * dtype_of(kind).itemsize
    unsigned = np.dtype(f"u{width // 8}").type

    def mask_of(length):
        wide = np.minimum(length, width - 1).astype(unsigned)
        return np.where(
            length >= width, unsigned((1 << width) - 1), (unsigned(1) << wide) - unsigned(1)
        )

    def shift(value, amount, left):
        within = np.minimum(amount, width - 1).astype(unsigned)
        moved = value << within if left else value >> within
        return np.where(amount >= width, unsigned(0), moved)

    def insert(a, b, position, length):
        position, length = position & 255, length & 255
        field = shift(mask_of(length), position, True)
        return (shift(a, position, True) & field) | (b & ~field)

    def extract(a, position, length):
        position, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
        bits = a.view(unsigned)
        result = shift(bits, position, False) & mask_of(length)
        if kind[0] == "s":
            last = np.minimum(position + length - 1, width - 1)
            sign = (shift(bits, np.maximum(last, 0), False) & unsigned(1)).astype(bool)
            sign &= length > 0
            result = np.where(sign, result | ~mask_of(length), result)
            result = np.where(sign & (position >= width), unsigned((1 << width) - 1), result)
        return result.view(a.dtype)

    if name == "bfi":
        return _map(binder, insert, kind, kind, "u32", "u32")
    return _map(binder, extract, kind, "u32", "u32")


def compile_bit_count(binder: Binder) -> Step:
    """popc, clz, brev, bfind."""
    name, kind = binder.parts[0], binder.parts[-1]
    width = 8 * dtype_of(kind).itemsize

    def bits(a):
        unsigned = a.view(f"u{width // 8}")
        shifts = np.arange(width, dtype=unsigned.dtype)
        return (unsigned[:, None] >> shifts) & unsigned.dtype.type(1)

    def highest(a):
        if kind[0] == "s":
            a = np.where(a < 0, ~a, a)
        table = bits(a).astype(bool)
        top = width - 1 - np.argmax(table[:, ::-1], axis=1)
        return np.where(table.any(axis=1), top, -1)

    if name == "popc":
        return _map(binder, lambda a: bits(a).sum(axis=1).astype(np.uint32), kind)
    if name == "clz":
        return _map(binder, lambda a: (width - 1 - highest(a)).astype(np.uint32), kind)
    if name == "bfind" and len(binder.parts) == 2:
        return _map(binder, lambda a: highest(a).astype(np.int32).view(np.uint32), kind)
    if name == "brev":

        def reverse(a):
            weights = np.left_shift(a.dtype.type(1), np.arange(width, dtype=a.dtype))[::-1]
            return (bits(a) * weights).sum(axis=1, dtype=a.dtype)

        return _map(binder, reverse, kind)
    raise binder.unsupported()


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
        unpack = _SCALAR_HALF[kind][0] if kind in _SCALAR_HALF else np.asarray
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
    if kind in _PACKED:
        return _map(binder, _pairs(_halves(function, *_PACKED[kind])), "b32")
    if kind in _SCALAR_HALF:
        return _map(binder, _halves(function, *_SCALAR_HALF[kind]), "b16")
    if kind != "f32":
        raise binder.unsupported()
    return _map(binder, _flushed(function) if binder.has("ftz") else function, "f32")


def compile_dot_product(binder: Binder) -> Step:
    """dp4a.atype.btype: four products of bytes onto a 32-bit sum."""
    _, a_kind, b_kind = binder.parts

    def dot(a, b, c):
        x = np.ascontiguousarray(a).view(np.int8 if a_kind == "s32" else np.uint8).reshape(-1, 4)
        y = np.ascontiguousarray(b).view(np.int8 if b_kind == "s32" else np.uint8).reshape(-1, 4)
        return c + (x.astype(np.int32) * y.astype(np.int32)).sum(axis=1).astype(np.int32).view(
            np.uint32
        )

    return _map(binder, dot, "b32", "b32", "b32")


COMPILERS = {
    **dict.fromkeys(
        ["add", "sub", "mul", "mad", "fma", "min", "max", "abs", "neg"], compile_arithmetic
    ),
    **dict.fromkeys(["div", "rem"], compile_divide),
    **dict.fromkeys(["and", "or", "xor", "not", "cnot"], compile_logic),
    **dict.fromkeys(["shl", "shr"], compile_shift),
    **dict.fromkeys(["popc", "clz", "brev", "bfind"], compile_bit_count),
    **dict.fromkeys(["bfe", "bfi"], compile_bit_field),
    **dict.fromkeys(_APPROXIMATE, compile_transcendental),
    "shf": compile_funnel_shift,
    "lop3": compile_lop3,
    "prmt": compile_prmt,
    "setp": compile_setp,
    "selp": compile_selp,
    "dp4a": compile_dot_product,
}
