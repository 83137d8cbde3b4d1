"""wgmma and tcgen05 of the PTX emulator: layouts, shapes and sums by hand.

Layouts are written out here from PTX ISA 9.0 (9.7.15 for wgmma: fragments, canonical layouts,
matrix descriptor; 9.7.16 for tcgen05), and share no code with the emulator.
"""

import numpy as np
import pytest

from tests.emulator.matrix_snippets import (
    FILL,
    WGMMA_LAYOUT,
    bf16,
    descriptor,
    descriptor_bits,
    k_major_image,
    run_wgmma,
)
from tests.emulator.ptx_emulator.snippet import run_snippet

U32 = np.uint32
MODES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1)]
TCGEN05_LAYOUT = {"none": 0, "128B": 2, "64B": 4, "32B": 6}  # bits 61-63


def _small(rng, *shape) -> np.ndarray:
    """Integers, so that every sum is exact."""
    return rng.integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("n", [8, 16, 24, 64, 104, 128, 256])
@pytest.mark.parametrize("registers", [False, True], ids=["shared-A", "register-A"])
def test_wgmma_shapes(n, registers):
    rng = np.random.default_rng(n)
    a, b, c = _small(rng, 64, 16), _small(rng, n, 16), _small(rng, 64, n)
    assert np.array_equal(run_wgmma(a, b, c, registers=registers), a @ b.T + c)


@pytest.mark.parametrize("swizzle", list(WGMMA_LAYOUT))
@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_wgmma_swizzles(swizzle, kind, mode, seed):
    rng = np.random.default_rng(1)
    a, b = _small(rng, 64, 16), _small(rng, 32, 16)
    d = run_wgmma(a, b, None, swizzle=swizzle, kind=kind, mode=mode, seed=seed)
    assert np.array_equal(d, a @ b.T)


@pytest.mark.parametrize("swizzle", list(WGMMA_LAYOUT))
@pytest.mark.parametrize("registers", [False, True], ids=["shared-A", "register-A"])
@pytest.mark.parametrize("n", [8, 144])
def test_wgmma_of_8_bits(n, swizzle, registers):
    rng = np.random.default_rng(n)
    a, b, c = _small(rng, 64, 32), _small(rng, n, 32), _small(rng, 64, n)
    d = run_wgmma(a, b, c, swizzle=swizzle, kind="e4m3", registers=registers, repeats=2)
    assert np.array_equal(d, 2 * a @ b.T + c)


@pytest.mark.parametrize("n", [64, 128])
def test_wgmma_with_b_contiguous_along_n(n):
    rng = np.random.default_rng(2)
    a, b = _small(rng, 64, 16), _small(rng, n, 16)
    assert np.array_equal(run_wgmma(a, b, None, b_rows=True), a @ b.T)


def test_wgmma_signs():
    rng = np.random.default_rng(3)
    a, b, c = _small(rng, 64, 16), _small(rng, 8, 16), _small(rng, 64, 8)
    assert np.array_equal(run_wgmma(a, b, c, signs=(-1, 1)), c - a @ b.T)
    assert np.array_equal(run_wgmma(a, b, c, signs=(-1, -1)), c + a @ b.T)


# tcgen05.

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3 = {0x38: 1.0, 0x40: 2.0, 0x30: 0.5, 0x28: 0.25, 0xB8: -1.0}


