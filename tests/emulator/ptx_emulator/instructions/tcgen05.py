"""tcgen05: tensor memory and the asynchronous matrix pipe (PTX ISA 9.0, 9.7.16).

mma, cp and commit of a CTA complete in the order of issue.
"""

import re

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.instructions.tcgen05_mma import compile_mma, ctas_of, touch
from tests.emulator.ptx_emulator.matrices import Operand, tcgen05_descriptor
from tests.emulator.ptx_emulator.memory import OFFSET_MASK, RANK_SHIFT
from tests.emulator.ptx_emulator.operands import Binder
from tests.emulator.ptx_emulator.program import COLLECTIVE, PLAIN, Step
from tests.emulator.ptx_emulator.tensor_order import add
from tests.emulator.ptx_emulator.threads import WARP, AsyncResult, Gang, InFlight


def compile_tcgen05(binder: Binder) -> Step:
    form = binder.parts[1].split("::")[0]
    compilers = {
        "alloc": _compile_alloc,
        "dealloc": _compile_dealloc,
        "relinquish_alloc_permit": _compile_relinquish,
        "wait": _compile_wait,
        "fence": _compile_fence,
        "cp": _compile_cp,
        "commit": _compile_commit,
        "mma": compile_mma,
        "ld": _compile_load,
        "st": _compile_store,
    }
    if form not in compilers:
        raise binder.unsupported()
    return compilers[form](binder)


def _per_warp(values: np.ndarray, gang: Gang, warp: int, what: str) -> int:
    lanes = values[gang.warp_lanes(warp)]
    if (lanes != lanes[0]).any():
        raise Finding("divergent", f"{what} with different operands in one warp")
    return int(lanes[0])


def _compile_alloc(binder: Binder) -> Step:
    """alloc: writes the address of the columns to shared memory. With cta_group::2 one warp of
    each CTA executes it; each allocates in its own CTA.

    That one CTA of a pair may only then allocate when the other is known to run is not in the ISA;
    CUTLASS's and DeepGEMM's kernels synchronise the cluster first, and so must ours.
    """
    address, columns = binder.address(binder.operands[0]), binder.read(binder.operands[1], "u32")
    paired = binder.has("cta_group::2")

    def action(gang, mask):
        if paired and gang.cta.cluster_barrier.phase == 0:
            raise Finding(
                "tmem", "tcgen05.alloc of a pair whose CTAs have not met: one may not run"
            )
        for warp in gang.warps_of(mask):
            at = _per_warp(address(gang), gang, warp, "tcgen05.alloc")
            first = gang.cta.tensor.allocate(_per_warp(columns(gang), gang, warp, "tcgen05.alloc"))
            offset = np.array([at & OFFSET_MASK])
            data = np.array([[first]], np.uint32).view(np.uint8)
            gang.cta.shared.scatter(offset, data, 0)
            gang.machine.events += 1

    return Step(COLLECTIVE, action, None)


def _compile_dealloc(binder: Binder) -> Step:
    address, columns = (binder.read(o, "u32") for o in binder.operands)

    def action(gang, mask):
        for warp in gang.warps_of(mask):
            at = _per_warp(address(gang), gang, warp, "tcgen05.dealloc")
            gang.cta.tensor.free(at & 0xFFFF, _per_warp(columns(gang), gang, warp, "dealloc"))

    return Step(COLLECTIVE, action, None)


def _compile_relinquish(binder: Binder) -> Step:
    def action(gang, mask):
        gang.cta.tensor.may_allocate = False

    return Step(COLLECTIVE, action, None)


def _compile_fence(binder: Binder) -> Step:
    name = ".".join(binder.parts)
    before = "before_thread_sync" in name

    def action(gang, mask):
        order, cta = gang.cta.tensor_order, gang.cta
        for warp in gang.warps_of(mask):
            gang.machine.counts[name] += 1
            fence = order.before_sync if before else order.after_sync
            fence(order.warp(cta.rank, gang.first_warp + warp))

    return Step(PLAIN, action, None)


