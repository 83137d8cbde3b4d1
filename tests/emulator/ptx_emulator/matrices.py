"""Matrix operands in shared memory, as wgmma and tcgen05 descriptors address them.

PTX ISA 9.0, 9.7.15 (wgmma: matrix descriptor, canonical layouts) and 9.7.16 (tcgen05).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding, Unsupported
from tests.emulator.ptx_emulator.memory import OFFSET_MASK, SharedMemory
from tests.emulator.ptx_emulator.tensor_map import swizzle

_ATOM = 1024  # bytes after which every swizzle pattern repeats


class Descriptor(NamedTuple):
    start: int  # bytes, within the CTA's shared memory
    leading: int  # bytes
    stride: int  # bytes
    swizzle: int  # 0 none, 1 32 B, 2 64 B, 3 128 B


def _fields(bits: int, layout: int, table: dict[int, int]) -> Descriptor:
    if bits >> 49 & 7:
        raise Unsupported("a matrix descriptor with a base offset")
    if layout not in table:
        raise Finding("descriptor", f"matrix descriptor {bits:#x}: layout type {layout}")
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return Descriptor(start & OFFSET_MASK, leading, stride, table[layout])


def wgmma_descriptor(bits: int) -> Descriptor:
    return _fields(bits, bits >> 62 & 3, {0: 0, 1: 3, 2: 2, 3: 1})


def tcgen05_descriptor(bits: int) -> Descriptor:
    if bits >> 46 & 7 != 1:
        raise Finding("descriptor", f"tcgen05 matrix descriptor {bits:#x}: version, bits 46-48")
    return _fields(bits, bits >> 61 & 7, {0: 0, 2: 3, 4: 2, 6: 1})


@lru_cache(maxsize=4096)
def _k_major_words(low: int, d: Descriptor, rows: int, row_bytes: int) -> np.ndarray:
    """(rows, row_bytes / 4) word offsets from the atom that holds the start."""
    row = np.arange(rows)[:, None]
    byte = np.arange(0, row_bytes, 4)[None, :]
    if d.swizzle == 0:
        # 8 rows of 16 bytes are contiguous; `leading` steps along K, `stride` along rows.
        at = low + row // 8 * d.stride + row % 8 * 16 + byte // 16 * d.leading + byte % 16
    else:
        at = low + row // 8 * d.stride + row % 8 * (16 << d.swizzle) + byte
    return swizzle(at, d.swizzle) >> 2


@lru_cache(maxsize=4096)
def _row_major_words(low: int, d: Descriptor, rows: int, depth: int) -> np.ndarray:
    """(depth, rows / 2) word offsets of 16-bit elements whose rows are contiguous."""
    k = np.arange(depth)[:, None]
    row = np.arange(0, rows, 2)[None, :]
    if d.swizzle == 0:
        at = low + row // 8 * d.stride + row % 8 * 2 + k % 8 * 16 + k // 8 * d.leading
    else:
        span = 16 << d.swizzle
        per_span = span // 2
        at = low + row // per_span * d.leading + row % per_span * 2
        at = at + k % 8 * span + k // 8 * d.stride
    return swizzle(at, d.swizzle) >> 2


class Operand:
    """A matrix operand: checked when it is named, read when the instruction executes."""

    def __init__(
        self,
        shared: SharedMemory,
        descriptor: Descriptor,
        rows: int,
        row_bytes: int,
        what: str,
        rows_contiguous: bool = False,
    ):
        self.shared = shared
        self.rows_contiguous = rows_contiguous
        base = descriptor.start // _ATOM * _ATOM
        relative = descriptor._replace(start=0)
        if rows_contiguous:
            words = _row_major_words(descriptor.start - base, relative, rows, row_bytes // 2)
        else:
            words = _k_major_words(descriptor.start - base, relative, rows, row_bytes)
        self.words = words + (base >> 2)
        low, high = int(self.words.min()) << 2, (int(self.words.max()) + 1) << 2
        shared.check(np.array([low, high - 1]), 1, what)
        if (shared.stamps[self.words] > 0).any():
            stale = self.words[shared.stamps[self.words] > 0]
            shared.check_async_read(stale[:1].astype(np.int64) << 2, what)

    def read(self) -> np.ndarray:
        """(rows, row_bytes) uint8."""
        words = self.shared.data.view(np.uint32)[self.words]
        if self.rows_contiguous:
            return np.ascontiguousarray(words.view(np.uint16).T).view(np.uint8)
        return words.view(np.uint8)
