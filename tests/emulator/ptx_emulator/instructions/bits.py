"""Logic, shifts, permutations and bit fields (PTX ISA 9.0, 9.7.1, 9.7.8, 9.7.9)."""

import numpy as np

from tests.emulator.ptx_emulator.instructions.arithmetic import map_operands
from tests.emulator.ptx_emulator.operands import Binder, dtype_of, is_literal, literal
from tests.emulator.ptx_emulator.program import PLAIN, Step


def compile_logic(binder: Binder) -> Step:
    """and, or, xor, not, cnot on predicates and bits."""
    name, kind = binder.parts[0], binder.parts[-1]
    bits = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    if name == "cnot":
        return map_operands(binder, lambda a: (a == 0).astype(a.dtype), kind)
    return map_operands(binder, bits[name], *[kind] * (len(binder.operands) - 1))


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
    return map_operands(binder, shift, kind, "u32")


def compile_funnel_shift(binder: Binder) -> Step:
    """shf.{l,r}.{wrap,clamp}.b32 d, low, high, amount."""
    left, wrap = binder.parts[1] == "l", binder.parts[2] == "wrap"

    def shift(low, high, amount):
        by = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        if left:
            return ((both << by) >> np.uint64(32)).astype(np.uint32)
        return (both >> by).astype(np.uint32)

    return map_operands(binder, shift, "b32", "b32", "u32")


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

    return map_operands(binder, permute, "b32", "b32", "b32")


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
        return map_operands(binder, insert, kind, kind, "u32", "u32")
    return map_operands(binder, extract, kind, "u32", "u32")


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
        return map_operands(binder, lambda a: bits(a).sum(axis=1).astype(np.uint32), kind)
    if name == "clz":
        return map_operands(binder, lambda a: (width - 1 - highest(a)).astype(np.uint32), kind)
    if name == "bfind" and len(binder.parts) == 2:
        return map_operands(binder, lambda a: highest(a).astype(np.int32).view(np.uint32), kind)
    if name == "brev":

        def reverse(a):
            weights = np.left_shift(a.dtype.type(1), np.arange(width, dtype=a.dtype))[::-1]
            return (bits(a) * weights).sum(axis=1, dtype=a.dtype)

        return map_operands(binder, reverse, kind)
    raise binder.unsupported()


COMPILERS = {
    **dict.fromkeys(["and", "or", "xor", "not", "cnot"], compile_logic),
    **dict.fromkeys(["shl", "shr"], compile_shift),
    **dict.fromkeys(["popc", "clz", "brev", "bfind"], compile_bit_count),
    **dict.fromkeys(["bfe", "bfi"], compile_bit_field),
    "shf": compile_funnel_shift,
    "lop3": compile_lop3,
    "prmt": compile_prmt,
}
