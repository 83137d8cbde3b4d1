"""mbarrier objects, named barriers, and who has seen whose writes."""

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding

MAX_PENDING = (1 << 20) - 1  # PTX ISA, "mbarrier": range of counts


class Visibility:
    """Vector clocks of one CTA's warps: seen[w, u] is the last epoch of u's writes that w sees.

    Barriers and mbarriers join them. `fence.proxy.async` by a warp makes every write that it
    sees, its own included, visible to the asynchronous proxy.
    """

    def __init__(self, num_warps: int):
        self.seen = np.zeros((num_warps, num_warps), np.int32)
        self.epoch = np.ones(num_warps, np.int32)

    def stamps(self, warps: np.ndarray) -> np.ndarray:
        """The stamp of a store by each of these warps; never 0."""
        return (self.epoch[warps] << 6) | (warps + 1)

    def release(self, warp: int) -> np.ndarray:
        """What a release by `warp` publishes; its later writes belong to the next epoch."""
        published = self.seen[warp].copy()
        published[warp] = self.epoch[warp]
        self.epoch[warp] += 1
        return published

    def acquire(self, warp: int, published: np.ndarray) -> None:
        np.maximum(self.seen[warp], published, out=self.seen[warp])

    def proxy_fence(self, warp: int, stamps: np.ndarray) -> None:
        dirty = np.nonzero(stamps > 0)[0]
        if len(dirty) == 0:
            return
        writer, epoch = (stamps[dirty] & 63) - 1, stamps[dirty] >> 6
        visible = (writer == warp) | (epoch <= self.seen[warp][writer])
        stamps[dirty[visible]] = 0


class MBarrier:
    """An mbarrier object (PTX ISA 9.0, 9.7.13). `parity` is that of the phase under way."""

    __slots__ = (
        *("count", "pending", "pending_bytes", "parity", "published", "completions"),
        *("knows_dependence", "tensor_accesses"),
    )

    def __init__(self, count: int, num_warps: int):
        if not 1 <= count <= MAX_PENDING:
            raise Finding("mbarrier", f"mbarrier.init with count {count}")
        self.count = self.pending = count
        self.pending_bytes = 0
        self.parity = 0
        self.completions = 0
        self.knows_dependence = False  # see `dependence`
        self.tensor_accesses: np.ndarray | None = None  # what it tells of, see `tensor_order`
        self.published = np.zeros(num_warps, np.int32)

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        if self.pending < 0:
            raise Finding("mbarrier", f"more arrivals than the count of {self.count}")
        self._complete()

    def expect(self, num_bytes: int) -> None:
        self.pending_bytes += num_bytes
        if abs(self.pending_bytes) > MAX_PENDING:
            raise Finding("mbarrier", f"a transaction count of {self.pending_bytes} bytes")

    def complete_bytes(self, num_bytes: int) -> None:
        self.expect(-num_bytes)
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.pending_bytes == 0:
            self.parity ^= 1
            self.pending = self.count
            self.completions += 1


class ClusterBarrier:
    """barrier.cluster: every warp of every CTA of a cluster arrives, and later waits."""

    def __init__(self, num_warps: int):
        self.num_warps = num_warps
        self.arrived = 0
        self.phase = 0
        self.waiting: list = []  # strands


class NamedBarrier:
    """bar.sync / bar.arrive with an id: counts threads, a warp at a time."""

    def __init__(self) -> None:
        self.expected = 0
        self.arrived = 0
        self.waiting: list = []  # strands
        self.warps: list[int] = []

    def arrive(self, warp: int, expected: int, number: int) -> bool:
        """Count one warp; True where that completes the barrier."""
        if expected % 32 or expected <= 0:
            raise Finding("barrier", f"barrier {number} for {expected} threads")
        if self.arrived and expected != self.expected:
            raise Finding(
                "barrier", f"barrier {number} for {expected} threads, others said {self.expected}"
            )
        self.expected = expected
        self.arrived += 32
        self.warps.append(warp)
        return self.arrived == expected
