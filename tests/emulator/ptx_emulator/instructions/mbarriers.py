"""mbarrier (PTX ISA 9.0, 9.7.13)."""

import numpy as np

from tests.emulator.ptx_emulator.barriers import MBarrier
from tests.emulator.ptx_emulator.dependence import learn, publish
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import MBARRIER_STAMP, OFFSET_MASK
from tests.emulator.ptx_emulator.operands import Binder, is_literal
from tests.emulator.ptx_emulator.program import CONTROL, PLAIN, Signal, Step
from tests.emulator.ptx_emulator.tensor_order import hear, tell
from tests.emulator.ptx_emulator.threads import WARP


def compile_mbarrier(binder: Binder) -> Step:
    form = binder.parts[1]
    if form == "init":
        return _compile_init(binder)
    if form == "inval":
        return _compile_invalidate(binder)
    if form in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
        return _compile_arrive(binder, form)
    if form in ("try_wait", "test_wait"):
        return _compile_wait(binder)
    raise binder.unsupported()


def _compile_init(binder: Binder) -> Step:
    address, count = binder.address(binder.operands[0]), binder.read(binder.operands[1], "u32")

    def action(gang, mask):
        addresses, counts = address(gang), count(gang)
        for lane in np.nonzero(mask)[0]:
            at = int(addresses[lane])
            cta, offset = gang.cta.peer(at), at & OFFSET_MASK
            if offset % 8:
                raise Finding("misaligned", f"mbarrier at {at:#x}; a multiple of 8")
            cta.shared.check(np.array([offset]), 8, "mbarrier.init")
            if offset in cta.mbarriers:
                raise Finding("mbarrier", "mbarrier.init of an mbarrier that is in use")
            cta.mbarriers[offset] = MBarrier(int(counts[lane]), cta.num_warps)
            cta.shared.stamps[offset >> 2 : (offset >> 2) + 2] = MBARRIER_STAMP
        gang.machine.events += 1

    return Step(PLAIN, action, None)


def _compile_invalidate(binder: Binder) -> Step:
    address = binder.address(binder.operands[0])

    def action(gang, mask):
        for at in address(gang)[mask]:
            gang.cta.mbarrier(int(at))
            offset = int(at) & OFFSET_MASK
            del gang.cta.peer(int(at)).mbarriers[offset]
            gang.cta.peer(int(at)).shared.stamps[offset >> 2 : (offset >> 2) + 2] = 0

    return Step(PLAIN, action, None)


def _compile_arrive(binder: Binder, form: str) -> Step:
    """arrive{.expect_tx}, expect_tx, complete_tx, with or without a state result."""
    operands = list(binder.operands)
    write = None
    if not operands[0].startswith("["):
        write = binder.write(operands.pop(0))
    if binder.has("noComplete") or form == "arrive_drop":
        raise binder.unsupported()
    address = binder.address(operands[0])
    amount = binder.read(operands[1] if len(operands) > 1 else "1", "u32")
    expects = binder.has("expect_tx")
    completes = form == "complete_tx"

    def action(gang, mask):
        addresses, amounts = address(gang), amount(gang)
        for lane in np.nonzero(mask)[0]:
            barrier = gang.cta.mbarrier(int(addresses[lane]))
            if completes:
                barrier.complete_bytes(int(amounts[lane]))
                continue
            if expects:
                barrier.expect(int(amounts[lane]))
            if form == "arrive":
                if gang.cta.peer(int(addresses[lane])) is gang.cta:
                    warp = gang.first_warp + lane // WARP
                    published = gang.cta.visibility.release(warp)
                    np.maximum(barrier.published, published, out=barrier.published)
                publish(gang, barrier)
                tell(gang.cta, gang.first_warp + int(lane) // WARP, barrier)
                barrier.arrive(1 if expects else int(amounts[lane]))
        if write is not None:
            write(gang, np.zeros(gang.lanes, np.uint64), mask)
        gang.machine.events += 1

    return Step(PLAIN, action, None)


def _compile_wait(binder: Binder) -> Step:
    """try_wait.parity and test_wait.parity: true once the phase of that parity is complete."""
    if not binder.has("parity"):
        raise binder.unsupported("(wait on a state, not a parity)")
    write = binder.write(binder.operands[0])
    address, parity = binder.address(binder.operands[1]), binder.read(binder.operands[2], "u32")
    constant = is_literal(binder.operands[2])

    def action(gang, mask):
        addresses, parities = address(gang)[mask], parity(gang)[mask]
        same = (addresses == addresses[0]).all() and (constant or (parities == parities[0]).all())
        if parities.max() > 1:
            raise Finding("mbarrier", f"try_wait with parity {parities.max()}")
        if same:
            barrier = gang.cta.mbarrier(int(addresses[0]))
            done = barrier.parity != int(parities[0])
            write(gang, np.full(gang.lanes, done), mask)
            if not done:
                return Signal(barrier=barrier)
            warps = [gang.first_warp + warp for warp in gang.warps_of(mask)]
            for warp in warps:
                gang.cta.visibility.acquire(warp, barrier.published)
                hear(gang.cta, warp, barrier)
            learn(gang.cta, warps, barrier.knows_dependence)
            return None
        results = np.zeros(gang.lanes, bool)
        failed = None
        for lane in np.nonzero(mask)[0]:
            barrier = gang.cta.mbarrier(int(address(gang)[lane]))
            results[lane] = barrier.parity != int(parity(gang)[lane])
            if results[lane]:
                warp = gang.first_warp + lane // WARP
                gang.cta.visibility.acquire(warp, barrier.published)
                hear(gang.cta, warp, barrier)
                learn(gang.cta, [warp], barrier.knows_dependence)
            else:
                failed = barrier
        write(gang, results, mask)
        return None if results[mask].any() else Signal(barrier=failed)

    return Step(CONTROL, action, None)


COMPILERS = {"mbarrier": compile_mbarrier}
