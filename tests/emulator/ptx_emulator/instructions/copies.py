"""cp.async.bulk and cp.async.bulk.tensor (PTX ISA 9.0, 9.7.9)."""

import numpy as np

from tests.emulator.ptx_emulator.dependence import check_global, publish
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.instructions.cp_async import compile_cp_async
from tests.emulator.ptx_emulator.memory import OFFSET_MASK
from tests.emulator.ptx_emulator.operands import Binder, Reader, literal
from tests.emulator.ptx_emulator.parser import split_operands
from tests.emulator.ptx_emulator.program import PLAIN, Step
from tests.emulator.ptx_emulator.tensor_map import TENSOR_MAP_BYTES, TensorMap, swizzle
from tests.emulator.ptx_emulator.threads import Cta, Gang


def compile_copy(binder: Binder) -> Step:
    if not binder.has("async"):
        raise binder.unsupported()
    if not binder.has("bulk"):
        return compile_cp_async(binder)
    if binder.has("commit_group"):
        return Step(PLAIN, _commit_bulk, None)
    if binder.has("wait_group"):
        return _compile_bulk_wait(binder)
    if binder.has("prefetch"):
        return Step(PLAIN, lambda gang, mask: gang.machine.counts.update(["prefetch"]), None)
    if binder.has("reduce") or binder.parts[1] == "reduce":
        raise binder.unsupported()
    if binder.has("tensor"):
        return _compile_tensor(binder)
    return _compile_bulk(binder)


# Bulk copies and their groups.


class _Store:
    """A bulk store: reads shared memory, then writes global memory; each at most once."""

    def __init__(self, read, write):
        self.read_action, self.write_action = read, write
        self.data = None
        self.has_read = self.has_written = False
        self.awaited = False  # the program knows that shared memory was read

    def read(self) -> None:
        if not self.has_read:
            self.has_read = True
            self.data = self.read_action()

    def write(self) -> None:
        self.read()
        if not self.has_written:
            self.has_written = True
            self.write_action(self.data)
            self.data = None


def _issue_store(gang: Gang, store: _Store) -> _Store:
    engine = gang.machine.engine
    engine.submit(store.read)
    engine.submit(store.write)
    gang.machine.events += 1
    return store


def _commit_bulk(gang: Gang, mask: np.ndarray) -> None:
    for lane in np.nonzero(mask)[0]:
        gang.bulk_groups[lane].append(gang.bulk[lane])
        gang.bulk[lane] = []


def check_stores_at_exit(gang: Gang, mask: np.ndarray) -> None:
    """Shared memory goes with the CTA: a bulk store must have read it before its thread exits."""
    for lane in np.nonzero(mask)[0]:
        groups = [gang.bulk[lane], *gang.bulk_groups[lane]]
        if any(not store.awaited for group in groups for store in group):
            raise Finding(
                "async-wait",
                f"thread {int(gang.thread[lane])} exits with a bulk store that it has not waited "
                "for by cp.async.bulk.wait_group",
            )


def _compile_bulk_wait(binder: Binder) -> Step:
    keep = literal(binder.operands[0])
    reads_only = binder.has("read")

    def action(gang, mask):
        for lane in np.nonzero(mask)[0]:
            groups = gang.bulk_groups[lane]
            done = groups[: max(0, len(groups) - keep)]
            for group in done:
                for store in group:
                    store.awaited = True
                    store.read() if reads_only else store.write()
            if not reads_only:
                del groups[: len(done)]

    return Step(PLAIN, action, None)


def _compile_bulk(binder: Binder) -> Step:
    """cp.async.bulk without a tensor map: global -> shared with an mbarrier, shared -> global."""
    if binder.has("multicast::cluster") or binder.has("cp_mask"):
        raise binder.unsupported()
    target, source = binder.address(binder.operands[0]), binder.address(binder.operands[1])
    size = binder.read(binder.operands[2], "u32")
    spaces = [p for p in binder.parts if p.startswith(("global", "shared"))]
    loads = spaces[0].startswith("shared") and spaces[1] == "global"
    stores = spaces[0] == "global"
    if not (loads or stores):
        raise binder.unsupported()
    barrier = binder.address(binder.operands[3]) if loads else None

    def action(gang, mask):
        targets, sources, sizes = target(gang), source(gang), size(gang)
        for lane in np.nonzero(mask)[0]:
            to, start, count = int(targets[lane]), int(sources[lane]), int(sizes[lane])
            if to % 16 or start % 16 or count % 16:
                raise Finding(
                    "misaligned", f"cp.async.bulk of {count} bytes from {start:#x} to {to:#x}"
                )
            if count == 0:
                continue
            gang.machine.counts["cp.async.bulk"] += 1
            if loads:
                _bulk_load(gang, to, start, count, int(barrier(gang)[lane]))
            else:
                _bulk_store(gang, int(lane), to, start, count)

    return Step(PLAIN, action, None)


