"""Tensor maps (CUtensorMap) and the shared-memory swizzle.

The 128 bytes of a tensor map are opaque in the CUDA driver API; the fields below are those that
compiled CuTe DSL host code writes, all in the first 64 bytes.
"""

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding, Unsupported

TENSOR_MAP_BYTES = 128
# Element type code -> bits. Code 11 is two E2M1 a byte, 16-byte aligned in global memory.
ELEMENT_BITS = {0: 8, 1: 16, 2: 32, 3: 32, 4: 64, 5: 64, 6: 16, 7: 32, 8: 64, 10: 16, 11: 4}


def swizzle(addresses: np.ndarray, mode: int) -> np.ndarray:
    """Mode 0 none, 1 32 B, 2 64 B, 3 128 B: address bits 7.. are XORed onto bits 4.. ."""
    if mode == 0:
        return addresses
    return addresses ^ (((addresses >> 7) & ((1 << mode) - 1)) << 4)


class TensorMap:
    """A decoded tensor map: base address, and sizes, strides (bytes) and box, fastest first."""

    def __init__(self, raw: bytes):
        q = [int(x) for x in np.frombuffer(raw[:64], np.uint64)]
        low, high = [x & 0xFFFFFFFF for x in q], [x >> 32 for x in q]
        flags = low[1]
        self.base = q[0]
        self.rank = ((flags >> 4) & 7) + 1
        self.swizzle = (flags >> 13) & 3
        element = (flags >> 7) & 15
        if flags & 15 != 2 or element not in ELEMENT_BITS or (flags >> 11) & 3 or self.rank > 5:
            raise Finding("descriptor", f"not a tiled tensor map: {[hex(x) for x in q]}")
        self.element_bits = ELEMENT_BITS[element]
        strides = [high[1], low[2], high[2], low[3]]
        upper = high[3]
        self.strides = [
            (strides[i] | (((upper >> (4 * i)) & 15) << 32)) << 4 for i in range(self.rank - 1)
        ]
        sizes = [low[4], high[4], low[5], high[5], low[6]]
        self.sizes = [s + 1 for s in sizes[: self.rank]]
        boxes = [q[6] >> 56] + [(q[7] >> (8 * i)) & 255 for i in range(4)]
        self.box = [b + 1 for b in boxes[: self.rank]]
        self._check()

    def _check(self) -> None:
        inner = self.box[0] * self.element_bits // 8
        if self.base % 16:
            raise Finding("misaligned", f"tensor map base {self.base:#x}; a multiple of 16")
        if inner % 16:
            raise Finding("descriptor", f"the inner box is {inner} bytes; a multiple of 16")
        if self.swizzle and inner > 16 << self.swizzle:
            raise Finding(
                "descriptor", f"the inner box is {inner} bytes, the swizzle {16 << self.swizzle}"
            )

    @property
    def tile_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_bits // 8

    def tile(self, coordinates: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Global address and in-bounds flag of every byte of the box, in shared-memory order."""
        if len(coordinates) != self.rank:
            raise Finding("descriptor", f"{len(coordinates)} coordinates for rank {self.rank}")
        bits = self.element_bits
        inner = np.arange(self.box[0] * bits // 8, dtype=np.int64) + coordinates[0] * bits // 8
        address = inner + self.base
        inside = (inner >= 0) & (inner < self.sizes[0] * bits // 8)
        for d in range(1, self.rank):
            index = np.arange(self.box[d], dtype=np.int64) + coordinates[d]
            shape = (-1,) + (1,) * address.ndim
            address = address[None] + (index * self.strides[d - 1]).reshape(shape)
            inside = inside[None] & ((index >= 0) & (index < self.sizes[d])).reshape(shape)
        return address.reshape(-1), inside.reshape(-1)


def replace_field(raw: bytes, field: str, ordinal: int, value: int) -> bytes:
    """A tensor map with one field replaced; addresses and strides in bytes, sizes in elements."""
    words = np.frombuffer(raw, np.uint32).copy()
    if field == "global_address":
        words[0], words[1] = value & 0xFFFFFFFF, value >> 32
    elif field == "global_dim":
        words[8 + ordinal] = value - 1
    elif field == "global_stride":
        if value % 16:
            raise Finding("misaligned", f"tensor map stride of {value} bytes; a multiple of 16")
        words[3 + ordinal] = (value >> 4) & 0xFFFFFFFF
        keep = ~np.uint32(15 << (4 * ordinal))
        words[7] = (words[7] & keep) | np.uint32((value >> 36) << (4 * ordinal))
    else:
        raise Unsupported(f"tensormap.replace of {field}")
    return words.tobytes()
