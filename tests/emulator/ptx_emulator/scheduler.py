"""Runs the gangs of one cluster after another, and decides who goes next."""

import ctypes
import gc
import random
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx_emulator import limits, reports
from tests.emulator.ptx_emulator.async_engine import AsyncEngine
from tests.emulator.ptx_emulator.barriers import ClusterBarrier
from tests.emulator.ptx_emulator.findings import EmulatorError, Finding, Unsupported
from tests.emulator.ptx_emulator.instructions.copies import check_stores_at_exit
from tests.emulator.ptx_emulator.instructions.table import COMPILERS
from tests.emulator.ptx_emulator.memory import GlobalMemory
from tests.emulator.ptx_emulator.operands import Binder
from tests.emulator.ptx_emulator.parser import Kernel, parse
from tests.emulator.ptx_emulator.program import BRANCH, COLLECTIVE, EXIT, PLAIN, Signal, Step
from tests.emulator.ptx_emulator.tensor_order import TensorOrder
from tests.emulator.ptx_emulator.threads import CONVERGENCE, WARP, Cta, Gang, Strand

GANG_WARPS = 4
PARAM_ALIGN = 128
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # cudaLaunchAttributeProgrammaticStreamSerialization
MORSEL = 32  # instructions after which a starved strand looks whether the others can go on
SPINS = 1000  # looks at memory that nobody changes, after which a kernel does not count them


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: list[bytes]
    cluster: tuple[int, int, int] = (1, 1, 1)
    attributes: tuple[tuple[int, int], ...] = ()  # CUDA launch attribute id, first word