def _bulk_load(gang: Gang, to: int, start: int, count: int, barrier_address: int) -> None:
    machine, cta = gang.machine, gang.cta.peer(to)
    region = machine.memory.find(start, count, "cp.async.bulk")
    check_global(gang, np.array([start]), False, "cp.async.bulk")
    barrier = gang.cta.mbarrier(barrier_address)
    publish(gang, barrier)
    offsets = (to & OFFSET_MASK) + np.arange(count)
    cta.shared.check(offsets, 1, "cp.async.bulk")

    def copy():
        at = start - region.start
        cta.shared.async_write(offsets, region.data[at : at + count], "cp.async.bulk")
        barrier.complete_bytes(count)
        machine.events += 1

    machine.engine.submit(copy)
    machine.events += 1


def _bulk_store(gang: Gang, lane: int, to: int, start: int, count: int) -> None:
    machine, cta = gang.machine, gang.cta.peer(start)
    region = machine.memory.find(to, count, "cp.async.bulk")
    check_global(gang, np.array([to]), True, "cp.async.bulk")
    offsets = (start & OFFSET_MASK) + np.arange(count)
    cta.shared.check_async_read(offsets, "cp.async.bulk")

    def write(data):
        region.data[to - region.start : to - region.start + count] = data

    gang.bulk[lane].append(_issue_store(gang, _Store(lambda: cta.shared.data[offsets], write)))


# Tensor copies.


def _tensor_operands(binder: Binder, text: str) -> tuple[Reader, list[Reader]]:
    descriptor, coordinates = split_operands(text[1:-1])
    return (
        binder.address(f"[{descriptor}]"),
        [binder.read(c, "s32") for c in binder.vector(coordinates)],
    )


def _compile_tensor(binder: Binder) -> Step:
    if binder.has("im2col") or any("gather" in p or "scatter" in p for p in binder.parts):
        raise binder.unsupported()
    spaces = [p for p in binder.parts if p.startswith(("global", "shared"))]
    if spaces[0].startswith("shared") and spaces[1] == "global":
        return _compile_tensor_load(binder)
    return _compile_tensor_store(binder)


def _tensor_map(gang: Gang, address: int) -> TensorMap:
    if address % 64:
        raise Finding("misaligned", f"tensor map at {address:#x}; a multiple of 64")
    region = gang.machine.memory.find(address, TENSOR_MAP_BYTES, "tensor map")
    at = address - region.start
    return TensorMap(region.data[at : at + TENSOR_MAP_BYTES].tobytes())


def _shared_offsets(tensor_map: TensorMap, address: int) -> np.ndarray:
    offset = address & OFFSET_MASK
    if offset % 128:
        raise Finding(
            "misaligned", f"tensor copy at shared address {address:#x}; a multiple of 128"
        )
    return swizzle(offset + np.arange(tensor_map.tile_bytes), tensor_map.swizzle)


def _compile_tensor_load(binder: Binder) -> Step:
    descriptor, coordinates = _tensor_operands(binder, binder.operands[1])
    target, barrier = binder.address(binder.operands[0]), binder.address(binder.operands[2])
    multicast = binder.has("multicast::cluster")
    ctas = binder.read(binder.operands[3], "u16") if multicast else None
    paired = binder.has("cta_group::2")

    def action(gang, mask):
        for lane in np.nonzero(mask)[0]:
            where = [int(c(gang)[lane]) for c in coordinates]
            to = int(target(gang)[lane])
            cluster = gang.cta.cluster
            receivers = [gang.cta.peer(to)]
            if multicast:
                chosen = int(ctas(gang)[lane])
                if chosen >> len(cluster):
                    raise Finding(
                        "out-of-bounds", f"multicast to CTAs {chosen:#x} of {len(cluster)}"
                    )
                receivers = [c for c in cluster if chosen >> c.rank & 1]
            _tensor_load(
                gang,
                int(descriptor(gang)[lane]),
                where,
                to,
                int(barrier(gang)[lane]),
                receivers,
                multicast,
                paired,
            )

    return Step(PLAIN, action, None)


