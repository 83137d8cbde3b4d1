"""CTAs, gangs of warps that run in lockstep when they can, and their registers."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.ptx_emulator.async_engine import Operation
from tests.emulator.ptx_emulator.barriers import ClusterBarrier, MBarrier, NamedBarrier, Visibility
from tests.emulator.ptx_emulator.dependence import Dependence
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import (
    OFFSET_MASK,
    RANK_SHIFT,
    SHARED_BASE,
    SHARED_LIMIT,
    SharedMemory,
    TensorMemory,
)
from tests.emulator.ptx_emulator.starvation import victim
from tests.emulator.ptx_emulator.tensor_order import TensorOrder

if TYPE_CHECKING:
    from tests.emulator.ptx_emulator.program import Step
    from tests.emulator.ptx_emulator.scheduler import Machine

WARP = 32
SPECIAL_REGISTERS = {
    *(
        f"%{name}.{axis}"
        for name in "tid ntid ctaid nctaid clusterid nclusterid".split()
        + ["cluster_ctaid", "cluster_nctaid"]
        for axis in "xyz"
    ),
    *"%laneid %warpid %cluster_ctarank %cluster_nctarank %smid %nsmid".split(),
    *(f"%lanemask_{order}" for order in "eq lt le gt ge".split()),
    *"%dynamic_smem_size %total_smem_size %is_explicit_cluster".split(),
}
CONVERGENCE = "the other lanes of its warp"


class AsyncResult:
    """Registers that an asynchronous instruction owns, until the program waits for it."""

    def __init__(self, name: str, wait: str, lanes: np.ndarray, readable: bool = False):
        self.name = name
        self.wait = wait  # the instruction that gives the registers back, for messages
        self.lanes = lanes
        self.pending = lanes.copy()  # lanes that have not waited yet
        self.readable = readable  # inputs: they may be read, but not overwritten
        self.values: list[np.ndarray] | None = None  # per register, once complete

    def value(self, position: int) -> np.ndarray | None:
        return None if self.values is None else self.values[position]

    def settle(self, lanes: np.ndarray | slice) -> None:
        self.pending[lanes] = False


class InFlight:
    """What a register holds while an AsyncResult owns some of its lanes.

    `previous` is what the other lanes hold, and for inputs what all of them hold.
    """

    __slots__ = ("owner", "position", "previous")
    # Readers compare dtypes first, so a register in flight takes their slow path.
    dtype = None

    def __init__(self, owner: AsyncResult, position: int, previous: "np.ndarray | InFlight | None"):
        self.owner = owner
        self.position = position
        self.previous = previous

    def read(self, active: np.ndarray) -> np.ndarray:
        """The value of every lane; a Finding where `active` touches lanes not waited for."""
        owner = self.owner
        if not owner.readable and (owner.pending & active).any():
            raise Finding("async-wait", f"{owner.name} writes a register, read before {owner.wait}")
        return self.merged(active)

    def merged(self, active: np.ndarray) -> np.ndarray:
        owner, base = self.owner, self.previous
        values = owner.value(self.position)
        if base.__class__ is InFlight:
            base = base.read(active if owner.readable else active & ~owner.lanes)
        if values is None:
            return base
        if base is None:
            return values
        return np.where(owner.lanes, values, base.view(values.dtype))

    def overwrite(self, active: np.ndarray) -> "np.ndarray | InFlight | None":
        """What the register holds, for a write by `active` to be laid over."""
        owner = self.owner
        if (owner.pending & active).any():
            verb = "reads" if owner.readable else "writes"
            raise Finding(
                "async-wait", f"{owner.name} {verb} a register, overwritten before {owner.wait}"
            )
        return self if owner.pending.any() else self.merged(active)

    def beside(self, value: np.ndarray, active: np.ndarray) -> "InFlight":
        """The same register with new values on the lanes of `active`, which nobody owns."""
        base = self.previous
        if base.__class__ is InFlight:
            base = base.beside(value, active)
        elif base is None:
            base = value
        else:
            base = np.where(active, value, base.view(value.dtype))
        return InFlight(self.owner, self.position, base)


class Cta:
    def __init__(self, machine: "Machine", index: tuple[int, int, int], rank: int, num_warps: int):
        launch = machine.launch
        self.machine = machine
        self.index = index
        self.rank = rank
        self.num_warps = num_warps
        self.shared_base = rank << RANK_SHIFT | SHARED_BASE
        self.dynamic_base = self.shared_base + machine.dynamic_offset
        self.shared = SharedMemory(machine.dynamic_offset + launch.shared_bytes)
        self.tensor = TensorMemory()
        self.wgmma_counts = np.zeros(num_warps, np.int64)
        self.registers = np.zeros(num_warps, np.int64)  # by setmaxnreg, or 0
        self.mbarriers: dict[int, MBarrier] = {}
        self.barriers: dict[int, NamedBarrier] = {}
        self.visibility = Visibility(num_warps)
        self.tensor_queue: deque[Operation] = machine.engine.new_queue()
        self.gangs: list[Gang] = []
        self.cluster: list[Cta] = []
        self.cluster_barrier: ClusterBarrier | None = None
        self.tensor_order: TensorOrder | None = None  # the cluster's, where tcgen05 is used
        self.dependence: Dependence | None = None  # None once every warp knows
        if machine.is_dependent:
            self.dependence = Dependence(num_warps, machine.produced)

    def peer(self, address: int) -> "Cta":
        """The CTA of the cluster that a shared address belongs to."""
        rank = address >> RANK_SHIFT
        if address >= SHARED_LIMIT or rank >= len(self.cluster):
            raise Finding("out-of-bounds", f"{address:#x} is no shared address of this cluster")
        self.check_alive(self.cluster[rank])
        return self.cluster[rank]

    def check_alive(self, other: "Cta") -> None:
        """PTX ISA 9.0, 9.7.13.4 (mapa, shared::cluster): shared memory lives as long as its CTA."""
        if other is not self and not any(gang.strands for gang in other.gangs):
            raise Finding("exited", f"CTA {self.index} reaches CTA {other.index}, which has ended")

    def pair(self) -> tuple["Cta", "Cta"]:
        """The two CTAs of cta_group::2 that this CTA is one of."""
        even = self.rank & ~1
        if even + 1 >= len(self.cluster):
            raise Finding("descriptor", "cta_group::2 in a cluster without a second CTA")
        return self.cluster[even], self.cluster[even + 1]

    def mbarrier(self, address: int) -> MBarrier:
        cta = self.peer(address)
        if address % 8:
            raise Finding("misaligned", f"mbarrier at {address:#x}; a multiple of 8")
        barrier = cta.mbarriers.get(address & OFFSET_MASK)
        if barrier is None:
            raise Finding(
                "mbarrier",
                f"none was initialised at shared byte {(address & OFFSET_MASK) - SHARED_BASE} of "
                f"CTA {cta.rank}",
            )
        return barrier


class Strand:
    """Lanes of one gang at one instruction."""

    __slots__ = ("pc", "mask", "size", "warps", "blocked", "parked", "woken", "polled", "_victims")

    def __init__(self, pc: int, mask: np.ndarray):
        self.pc = pc
        self.mask = mask
        self.size = int(np.count_nonzero(mask))
        self.warps = np.nonzero(mask.reshape(-1, WARP).any(axis=1))[0].tolist()
        self.blocked: str | None = None  # what the strand waits for
        # Its last try_wait failed on this barrier, which had completed so many phases.
        self.parked: tuple[MBarrier, int] | None = None
        self.woken: tuple | None = None  # where another try did not help
        # Where it stopped after a load that may poll memory, and how much had happened by then.
        self.polled: tuple[int, int] | None = None
        self._victims = -1  # how many of its lanes are starved, once counted

    def can_run(self) -> bool:
        if self.parked is not None:
            barrier, completions = self.parked
            if barrier.completions == completions:
                return False
        return self.blocked is None

    def _count_victims(self, gang: "Gang") -> int:
        if self._victims < 0:
            self._victims = int(np.count_nonzero(self.mask & gang.starved))
        return self._victims

    def is_starved(self, gang: "Gang") -> bool:
        return gang.starved is not None and self._count_victims(gang) == self.size

    def is_mixed(self, gang: "Gang") -> bool:
        return 0 < self._count_victims(gang) < self.size


class Gang:
    """Up to four warps of one CTA, aligned, with one register file.

    They execute an instruction together while they are at the same place, and apart otherwise.
    """

    def __init__(self, cta: Cta, first_warp: int, num_warps: int, num_registers: int):
        self.cta = cta
        self.machine = cta.machine
        self.first_warp = first_warp
        self.num_warps = num_warps
        self.lanes = num_warps * WARP
        self.full = np.ones(self.lanes, bool)
        self.active = self.full
        launch = self.machine.launch
        self.thread = np.arange(self.lanes, dtype=np.int64) + first_warp * WARP
        self.exists = self.thread < int(np.prod(launch.block))
        self.registers: list = [None] * num_registers
        mask = self.full if self.exists.all() else self.exists
        self.strands = [Strand(0, mask)]
        self.strand = self.strands[0]  # the one that runs
        self.special = self._special_registers()
        self.starved: np.ndarray | None = None  # lanes that run as late as possible
        if self.machine.mode == "starved":
            is_last = cta.rank + 1 == int(np.prod(launch.cluster))
            self.starved = victim(self.machine.seed, self.thread, cta.num_warps, is_last)
        # Per lane: cp.async and bulk operations not in a group yet, and the groups.
        self.copies: list[list[Operation]] = [[] for _ in range(self.lanes)]
        self.copy_groups: list[list[list[Operation]]] = [[] for _ in range(self.lanes)]
        self.bulk: list[list] = [[] for _ in range(self.lanes)]
        self.bulk_groups: list[list[list]] = [[] for _ in range(self.lanes)]
        # Per warp: wgmma operations not in a group yet, and the groups.
        self.wgmma: list[list] = [[] for _ in range(num_warps)]
        self.wgmma_groups: list[list[list]] = [[] for _ in range(num_warps)]
        self.fenced_registers: list | None = None  # as of the last wgmma.fence
        self.wgmma_queue = self.machine.engine.new_queue()
        # Per warp: tcgen05.ld and tcgen05.st not waited for.
        self.tensor_loads: list[list] = [[] for _ in range(num_warps)]
        self.tensor_stores: list[list] = [[] for _ in range(num_warps)]
        self.cluster_phase = [-1] * num_warps

    def _special_registers(self) -> dict[str, np.ndarray]:
        cta, launch = self.cta, self.machine.launch
        x, y, _ = launch.block
        lane = self.thread % WARP
        values = {
            "%tid.x": self.thread % x,
            "%tid.y": self.thread // x % y,
            "%tid.z": self.thread // (x * y),
            "%laneid": lane,
            "%warpid": self.thread // WARP,
            "%cluster_ctarank": cta.rank,
            "%cluster_nctarank": int(np.prod(launch.cluster)),
            "%nsmid": self.machine.num_sms,
            "%smid": cta.index[0] % self.machine.num_sms,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_eq": 1 << lane,
            "%lanemask_ge": (0xFFFFFFFF << lane) & 0xFFFFFFFF,
            "%lanemask_gt": (0xFFFFFFFE << lane) & 0xFFFFFFFF,
            "%dynamic_smem_size": launch.shared_bytes,
            "%total_smem_size": launch.shared_bytes,
            "%is_explicit_cluster": int(launch.cluster != (1, 1, 1)),
        }
        for axis, name in enumerate("xyz"):
            cluster = launch.cluster[axis]
            values[f"%ctaid.{name}"] = cta.index[axis]
            values[f"%nctaid.{name}"] = launch.grid[axis]
            values[f"%ntid.{name}"] = launch.block[axis]
            values[f"%clusterid.{name}"] = cta.index[axis] // cluster
            values[f"%nclusterid.{name}"] = launch.grid[axis] // cluster
            values[f"%cluster_ctaid.{name}"] = cta.index[axis] % cluster
            values[f"%cluster_nctaid.{name}"] = cluster
        return {
            name: np.ascontiguousarray(np.broadcast_to(value, self.lanes)).astype(np.uint32)
            for name, value in values.items()
        }

    def warps_of(self, mask: np.ndarray) -> list[int]:
        """Warps of this gang with a lane in the mask."""
        if mask is self.full:
            return list(range(self.num_warps))
        return np.nonzero(mask.reshape(-1, WARP).any(axis=1))[0].tolist()

    def warp_lanes(self, warp: int) -> slice:
        return slice(warp * WARP, warp * WARP + WARP)

    def split(self, strand: Strand, mask: np.ndarray) -> tuple[Strand, Strand]:
        """Two strands at the same place instead of one: the lanes of `mask`, and the rest."""
        self.strands.remove(strand)
        taken = Strand(strand.pc, strand.mask & mask)
        rest = Strand(strand.pc, strand.mask & ~mask)
        self.strands += [taken, rest]
        return taken, rest

    def merge(self, program: list["Step"]) -> None:
        """Join the strands that are at the same instruction and wait for nothing else; starved
        ones meet the others where a whole warp is wanted."""
        at: dict[tuple[int, bool], Strand] = {}
        for strand in list(self.strands):
            if strand.blocked not in (None, CONVERGENCE):
                continue
            late = self.starved is not None and strand.is_starved(self)
            place = strand.pc, late and not program[strand.pc].collective
            other = at.get(place)
            if other is None:
                at[place] = strand
                continue
            shared = set(strand.warps) & set(other.warps)
            if bool(strand.blocked) != bool(other.blocked) and not shared:
                continue  # whole warps need not wait for the rest of others
            mask = strand.mask | other.mask
            joined = Strand(strand.pc, self.full if mask.all() else mask)
            joined.parked = strand.parked or other.parked
            joined.polled = strand.polled or other.polled
            if strand.blocked and other.blocked and not shared:
                joined.blocked = CONVERGENCE
            self.strands.remove(strand)
            self.strands.remove(other)
            self.strands.append(joined)
            at[place] = joined
