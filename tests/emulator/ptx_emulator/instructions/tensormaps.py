"""tensormap.replace and tensormap.cp_fenceproxy (PTX ISA 9.0, 9.7.9)."""

import numpy as np

from tests.emulator.ptx_emulator.instructions.loads import read_bytes, write_bytes
from tests.emulator.ptx_emulator.operands import Binder, literal
from tests.emulator.ptx_emulator.program import COLLECTIVE, PLAIN, Step
from tests.emulator.ptx_emulator.tensor_map import TENSOR_MAP_BYTES, replace_field

_CHUNK = 32  # bytes moved at once


def compile_tensormap(binder: Binder) -> Step:
    if binder.parts[1] == "replace":
        return _compile_replace(binder)
    if binder.parts[1] == "cp_fenceproxy" and literal(binder.operands[2]) == TENSOR_MAP_BYTES:
        return _compile_copy(binder)
    raise binder.unsupported()


def _read(gang, address: int, space: str) -> bytes:
    chunks = address + np.arange(0, TENSOR_MAP_BYTES, _CHUNK)
    return np.ascontiguousarray(read_bytes(gang, chunks, _CHUNK, space)).tobytes()


def _write(gang, lane: int, address: int, raw: bytes, space: str) -> None:
    chunks = address + np.arange(0, TENSOR_MAP_BYTES, _CHUNK)
    values = np.frombuffer(raw, np.uint8).reshape(-1, _CHUNK)
    write_bytes(gang, np.full(len(chunks), lane), chunks, values, space)


def _compile_replace(binder: Binder) -> Step:
    field = binder.parts[3]
    space = "shared" if "shared::cta" in binder.parts else "global"
    address = binder.address(binder.operands[0])
    indexed = len(binder.operands) == 3
    ordinal = literal(binder.operands[1]) if indexed else 0
    value = binder.read(binder.operands[-1], binder.parts[-1].replace("b", "u"))

    def action(gang, mask):
        for lane in np.nonzero(mask)[0]:
            at = int(address(gang)[lane])
            raw = replace_field(_read(gang, at, space), field, ordinal, int(value(gang)[lane]))
            _write(gang, int(lane), at, raw, space)

    return Step(PLAIN, action, None)


def _compile_copy(binder: Binder) -> Step:
    """cp_fenceproxy: shared to global, released to the tensor-map proxy."""
    target, source = binder.address(binder.operands[0]), binder.address(binder.operands[1])

    def action(gang, mask):
        for warp in gang.warps_of(mask):
            lane = warp * 32
            raw = _read(gang, int(source(gang)[lane]), "shared")
            _write(gang, lane, int(target(gang)[lane]), raw, "global")

    return Step(COLLECTIVE, action, None)


COMPILERS = {"tensormap": compile_tensormap}
