"""Warp collectives, barriers, branches, fences (PTX ISA 9.0, 9.7.9, 9.7.12, 9.7.13)."""

import numpy as np

from tests.emulator.ptx_emulator.barriers import ClusterBarrier, NamedBarrier
from tests.emulator.ptx_emulator.dependence import learn, share
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.numerics import FUNCTIONS
from tests.emulator.ptx_emulator.operands import Binder, dtype_of
from tests.emulator.ptx_emulator.program import BRANCH, COLLECTIVE, EXIT, PLAIN, Signal, Step
from tests.emulator.ptx_emulator.threads import WARP, Gang


def _full_membership(gang: Gang, members: np.ndarray, mask: np.ndarray, what: str) -> None:
    if (members[mask] != 0xFFFFFFFF).any():
        raise Finding("divergent", f"{what} with member mask {int(members[mask][0]):#x}")


def compile_shfl(binder: Binder) -> Step:
    """shfl.sync.{idx,up,down,bfly}.b32 d{|p}, a, b, c, members."""
    mode = binder.parts[2]
    if binder.parts[1] != "sync":
        raise binder.unsupported()
    target, _, predicate = binder.operands[0].partition("|")
    write = binder.write(target)
    write_inside = binder.write(predicate) if predicate else None
    value, lane_b, clamp_c, members = (binder.read(o, "b32") for o in binder.operands[1:5])

    def action(gang, mask):
        _full_membership(gang, members(gang), mask, "shfl.sync")
        lane = np.arange(gang.lanes) % WARP
        by, c = lane_b(gang).astype(np.int64) & 31, clamp_c(gang).astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        bound = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - by
            inside = source >= bound
        else:
            source = {
                "idx": (lane & segment) | (by & ~segment),
                "down": lane + by,
                "bfly": lane ^ by,
            }[mode]
            inside = source <= bound
        source = np.where(inside, source, lane) + np.arange(gang.lanes) // WARP * WARP
        write(gang, value(gang)[source], mask)
        if write_inside is not None:
            write_inside(gang, inside, mask)

    return Step(COLLECTIVE, action, None)


def compile_elect(binder: Binder) -> Step:
    """elect.sync d|p, members: the lowest lane, as the hardware does today."""
    target, _, predicate = binder.operands[0].partition("|")
    write, write_elected = binder.write(target), binder.write(predicate)
    members = binder.read(binder.operands[1], "u32")

    def action(gang, mask):
        _full_membership(gang, members(gang), mask, "elect.sync")
        write(gang, np.zeros(gang.lanes, np.uint32), mask)
        write_elected(gang, np.arange(gang.lanes) % WARP == 0, mask)

    return Step(COLLECTIVE, action, None)


