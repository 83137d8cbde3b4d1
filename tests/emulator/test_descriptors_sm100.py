"""Bits that the hardware reads and no compiler checks: descriptors and places in tensor memory.

By hand from the PTX ISA 9.0 (9.7.16: "Instruction descriptor", "Shared memory descriptor"), and
beside what CuTe DSL's own block-scaled MMA issues for the same tile.
"""

from typing import NamedTuple

import cutlass
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
import pytest
import torch
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, cute
from cutlass.cute.nvgpu import tcgen05
from cutlass.cute.runtime import make_ptr
from dsv4_kernels.reference import expert_layout
from dsv4_kernels.sm100 import ptx as ptx
from dsv4_kernels.sm100.spec import CONFIGS, Config, Gemm

from tests.emulator.ptx_emulator.host import Statistics, emulate
from tests.emulator.ptx_emulator.instructions import copies, tcgen05_mma
from tests.emulator.ptx_emulator.instructions import tcgen05 as emulator
from tests.emulator.ptx_emulator.memory import TensorMemory
from tests.emulator.ptx_emulator.tensor_map import TensorMap
from tests.emulator.sm100_emulation import emulated
from tests.support.layers import aligned

K_STEPS = 4  # MMAs of K = 64 a stage
ADDRESS = (1 << 14) - 1  # the field of a shared-memory descriptor, in units of 16 bytes


class Mma(NamedTuple):
    d: int
    a: int
    b: int
    instruction: int
    a_scales: int
    b_scales: int
    accumulate: bool


class Copy(NamedTuple):
    columns: int  # of tensor memory
    source: int  # shared-memory descriptor


class Issued(NamedTuple):
    mmas: list[Mma]
    copies: list[Copy]


@pytest.fixture
def issued(monkeypatch) -> Issued:
    """Operands of what runs in the emulator, in the order of issue; nothing is computed."""
    result, sources = Issued([], []), []
    to_descriptor, columns = emulator.tcgen05_descriptor, TensorMemory.columns

    def issue(ctas, values, accumulate, block):
        assert block == 16
        result.mmas.append(Mma(*values, accumulate))
        return (lambda: None), ()

    def descriptor(bits):
        sources.append(bits)
        return to_descriptor(bits)

    def record(self, address, count, what):
        # Both CTAs of a pair are asked, with the same operands.
        if what == "tcgen05.cp" and result.copies[-1:] != [Copy(address, sources[-1])]:
            result.copies.append(Copy(address, sources[-1]))
        return columns(self, address, count, what)

    monkeypatch.setattr(tcgen05_mma, "_issue_scaled", issue)
    monkeypatch.setattr(emulator, "tcgen05_descriptor", descriptor)
    monkeypatch.setattr(TensorMemory, "columns", record)
    return result


class OneStage:
    """K = 256 of CuTe DSL's block-scaled MMA, on shared memory that nobody fills."""

    def __init__(self, n: int, num_ctas: int):
        self.tile = (128 * num_ctas, n, 256)
        self.pair = num_ctas == 2
        self.group = tcgen05.CtaGroup.TWO if self.pair else tcgen05.CtaGroup.ONE

    @cute.jit
    def __call__(self, unused: cute.Pointer):
        ctas = 2 if self.pair else 1
        self.kernel().launch(grid=(ctas, 1, 1), block=(32, 1, 1), cluster=(ctas, 1, 1))

    @cute.kernel
    def kernel(self):
        tile, major = self.tile, cute.nvgpu.OperandMajorMode.K
        mma = blackwell.make_blockscaled_trivial_tiled_mma(
            *(Float4E2M1FN, Float4E2M1FN, major, major, Float8E4M3FN, 16, self.group, tile[:2])
        )
        smem = cutlass.memory.SmemAllocator()
        a_layout = blackwell.make_smem_layout_a(mma, tile, Float4E2M1FN, 1)
        b_layout = blackwell.make_smem_layout_b(mma, tile, Float4E2M1FN, 1)
        sfa_layout = blockscaled.make_smem_layout_sfa(mma, tile, 16, 1)
        sfb_layout = blockscaled.make_smem_layout_sfb(mma, tile, 16, 1)
        sA = smem.allocate_tensor(Float4E2M1FN, a_layout.outer, 1024, swizzle=a_layout.inner)
        sB = smem.allocate_tensor(Float4E2M1FN, b_layout.outer, 1024, swizzle=b_layout.inner)
        sSFA = smem.allocate_tensor(Float8E4M3FN, sfa_layout, 1024)
        sSFB = smem.allocate_tensor(Float8E4M3FN, sfb_layout, 1024)
        slot = smem.allocate_array(Int32, 1)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        cute.arch.alloc_tmem(512, slot, is_two_cta=self.pair)
        tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, slot)
        if cute.arch.block_idx_in_cluster() == 0:
            self.multiply(mma, tmem, (sA, sB, sSFA, sSFB), (sfa_layout, sfb_layout))
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        cute.arch.dealloc_tmem(tmem, 512, is_two_cta=self.pair)

    @cute.jit
    def multiply(self, mma, tmem, shared, scale_layouts):
        sA, sB, *scales = shared
        rA, rB = mma.make_fragment_A(sA), mma.make_fragment_B(sB)
        shape = mma.partition_shape_C(self.tile[:2])
        tAcc = cute.make_tensor(tmem, mma.make_fragment_C(shape).layout)
        makers = (blockscaled.make_tmem_layout_sfa, blockscaled.make_tmem_layout_sfb)
        tScales = []
        for i in cutlass.range_constexpr(2):
            of_stage = cute.slice_(scale_layouts[i], (None, None, None, 0))
            layout = makers[i](mma, self.tile, 16, of_stage)
            # Beyond the largest accumulator, and beyond the weights' scales.
            place = cute.recast_ptr(tmem + (256 + 32 * i), dtype=Float8E4M3FN)
            tScales.append(cute.make_tensor(place, layout))
            to, source = cute.filter_zeros(tScales[i]), cute.filter_zeros(scales[i])
            atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.group), Float8E4M3FN)
            copy = tcgen05.make_s2t_copy(atom, to)
            descs = tcgen05.get_s2t_smem_desc_tensor(copy, copy.get_slice(0).partition_S(source))
            cute.copy(copy, descs[None, None, None, None, 0], copy.get_slice(0).partition_D(to))
        mma.set(tcgen05.Field.ACCUMULATE, False)
        stage = (None, None, None, 0)
        cute.gemm(mma, tAcc, [rA[stage], tScales[0]], [rB[stage], tScales[1]], tAcc)


