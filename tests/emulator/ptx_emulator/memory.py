"""Global, shared and tensor memory.

Addresses: a global address is the address of the host buffer itself. A shared address is
`rank << 24 | offset`, rank being the CTA's in its cluster; generic addresses are the same
numbers, and every number below 2**32 is shared memory.
"""

import ctypes
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding

SHARED_LIMIT = 1 << 32
RANK_SHIFT = 24
OFFSET_MASK = (1 << RANK_SHIFT) - 1
SHARED_BASE = 1024  # the system keeps the first KiB of shared memory
POISON_BYTE = 0xFF  # NaN as bf16, f16, f32 and E4M3
POISON_WORD = 0x7FC0DEAD  # a NaN that no kernel writes
TMEM_LANES, TMEM_COLUMNS = 128, 512
MBARRIER_STAMP = -1


class Region(NamedTuple):
    start: int
    end: int
    data: np.ndarray  # (bytes,) uint8 view of the buffer
    name: str


class GlobalMemory:
    """Host buffers that kernels may touch. Anything else is out of bounds."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []

    def add_bytes(self, start: int, size: int, name: str, keep: object = None) -> None:
        """Register [start, start + size). `keep` is what owns the memory."""
        if size == 0:
            return
        raw = (ctypes.c_uint8 * size).from_address(start)
        raw.owner = keep
        region = Region(start, start + size, np.frombuffer(raw, np.uint8), name)
        at = bisect_right(self._starts, start)
        same = at > 0 and self.regions[at - 1].start == start
        if same and self.regions[at - 1].end >= region.end:
            return
        if same:
            self.regions[at - 1] = region
        else:
            self.regions.insert(at, region)
            self._starts.insert(at, start)

    def remove(self, start: int) -> None:
        at = self._starts.index(start)
        del self.regions[at], self._starts[at]

    def find(self, address: int, size: int, what: str = "access") -> Region:
        at = bisect_right(self._starts, address) - 1
        while at >= 0:
            region = self.regions[at]
            if address >= region.start and address + size <= region.end:
                return region
            at = at - 1 if region.end > address else -1
        raise self._out_of_bounds(address, size, what)

    def _out_of_bounds(self, address: int, size: int, what: str) -> Finding:
        near = min(
            self.regions,
            key=lambda r: min(abs(address - r.start), abs(address - r.end)),
            default=None,
        )
        where = "no buffer is registered"
        if near is not None:
            where = (
                f"nearest is {near.name} of {near.end - near.start} bytes, "
                f"the access is at byte {address - near.start}"
            )
        return Finding("out-of-bounds", f"global {what} of {size} bytes at {address:#x}; {where}")

    def gather(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n,) addresses -> (n, size) bytes."""
        low, high = int(addresses.min()), int(addresses.max())
        region = self._common(low, high, size)
        if region is None:
            return np.stack(
                [self.gather(addresses[i : i + 1], size)[0] for i in range(len(addresses))]
            )
        if low == high:
            at = low - region.start
            return np.broadcast_to(region.data[at : at + size], (len(addresses), size))
        return region.data[(addresses - region.start)[:, None] + np.arange(size)]

    def scatter(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """(n,) addresses, (n, size) bytes. Where addresses are equal, the last lane wins."""
        size = values.shape[1]
        region = self._common(int(addresses.min()), int(addresses.max()), size)
        if region is None:
            for i in range(len(addresses)):
                self.scatter(addresses[i : i + 1], values[i : i + 1])
            return
        region.data[(addresses - region.start)[:, None] + np.arange(size)] = values

    def _common(self, low: int, high: int, size: int) -> Region | None:
        """The region that holds both ends, or None where the ends are in two regions."""
        region = self.find(low, size)
        if high + size <= region.end:
            return region
        self.find(high, size)
        return None


class SharedMemory:
    """One CTA's shared memory, poisoned, with a stamp per word that a thread wrote.

    A stamp says which warp wrote the word, at which of its epochs, until a proxy fence makes
    the write visible to the asynchronous proxy (PTX ISA, "Proxies" and `fence.proxy`):
    0 means visible, MBARRIER_STAMP an mbarrier object.
    """

    def __init__(self, size: int):
        self.size = SHARED_BASE + size
        self.data = np.full(-(-self.size // 16) * 16, POISON_BYTE, np.uint8)
        self.stamps = np.zeros(len(self.data) // 4, np.int32)

    def check(self, offsets: np.ndarray, size: int, what: str) -> None:
        low, high = int(offsets.min()), int(offsets.max()) + size
        if low < SHARED_BASE or high > self.size:
            at = low if low < SHARED_BASE else high - size
            raise Finding(
                "out-of-bounds",
                f"shared {what} of {size} bytes at byte {at - SHARED_BASE} of "
                f"{self.size - SHARED_BASE}",
            )

    def gather(self, offsets: np.ndarray, size: int) -> np.ndarray:
        self.check(offsets, size, "read")
        if size >= 4:
            words = self.data.view(np.uint32)[(offsets >> 2)[:, None] + np.arange(size // 4)]
            return words.view(np.uint8)
        return self.data[offsets[:, None] + np.arange(size)]

    def scatter(self, offsets: np.ndarray, values: np.ndarray, stamp: int | np.ndarray) -> None:
        """Write (n, size) bytes at (n,) offsets; stamp is one number or (n, 1)."""
        size = values.shape[1]
        self.check(offsets, size, "write")
        words = (offsets >> 2)[:, None] + np.arange(max(1, size // 4))
        if self.stamps[words].min() < 0:
            raise Finding("mbarrier", "an ordinary store overwrites an mbarrier object")
        self.stamps[words] = stamp
        if size >= 4:
            self.data.view(np.uint32)[words] = np.ascontiguousarray(values).view(np.uint32)
        else:
            self.data[offsets[:, None] + np.arange(size)] = values

    def check_async_read(self, offsets: np.ndarray, what: str) -> None:
        """Refuse bytes that were written through the generic proxy and not fenced since."""
        self.check(offsets, 1, what)
        stale = self.stamps[offsets >> 2] > 0
        if stale.any():
            at = int(offsets[np.argmax(stale)])
            warp = (int(self.stamps[at >> 2]) & 63) - 1
            raise Finding(
                "proxy-fence",
                f"{what} reads shared byte {at - SHARED_BASE}, written by warp {warp} with no "
                "fence.proxy.async since",
            )

    def async_write(self, offsets: np.ndarray, values: np.ndarray, what: str) -> None:
        self.check(offsets, 1, what)
        words = offsets >> 2
        if self.stamps[words].min() < 0:
            raise Finding("mbarrier", f"{what} overwrites an mbarrier object")
        self.data[offsets] = values
        self.stamps[words] = 0


class TensorMemory:
    """One CTA's tensor memory: 128 lanes by 512 columns of 32 bits, poisoned."""

    def __init__(self) -> None:
        self.words = np.full((TMEM_LANES, TMEM_COLUMNS), POISON_WORD, np.uint32)
        self.owned = np.zeros(TMEM_COLUMNS, bool)
        self.allocations: dict[int, int] = {}  # first column -> columns
        self.may_allocate = True

    def allocate(self, columns: int) -> int:
        if columns & (columns - 1) or not 32 <= columns <= TMEM_COLUMNS:
            raise Finding(
                "tmem", f"tcgen05.alloc of {columns} columns; a power of 2 from 32 to 512"
            )
        if not self.may_allocate:
            raise Finding("tmem", "tcgen05.alloc after relinquish_alloc_permit")
        for first in range(0, TMEM_COLUMNS - columns + 1, 32):
            if not self.owned[first : first + columns].any():
                self.owned[first : first + columns] = True
                self.allocations[first] = columns
                return first
        raise Finding("tmem", f"tcgen05.alloc of {columns} columns; {self.owned.sum()} are in use")

    def free(self, first: int, columns: int) -> None:
        if self.allocations.get(first) != columns:
            raise Finding(
                "tmem",
                f"tcgen05.dealloc of {columns} columns at {first}; owned: {self.allocations}",
            )
        del self.allocations[first]
        self.owned[first : first + columns] = False
        self.words[:, first : first + columns] = POISON_WORD

    def columns(self, address: int, count: int, what: str) -> slice:
        """The column slice of an access to all lanes, which must be allocated."""
        if address >> 16:
            raise Finding("tmem", f"{what} at lane {address >> 16}; its data begin at lane 0")
        return self.columns_of_a_warp(address, count, what)

    def columns_of_a_warp(self, address: int, count: int, what: str) -> slice:
        first = address & 0xFFFF
        if first + count > TMEM_COLUMNS or not self.owned[first : first + count].all():
            raise Finding(
                "out-of-bounds",
                f"{what} touches tensor memory columns {first}..{first + count - 1}; "
                f"allocated: {self.allocations}",
            )
        return slice(first, first + count)
