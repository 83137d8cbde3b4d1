"""cp.async of 4 to 16 bytes a lane, its groups, its mbarriers (PTX ISA 9.0, 9.7.9)."""

import numpy as np

from tests.emulator.ptx_emulator.dependence import check_global
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import OFFSET_MASK, SHARED_LIMIT
from tests.emulator.ptx_emulator.operands import Binder, Reader, literal
from tests.emulator.ptx_emulator.program import PLAIN, Step
from tests.emulator.ptx_emulator.threads import Gang


def compile_cp_async(binder: Binder) -> Step:
    if binder.has("commit_group"):
        return Step(PLAIN, _commit_copies, None)
    if binder.has("wait_group", "wait_all"):
        return _compile_copy_wait(binder)
    if binder.has("mbarrier"):
        return _compile_copies_arrive(binder)
    size = literal(binder.operands[2])
    if size not in (4, 8, 16) or (binder.has("cg") and size != 16):
        raise binder.unsupported()
    target, source = binder.address(binder.operands[0]), binder.address(binder.operands[1])
    given = _source_size(binder)

    def action(gang, mask):
        lanes = np.nonzero(mask)[0]
        targets, sources = target(gang)[lanes], source(gang)[lanes]
        sizes = np.full(len(lanes), size) if given is None else given(gang)[lanes].astype(np.int64)
        _check_copy(gang, targets, sources, sizes, size)
        machine, cta = gang.machine, gang.cta
        machine.counts["cp.async"] += len(lanes)
        machine.events += 1
        stamps = cta.visibility.stamps(gang.first_warp + lanes // 32)[:, None]

        def copy():
            data = np.zeros((len(lanes), size), np.uint8)
            for count in np.unique(sizes[sizes > 0]):
                rows = sizes == count
                data[rows, :count] = machine.memory.gather(sources[rows], int(count))
            # cp.async writes through the generic proxy.
            cta.shared.scatter(targets & OFFSET_MASK, data, stamps)

        operation = machine.engine.submit(copy)
        for lane in lanes:
            gang.copies[lane].append(operation)

    return Step(PLAIN, action, None)


def _source_size(binder: Binder) -> Reader | None:
    """The bytes to read; the rest of the destination becomes zeros."""
    extra = list(binder.operands[3:])
    if binder.has("L2::cache_hint"):
        extra.pop()
    if not extra:
        return None
    register = binder.register(extra[0])
    if register is not None and register[1] == "pred":
        raise binder.unsupported("(ignore-src)")
    return binder.read(extra[0], "u32")


def _check_copy(
    gang: Gang, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, size: int
) -> None:
    """At issue, so that what is reported does not depend on when the copy happens."""
    if (targets % size).any() or (sources[sizes > 0] % size).any():
        raise Finding("misaligned", f"cp.async of {size} bytes")
    if (sizes > size).any():
        raise Finding("misaligned", f"cp.async of {size} bytes from {int(sizes.max())}")
    if (targets >= SHARED_LIMIT).any():
        raise Finding("out-of-bounds", "cp.async to something other than shared memory")
    if (sizes > 0).any():
        check_global(gang, sources[sizes > 0], False, "cp.async")
    for count in np.unique(sizes[sizes > 0]):
        gang.machine.memory.gather(sources[sizes == count], int(count))


def _compile_copy_wait(binder: Binder) -> Step:
    keep = literal(binder.operands[0]) if binder.operands else 0
    everything = binder.has("wait_all")

    def action(gang, mask):
        if everything:
            _commit_copies(gang, mask)
        for lane in np.nonzero(mask)[0]:
            groups = gang.copy_groups[lane]
            while len(groups) > keep:
                for operation in groups.pop(0):
                    operation.complete()

    return Step(PLAIN, action, None)


def _commit_copies(gang: Gang, mask: np.ndarray) -> None:
    for lane in np.nonzero(mask)[0]:
        gang.copy_groups[lane].append(gang.copies[lane])
        gang.copies[lane] = []


def _compile_copies_arrive(binder: Binder) -> Step:
    """cp.async.mbarrier.arrive{.noinc}: arrives when the lane's earlier cp.async are complete.

    Without .noinc the pending count is raised first, so the arrival is on top of the count.
    """
    address = binder.address(binder.operands[0])
    increments = not binder.has("noinc")

    def action(gang, mask):
        machine = gang.machine
        addresses = address(gang)
        for lane in np.nonzero(mask)[0]:
            barrier = gang.cta.mbarrier(int(addresses[lane]))
            if increments:
                barrier.pending += 1
            gang.copies[lane] = [o for o in gang.copies[lane] if not o.done]
            groups = [o for group in gang.copy_groups[lane] for o in group if not o.done]
            earlier = gang.copies[lane] + groups
            warp = gang.first_warp + int(lane) // 32
            published = gang.cta.visibility.release(warp)

            def arrive(barrier=barrier, earlier=earlier, published=published):
                for operation in earlier:
                    operation.complete()
                np.maximum(barrier.published, published, out=barrier.published)
                barrier.arrive()
                machine.events += 1

            machine.engine.submit(arrive)
        machine.events += 1

    return Step(PLAIN, action, None)
