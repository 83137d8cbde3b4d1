"""Run a few lines of PTX on one warp or more, for the emulator's own tests."""

from collections.abc import Callable, Collection

import numpy as np

from tests.emulator.ptx_emulator.scheduler import PROGRAMMATIC_STREAM_SERIALIZATION, Launch, Machine
from tests.emulator.ptx_emulator.threads import WARP

_REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
_SCRATCH = (
    ".reg .pred %p<64>; .reg .b16 %rs<64>; .reg .b32 %r<300>; .reg .b64 %rd<64>; .reg .b32 lane;"
)

# What else runs each snippet: called with the PTX, the launch, and per buffer its bytes before and
# after the emulation.
OBSERVERS: list[Callable[[str, Launch, dict[str, np.ndarray], dict[str, np.ndarray]], None]] = []


def run_snippet(
    body: str,
    buffers: dict[str, np.ndarray],
    *,
    warps: int = 1,
    ctas: int = 1,
    shared_bytes: int = 0,
    mode: str = "eager",
    seed: int = 0,
    produced: Collection[str] = (),
) -> Machine:
    """Run `body` with a 64-bit register `name` for the address of each buffer.

    Also there: `lane` (the thread's index in the CTA), `smem` (shared memory, dynamic), and scratch
    registers %p, %rs, %r, %rd. The CTAs are one cluster. produced: buffers that a kernel writes
    which may still run.
    """
    params = ",\n".join(f".param .u64 p_{name}" for name in buffers)
    loads = "\n".join(f".reg .b64 {n}; ld.param.u64 {n}, [p_{n}];" for n in buffers)
    ptx = f"""
    .extern .shared .align 1024 .b8 smem[];
    .visible .entry snippet({params}) .reqnctapercluster {ctas}, 1, 1
    {{
    {_SCRATCH}
    {loads}
    mov.u32 lane, %tid.x;
    {body}
    ret;
    }}
    """
    machine = Machine(ptx, mode, seed, max_instructions=200_000, produced=produced)
    copies = {name: _aligned_copy(buffer) for name, buffer in buffers.items()}
    for name, copy in copies.items():
        machine.memory.add_bytes(copy.ctypes.data, copy.nbytes, name, copy)
    addresses = [np.uint64(copy.ctypes.data).tobytes() for copy in copies.values()]
    launch = Launch(
        "snippet",
        (ctas, 1, 1),
        (warps * WARP, 1, 1),
        shared_bytes,
        addresses,
        (ctas, 1, 1),
        ((PROGRAMMATIC_STREAM_SERIALIZATION, 1),) if produced else (),
    )
    machine.run(launch)
    before = {name: _aligned_copy(buffer) for name, buffer in buffers.items()}
    for name, buffer in buffers.items():
        buffer.reshape(-1).view(np.uint8)[:] = copies[name]
    for observe in OBSERVERS:
        observe(ptx, launch, before, copies)
    return machine


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    """The bytes of a C-contiguous array at a multiple of 256, as device allocations are."""
    room = np.empty(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    room[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return room[start : start + array.nbytes]


def lanewise(
    instructions: str, results: dict[str, type], shared_bytes: int = 0, **operands: np.ndarray
) -> dict[str, np.ndarray]:
    """Run instructions on one warp with a register per operand, a lane per value.

    operands: arrays of up to 32 values; the last value fills the remaining lanes. results: NumPy
    type of each register to return; bool for predicates. Returns (32,) arrays.
    """
    buffers, before, after = {}, [], []
    for name, values in operands.items():
        values = np.asarray(values)
        is_predicate = values.dtype == bool
        values = values.astype(np.uint8) if is_predicate else values
        padded = np.concatenate([values, np.repeat(values[-1:], WARP - len(values))])
        buffers[f"in_{name}"] = padded
        before.append(_transfer(name, f"in_{name}", padded.dtype, True, is_predicate))
    outputs = {n: np.zeros(WARP, np.uint8 if t is bool else t) for n, t in results.items()}
    for name, array in outputs.items():
        buffers[f"out_{name}"] = array
        after.append(_transfer(name, f"out_{name}", array.dtype, False, results[name] is bool))
        if name in operands:
            after[-1] = after[-1].replace(
                _declaration(name, array.dtype, results[name] is bool), ""
            )
        else:
            before.append(_declaration(name, array.dtype, results[name] is bool))
            after[-1] = after[-1].replace(before[-1], "")
    run_snippet("\n".join([*before, instructions, *after]), buffers, shared_bytes=shared_bytes)
    return {n: a.astype(bool) if results[n] is bool else a for n, a in outputs.items()}


def _declaration(name: str, dtype: np.dtype, is_predicate: bool) -> str:
    kind = "pred" if is_predicate else _REGISTER[dtype.itemsize]
    return f".reg .{kind} {name};"


def _transfer(name: str, buffer: str, dtype: np.dtype, load: bool, is_predicate: bool) -> str:
    """Declare `name` and move each lane's element between it and the buffer."""
    size = dtype.itemsize
    lines = [
        _declaration(name, dtype, is_predicate),
        f"mad.wide.u32 %rd60, lane, {size}, {buffer};",
    ]
    if is_predicate:
        if load:
            lines += ["ld.global.u8 %rs60, [%rd60];", f"setp.ne.b16 {name}, %rs60, 0;"]
        else:
            lines += [f"selp.b16 %rs60, 1, 0, {name};", "st.global.b8 [%rd60], %rs60;"]
    elif load:
        lines.append(f"ld.global.b{8 * size} {name}, [%rd60];")
    else:
        lines.append(f"st.global.b{8 * size} [%rd60], {name};")
    return "\n".join(lines)