def _compile_wait(binder: Binder) -> Step:
    loads = "wait::ld" in binder.opcode

    def action(gang, mask):
        for warp in gang.warps_of(mask):
            pending = gang.tensor_loads[warp] if loads else gang.tensor_stores[warp]
            for operation, result in pending:
                operation.complete()
                if result is not None:
                    result.settle(gang.warp_lanes(warp))
            pending.clear()
            order, rank = gang.cta.tensor_order, gang.cta.rank
            order.wait(order.warp(rank, gang.first_warp + warp), rank, not loads)

    return Step(COLLECTIVE, action, None)


def _compile_cp(binder: Binder) -> Step:
    """cp.32x128b.warpx4: 32 rows of 16 bytes to four columns, in all four lane quarters."""
    if not (binder.has("32x128b") and binder.has("warpx4")) or len(binder.operands) != 2:
        raise binder.unsupported()
    paired = binder.has("cta_group::2")
    target, source = binder.address(binder.operands[0]), binder.read(binder.operands[1], "u64")

    def action(gang, mask):
        for lane in np.nonzero(mask)[0]:
            address, bits = int(target(gang)[lane]), int(source(gang)[lane])
            moves = []
            for cta in ctas_of(gang, paired):
                operand = Operand(cta.shared, tcgen05_descriptor(bits), 32, 16, "tcgen05.cp")
                columns = cta.tensor.columns(address, 4, "tcgen05.cp")
                moves.append((cta, operand, columns))
                touch(gang, int(lane), cta, columns, "tcgen05.cp")
            gang.machine.counts["tcgen05.cp"] += 1

            def copy(moves=moves):
                for cta, operand, columns in moves:
                    words = np.ascontiguousarray(operand.read()).view(np.uint32)
                    cta.tensor.words[:, columns] = np.tile(words, (4, 1))

            gang.machine.engine.submit_in_order(gang.cta.tensor_queue, copy)
        gang.machine.events += 1

    return Step(PLAIN, action, None)


