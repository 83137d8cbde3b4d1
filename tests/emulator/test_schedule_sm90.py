"""What the stream-K schedule of the sm90 GEMMs gives every CTA: its device code in the emulator."""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import numpy as np
import pytest
import torch
from cuda.bindings import driver
from cutlass import Int32
from cutlass.cute.runtime import make_ptr
from dsv4_kernels.sm90.schedule import Sm90Schedule, Tables

from tests.emulator.ptx_emulator.host import EmulatedFunction, emulate

MOST = 64  # pieces of a block
FIELDS = 6


class Piece(NamedTuple):
    """Stages [k_first, k_end) of a tile, the work of one block."""

    expert: int
    row_start: int
    rows: int
    m_tile: int
    k_first: int
    k_end: int


class Schedule(Sm90Schedule):
    """Every CTA writes its pieces to out (CTAs, MOST, FIELDS)."""

    def __init__(self, experts: int, tile_n: tuple[int, int], m_tiles: int, cluster: int):
        super().__init__(
            num_experts=experts,
            tile_n=tile_n,
            m_tiles=m_tiles,
            k_stages=16,
            threads=256,
            cluster=cluster,
        )

    @cute.jit
    def __call__(
        self,
        counts: cute.Pointer,
        offsets: cute.Pointer,
        out: cute.Pointer,
        num_blocks: Int32,
        stream: driver.CUstream,
    ):
        self.kernel(counts, offsets, out).launch(
            grid=[num_blocks, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, counts: cute.Pointer, offsets: cute.Pointer, out: cute.Pointer):
        smem = cutlass.memory.SmemAllocator()
        tables = self._allocate_tables(
            lambda size: cute.recast_ptr(smem.allocate(4 * size, byte_alignment=16), dtype=Int32)
        )
        self._plan(counts, offsets, tables)
        if cute.arch.thread_idx()[0] == 0:
            self._write(out + cute.arch.block_idx()[0] * (MOST * FIELDS), tables)

    @cute.jit
    def _write(self, target: cute.Pointer, tables: Tables):
        """In the order in which all roles of a GEMM's block walk them."""
        whole, first, end = self._share(tables)
        position = Int32(0) if whole > 0 else first
        while position < end:
            tile = self._tile_at(position, whole)
            k_first = position % self.k_stages
            k_end = cutlass.min(Int32(self.k_stages), k_first + end - position)
            position += k_end - k_first
            if position == whole:
                position = first
            piece = (*self._locate(tile, tables), k_first, k_end)
            for i in cutlass.range_constexpr(FIELDS):
                (target + i).store(piece[i])
            target += FIELDS


# Of a decode batch, of prefill, and of prefill by clusters.
SCHEDULES = {
    "small-tiles": Schedule(32, (8, 32), 4, 1),
    "large-tiles": Schedule(32, (72, 96), 4, 1),
    "clusters": Schedule(32, (112, 160), 4, 2),
}
EVEN = np.full(32, 90)
COUNTS = {
    "even": EVEN,
    "skewed": np.random.default_rng(0).geometric(0.01, 32) * (np.arange(32) % 3 > 0),
    "one-expert": np.eye(32, dtype=int)[5] * 700,
}
GRIDS = {"h20": 78, "h100-pcie": 114}  # multiprocessors


@functools.cache
def emulated(name: str) -> EmulatedFunction:
    pointers = [make_ptr(Int32, 1 << 20, cute.AddressSpace.gmem, assumed_align=4)] * 3
    return emulate(SCHEDULES[name], *pointers, Int32(1), driver.CUstream(0), arch="sm_90a")


def pieces(name: str, counts: np.ndarray, grid: int) -> list[list[Piece]]:
    """Of every block, by block index, in the order of its work."""
    offsets = np.concatenate([[0], counts.cumsum()])
    out = torch.full((grid, MOST, FIELDS), -1, dtype=torch.int32)
    given = [torch.from_numpy(each.astype(np.int32)) for each in (counts, offsets)]
    emulated(name).run(*given, out, grid, None)
    assert (out[:, -1] < 0).all(), "a block has more pieces than fit"
    return [[Piece(*row) for row in rows if row[0] >= 0] for rows in out.tolist()]


def tiles(schedule: Schedule, counts: np.ndarray) -> set[tuple[int, int, int, int]]:
    """(expert, first row, rows, m tile): the rows of an expert in equal parts, rounded up to 8."""
    found = set()
    for expert, count in enumerate(counts.tolist()):
        parts = math.ceil(count / schedule.tile_n_max)
        each = math.ceil(count / max(parts, 1) / 8) * 8
        first = int(counts[:expert].sum())
        for start in range(0, count, max(each, 1)):
            rows = min(each, count - start)
            found |= {(expert, first + start, rows, m_tile) for m_tile in range(schedule.m_tiles)}
    return found


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_is_one_block_s_and_blocks_wait_for_lower_indices(name, counts, grid):
    schedule = SCHEDULES[name]
    work = pieces(name, COUNTS[counts], grid)
    parts = defaultdict(list)
    for block, each in enumerate(work):
        for piece in each:
            where = piece[:4], block % schedule.cluster
            parts[where].append((piece.k_first, piece.k_end, block))
    wanted = tiles(schedule, COUNTS[counts])
    assert parts.keys() == {(tile, rank) for tile in wanted for rank in range(schedule.cluster)}
    for tile, found in parts.items():
        starts, ends, blocks = zip(*sorted(found), strict=True)
        assert (0, *ends) == (*starts, schedule.k_stages), tile
        # The block of the first stages waits for the others.
        assert list(blocks) == sorted(set(blocks), reverse=True), tile
    if counts != "skewed":  # tiles cost the same: to the stage, and where costs are cut, to two
        stages = [sum(p.k_end - p.k_first for p in each) for each in work]
        assert max(stages) - min(stages) <= (2 if schedule.by_cost else 1), stages
