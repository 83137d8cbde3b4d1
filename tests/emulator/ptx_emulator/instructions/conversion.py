"""mov, cvt, cvta and mapa (PTX ISA 9.0, 9.7.9)."""

from collections.abc import Callable

import numpy as np

from tests.emulator.ptx_emulator import numerics
from tests.emulator.ptx_emulator.memory import OFFSET_MASK, RANK_SHIFT
from tests.emulator.ptx_emulator.operands import Binder, dtype_of
from tests.emulator.ptx_emulator.program import PLAIN, Step
from tests.emulator.ptx_emulator.threads import InFlight


def compile_mov(binder: Binder) -> Step:
    """mov: a register, or packing and unpacking of `{a, b}`."""
    kind = binder.parts[-1]
    target, source = binder.operands
    if target.startswith("{"):
        return _unpack(binder, binder.vector(target), source, kind)
    if source.startswith("{"):
        return _pack(binder, target, binder.vector(source), kind)
    write, read = binder.write(target), binder.read(source, kind)
    from_register, to_register = binder.register(source), binder.register(target)
    if from_register is None or to_register is None:
        return Step(PLAIN, lambda gang, mask: write(gang, read(gang), mask), None)
    index, into = from_register[0], to_register[0]

    def action(gang, mask):
        value = gang.registers[index]
        if value.__class__ is InFlight and mask is gang.full and not value.owner.readable:
            # A rename of a result under way: the compiler keeps both names in one register.
            if gang.registers[into].__class__ is InFlight:
                gang.registers[into].overwrite(mask)
            gang.registers[into] = value
        else:
            write(gang, read(gang), mask)

    return Step(PLAIN, action, None)


def _unpack(binder: Binder, targets: list[str], source: str, kind: str) -> Step:
    size = dtype_of(kind).itemsize // len(targets)
    read = binder.read(source, kind)
    writes = [binder.write(t) for t in targets]

    def action(gang, mask):
        parts = np.ascontiguousarray(read(gang)).view(f"u{size}").reshape(gang.lanes, -1)
        for i, write in enumerate(writes):
            write(gang, np.ascontiguousarray(parts[:, i]), mask)

    return Step(PLAIN, action, None)


def _pack(binder: Binder, target: str, sources: list[str], kind: str) -> Step:
    dtype = dtype_of(kind)
    size = dtype.itemsize // len(sources)
    write = binder.write(target)
    reads = [binder.read(s, f"b{8 * size}") for s in sources]

    def action(gang, mask):
        parts = np.stack([read(gang) for read in reads], axis=1)
        write(gang, parts.view(dtype).reshape(gang.lanes), mask)

    return Step(PLAIN, action, None)


_PACKED_ENCODERS: dict[str, Callable] = {
    "bf16x2": numerics.to_bf16,
    "f16x2": numerics.to_f16,
    "e4m3x2": numerics.to_e4m3,
    "e5m2x2": numerics.to_e5m2,
    "e2m1x2": numerics.to_e2m1,
}
_PACKED_DECODERS: dict[str, Callable] = {
    "e4m3x2": lambda codes: numerics.E4M3[codes],
    "e5m2x2": lambda codes: numerics.E5M2[codes],
}
_ROUNDING = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def compile_cvt(binder: Binder) -> Step:
    parts = binder.parts[1:]
    modifiers = [
        p for p in parts if p in _ROUNDING or p in ("ftz", "sat", "satfinite", "relu", "pack")
    ]
    kinds = [p for p in parts if p not in modifiers]
    if len(kinds) != 2 or "pack" in modifiers:
        raise binder.unsupported()
    to, source = kinds
    if to == "ue8m0x2":
        up = "rp" in modifiers
        return _encode_pair(binder, source, lambda x: numerics.to_ue8m0(x, up))
    if to in _PACKED_ENCODERS and source in ("f32", "f16x2", "bf16x2"):
        return _encode_pair(binder, source, _PACKED_ENCODERS[to], modifiers)
    if to in ("f16x2", "bf16x2"):
        return _decode_pair(binder, to, source)
    return _convert_scalar(binder, to, source, modifiers)


def _encode_pair(binder: Binder, source: str, encode: Callable, modifiers: list[str] = ()) -> Step:
    """Two values to a packed pair; the first source is the upper half."""
    to = binder.parts[[p.endswith("x2") for p in binder.parts].index(True)]
    narrow = to in ("e4m3x2", "e5m2x2", "e2m1x2", "ue8m0x2")
    if narrow and "satfinite" not in modifiers and to != "ue8m0x2":
        raise binder.unsupported("(without .satfinite)")
    if "rz" in modifiers:
        if to != "bf16x2":
            raise binder.unsupported()
        inner = encode
        encode = lambda x: inner(x, toward_zero=True)  # noqa: E731
    if not narrow and "satfinite" in modifiers:
        raise binder.unsupported()
    relu = "relu" in modifiers
    write = binder.write(binder.operands[0])
    reads = [binder.read(o, source) for o in binder.operands[1:]]
    unpack = {"bf16x2": numerics.from_bf16, "f16x2": numerics.from_f16}.get(source)

    def action(gang, mask):
        if unpack is None:
            high, low = (read(gang) for read in reads)
        else:
            halves = unpack(np.ascontiguousarray(reads[0](gang)).view(np.uint16)).reshape(-1, 2)
            low, high = halves[:, 0], halves[:, 1]
        if relu:
            low, high = (np.where(x < 0, np.float32(0), x) for x in (low, high))
        low, high = encode(low), encode(high)
        if to == "e2m1x2":
            write(gang, low | (high << np.uint8(4)), mask)
        else:
            wide = np.uint32 if low.dtype == np.uint16 else np.uint16
            write(gang, low.astype(wide) | (high.astype(wide) << wide(8 * low.itemsize)), mask)

    return Step(PLAIN, action, None)


