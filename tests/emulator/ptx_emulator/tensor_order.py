"""Who may touch tensor memory after whom: tcgen05.fence (PTX ISA 9.0, 9.7.16.6).

An access of a thread is ordered after a conflicting one of another only where the other waited for
its own (wait::ld, wait::st), executed fence::before_thread_sync and synchronised, and this one
executed fence::after_thread_sync since. mma and cp go through the pipe of their CTA in the order of
issue, and it is their commit, a before_thread_sync in itself, whose mbarrier tells that they are
complete.

Actors are the warps of a cluster and each CTA's pipe. Vector clocks over them say up to which epoch
of another's accesses a warp has heard of (`heard`), and has fenced since (`seen`).
"""

from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.ptx_emulator.barriers import MBarrier
from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import TMEM_COLUMNS

if TYPE_CHECKING:
    from tests.emulator.ptx_emulator.threads import Cta

_QUARTERS = 4  # of the lanes: a warp reaches one
_UNDER_WAY = np.iinfo(np.int32).max


class TensorOrder:
    """Of one cluster. A table holds per actor the last epoch in which it touched a column."""

    def __init__(self, num_warps: int, num_ctas: int):
        self.stride = num_warps + 1
        actors = num_ctas * self.stride
        self.heard = np.zeros((actors, actors), np.int32)
        self.seen = np.zeros((actors, actors), np.int32)
        self.covered = np.zeros(actors, np.int32)  # up to there, others may be told
        self.epoch = np.ones(actors, np.int32)
        size = num_ctas, actors, _QUARTERS, TMEM_COLUMNS
        self.reads, self.writes = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def warp(self, rank: int, warp: int) -> int:
        return rank * self.stride + warp

    def pipe(self, rank: int) -> int:
        return rank * self.stride + self.stride - 1

    def _check(self, by: int, own: int, table: np.ndarray, what: str, done: str) -> None:
        last = table.max(axis=(1, 2))
        late = last > self.seen[by]
        late[[by, own]] = False
        if late.any():
            other = int(np.argmax(late))
            rank, warp = divmod(other, self.stride)
            whose = "the MMA pipe" if warp == self.stride - 1 else f"warp {warp}"
            lacks = "fence::before_thread_sync, or a wait, on its side"
            if last[other] <= self.heard[by][other]:
                lacks = "tcgen05.fence::after_thread_sync since it was waited for"
            raise Finding(
                "tensor-order", f"{what} after {whose} of CTA {rank} {done} there, with no {lacks}"
            )

    def access(
        self, by: int, rank: int, quarters: slice, columns: slice, write: bool, what: str
    ) -> None:
        """A warp's ld or st of its CTA's columns, under way until its wait."""
        self._check(by, by, self.writes[rank][:, quarters, columns], what, "wrote")
        if write:
            self._check(by, by, self.reads[rank][:, quarters, columns], what, "read")
        (self.writes if write else self.reads)[rank, by, quarters, columns] = _UNDER_WAY

    def wait(self, by: int, rank: int, write: bool) -> None:
        """What was under way belongs to the present epoch."""
        table = (self.writes if write else self.reads)[rank, by]
        table[table == _UNDER_WAY] = self.epoch[by]

    def issue(self, by: int, pipe: int, rank: int, columns: slice, what: str, write: bool) -> None:
        """mma or cp by a warp: it touches every lane of these columns."""
        self._check(by, pipe, self.writes[rank][:, :, columns], what, "wrote")
        if write:
            self._check(by, pipe, self.reads[rank][:, :, columns], what, "read")
        (self.writes if write else self.reads)[rank, pipe, :, columns] = self.epoch[pipe]

    def commit(self, by: int, pipe: int) -> np.ndarray:
        """What the commit's arrivals tell."""
        told = self.release(by)
        told[pipe] = self.epoch[pipe]
        self.epoch[pipe] += 1
        return told

    def before_sync(self, by: int) -> None:
        self.covered[by] = self.epoch[by]
        self.epoch[by] += 1

    def after_sync(self, by: int) -> None:
        self.seen[by] = self.heard[by]

    def release(self, by: int) -> np.ndarray:
        told = self.heard[by].copy()
        told[by] = self.covered[by]
        return told

    def acquire(self, by: int, told: np.ndarray) -> None:
        np.maximum(self.heard[by], told, out=self.heard[by])

    def meet(self, actors: list[int]) -> None:
        """Warps have met at a barrier."""
        told = np.maximum.reduce([self.release(actor) for actor in actors])
        for actor in actors:
            self.acquire(actor, told)


def tell(cta: "Cta", warp: int, barrier: MBarrier) -> None:
    """An arrival by a warp of this CTA."""
    if cta.tensor_order is not None:
        add(barrier, cta.tensor_order.release(cta.tensor_order.warp(cta.rank, warp)))


def add(barrier: MBarrier, told: np.ndarray) -> None:
    known = barrier.tensor_accesses
    barrier.tensor_accesses = told if known is None else np.maximum(known, told)


def hear(cta: "Cta", warp: int, barrier: MBarrier) -> None:
    """A wait of this CTA's warp that has ended."""
    if cta.tensor_order is not None and barrier.tensor_accesses is not None:
        actor = cta.tensor_order.warp(cta.rank, warp)
        cta.tensor_order.acquire(actor, barrier.tensor_accesses)
