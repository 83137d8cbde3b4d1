"""Matrix operands in shared memory and one wgmma, for tests of the emulator.

Layouts are written out here from PTX ISA 9.0 (9.7.15 for wgmma: fragments, canonical layouts,
matrix descriptor), and share no code with the emulator.
"""

import numpy as np

from tests.emulator.ptx_emulator.numerics import E4M3, to_e4m3
from tests.emulator.ptx_emulator.snippet import run_snippet

U32 = np.uint32
SWIZZLES = {"128B": (128, 1), "64B": (64, 2), "32B": (32, 4)}  # row bytes, rows per XOR step
WGMMA_LAYOUT = {"none": 0, "128B": 1, "64B": 2, "32B": 3}  # bits 62-63


def k_major_image(rows: np.ndarray, swizzle: str) -> tuple[np.ndarray, int, int]:
    """(n, bytes) rows as shared memory holds them, with the leading and stride byte offsets.

    Groups of 8 rows follow one another. In a group, 16-byte chunk c of row r is at chunk
    c XOR (r / rows per step); without swizzle each chunk column is 128 contiguous bytes.
    """
    count, row_bytes = rows.shape
    if swizzle == "none":
        image = rows.reshape(count // 8, 8, row_bytes // 16, 16).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(image).reshape(-1), 128, row_bytes // 16 * 128
    span, step = SWIZZLES[swizzle]
    image = np.zeros((count, span), np.uint8)
    for r in range(count):
        for c in range(row_bytes // 16):
            at = c ^ (r % 8 // step)
            image[r, 16 * at : 16 * at + 16] = rows[r, 16 * c : 16 * c + 16]
    return image.reshape(-1), 16, 8 * span


def row_major_image(rows: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(n, k) 16-bit elements with n contiguous, 128-byte swizzle: 64 n by 8 k atoms."""
    n, k = rows.shape
    image = np.zeros((-(-n // 64), k // 8, 8, 8, 8), np.uint16)  # n / 64, k / 8, k, chunk, n
    for i in range(n):
        for j in range(k):
            image[i // 64, j // 8, j % 8, i % 64 // 8 ^ j % 8, i % 8] = rows[i, j]
    return image.reshape(-1).view(np.uint8), k // 8 * 1024, 1024


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits of values that bf16 holds exactly."""
    bits = values.astype(np.float32).view(U32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def e4m3(values: np.ndarray) -> np.ndarray:
    """Bits of values that E4M3 holds exactly."""
    bits = to_e4m3(values)
    assert np.array_equal(E4M3[bits], values, equal_nan=True)
    return bits


ENCODE = {"bf16": bf16, "f16": lambda x: x.astype(np.float16).view(np.uint16), "e4m3": e4m3}


def descriptor_bits(leading: int, stride: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32


# Copies `image` to shared memory with 128 threads and makes it visible to the async proxy.
FILL = """
    mov.b32 %r1, smem;
    mul.lo.u32 %r2, lane, 16;
    FILL:
    setp.ge.u32 %p1, %r2, {bytes};
    @%p1 bra FILLED;
    cvt.u64.u32 %rd1, %r2;
    add.u64 %rd1, %rd1, image;
    add.u32 %r3, %r1, %r2;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd1];
    st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    add.u32 %r2, %r2, 2048;
    bra.uni FILL;
    FILLED:
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""


def descriptor(register: str, offset: int, bits: int) -> str:
    """A descriptor of shared memory at `offset`."""
    return f"""
    add.u32 %r8, %r1, {offset};
    shr.u32 %r8, %r8, 4;
    and.b32 %r8, %r8, 0x3FFF;
    cvt.u64.u32 {register}, %r8;
    or.b64 {register}, {register}, {bits};
    """


def run_wgmma(
    a,
    b,
    c,
    *,
    swizzle="128B",
    kind="bf16",
    registers=False,
    b_rows=False,
    mode="eager",
    seed=0,
    signs=(1, 1),
    repeats=1,
):
    """D = A Bᵀ (+ C) by one instruction, or C + A Bᵀ + A Bᵀ ... by `repeats` of them in one group.

    a (64, k), b (n, k), c (64, n) or None, as float32; k is 16, and 32 of e4m3."""
    n, k = b.shape
    a_bits, b_bits = ENCODE[kind](a), ENCODE[kind](b)
    a_bytes = a_bits.view(np.uint8)
    a_image, a_leading, a_stride = k_major_image(a_bytes, swizzle)
    if b_rows:
        b_image, b_leading, b_stride = row_major_image(b_bits)
    else:
        b_image, b_leading, b_stride = k_major_image(b_bits.view(np.uint8), swizzle)
    offset = -(-len(a_image) // 1024) * 1024
    image = np.zeros(-(-(offset + len(b_image)) // 16) * 16, np.uint8)
    image[: len(a_image)], image[offset : offset + len(b_image)] = a_image, b_image
    layout = WGMMA_LAYOUT[swizzle] << 62
    b_layout = WGMMA_LAYOUT["128B" if b_rows else swizzle] << 62
    accumulators = [f"%r{100 + i}" for i in range(n // 2)]
    # Thread t of warp w: rows 16 w + t / 4 and + 8, columns 8 j + 2 (t % 4) and + 1.
    fragments = np.zeros((128, n // 2), np.float32)
    a_fragments = np.zeros((128, 4, 4), np.uint8)
    where = np.zeros((128, n // 2, 2), int)
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        for i in range(n // 2):
            where[thread, i] = row + 8 * (i // 2 % 2), i // 4 * 8 + column + i % 2
        for i in range(4):
            first = 2 * column + 16 * (i // 2)
            a_fragments[thread, i] = a_bytes[row + 8 * (i % 2), first : first + 4]
    if c is not None:
        fragments[:] = c[where[..., 0], where[..., 1]]
    loads = "\n".join(f"ld.global.b32 {r}, [%rd10+{4 * i}];" for i, r in enumerate(accumulators))
    stores = "\n".join(f"st.global.b32 [%rd10+{4 * i}], {r};" for i, r in enumerate(accumulators))
    a_operand = "{%r20, %r21, %r22, %r23}" if registers else "%rd3"
    signs_text = f"{signs[0]}, {signs[1]}"
    if kind != "e4m3":
        signs_text += f", {int(b_rows)}" if registers else f", 0, {int(b_rows)}"
    multiply = f"""
        wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{", ".join(accumulators)}}},
            {a_operand}, %rd4, %p2, {signs_text};
    """
    run_snippet(
        FILL.format(bytes=len(image))
        + descriptor("%rd3", 0, descriptor_bits(a_leading, a_stride) | layout)
        + descriptor("%rd4", offset, descriptor_bits(b_leading, b_stride) | b_layout)
        + f"""
        mad.wide.u32 %rd10, lane, {2 * n}, result;
        {loads}
        mad.wide.u32 %rd11, lane, 16, a_fragments;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd11];
        setp.ne.u32 %p2, {int(c is not None)}, 0;
        wgmma.fence.sync.aligned;
        {multiply * repeats}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        {stores}
        """,
        {"image": image, "result": fragments, "a_fragments": a_fragments},
        warps=4,
        shared_bytes=len(image),
        mode=mode,
        seed=seed,
    )
    d = np.full((64, n), np.nan, np.float32)
    d[where[..., 0], where[..., 1]] = fragments
    return d