def nvfp4(rng, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, 32) packed codes, (rows, 4) scales, (rows, 64) values."""
    codes = rng.integers(0, 16, (rows, 64)).astype(np.uint8)
    scales = rng.choice(list(E4M3), (rows, 4)).astype(np.uint8)
    factors = np.vectorize(E4M3.get)(scales).astype(np.float32)
    values = E2M1[codes] * np.repeat(factors, 16, axis=1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, values


def scale_image(scales: np.ndarray) -> np.ndarray:
    """(rows, 4) scales as blocks of 32 rows by 16 bytes: row r is at block r / 128, row r % 32,
    word r % 128 / 32."""
    blocks = -(-len(scales) // 128)
    image = np.zeros((blocks, 32, 4, 4), np.uint8)
    for r in range(len(scales)):
        image[r // 128, r % 32, r % 128 // 32] = scales[r]
    return image.reshape(-1)


_TMEM_PROLOGUE = """
    setp.lt.u32 %p10, lane, 32;
    setp.eq.u32 %p11, lane, 0;
    @!%p10 bra ALLOCATED;
    tcgen05.alloc.cta_group::{ctas}.sync.aligned.shared::cta.b32 [%r1+{slot}], 512;
    tcgen05.relinquish_alloc_permit.cta_group::{ctas}.sync.aligned;
    ALLOCATED:
    @%p11 mbarrier.init.shared.b64 [%r1+{barrier}], 1;
    bar.sync 0;
    ld.shared.b32 %r40, [%r1+{slot}];
"""
_TMEM_EPILOGUE = """
    WAIT:
    mbarrier.try_wait.parity.shared.b64 %p4, [%r1+{barrier}], 0;
    @!%p4 bra WAIT;
    tcgen05.fence::after_thread_sync;
    shr.u32 %r41, lane, 5;
    shl.b32 %r41, %r41, 21;
    add.u32 %r42, %r40, %r41;
    mad.wide.u32 %rd10, lane, {row_bytes}, result;
    {loads}
    bar.sync 0;
    @!%p10 bra FREED;
    tcgen05.dealloc.cta_group::{ctas}.sync.aligned.b32 %r40, 512;
    FREED:
