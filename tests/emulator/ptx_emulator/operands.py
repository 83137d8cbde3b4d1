"""Operands of an instruction -> functions that read and write a gang's registers."""

import re
from collections.abc import Callable

import numpy as np

from tests.emulator.ptx_emulator.findings import Unsupported
from tests.emulator.ptx_emulator.parser import Instruction, Kernel, split_operands
from tests.emulator.ptx_emulator.threads import SPECIAL_REGISTERS, Gang, InFlight

Reader = Callable[[Gang], np.ndarray]
Writer = Callable[[Gang, np.ndarray, np.ndarray], None]

_REGISTER_DTYPE = {
    "pred": np.dtype(bool),
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "busf" for size in (1, 2, 4, 8)},
}
_DTYPE = {
    "pred": np.dtype(bool),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    # 16-bit floats travel as bits; the instructions convert them.
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f32x2": np.dtype(np.uint64),
    **{
        f"{k}{8 * s}": np.dtype(f"{n}{s}")
        for k, n in (("s", "i"), ("u", "u"), ("b", "u"))
        for s in (1, 2, 4, 8)
    },
}
_POISON = {1: 0xAD, 2: 0xDEAD, 4: 0x7FC0DEAD, 8: 0x7FC0DEAD7FC0DEAD}


def dtype_of(kind: str) -> np.dtype:
    """The NumPy type that holds a PTX type."""
    if kind not in _DTYPE:
        raise Unsupported(f"type .{kind}")
    return _DTYPE[kind]


def is_literal(text: str) -> bool:
    return re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)[uU]?", text) is not None


def literal(text: str) -> int:
    return int(text.rstrip("uU"), 0)


class Binder:
    """Binds one instruction's operands for one kernel and one launch."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int], instruction: Instruction):
        self.kernel = kernel
        self.symbols = symbols  # kernel parameters: address of their copy
        self.instruction = instruction
        self.operands = instruction.operands
        self.parts = instruction.parts
        self.opcode = instruction.opcode

    def has(self, *modifiers: str) -> bool:
        return any(m in self.parts for m in modifiers)

    def unsupported(self, why: str = "") -> Unsupported:
        return Unsupported(f"instruction `{self.instruction}` {why}".rstrip())

    def register(self, text: str) -> tuple[int, str] | None:
        return self.kernel.registers.get(text)

    def read(self, text: str, kind: str) -> Reader:
        """A function that gives the operand as (lanes,) of the PTX type `kind`."""
        dtype = dtype_of(kind)
        if text.startswith("!"):
            inverted = self.read(text[1:], kind)
            return lambda gang: ~inverted(gang)
        if text in self.kernel.registers:
            return self._read_register(text, dtype)
        if text.startswith("%"):
            return self._read_special(text, dtype)
        if text in self.kernel.dynamic_shared:
            return _per_gang(lambda gang: gang.cta.dynamic_base, dtype)
        if text in self.kernel.shared:
            offset = self.kernel.shared[text]
            return _per_gang(lambda gang: gang.cta.shared_base + offset, dtype)
        return self._constant(text, dtype)

    def _read_register(self, text: str, dtype: np.dtype) -> Reader:
        index, kind = self.kernel.registers[text]
        size = _REGISTER_DTYPE[kind].itemsize
        if (kind == "pred") != (dtype == bool):
            raise self.unsupported(f"reads {text} as {dtype}")

        def convert(gang: Gang) -> np.ndarray:
            value = gang.registers[index]
            if value.__class__ is InFlight:
                value = value.read(gang.active)
            if value is None:
                value = np.zeros(gang.lanes, bool) if kind == "pred" else _poison(gang, size)
            if size == dtype.itemsize:
                return value.view(dtype)
            return value.view(f"u{size}").astype(f"u{dtype.itemsize}").view(dtype)

        def read(gang: Gang) -> np.ndarray:
            value = gang.registers[index]
            if value is not None and value.dtype is dtype:
                return value
            return convert(gang)

        return read

    def _read_special(self, text: str, dtype: np.dtype) -> Reader:
        if text in ("%clock", "%clock64", "%globaltimer", "%clock_hi"):
            return lambda gang: np.full(gang.lanes, gang.machine.instructions, dtype)

        def read(gang: Gang) -> np.ndarray:
            return gang.special[text].astype(dtype)

        if text not in SPECIAL_REGISTERS:
            raise self.unsupported(f"reads {text}")
        return read

    def _constant(self, text: str, dtype: np.dtype) -> Reader:
        if is_literal(text):
            bits = literal(text)
        elif match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text):
            bits = int(match.group(1), 16)
        elif text in self.symbols:
            bits = self.symbols[text]
        else:
            raise self.unsupported(f"has an unknown operand {text!r}")
        if dtype == bool:
            value = np.array(bits != 0)
        else:
            size = dtype.itemsize
            value = np.array(bits & ((1 << (8 * size)) - 1), f"u{size}").view(dtype)
        by_lanes: dict[int, np.ndarray] = {}

        def read(gang: Gang) -> np.ndarray:
            found = by_lanes.get(gang.lanes)
            if found is None:
                found = by_lanes[gang.lanes] = np.full(gang.lanes, value)
                found.flags.writeable = False
            return found

        return read

    def write(self, text: str) -> Writer:
        """A function (gang, values, mask) that writes a register; `_` discards."""
        if text == "_":
            return lambda gang, value, mask: None
        if text not in self.kernel.registers:
            raise self.unsupported(f"writes {text!r}")
        index, kind = self.kernel.registers[text]
        storage = _REGISTER_DTYPE[kind]
        size = storage.itemsize
        is_predicate = kind == "pred"

        def write(gang: Gang, value: np.ndarray, mask: np.ndarray) -> None:
            dtype = value.dtype
            if dtype.itemsize != size or (dtype == bool) != is_predicate:
                # A narrower value is extended by its own signedness, a wider one truncated.
                value = value.astype(f"{'i' if dtype.kind == 'i' else 'u'}{size}")
                dtype = value.dtype
            old = gang.registers[index]
            if old.__class__ is InFlight:
                old = old.overwrite(mask)
            if mask is gang.full:
                gang.registers[index] = value
            elif old.__class__ is InFlight:
                gang.registers[index] = old.beside(value, mask)
            else:
                if old is None:
                    old = np.zeros(gang.lanes, bool) if is_predicate else _poison(gang, size)
                gang.registers[index] = np.where(mask, value, old.view(dtype))

        return write

    def vector(self, text: str) -> list[str]:
        """Elements of `{a, b}`, or the operand alone."""
        return split_operands(text[1:-1]) if text.startswith("{") else [text]

    def address(self, text: str) -> Reader:
        """A function that gives the addresses of `[base + offset]` as (lanes,) int64."""
        inner = text.strip()[1:-1].strip() if text.startswith("[") else text
        base, offset = inner, 0
        if match := re.fullmatch(r"(.*?)\s*\+\s*(-?\w+)", inner):
            base, offset = match.group(1).strip(), literal(match.group(2))
        register = self.register(base)
        wide = (register is not None and register[1].endswith("64")) or base in self.symbols
        source = self.read(base, "u64" if wide else "u32")
        if offset == 0:
            return lambda gang: source(gang).astype(np.int64)
        return lambda gang: source(gang).astype(np.int64) + offset


def _poison(gang: Gang, size: int) -> np.ndarray:
    return np.full(gang.lanes, _POISON[size], f"u{size}")


def _per_gang(value: Callable[[Gang], int], dtype: np.dtype) -> Reader:
    return lambda gang: np.full(gang.lanes, value(gang), dtype)
