"""ld, st, atom, red, ldmatrix, stmatrix, st.async (PTX ISA 9.0, 9.7.9 and 9.7.13)."""

import numpy as np

from tests.emulator.ptx_emulator.dependence import check_global
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import OFFSET_MASK, SHARED_LIMIT
from tests.emulator.ptx_emulator.numerics import FUNCTIONS, from_bf16, from_f16, to_bf16, to_f16
from tests.emulator.ptx_emulator.operands import Binder, dtype_of
from tests.emulator.ptx_emulator.program import COLLECTIVE, CONTROL, PLAIN, Signal, Step
from tests.emulator.ptx_emulator.threads import WARP, Gang

_VECTOR = {"v2": 2, "v4": 4, "v8": 8}
_SPACES = ("param", "global", "shared", "shared::cta", "shared::cluster", "const")


def state_space(binder: Binder) -> str:
    """global, shared, param, or generic."""
    for part in binder.parts[1:]:
        if part in _SPACES:
            return part.split("::")[0]
    if binder.has("local"):
        raise binder.unsupported("(local memory)")
    return "generic"


def check_alignment(addresses: np.ndarray, size: int, what: str) -> None:
    wrong = addresses % size != 0
    if wrong.any():
        at = int(addresses[np.argmax(wrong)])
        raise Finding("misaligned", f"{what} of {size} bytes at {at:#x}")


def _is_shared(addresses: np.ndarray, space: str, what: str) -> bool:
    """Whether the addresses are shared memory; the lanes of one access agree."""
    if space == "generic":
        inside = addresses < SHARED_LIMIT
        if inside.all() != inside.any():
            raise Finding("out-of-bounds", f"{what} mixes shared and global generic addresses")
        return bool(inside[0])
    if space == "shared" and (addresses >= SHARED_LIMIT).any():
        raise Finding("out-of-bounds", f"shared {what} at {int(addresses.max()):#x}")
    return space == "shared"


def read_bytes(gang: Gang, addresses: np.ndarray, size: int, space: str) -> np.ndarray:
    """(n,) addresses -> (n, size) bytes."""
    check_alignment(addresses, size, "load")
    if not _is_shared(addresses, space, "load"):
        check_global(gang, addresses, False, "load")
        return gang.machine.memory.gather(addresses, size)
    offsets = addresses & OFFSET_MASK
    ranks = addresses >> 24
    first = int(ranks[0])
    if (ranks == first).all():
        return gang.cta.peer(int(addresses[0])).shared.gather(offsets, size)
    rows = [
        gang.cta.peer(int(a)).shared.gather(offsets[i : i + 1], size)[0]
        for i, a in enumerate(addresses)
    ]
    return np.stack(rows)


def write_bytes(
    gang: Gang, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, space: str
) -> None:
    """Write (n, size) bytes at the (n,) addresses of these lanes."""
    check_alignment(addresses, values.shape[1], "store")
    gang.machine.events += 1
    if not _is_shared(addresses, space, "store"):
        check_global(gang, addresses, True, "store")
        gang.machine.memory.scatter(addresses, values)
        return
    stamps = gang.cta.visibility.stamps(gang.first_warp + lanes // WARP)[:, None]
    offsets = addresses & OFFSET_MASK
    ranks = addresses >> 24
    if (ranks == gang.cta.rank).all():
        gang.cta.shared.scatter(offsets, values, stamps)
        return
    for i, address in enumerate(addresses):
        # Another CTA's warps have clocks of their own, so a remote store is not tracked.
        gang.cta.peer(int(address)).shared.scatter(offsets[i : i + 1], values[i : i + 1], 0)


def active_lanes(gang: Gang, mask: np.ndarray) -> np.ndarray:
    return np.nonzero(mask)[0]


def compile_load(binder: Binder) -> Step:
    kind = binder.parts[-1]
    dtype = dtype_of(kind)
    space = state_space(binder)
    targets = binder.vector(binder.operands[0])
    count = len(targets)
    size = dtype.itemsize
    if count != next((n for v, n in _VECTOR.items() if binder.has(v)), 1) or count * size > 32:
        raise binder.unsupported()
    address = binder.address(binder.operands[1])
    writes = [binder.write(t) for t in targets]
    polls = binder.has("acquire", "relaxed", "volatile")
    polled = Signal(polled=True) if polls else None

    def action(gang, mask):
        lanes = mask if mask is not gang.full else slice(None)
        data = read_bytes(gang, address(gang)[lanes], count * size, space)
        if mask is gang.full:
            elements = np.ascontiguousarray(data).view(dtype)
        else:
            elements = np.zeros((gang.lanes, count), dtype)
            elements[lanes] = np.ascontiguousarray(data).view(dtype)
        for i, write in enumerate(writes):
            write(gang, np.ascontiguousarray(elements[:, i]), mask)
        return polled

    return Step(PLAIN if polled is None else CONTROL, action, None)


def compile_store(binder: Binder) -> Step:
    if binder.has("async"):
        raise binder.unsupported()
    kind = binder.parts[-1]
    dtype = dtype_of(kind)
    space = state_space(binder)
    sources = binder.vector(binder.operands[1])
    if len(sources) * dtype.itemsize > 32:
        raise binder.unsupported()
    address = binder.address(binder.operands[0])
    reads = [binder.read(s, kind) for s in sources]

    def action(gang, mask):
        lanes = active_lanes(gang, mask)
        values = np.stack([read(gang) for read in reads], axis=1).view(np.uint8)
        write_bytes(gang, lanes, address(gang)[lanes], values[lanes], space)

    return Step(PLAIN, action, None)


def _atomic_function(binder: Binder, name: str, kind: str):
    half = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}
    if kind in ("bf16x2", "f16x2"):
        unpack, pack = half[kind[:-2]]
        if name != "add":
            raise binder.unsupported()
        return lambda old, new: pack(
            unpack(old.view(np.uint16)) + unpack(new.view(np.uint16))
        ).view(np.uint32)
    if kind in half:
        raise binder.unsupported()
    functions = FUNCTIONS | {
        "exch": lambda old, new: new,
        "inc": lambda old, new: np.where(old >= new, 0, old + 1).astype(old.dtype),
    }
    if name not in functions:
        raise binder.unsupported()
    return functions[name]