"""


def _read_columns(n: int) -> str:
    """Each thread stores its row of n columns, 8 at a time."""
    lines = []
    registers = ", ".join(f"%r{100 + i}" for i in range(8))
    for column in range(0, n, 8):
        lines.append(f"add.u32 %r43, %r42, {column};")
        lines.append(f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {{{registers}}}, [%r43];")
        lines.append("tcgen05.wait::ld.sync.aligned;")
        lines += [f"st.global.b32 [%rd10+{4 * (column + i)}], %r{100 + i};" for i in range(8)]
    return "\n".join(lines)


def _scaled_instruction(n: int, m: int) -> int:
    """E2M1 by E2M1 (bits 7-9, 10-11), N >> 3 at 17, UE4M3 scales (bit 23: 0), M >> 7 at 27."""
    return 1 << 7 | 1 << 10 | n >> 3 << 17 | m >> 7 << 27


@pytest.mark.parametrize("n", [8, 40, 128, 256])
@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_tcgen05_block_scaled(n, mode, seed):
    """Two accumulating MMAs of the same operands: D = 2 (A sA) (B sB)ᵀ."""
    rng = np.random.default_rng(n)
    a, a_scales, a_values = nvfp4(rng, 128)
    b, b_scales, b_values = nvfp4(rng, n)
    a_image, _, a_stride = k_major_image(a, "32B")
    b_image, _, b_stride = k_major_image(b, "128B")
    parts = [a_image, b_image, scale_image(a_scales), scale_image(b_scales)]
    image, offsets = _layout(parts)
    slot = len(image)
    version = 1 << 46
    a_bits = descriptor_bits(16, a_stride) | version | TCGEN05_LAYOUT["32B"] << 61
    b_bits = descriptor_bits(16, b_stride) | version | TCGEN05_LAYOUT["128B"] << 61
    scale_bits = descriptor_bits(16, 128) | version | TCGEN05_LAYOUT["none"] << 61
    copies = ""
    for i in range(-(-n // 128)):
        copies += descriptor("%rd6", offsets[3] + 512 * i, scale_bits)
        copies += f"add.u32 %r45, %r40, {264 + 4 * i};"
        copies += "tcgen05.cp.cta_group::1.32x128b.warpx4 [%r45], %rd6;\n"
    mma = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16"
    result = np.full((128, n), np.nan, np.float32)
    machine = run_snippet(
        FILL.format(bytes=len(image))
        + _TMEM_PROLOGUE.format(ctas=1, slot=slot, barrier=slot + 8)
        + "@!%p11 bra ISSUED;"
        + descriptor("%rd3", offsets[0], a_bits)
        + descriptor("%rd4", offsets[1], b_bits)
        + descriptor("%rd5", offsets[2], scale_bits)
        + "add.u32 %r44, %r40, 256; tcgen05.cp.cta_group::1.32x128b.warpx4 [%r44], %rd5;"
        + copies
        + f"""
        add.u32 %r45, %r40, 264;
        setp.ne.u32 %p5, 0, 0;
        setp.ne.u32 %p6, 1, 0;
        {mma} [%r40], %rd3, %rd4, {_scaled_instruction(n, 128)}, [%r44], [%r45], %p5;
        {mma} [%r40], %rd3, %rd4, {_scaled_instruction(n, 128)}, [%r44], [%r45], %p6;
        tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+{slot + 8}];
        ISSUED:
        """
        + _TMEM_EPILOGUE.format(ctas=1, barrier=slot + 8, row_bytes=4 * n, loads=_read_columns(n)),
        {"image": image, "result": result},
        warps=4,
        shared_bytes=slot + 16,
        mode=mode,
        seed=seed,
    )
    assert np.array_equal(result, 2 * (a_values @ b_values.T))
    assert machine.counts["tcgen05.mma"] == 2


def _layout(parts: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """The parts one after another, each at a multiple of 1024 bytes."""
    offsets, end = [], 0
    for part in parts:
        offsets.append(end)
        end = -(-(end + len(part)) // 1024) * 1024
    image = np.zeros(end, np.uint8)
    for part, offset in zip(parts, offsets, strict=True):
        image[offset : offset + len(part)] = part
    return image, offsets


@pytest.mark.parametrize("swizzle", list(TCGEN05_LAYOUT))
@pytest.mark.parametrize("n", [16, 256])
def test_tcgen05_bf16(n, swizzle):
    rng = np.random.default_rng(n)
    a, b = _small(rng, 128, 16), _small(rng, n, 16)
    a_image, leading, a_stride = k_major_image(bf16(a).view(np.uint8), swizzle)
    b_image, _, b_stride = k_major_image(bf16(b).view(np.uint8), swizzle)
    image, offsets = _layout([a_image, b_image])
    slot = len(image)
    bits = 1 << 46 | TCGEN05_LAYOUT[swizzle] << 61
    instruction = 1 << 4 | 1 << 7 | 1 << 10 | n >> 3 << 17 | 128 >> 4 << 24
    result = np.full((128, n), np.nan, np.float32)
    run_snippet(
        FILL.format(bytes=len(image))
        + _TMEM_PROLOGUE.format(ctas=1, slot=slot, barrier=slot + 8)
        + "@!%p11 bra ISSUED;"
        + descriptor("%rd3", offsets[0], descriptor_bits(leading, a_stride) | bits)
        + descriptor("%rd4", offsets[1], descriptor_bits(leading, b_stride) | bits)
        + f"""
        setp.ne.u32 %p5, 0, 0;
        tcgen05.mma.cta_group::1.kind::f16 [%r40], %rd3, %rd4, {instruction}, %p5;
        tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+{slot + 8}];
        ISSUED:
        """
        + _TMEM_EPILOGUE.format(ctas=1, barrier=slot + 8, row_bytes=4 * n, loads=_read_columns(n)),
        {"image": image, "result": result},
        warps=4,
        shared_bytes=slot + 16,
    )
    assert np.array_equal(result, a @ b.T)


@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_tcgen05_pair_of_ctas(mode, seed):
    """cta_group::2: 256 rows of A, half in each CTA; B's rows half in each; both get N columns."""
    n = 64
    rng = np.random.default_rng(5)
    a, b = _small(rng, 256, 16), _small(rng, n, 16)
    images = []
    for rank in range(2):
        a_image, _, a_stride = k_major_image(
            bf16(a[128 * rank : 128 * rank + 128]).view(np.uint8), "32B"
        )
        b_image, _, b_stride = k_major_image(
            bf16(b[32 * rank : 32 * rank + 32]).view(np.uint8), "32B"
        )
        image, offsets = _layout([a_image, b_image])
        images.append(image)
    slot = len(images[0])
    bits = 1 << 46 | TCGEN05_LAYOUT["32B"] << 61
    instruction = 1 << 4 | 1 << 7 | 1 << 10 | n >> 3 << 17 | 256 >> 4 << 24
    result = np.full((256, n), np.nan, np.float32)
    run_snippet(
        "mov.u32 %r60, %cluster_ctarank;"
        f"mad.wide.u32 %rd30, %r60, {slot}, images; .reg .b64 image; mov.b64 image, %rd30;"
        + FILL.format(bytes=slot)
        + "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
        + _TMEM_PROLOGUE.format(ctas=2, slot=slot, barrier=slot + 8)
        + f"""
        barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        setp.eq.and.u32 %p12, %r60, 0, %p11;
        @!%p12 bra ISSUED;
        {descriptor("%rd3", offsets[0], descriptor_bits(16, a_stride) | bits)}
        {descriptor("%rd4", offsets[1], descriptor_bits(16, b_stride) | bits)}
        setp.ne.u32 %p5, 0, 0;
        mov.b16 %rs1, 3;
        tcgen05.mma.cta_group::2.kind::f16 [%r40], %rd3, %rd4, {instruction}, %p5;
        tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64
            [%r1+{slot + 8}], %rs1;
        ISSUED:
        mad.lo.u32 %r61, %r60, {128 * n * 4}, 0;
        cvt.u64.u32 %rd31, %r61;
        add.u64 result, result, %rd31;
        """
        + _TMEM_EPILOGUE.format(ctas=2, barrier=slot + 8, row_bytes=4 * n, loads=_read_columns(n))
        + "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        {"images": np.stack(images), "result": result},
        warps=4,
        ctas=2,
        shared_bytes=slot + 16,
        mode=mode,
        seed=seed,
    )
    assert np.array_equal(result, a @ b.T)