def _decode_pair(binder: Binder, to: str, source: str) -> Step:
    """e4m3x2, e5m2x2, e2m1x2, ue8m0x2 -> f16x2 or bf16x2; every such value is exact."""
    encode = {"f16x2": numerics.to_f16, "bf16x2": numerics.to_bf16}[to]
    write = binder.write(binder.operands[0])
    if source == "e2m1x2":
        read = binder.read(binder.operands[1], "b8")
        decode = numerics.unpack_e2m1
        split = lambda codes: codes[:, None]  # noqa: E731
    else:
        table = {**_PACKED_DECODERS, "ue8m0x2": lambda codes: numerics.UE8M0[codes]}
        if source not in table:
            raise binder.unsupported()
        decode = table[source]
        read = binder.read(binder.operands[1], "b16")
        split = lambda codes: np.ascontiguousarray(codes).view(np.uint8).reshape(-1, 2)  # noqa: E731

    def action(gang, mask):
        values = decode(split(read(gang)))
        write(gang, encode(values).view(np.uint32).reshape(gang.lanes), mask)

    return Step(PLAIN, action, None)


def _convert_scalar(binder: Binder, to: str, source: str, modifiers: list[str]) -> Step:
    floats = {"bf16": numerics.from_bf16, "f16": numerics.from_f16}
    encoders = {"bf16": numerics.to_bf16, "f16": numerics.to_f16}
    read = binder.read(binder.operands[1], source)
    write = binder.write(binder.operands[0])
    unpack = floats.get(source, lambda x: x)
    from_float, to_float = source[0] == "f" or source in floats, to[0] == "f" or to in encoders
    saturate = "sat" in modifiers
    if "relu" in modifiers or "satfinite" in modifiers:
        raise binder.unsupported()
    if to == "bf16" and "rz" in modifiers:
        encoders["bf16"] = lambda x: numerics.to_bf16(x, toward_zero=True)
    elif to_float and any(m in modifiers for m in ("rz", "rm", "rp")):
        raise binder.unsupported()
    rounding = next((m for m in modifiers if m in _TO_INTEGER), None)

    def convert(x):
        x = unpack(x)
        if rounding is not None:
            x = _TO_INTEGER[rounding](x)
        if to_float:
            if saturate:
                x = np.clip(np.nan_to_num(x, nan=0.0), 0, 1)
            if to in encoders:
                return encoders[to](x.astype(np.float32))
            return x.astype(dtype_of(to))
        return _to_integer(x, dtype_of(to), from_float, saturate)

    return Step(PLAIN, lambda gang, mask: write(gang, convert(read(gang)), mask), None)


def _to_integer(x: np.ndarray, dtype: np.dtype, from_float: bool, saturate: bool) -> np.ndarray:
    """Floats clamp to the range and NaN gives 0; integers wrap unless .sat."""
    limits = np.iinfo(dtype)
    if from_float:
        wide = np.where(np.isnan(x), 0, x).astype(np.float64)
        inside = np.clip(wide, float(limits.min), float(limits.max))
        result = inside.astype(dtype)
        return np.where(wide >= float(limits.max), dtype.type(limits.max), result)
    if saturate:
        return np.clip(x.astype(np.int64), limits.min, limits.max).astype(dtype)
    return x.astype(dtype)


def compile_cvta(binder: Binder) -> Step:
    """Generic, global and shared addresses are the same numbers here."""
    write = binder.write(binder.operands[0])
    source = binder.operands[1]
    register = binder.register(source)
    kind = "u64" if register is None or register[1].endswith("64") else "u32"
    read = binder.read(source, kind)
    return Step(PLAIN, lambda gang, mask: write(gang, read(gang), mask), None)


def compile_mapa(binder: Binder) -> Step:
    """mapa{.shared::cluster}.type d, address, rank."""
    kind = binder.parts[-1]
    write = binder.write(binder.operands[0])
    address, rank = binder.read(binder.operands[1], kind), binder.read(binder.operands[2], "u32")

    def action(gang, mask):
        local = address(gang)
        offset = local & local.dtype.type(OFFSET_MASK)
        write(gang, offset | (rank(gang).astype(local.dtype) << local.dtype.type(RANK_SHIFT)), mask)

    return Step(PLAIN, action, None)


COMPILERS = {"mov": compile_mov, "cvt": compile_cvt, "cvta": compile_cvta, "mapa": compile_mapa}