def compile_vote(binder: Binder) -> Step:
    """vote.sync.{all,any,uni}.pred and vote.sync.ballot.b32."""
    mode = binder.parts[2]
    write = binder.write(binder.operands[0])
    source, members = (
        binder.read(binder.operands[1], "pred"),
        binder.read(binder.operands[2], "u32"),
    )

    def action(gang, mask):
        _full_membership(gang, members(gang), mask, "vote.sync")
        bits = source(gang).reshape(-1, WARP)
        if mode == "ballot":
            result = (bits << np.arange(WARP, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
        else:
            result = {
                "all": bits.all(axis=1),
                "any": bits.any(axis=1),
                "uni": bits.all(axis=1) | ~bits.any(axis=1),
            }[mode]
        write(gang, np.repeat(result, WARP), mask)

    return Step(COLLECTIVE, action, None)


def compile_match(binder: Binder) -> Step:
    """match.{any,all}.sync: lanes that hold the same value."""
    mode, kind = binder.parts[1], binder.parts[-1]
    target, _, predicate = binder.operands[0].partition("|")
    write = binder.write(target)
    write_all = binder.write(predicate) if predicate else None
    source, members = binder.read(binder.operands[1], kind), binder.read(binder.operands[2], "u32")

    def action(gang, mask):
        _full_membership(gang, members(gang), mask, "match.sync")
        values = source(gang).reshape(-1, WARP)
        equal = values[:, :, None] == values[:, None, :]
        if mode == "any":
            result = (equal << np.arange(WARP, dtype=np.uint64)).sum(axis=2).reshape(-1)
        else:
            same = np.repeat(equal.all(axis=(1, 2)), WARP)
            result = np.where(same, 0xFFFFFFFF, 0)
            if write_all is not None:
                write_all(gang, same, mask)
        write(gang, result.astype(np.uint32), mask)

    return Step(COLLECTIVE, action, None)


def compile_redux(binder: Binder) -> Step:
    """redux.sync: add, min, max, and, or, xor over a warp; f32 min and max with .abs and .NaN."""
    name, kind = binder.parts[2], binder.parts[-1]
    dtype = dtype_of(kind)
    functions = FUNCTIONS
    if kind == "f32" and not binder.has("NaN"):
        functions = functions | {"min": np.fmin, "max": np.fmax}
    function = functions[name]
    absolute = binder.has("abs")
    write = binder.write(binder.operands[0])
    source, members = binder.read(binder.operands[1], kind), binder.read(binder.operands[2], "u32")

    def action(gang, mask):
        _full_membership(gang, members(gang), mask, "redux.sync")
        values = source(gang).reshape(-1, WARP)
        if absolute:
            values = np.abs(values)
        write(gang, np.repeat(function.reduce(values, axis=1, dtype=dtype), WARP), mask)

    return Step(COLLECTIVE, action, None)


def compile_barrier(binder: Binder) -> Step:
    """bar and barrier: sync and arrive with an id, warp, cluster."""
    if binder.parts[1] == "warp":
        members = binder.read(binder.operands[0], "u32")
        return Step(
            COLLECTIVE,
            lambda gang, mask: _full_membership(gang, members(gang), mask, "bar.warp.sync"),
            None,
        )
    if binder.has("cluster"):
        return _compile_cluster_barrier(binder)
    waits = not binder.has("arrive")
    if binder.has("red"):
        raise binder.unsupported()
    number = binder.read(binder.operands[0], "u32")
    threads = binder.read(binder.operands[1], "u32") if len(binder.operands) > 1 else None

    def action(gang, mask):
        warps = gang.warps_of(mask)
        numbers = number(gang)[mask]
        counts = None if threads is None else threads(gang)[mask]
        if counts is not None:
            numbers = numbers * 4096 + counts
        if (numbers != numbers[0]).any():
            same = np.zeros(gang.lanes, bool)
            same[mask] = numbers == numbers[0]
            gang.split(gang.strand, same)
            return Signal(retry=True)
        expected = gang.cta.num_warps * WARP if counts is None else int(counts[0])
        chosen = int(number(gang)[mask][0])
        if chosen > 15:
            raise Finding("barrier", f"barrier {chosen}; a CTA has 16")
        return _arrive_named(gang, warps, chosen, expected, waits)

    return Step(COLLECTIVE, action, None)


def _arrive_named(
    gang: Gang, warps: list[int], number: int, expected: int, waits: bool
) -> Signal | None:
    cta = gang.cta
    gang.machine.events += 1
    barrier = cta.barriers.setdefault(number, NamedBarrier())
    complete = False
    for i, warp in enumerate(warps):
        complete = barrier.arrive(gang.first_warp + warp, expected, number)
        if complete and i + 1 < len(warps):
            raise Finding(
                "barrier",
                f"barrier {number} completes with {expected} threads while more warps of a "
                "lockstep strand arrive",
            )
    if not complete:
        if waits:
            barrier.waiting.append(gang.strand)
            return Signal(blocked=f"barrier {number} ({barrier.arrived} of {expected} threads)")
        return None
    published = [cta.visibility.release(w) for w in barrier.warps]
    joined = np.maximum.reduce(published)
    for warp in barrier.warps:
        cta.visibility.acquire(warp, joined)
    share(cta, barrier.warps)
    if cta.tensor_order is not None:
        cta.tensor_order.meet([cta.tensor_order.warp(cta.rank, w) for w in barrier.warps])
    for waiting in barrier.waiting:
        waiting.blocked = None
    del cta.barriers[number]
    return None


def _compile_cluster_barrier(binder: Binder) -> Step:
    arrives, waits = binder.has("arrive"), binder.has("wait")

    def action(gang, mask):
        gang.machine.events += 1
        barrier = gang.cta.cluster_barrier
        warps = gang.warps_of(mask)
        if arrives:
            for warp in warps:
                if gang.cluster_phase[warp] == barrier.phase:
                    raise Finding("barrier", "a warp arrives twice at the cluster barrier")
                gang.cluster_phase[warp] = barrier.phase
                gang.cta.visibility.release(gang.first_warp + warp)
            barrier.arrived += len(warps)
            if barrier.arrived == barrier.num_warps:
                _complete_cluster(barrier, gang)
        if waits:
            if any(gang.cluster_phase[w] < 0 for w in warps):
                raise Finding("barrier", "barrier.cluster.wait without an arrive")
            if any(gang.cluster_phase[w] == barrier.phase for w in warps):
                barrier.waiting.append(gang.strand)
                return Signal(
                    blocked=f"the cluster barrier ({barrier.arrived} of {barrier.num_warps} warps)"
                )
        return None

    return Step(COLLECTIVE, action, None)


def _complete_cluster(barrier: ClusterBarrier, gang: Gang) -> None:
    barrier.arrived = 0
    barrier.phase += 1
    for strand in barrier.waiting:
        strand.blocked = None
    barrier.waiting.clear()
    order = gang.cta.tensor_order
    if order is not None:
        every = [(cta.rank, w) for cta in gang.cta.cluster for w in range(cta.num_warps)]
        order.meet([order.warp(*place) for place in every])
    # A CTA without a record knows.
    knows = any(c.dependence is None or c.dependence.knows.any() for c in gang.cta.cluster)
    for cta in gang.cta.cluster:
        learn(cta, list(range(cta.num_warps)), knows)
        # Everyone has seen everything of its own CTA.
        cta.visibility.seen[:] = np.maximum(cta.visibility.seen, cta.visibility.epoch - 1)


def compile_fence(binder: Binder) -> Step:
    """fence, membar: `.proxy.async` matters to the proxy checks, the others are counted."""
    proxy = binder.has("proxy") and (binder.has("async") or "async" in binder.opcode)
    if binder.has("proxy") and not proxy and not binder.has("tensormap", "alias"):
        if "tensormap" not in binder.opcode:
            raise binder.unsupported()
    name = ".".join(binder.parts[:3])

    def action(gang, mask):
        gang.machine.counts[name] += len(gang.warps_of(mask))
        if proxy and not binder.opcode.endswith("async.global"):
            for warp in gang.warps_of(mask):
                gang.cta.visibility.proxy_fence(gang.first_warp + warp, gang.cta.shared.stamps)

    return Step(PLAIN, action, None)


def compile_ordering(binder: Binder) -> Step:
    """Instructions with no effect on values: counted, and otherwise nothing."""
    name = ".".join(binder.parts[:2])

    def action(gang, mask):
        gang.machine.counts[name] += len(gang.warps_of(mask))

    return Step(PLAIN, action, None)


def compile_grid_dependency(binder: Binder) -> Step:
    count = compile_ordering(binder).action
    waits = binder.has("wait")

    def action(gang, mask):
        count(gang, mask)
        if waits:
            learn(gang.cta, [gang.first_warp + warp for warp in gang.warps_of(mask)])

    return Step(PLAIN, action, None)


def compile_policy(binder: Binder) -> Step:
    """createpolicy: a cache hint, which nothing here reads."""
    write = binder.write(binder.operands[0])
    return Step(PLAIN, lambda gang, mask: write(gang, np.zeros(gang.lanes, np.uint64), mask), None)


def compile_setmaxnreg(binder: Binder) -> Step:
    registers = int(binder.operands[0])
    if registers % 8 or not 24 <= registers <= 256:
        raise binder.unsupported("(24 to 256, a multiple of 8)")

    def action(gang, mask):
        for warp in gang.warps_of(mask):
            gang.cta.registers[gang.first_warp + warp] = registers

    return Step(COLLECTIVE, action, None)


def compile_branch(binder: Binder) -> Step:
    return Step(BRANCH, None, None, binder.kernel.labels[binder.operands[0]])


def compile_exit(binder: Binder) -> Step:
    return Step(EXIT, None, None)


def compile_trap(binder: Binder) -> Step:
    def action(gang, mask):
        raise Finding("deadlock", "trap")

    return Step(PLAIN, action, None)


def compile_activemask(binder: Binder) -> Step:
    write = binder.write(binder.operands[0])

    def action(gang, mask):
        bits = mask.reshape(-1, WARP) << np.arange(WARP, dtype=np.uint64)
        write(gang, np.repeat(bits.sum(axis=1).astype(np.uint32), WARP), mask)

    return Step(PLAIN, action, None)


COMPILERS = {
    "shfl": compile_shfl,
    "elect": compile_elect,
    "vote": compile_vote,
    "match": compile_match,
    "redux": compile_redux,
    "bar": compile_barrier,
    "barrier": compile_barrier,
    "fence": compile_fence,
    "membar": compile_ordering,
    "setmaxnreg": compile_setmaxnreg,
    "griddepcontrol": compile_grid_dependency,
    "nanosleep": compile_ordering,
    "prefetch": compile_ordering,
    "prefetchu": compile_ordering,
    "createpolicy": compile_policy,
    "discard": compile_ordering,
    "applypriority": compile_ordering,
    "activemask": compile_activemask,
    "bra": compile_branch,
    "ret": compile_exit,
    "exit": compile_exit,
    "trap": compile_trap,
}