def _barrier_cta(receiver: Cta, barrier_address: int, paired: bool) -> Cta:
    """Under multicast each receiver signals its own barrier; with cta_group::2, that of the
    CTA of its pair that the address names."""
    if not paired:
        return receiver
    even, odd = receiver.pair()
    return odd if barrier_address >> 24 & 1 else even


def _tensor_load(
    gang: Gang,
    descriptor: int,
    where: list[int],
    to: int,
    barrier_address: int,
    receivers: list[Cta],
    multicast: bool,
    paired: bool,
) -> None:
    machine = gang.machine
    machine.counts["tensor load"] += 1
    tensor_map = _tensor_map(gang, descriptor)
    check_global(gang, np.array([tensor_map.base]), False, "tensor load")
    offsets = _shared_offsets(tensor_map, to)
    barriers = []
    for receiver in receivers:
        receiver.shared.check(offsets, 1, "tensor load")
        owner = _barrier_cta(receiver, barrier_address, paired) if multicast else None
        if owner is None:
            barriers.append(gang.cta.mbarrier(barrier_address))
        else:
            barriers.append(
                owner.mbarrier(owner.shared_base & ~OFFSET_MASK | barrier_address & OFFSET_MASK)
            )

    def copy(receiver, barrier):
        gang.cta.check_alive(receiver)
        data = _gather_tile(gang, tensor_map, where)
        receiver.shared.async_write(offsets, data, "tensor load")
        barrier.complete_bytes(len(data))
        machine.events += 1

    for receiver, barrier in zip(receivers, barriers, strict=True):
        publish(gang, barrier)
        machine.engine.submit(lambda r=receiver, b=barrier: copy(r, b))
    machine.events += 1


def _gather_tile(gang: Gang, tensor_map: TensorMap, where: list[int]) -> np.ndarray:
    """The box's bytes; zeros beyond the tensor's sizes."""
    addresses, inside = tensor_map.tile(where)
    data = np.zeros(len(addresses), np.uint8)
    if not inside.any():
        return data
    everything = inside.all()
    used = addresses if everything else addresses[inside]
    low = int(used.min())
    region = gang.machine.memory.find(low, int(used.max()) + 1 - low, "tensor load")
    if everything:
        return region.data[used - region.start]
    data[inside] = region.data[used - region.start]
    return data


def _compile_tensor_store(binder: Binder) -> Step:
    descriptor, coordinates = _tensor_operands(binder, binder.operands[0])
    source = binder.address(binder.operands[1])

    def action(gang, mask):
        # Lanes that ask for the same copy share one: it would write the same bytes again.
        issued: dict[tuple, _Store] = {}
        for lane in np.nonzero(mask)[0]:
            where = [int(c(gang)[lane]) for c in coordinates]
            start = int(source(gang)[lane])
            key = (int(descriptor(gang)[lane]), start, *where)
            if key not in issued:
                gang.machine.counts["tensor store"] += 1
                issued[key] = _tensor_store(gang, _tensor_map(gang, key[0]), where, start)
            gang.bulk[lane].append(issued[key])

    return Step(PLAIN, action, None)


def _tensor_store(gang: Gang, tensor_map: TensorMap, where: list[int], start: int) -> _Store:
    cta = gang.cta.peer(start)
    offsets = _shared_offsets(tensor_map, start)
    addresses, inside = tensor_map.tile(where)
    # Only what lands inside the tensor has to be written; the rest may stay undefined.
    cta.shared.check(offsets, 1, "tensor store")
    if not inside.any():
        return _Store(lambda: None, lambda data: None)
    offsets, addresses = offsets[inside], addresses[inside]
    cta.shared.check_async_read(offsets, "tensor store")
    low = int(addresses.min())
    region = gang.machine.memory.find(low, int(addresses.max()) + 1 - low, "tensor store")
    check_global(gang, addresses, True, "tensor store")

    def write(data):
        region.data[addresses - region.start] = data

    return _issue_store(gang, _Store(lambda: cta.shared.data[offsets], write))


COMPILERS = {"cp": compile_copy}