class Machine:
    """One emulated device: runs launches of one PTX module.

    produced: names of the buffers that the kernel before the launch writes (`dependence`).
    mode and seed: see `async_engine`. In random mode warps also run apart from one another; mode
    starved is eager, but for the victim that the seed picks (`starvation`).
    """

    def __init__(
        self,
        ptx: str,
        mode: str = "eager",
        seed: int = 0,
        num_sms: int = 132,
        max_instructions: int = 50_000_000,
        produced: Collection[str] = (),
    ):
        self.kernels = parse(ptx)
        self.memory = GlobalMemory()
        self.mode = mode
        self.seed = seed
        self.num_sms = num_sms
        self.max_instructions = max_instructions
        self.produced = frozenset(produced)
        self.instructions = 0  # warp-instructions executed
        self.events = 0  # changes that other threads can notice
        self.counts: Counter[str] = Counter()  # of the asynchronous and ordering instructions
        self.random = random.Random(seed)
        apart = mode == "starved" or (mode == "random" and seed % 2)
        self.gang_warps = 1 if apart else GANG_WARPS
        self.quantum = 64 if mode == "random" else 100_000

    def run(self, launch: Launch) -> None:
        """Run every cluster of the grid; raises a Finding at the first mistake."""
        kernel = self.kernels[launch.kernel]
        self.launch = launch
        self.is_dependent = (PROGRAMMATIC_STREAM_SERIALIZATION, 1) in launch.attributes
        limits.check_launch(kernel, launch)
        self.dynamic_offset = -(-kernel.static_shared_bytes // 1024) * 1024
        block = self._copy_params(kernel, launch)
        # Nothing that a run throws away is in a cycle, and looking for one takes half its time.
        collects = gc.isenabled()
        gc.disable()
        try:
            self.program = self._compile(kernel)
            self.kernel = kernel
            clusters = [launch.grid[a] // launch.cluster[a] for a in range(3)]
            indices = [i[::-1] for i in np.ndindex(clusters[2], clusters[1], clusters[0])]
            at_once = max(1, self.num_sms // int(np.prod(launch.cluster)))
            for first in range(0, len(indices), at_once):
                self._run_wave(indices[first : first + at_once])
        finally:
            self.memory.remove(block)
            if collects:
                gc.enable()

    def _copy_params(self, kernel: Kernel, launch: Launch) -> int:
        """Copy the parameters to aligned memory; sets `symbols`, returns the region's start."""
        sizes = [-(-max(size, 1) // PARAM_ALIGN) * PARAM_ALIGN for _, size in kernel.params]
        total = sum(sizes) + PARAM_ALIGN
        self._params = ctypes.create_string_buffer(total + PARAM_ALIGN)
        start = -(-ctypes.addressof(self._params) // PARAM_ALIGN) * PARAM_ALIGN
        self.symbols: dict[str, int] = {}
        at = start
        for (name, size), value, step in zip(kernel.params, launch.params, sizes, strict=True):
            ctypes.memmove(at, value, size)
            self.symbols[name] = at
            at += step
        self.memory.add_bytes(start, total, "the kernel's parameters")
        return start

    def _compile(self, kernel: Kernel) -> list[Step]:
        program = []
        for instruction in kernel.instructions:
            binder = Binder(kernel, self.symbols, instruction)
            compiler = COMPILERS.get(binder.parts[0])
            try:
                if compiler is None:
                    raise binder.unsupported()
                step = compiler(binder)
                if instruction.guard is not None:
                    register, negated = instruction.guard
                    step = step._replace(guard=binder.read(("!" * negated) + register, "pred"))
            except Unsupported as error:
                error.where = f"\n  at line {instruction.line} of {kernel.name[:60]}"
                raise
            program.append(step)
        program.append(Step(EXIT, None, None))
        return program

    # The clusters that run at the same time.

    def _run_wave(self, indices: list[tuple[int, ...]]) -> None:
        self.engine = AsyncEngine(self.mode, self.seed)
        ctas = [cta for index in indices for cta in self._make_cluster(index)]
        with np.errstate(all="ignore"):
            self._schedule([gang for cta in ctas for gang in cta.gangs])
            self.engine.retire_all()
        limits.check_exit(self.kernel, ctas)

    def _make_cluster(self, cluster_index: tuple[int, ...]) -> list[Cta]:
        launch = self.launch
        num_warps = -(-int(np.prod(launch.block)) // WARP)
        ctas: list[Cta] = []
        for z, y, x in np.ndindex(*launch.cluster[::-1]):
            index = tuple(cluster_index[a] * launch.cluster[a] + (x, y, z)[a] for a in range(3))
            ctas.append(Cta(self, index, len(ctas), num_warps))
        barrier = ClusterBarrier(num_warps * len(ctas))
        uses_tensor_memory = any(i.parts[0] == "tcgen05" for i in self.kernel.instructions)
        order = TensorOrder(num_warps, len(ctas)) if uses_tensor_memory else None
        for cta in ctas:
            cta.cluster = ctas
            cta.cluster_barrier = barrier
            cta.tensor_order = order
            for first in range(0, num_warps, self.gang_warps):
                width = min(self.gang_warps, num_warps - first)
                cta.gangs.append(Gang(cta, first, width, len(self.kernel.registers)))
        return ctas

    def _schedule(self, gangs: list[Gang]) -> None:
        while True:
            live = [gang for gang in gangs if gang.strands]
            if not live:
                return
            if self.mode != "eager":
                self.random.shuffle(live)
            before = self.events
            ran = False
            for gang in live:
                ran |= self._run_gang(gang)
                if self.mode == "random" and self.random.random() < 0.3:
                    self.engine.retire_one()
            if ran or self.events != before:
                continue
            # Everyone waits. A failed try_wait may go on without the phase, so try that first.
            if self._wake(live) or self.engine.retire_one() or self._feed(live):
                continue
            if not (self._wake(live, starved=True) or self._spin(live)):
                raise reports.deadlock(self.kernel, live)

    def _run_gang(self, gang: Gang) -> bool:
        """Run a gang until it waits or its turn is over; True where something ran."""
        budget = self.quantum
        ran = False
        polled: list[Strand] = []
        while budget > 0 and gang.strands:
            strand = self._pick(gang, polled)
            if strand is None:
                break
            before = strand.polled
            budget -= self._run_strand(gang, strand, budget)
            if strand.polled is not None:
                polled.append(strand)
            # A strand that polls the same place again, nothing having happened, got nowhere.
            ran |= strand.polled is None or strand.polled != before
        return ran

    def _wake(self, live: list[Gang], starved: bool = False) -> bool:
        """One more turn for strands that wait for an mbarrier: some only peeked at it."""
        before = self.events
        places = [[s.pc for s in gang.strands] for gang in live]
        for gang in live:
            for strand in list(gang.strands):
                place = (strand.pc, strand.parked)
                waits = strand.parked is not None and strand.blocked is None
                if not waits or place == strand.woken or strand not in gang.strands:
                    continue
                if strand.is_starved(gang) == starved:
                    self._run_strand(gang, strand, self.quantum)
                    if (strand.pc, strand.parked) == place:
                        strand.woken = place
        return self.events != before or places != [[s.pc for s in g.strands] for g in live]

    def _feed(self, live: list[Gang]) -> bool:
        """Let one starved strand go on, until something happens that others may notice."""
        for gang in live:
            if gang.starved is None:
                continue
            if len(gang.strands) > 1:
                gang.merge(self.program)
            for strand in gang.strands:
                if strand.is_starved(gang) and strand.can_run():
                    polled, strand.polled = strand.polled, None
                    self._run_until_an_event(gang, strand)
                    # One that polls the same place again, nothing having happened, got nowhere.
                    if strand.polled is None or strand.polled != polled:
                        return True
        return False

    def _spin(self, live: list[Gang]) -> bool:
        """More looks for strands that poll memory: some count them, and give up."""
        for gang in live:
            for strand in list(gang.strands):
                polled = strand.polled
                for _ in range(SPINS if polled else 0):
                    self._run_strand(gang, strand, self.quantum)
                    if strand.polled != polled or strand not in gang.strands:
                        return True
        return False

    def _run_until_an_event(self, gang: Gang, strand: Strand) -> None:
        before = self.events
        while self.events == before and strand.polled is None and strand.can_run():
            self._run_strand(gang, strand, MORSEL)
            if strand not in gang.strands:
                return

    def _pick(self, gang: Gang, polled: list[Strand]) -> Strand | None:
        """The strand to run: lowest instruction first among those that share a warp.

        polled: strands that gave up their turn, so that what they poll for can happen.
        """
        if len(gang.strands) > 1:
            gang.merge(self.program)
        ready = [
            strand
            for strand in gang.strands
            if strand.can_run() and strand not in polled and not strand.is_starved(gang)
        ]
        if len(ready) < 2:
            return ready[0] if ready else None
        ready.sort(key=lambda s: s.pc)
        if self.mode != "random":
            return ready[0]
        free = [
            s
            for i, s in enumerate(ready)
            if not any(set(s.warps) & set(o.warps) for o in ready[:i])
        ]
        return self.random.choice(free)

    def _run_strand(self, gang: Gang, strand: Strand, budget: int) -> int:
        """Run one strand until it waits, splits, meets another or uses up the budget."""
        others = [s.pc for s in gang.strands if s is not strand and s.pc > strand.pc]
        meeting = min(others, default=len(self.program) + 1)
        strand.parked = strand.polled = None
        gang.strand = strand
        count, goes_on = 0, True
        try:
            while goes_on and count < budget and strand.pc < meeting:
                count += 1
                goes_on = self._step(gang, strand)
            return count
        except EmulatorError as error:
            if not error.where:
                error.where = reports.where(self, gang, strand)
            raise
        finally:
            self.instructions += count * len(strand.warps)
            if self.instructions > self.max_instructions:
                raise Finding("livelock", f"more than {self.max_instructions} warp-instructions")

    def _step(self, gang: Gang, strand: Strand) -> bool:
        """Execute one instruction; False where the strand stops, ends or is split."""
        step = self.program[strand.pc]
        active = strand.mask
        gang.active = active
        if gang.starved is not None and step.kind != COLLECTIVE and strand.is_mixed(gang):
            gang.split(strand, ~gang.starved)
            return False
        if step.guard is not None:
            chosen = step.guard(gang) & active
            lanes = np.count_nonzero(chosen)
            if lanes == 0:
                strand.pc += 1
                return True
            if lanes != strand.size:
                if self._splits(gang, strand, chosen, step):
                    return False
                active = gang.active = chosen
        if step.kind == PLAIN:
            step.action(gang, active)
            strand.pc += 1
            return True
        if step.kind == BRANCH:
            strand.pc = step.target
            return True
        if step.kind == EXIT:
            self._exit(gang, strand)
            return False
        if step.kind == COLLECTIVE and not self._converged(gang, strand, active):
            return False
        signal = step.action(gang, active)
        if signal is not None and signal.retry:
            return False
        strand.pc += 1
        if signal is not None:
            self._stop(strand, signal)
        return signal is None

    def _splits(self, gang: Gang, strand: Strand, chosen: np.ndarray, step: Step) -> bool:
        """Part a strand where its lanes go different ways, or where whole warps may wait."""
        if step.kind == PLAIN:
            return False
        if step.kind in (BRANCH, EXIT):
            taken, rest = gang.split(strand, chosen)
            rest.pc += 1
            if step.kind == BRANCH:
                taken.pc = step.target
            else:
                self._exit(gang, taken)
            return True
        if self._partial_warps(chosen, strand.mask):
            return False
        _, rest = gang.split(strand, chosen)
        rest.pc += 1
        return True

    @staticmethod
    def _partial_warps(active: np.ndarray, mask: np.ndarray) -> bool:
        """Whether `active` holds a part of a warp of `mask` only."""
        chosen, there = (m.reshape(-1, WARP).sum(axis=1) for m in (active, mask))
        return bool(((chosen > 0) & (chosen < there)).any())

    def _stop(self, strand: Strand, signal: Signal) -> None:
        if signal.polled:
            strand.polled = strand.pc, self.events
        elif signal.barrier is not None:
            strand.parked = (signal.barrier, signal.barrier.completions)
        else:
            strand.blocked = signal.blocked

    def _exit(self, gang: Gang, strand: Strand) -> None:
        check_stores_at_exit(gang, strand.mask)
        gang.strands.remove(strand)
        self.events += 1

    def _converged(self, gang: Gang, strand: Strand, active: np.ndarray) -> bool:
        """Whether every warp of `active` is there in full; otherwise the strand is split.

        Whole warps go on at the next turn, the others wait for the rest of their lanes.
        """
        if active is gang.full:
            return True
        by_warp = active.reshape(-1, WARP).sum(axis=1)
        expected = gang.exists.reshape(-1, WARP).sum(axis=1)
        partial = (by_warp > 0) & (by_warp < expected)
        if not partial.any():
            return True
        lanes = np.repeat(partial, WARP)
        in_strand = strand.mask.reshape(-1, WARP).sum(axis=1)
        if (in_strand[partial] == expected[partial]).all():
            raise Finding(
                "divergent", f"`{self.kernel.instructions[strand.pc]}` by a part of a warp"
            )
        waiting = strand
        if (strand.mask & ~lanes).any():
            waiting, _ = gang.split(strand, lanes)
        waiting.blocked = CONVERGENCE
        return False