_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "inc", "cas")


def compile_atomic(binder: Binder) -> Step:
    """atom and red, one lane after another."""
    if binder.has("async"):
        raise binder.unsupported()
    kind = binder.parts[-1]
    dtype = dtype_of(kind)
    space = state_space(binder)
    name = next((p for p in binder.parts if p in _ATOMICS), "")
    returns = binder.parts[0] == "atom"
    operands = binder.operands[1:] if returns else binder.operands
    write = binder.write(binder.operands[0]) if returns else None
    address = binder.address(operands[0])
    sources = [binder.vector(o) for o in operands[1:]]
    if len(sources[0]) != 1 and returns:
        raise binder.unsupported()
    reads = [[binder.read(e, kind) for e in s] for s in sources]
    function = None if name == "cas" else _atomic_function(binder, name, kind)
    size = dtype.itemsize
    polled = Signal(polled=True) if returns else None

    def action(gang, mask):
        addresses = address(gang)
        values = [np.stack([read(gang) for read in vector], axis=1) for vector in reads]
        result = np.zeros(gang.lanes, dtype)
        for lane in active_lanes(gang, mask):
            at = addresses[lane : lane + 1]
            lanes = np.array([lane])
            width = values[0].shape[1]
            old = np.ascontiguousarray(read_bytes(gang, at, size * width, space)).view(dtype)[0]
            result[lane] = old[0]
            new = values[0][lane]
            if function is None:
                new = np.where(old == new, values[1][lane], old)
            else:
                new = function(old, new)
            raw = np.ascontiguousarray(new.astype(dtype)).view(np.uint8).reshape(1, -1)
            write_bytes(gang, lanes, at, raw, space)
        if write is not None:
            write(gang, result, mask)
        return polled

    return Step(PLAIN if polled is None else CONTROL, action, None)


def _matrix_form(binder: Binder) -> tuple[int, bool]:
    """How many 8x8 matrices of 16 bits, and whether each is transposed."""
    if not binder.has("m8n8") or binder.parts[-1] != "b16":
        raise binder.unsupported()
    count = next((n for v, n in (("x1", 1), ("x2", 2), ("x4", 4)) if binder.has(v)), 0)
    if count == 0:
        raise binder.unsupported()
    return count, binder.has("trans")


def compile_ldmatrix(binder: Binder) -> Step:
    """ldmatrix: lanes 8 i .. 8 i + 7 give the row addresses of matrix i."""
    count, transposed = _matrix_form(binder)
    writes = [binder.write(t) for t in binder.vector(binder.operands[0])]
    address = binder.address(binder.operands[1])
    space = state_space(binder)

    def action(gang, mask):
        addresses = address(gang)
        registers = np.zeros((count, gang.lanes), np.uint32)
        for warp in gang.warps_of(mask):
            rows = addresses[gang.warp_lanes(warp)][: 8 * count]
            data = np.ascontiguousarray(read_bytes(gang, rows, 16, space)).view(np.uint16)
            matrices = data.reshape(count, 8, 8)
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            words = np.ascontiguousarray(matrices).view(np.uint32).reshape(count, WARP)
            registers[:, gang.warp_lanes(warp)] = words
        for i, write in enumerate(writes):
            write(gang, registers[i], mask)

    return Step(COLLECTIVE, action, None)


def compile_stmatrix(binder: Binder) -> Step:
    """stmatrix: lanes 8 i .. 8 i + 7 give the row addresses of matrix i."""
    count, transposed = _matrix_form(binder)
    address = binder.address(binder.operands[0])
    reads = [binder.read(s, "b32") for s in binder.vector(binder.operands[1])]
    space = state_space(binder)

    def action(gang, mask):
        addresses = address(gang)
        registers = np.stack([read(gang) for read in reads])
        for warp in gang.warps_of(mask):
            lanes = gang.warp_lanes(warp)
            matrices = (
                np.ascontiguousarray(registers[:, lanes]).view(np.uint16).reshape(count, 8, 8)
            )
            if transposed:
                matrices = matrices.transpose(0, 2, 1)
            rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(8 * count, 16)
            writers = np.arange(lanes.start, lanes.start + 8 * count)
            write_bytes(gang, writers, addresses[writers], rows, space)

    return Step(COLLECTIVE, action, None)


COMPILERS = {
    "ld": compile_load,
    "ldu": compile_load,
    "st": compile_store,
    "atom": compile_atomic,
    "red": compile_atomic,
    "ldmatrix": compile_ldmatrix,
    "stmatrix": compile_stmatrix,
}