def run_ours(config: Config, counts: list[int]) -> tuple[Gemm, Statistics]:
    """One tile of weight rows of fc2 and K = 256."""
    gemm = Gemm("fc2", len(counts), 128 * config.num_ctas, 256, config)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]
    layout = expert_layout(ids, len(counts), None, config.tile)
    rows = len(layout.row_to_slot)
    tensors = (
        torch.zeros(len(counts), gemm.weight_rows, 128, dtype=torch.uint8),
        torch.zeros(len(counts), gemm.weight_rows, 16, dtype=torch.uint8),
        torch.ones(len(counts)),
        torch.zeros(rows, 128, dtype=torch.uint8),
        torch.zeros(-(-rows // 128) * 128, 16, dtype=torch.uint8),
        torch.ones(len(counts)),
        *(layout.counts, layout.offsets, layout.tile_to_expert),
        torch.zeros(rows, gemm.out_features).bfloat16(),
    )
    tensors = tuple(map(aligned, tensors))
    return gemm, emulated(gemm).run(*tensors[:6], rows, *tensors[6:], 0.0, 1, None)


@pytest.mark.parametrize(
    ("m", "n", "bits"),
    [
        # E2M1 is 1 at bits 7 and 10, N / 8 starts at bit 17, M / 128 at bit 27.
        (128, 8, 0x0802_0480),
        (128, 64, 0x0810_0480),
        (128, 128, 0x0820_0480),
        (256, 16, 0x1004_0480),
        (256, 256, 0x1040_0480),
    ],
)
def test_instruction_descriptor_by_hand(m, n, bits):
    assert ptx.instruction_descriptor(m) | n // 8 << 17 == bits


def test_shared_memory_descriptors_by_hand():
    # Swizzle of 128 bytes: 2 at bit 61. Version 1 at bit 46. From 8 rows to the next 8: 1024 bytes,
    # in units of 16 at bit 32. The leading offset has no meaning here; 1, as CUTLASS has it.
    assert ptx.OPERAND_DESC == 0x4000_4040_0001_0000
    # No swizzle; 8 rows of 16 bytes are 128 bytes.
    assert ptx.SCALES_DESC == 0x0000_4008_0001_0000


@pytest.mark.parametrize("config", CONFIGS.values(), ids=str)
def test_as_cute_dsl_issues_it(issued, config: Config):
    gemm, _ = run_ours(config, [config.tile])
    ours = Issued(issued.mmas.copy(), issued.copies.copy())
    issued.mmas.clear(), issued.copies.clear()
    pointer = make_ptr(Int32, 1 << 20, cute.AddressSpace.gmem, assumed_align=16)
    theirs = emulate(OneStage(config.tile, config.num_ctas), pointer, arch="sm_100a")
    theirs.run(torch.zeros(4, dtype=torch.int32))
    assert len(ours.mmas) == len(issued.mmas) == K_STEPS
    for mine, other in zip(ours.mmas, issued.mmas, strict=True):
        assert mine.instruction == other.instruction
        assert mine.accumulate == other.accumulate
        assert mine.d - ours.mmas[0].d == other.d - issued.mmas[0].d == 0
        for field in ("a", "b", "a_scales", "b_scales"):
            first, reference = getattr(ours.mmas[0], field), getattr(issued.mmas[0], field)
            assert getattr(mine, field) - first == getattr(other, field) - reference, field
        for field in ("a", "b"):
            assert getattr(mine, field) & ~ADDRESS == getattr(other, field) & ~ADDRESS, field
    assert relative_copies(ours) == relative_copies(issued)
    assert len(relative_copies(ours)) == K_STEPS * (1 + gemm.scale_blocks)


def relative_copies(issued: Issued) -> set[tuple]:
    """Of each: whose scales, columns after the first MMA's, bytes after the first copy's."""
    first, found = issued.mmas[0], set()
    for columns, source in issued.copies:
        of_tokens = columns >= first.b_scales
        base = first.b_scales if of_tokens else first.a_scales
        start = next(s for c, s in issued.copies if c == base)
        assert source & ~ADDRESS == ptx.SCALES_DESC & ~ADDRESS, hex(source)
        found.add((of_tokens, columns - base, source - start << 4))
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=str)
def test_n_is_what_rows_exist_and_scales_start_at_their_block(issued, config: Config):
    """Two experts: all of a tile and a row of the next, and 9 rows."""
    gemm, statistics = run_ours(config, [config.tile + 1, 9])
    assert statistics.launches[0].cluster == (config.num_ctas, 1, 1)
    tiles = issued.mmas[::K_STEPS]
    n = [(mma.instruction >> 17 & 63) * 8 for mma in tiles]
    assert n == [config.tile, 8 * config.num_ctas, 16]
    # Rows 64 to 127 of a block of 128: its third and fourth column (CUTLASS does so for N = 64).
    shifts = [mma.b_scales - tiles[0].b_scales for mma in tiles]
    assert shifts == ([0, 2, 0] if config.tile == 64 else [0, 0, 0])
    assert [mma.d for mma in tiles] == [tiles[0].d, tiles[0].d + gemm.acc_stride, tiles[0].d]
    assert gemm.tmem_columns <= 512
    assert tiles[0].a_scales % 4 == 0 and tiles[0].b_scales % 4 == 0
    for mma in issued.mmas:
        # The swizzle is of address bits, so a tile starts at a multiple of its 1024 bytes.
        step = issued.mmas.index(mma) % K_STEPS
        assert (mma.a & ADDRESS) % 64 == (mma.b & ADDRESS) % 64 == 2 * step
        assert mma.instruction >> 4 & 3 == 0 and mma.instruction >> 29 == 0  # scale ids, K = 64


class Box(NamedTuple):
    swizzle: int  # 0 none, 2 of 64 bytes, 3 of 128 bytes
    box: list[int]
    strides: list[int]  # bytes, of the second dimension and beyond


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=str)
def test_tensor_maps_by_hand(monkeypatch, config: Config, op):
    """Hardware's limits: 256 a dimension of a box, strides of 16 bytes, 128 bytes to a swizzle."""
    maps = {}

    class Recorded(TensorMap):
        def __init__(self, raw: bytes):
            super().__init__(raw)
            maps[self.base] = self

    monkeypatch.setattr(copies, "TensorMap", Recorded)
    k, n, tile = 256, 128 * config.num_ctas, config.tile
    gemm = Gemm(op, 2, n, k, config)
    layout = expert_layout(torch.tensor([[0], [1]]), 2, None, tile)
    rows = len(layout.row_to_slot)
    weights = aligned(torch.zeros(2, gemm.weight_rows, k // 2, dtype=torch.uint8))
    weight_scales = aligned(torch.zeros(2, gemm.weight_rows, k // 16, dtype=torch.uint8))
    tokens = aligned(torch.zeros(rows, k // 2, dtype=torch.uint8))
    token_scales = aligned(torch.zeros(-(-rows // 128) * 128, k // 16, dtype=torch.uint8))
    out = aligned(torch.zeros(rows, n).bfloat16())
    scales = (torch.ones(2, 2), torch.ones(1)) if op == "fc1" else (torch.ones(2), torch.ones(2))
    more = (layout.row_to_slot, torch.ones(2)) if op == "fc1" else ()
    emulated(gemm).run(
        *(weights, weight_scales, aligned(scales[0]), tokens, token_scales, aligned(scales[1])),
        rows,
        *map(aligned, (layout.counts, layout.offsets, layout.tile_to_expert)),
        out,
        *map(aligned, more),
        *(1.0, 1, None),
    )
    found = {base: Box(m.swizzle, m.box, m.strides) for base, m in maps.items()}
    line = k // 2
    if op == "fc1":  # 16 rows of gate, then of up, 4 times
        expected = Box(3, [128, 16, 2, 4, 1], [line, n * line, 16 * line, 2 * n * line])
    else:
        expected = Box(3, [128, 128, 1], [line, n * line])
        assert found[out.data_ptr()] == Box(2, [32, 32], [2 * n])
    assert found[weights.data_ptr()] == expected
    assert found[tokens.data_ptr()] == Box(3, [128, config.token_box], [line])
    # Words: 512 bytes for 128 rows and K = 64, four of them a stage.
    assert found[weight_scales.data_ptr()] == Box(0, [128, 4], [512])
    assert found[token_scales.data_ptr()] == Box(0, [128, 4], [512])