def _compile_commit(binder: Binder) -> Step:
    """commit: one arrival on an mbarrier when everything issued before it is complete."""
    multicast = binder.has("multicast::cluster")
    address = binder.address(binder.operands[0])
    ctas = binder.read(binder.operands[1], "u16") if multicast else None

    def action(gang, mask):
        machine = gang.machine
        for lane in np.nonzero(mask)[0]:
            at = int(address(gang)[lane])
            receivers = [gang.cta.peer(at)]
            if multicast:
                chosen = int(ctas(gang)[lane])
                receivers = [c for c in gang.cta.cluster if chosen >> c.rank & 1]
            targets = [
                (c, gang.cta.mbarrier(c.rank << RANK_SHIFT | at & OFFSET_MASK)) for c in receivers
            ]

            order, rank = gang.cta.tensor_order, gang.cta.rank
            warp = order.warp(rank, gang.first_warp + int(lane) // WARP)
            told = order.commit(warp, order.pipe(rank))

            def arrive(targets=targets, cta=gang.cta, told=told):
                for receiver, barrier in targets:
                    cta.check_alive(receiver)
                    add(barrier, told)
                    barrier.arrive()
                machine.events += 1

            machine.engine.submit_in_order(gang.cta.tensor_queue, arrive)
        machine.events += 1

    return Step(PLAIN, action, None)


# Loads and stores.


def _access_shape(binder: Binder) -> tuple[str, int]:
    match = re.search(r"\.(\d+x\d+b)(?:x2)?\.x(\d+)", binder.opcode)
    if match is None or match.group(1) not in _FRAGMENTS or binder.has("pack::16b", "unpack::16b"):
        raise binder.unsupported()
    if "x2.x" in binder.opcode or binder.has("red"):
        raise binder.unsupported()
    return match.group(1), int(match.group(2))


# Per shape: lanes of tensor memory, and (lane, column) of each register of a thread, for .x1
# (PTX ISA 9.0, 9.7.16, figures of the data movement shapes). .xN repeats along columns.
_T = np.arange(WARP)
_FRAGMENTS = {
    "32x32b": (1, [(_T, 0 * _T)]),
    "16x128b": (4, [(_T // 4, _T % 4), (_T // 4 + 8, _T % 4)]),
    "16x256b": (
        8,
        [
            (_T // 4, _T % 4 * 2),
            (_T // 4, _T % 4 * 2 + 1),
            (_T // 4 + 8, _T % 4 * 2),
            (_T // 4 + 8, _T % 4 * 2 + 1),
        ],
    ),
}


def _positions(shape: str, repeat: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(registers, 32) lanes and columns within the access, and its width in columns."""
    width, registers = _FRAGMENTS[shape]
    lanes = np.stack([r[0] for r in registers] * repeat)
    columns = np.stack([r[1] + width * i for i in range(repeat) for r in registers])
    return lanes, columns, width * repeat


def _access(
    gang: Gang, warp: int, address: int, shape: str, width: int, write: bool
) -> tuple[int, slice]:
    what = "tcgen05.st" if write else "tcgen05.ld"
    lane = address >> 16
    quarter = 32 * ((gang.first_warp + warp) % 4)
    allowed = (quarter,) if shape == "32x32b" else (quarter, quarter + 16)
    if lane not in allowed:
        raise Finding(
            "tmem",
            f"{what} of lanes {lane}.. by warp {gang.first_warp + warp}, which owns "
            f"{quarter}..{quarter + 31}",
        )
    columns = gang.cta.tensor.columns_of_a_warp(address, width, what)
    order, rank = gang.cta.tensor_order, gang.cta.rank
    by = order.warp(rank, gang.first_warp + warp)
    order.access(by, rank, slice(quarter // 32, quarter // 32 + 1), columns, write, what)
    return lane, columns


def _compile_load(binder: Binder) -> Step:
    shape, repeat = _access_shape(binder)
    lanes, columns, width = _positions(shape, repeat)
    targets = [binder.kernel.registers[t][0] for t in binder.vector(binder.operands[0])]
    if len(targets) != len(lanes):
        raise binder.unsupported()
    address = binder.address(binder.operands[1])
    name = f"`{'.'.join(binder.parts[:2])}` at line {binder.instruction.line}"

    def action(gang, mask):
        addresses = address(gang)
        result = AsyncResult(name, "tcgen05.wait::ld", mask.copy())
        reads = []
        for warp in gang.warps_of(mask):
            at = _per_warp(addresses, gang, warp, "tcgen05.ld")
            lane, where = _access(gang, warp, at, shape, width, False)
            reads.append((gang.warp_lanes(warp), lanes + lane, columns + where.start))

        def load():
            values = np.zeros((len(targets), gang.lanes), np.uint32)
            for threads, rows, cols in reads:
                values[:, threads] = gang.cta.tensor.words[rows, cols]
            result.values = list(values)

        for position, index in enumerate(targets):
            old = gang.registers[index]
            if old.__class__ is InFlight:
                old = old.overwrite(mask)
            gang.registers[index] = InFlight(result, position, old)
        operation = gang.machine.engine.submit(load)
        for warp in gang.warps_of(mask):
            gang.tensor_loads[warp].append((operation, result))

    return Step(COLLECTIVE, action, None)


def _compile_store(binder: Binder) -> Step:
    shape, repeat = _access_shape(binder)
    lanes, columns, width = _positions(shape, repeat)
    sources = [binder.read(s, "u32") for s in binder.vector(binder.operands[1])]
    if len(sources) != len(lanes):
        raise binder.unsupported()
    address = binder.address(binder.operands[0])

    def action(gang, mask):
        addresses = address(gang)
        values = np.stack([read(gang) for read in sources])
        for warp in gang.warps_of(mask):
            at = _per_warp(addresses, gang, warp, "tcgen05.st")
            lane, where = _access(gang, warp, at, shape, width, True)

            def store(warp=warp, lane=lane, first=where.start):
                written = values[:, gang.warp_lanes(warp)]
                gang.cta.tensor.words[lanes + lane, columns + first] = written

            operation = gang.machine.engine.submit(store)
            gang.tensor_stores[warp].append((operation, None))

    return Step(COLLECTIVE, action, None)


COMPILERS = {"tcgen05": compile_tcgen05}