# tcgen05.ld and .st: (lane, column) of each register of thread t (data movement shapes).
FRAGMENTS = {
    "32x32b.x4": [lambda t, j=j: (t, j) for j in range(4)],
    "16x256b.x1": [
        lambda t: (t // 4, t % 4 * 2),
        lambda t: (t // 4, t % 4 * 2 + 1),
        lambda t: (t // 4 + 8, t % 4 * 2),
        lambda t: (t // 4 + 8, t % 4 * 2 + 1),
    ],
    "16x128b.x2": [
        lambda t: (t // 4, t % 4),
        lambda t: (t // 4 + 8, t % 4),
        lambda t: (t // 4, 4 + t % 4),
        lambda t: (t // 4 + 8, 4 + t % 4),
    ],
}


@pytest.mark.parametrize("shape", list(FRAGMENTS))
@pytest.mark.parametrize(("mode", "seed"), MODES)
def test_tcgen05_load_shapes(shape, mode, seed):
    """Columns are written with 32x32b and read with each shape by warp 0."""
    result = np.zeros((32, 4), U32)
    run_snippet(
        f"""
        mov.b32 %r1, smem;
        tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
        ld.shared.b32 %r40, [%r1];
        {"".join(f"mad.lo.u32 %r{100 + i}, lane, 100, {i};" for i in range(8))}
        tcgen05.st.sync.aligned.32x32b.x8.b32 [%r40],
            {{%r100, %r101, %r102, %r103, %r104, %r105, %r106, %r107}};
        tcgen05.wait::st.sync.aligned;
        tcgen05.ld.sync.aligned.{shape}.b32 {{%r120, %r121, %r122, %r123}}, [%r40];
        tcgen05.wait::ld.sync.aligned;
        mad.wide.u32 %rd1, lane, 16, result;
        st.global.v4.b32 [%rd1], {{%r120, %r121, %r122, %r123}};
        tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 32;
        """,
        {"result": result},
        shared_bytes=16,
        mode=mode,
        seed=seed,
    )
    for thread in range(32):
        for j, place in enumerate(FRAGMENTS[shape]):
            row, column = place(thread)
            assert result[thread, j] == 100 * row + column
