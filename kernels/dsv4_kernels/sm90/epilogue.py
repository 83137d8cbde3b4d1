"""Epilogue of a tile and stream-K's fix-up: device code of the sm90 grouped GEMM.

The weights' producer warp runs ahead of the consumers and hands them a work descriptor per tile:
(rows, k stages, first row, m tile), first row -1 where another unit began the tile and stores it.
So consumers neither look a tile up nor wait for its factors. The full barrier of the tile's first
stage publishes the descriptor. The epilogue's factors, loaded once all of the tile's copies have
been issued, have their own barrier, `factors_full`; all consumer threads arrive on `empty` when
they are done with the tile, and descriptor and factors may be overwritten.
"""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from dsv4_kernels.sm90 import e4m3 as e4m3
from dsv4_kernels.sm90 import ptx as ptx
from dsv4_kernels.sm90.schedule import Sm90Schedule, Tables
from dsv4_kernels.sm90.spec import FLAGS, Gemm

DESCRIPTORS = 2  # in the ring
PARTIALS_IN_FLIGHT = 32  # loads of a thread in the fix-up: more would not fit in registers
STAGING_BYTES = 512  # of a transposition buffer; each warp has two
UNSCALE = 128.0  # the 2^7 that widened weights lack
UNSCALE_FP8 = 8.0  # the same of E4M3


class WorkRing(NamedTuple):
    """Work descriptors and factors of DESCRIPTORS tiles in shared memory, and their mbarriers."""

    descriptors: cute.Pointer  # (DESCRIPTORS, 4) int32
    factors: cute.Pointer  # (DESCRIPTORS, self.factors) float32
    factors_full: cute.Pointer
    empty: cute.Pointer


class FactorSources(NamedTuple):
    """In global memory: what factors are made of."""

    global_scales: cute.Pointer
    row_to_slot: cute.Pointer
    slot_weights: cute.Pointer
    row_scales: cute.Pointer | None  # fp8
    scale_stride: Int32 | None  # fp8: of row_scales, where fc1 gathers
    h_scale: Float32 | None  # fp8


class FixUp(NamedTuple):
    """In global memory: what stream-K's units pass to one another."""

    partials: cute.Pointer
    flags: cute.Pointer  # FLAGS a CTA, one a consumer warp: its partial sums are written


class Sm90Epilogue(Sm90Schedule):
    """Owns how a tile is cut among consumer warps, and what its sums are multiplied by.

    spin_limit: for debugging, polls of a flag after which a thread that waits for partial sums
    traps, so that a hang ends in an error; None, as served, waits without a limit.
    """

    spin_limit: int | None = None

    def __init__(self, gemm: Gemm):
        config = gemm.config
        super().__init__(
            num_experts=gemm.num_experts,
            tile_n=config.tile_n,
            m_tiles=math.ceil(gemm.m / (config.tile_m * config.cluster)),
            k_stages=math.ceil(gemm.k / config.tile_k),
            threads=128 * (config.warpgroups + 1),
            cluster=config.cluster,
        )
        self.config = config
        self.fc1 = gemm.op == "fc1"
        self.gather, self.top_k = gemm.gather, gemm.top_k
        self.fp8 = gemm.activations == "fp8"
        self.h_row_scales = gemm.h_row_scales
        self.h_is_fp8 = self.fp8 and self.fc1 and not self.h_row_scales
        self.unscale = UNSCALE_FP8 if self.fp8 else UNSCALE
        self.m = gemm.m
        self.m_out = gemm.m // 2 if self.fc1 else gemm.m
        self.m_blocks_tile = config.m_blocks * config.warpgroups  # of 64 rows, in a CTA's tile
        # How many units' partial sums are in flight; where that is one for every size of tile,
        # tiles of all sizes share an epilogue, and a kernel compiles in half the time.
        self.depends_on_n = self._units_in_flight(self.tile_n_min) > 1
        # Two global scales, then a routing weight a row; fc2: one global scale. fp8: fc1 has a
        # scale a row instead, and fc2 its product with the routing weight.
        per_row = self.fc1 or self.fp8
        self.factors = 2 + (-(-self.tile_n_max // 32) * 32 if per_row else 0)

    def _descriptor(self, work: WorkRing, index: Int32) -> cute.Tensor:
        return cute.make_tensor((work.descriptors + index * 4).align(16), cute.make_layout(4))

    @cute.jit
    def _load_factors(
        self,
        sources: FactorSources,
        expert: Int32,
        row_start: Int32,
        rows: Int32,
        factors: cute.Pointer,
    ):
        """Global -> shared: a tile's factors; one warp."""
        lane = cute.arch.lane_idx()
        # Unpredicated, so that loads are in flight together: past the last row, the last.
        row_groups = (self.factors - 2) // 32
        at = [row_start + cutlass.min(lane + 32 * i, rows - 1) for i in range(row_groups)]
        values = [Float32(1.0)] * row_groups
        slots = [Int32(0)] * row_groups
        if cutlass.const_expr(self.fp8 and (self.fc1 or self.h_row_scales)):
            scaled = at
            if cutlass.const_expr(self.gather):
                tokens = [(sources.row_to_slot + row).load() // self.top_k for row in at]
                scaled = [token * sources.scale_stride for token in tokens]
            for i in cutlass.range_constexpr(row_groups):
                values[i] = (sources.row_scales + scaled[i]).load()
        elif cutlass.const_expr(self.fp8):
            values = [sources.h_scale] * row_groups
        if cutlass.const_expr(self.fc1 != self.fp8):
            for i in cutlass.range_constexpr(row_groups):
                slots[i] = (sources.row_to_slot + at[i]).load()
            for i in cutlass.range_constexpr(row_groups):
                values[i] = values[i] * (sources.slot_weights + slots[i]).load()
        for i in cutlass.range_constexpr(row_groups):
            (factors + 2 + lane + 32 * i).store(values[i])
        if cutlass.const_expr(self.fc1):
            if lane < 2:
                (factors + lane).store(
                    (sources.global_scales + 2 * expert + lane).load() * self.unscale
                )
        elif lane == 0:
            factors.store((sources.global_scales + expert).load() * self.unscale)

    def _units_in_flight(self, n: int) -> int:
        return max(1, PARTIALS_IN_FLIGHT // (n // 2 * self.config.m_blocks))

    @cute.jit
    def _epilogue(
        self,
        n_least: cutlass.Constexpr,
        n: cutlass.Constexpr,
        acc: list,
        out: cute.Pointer,
        fix_up: FixUp,
        limits: tuple,
        work: WorkRing,
        s_staging: cute.Pointer,
        tile: Int32,
        tables: Tables,
    ):
        """Of the CTA's tile number `tile`: spill the accumulators, or fix up and store. A tile has
        accumulators of n_least rows, or more if it has more rows, up to n."""
        tile = ptx.opaque(tile)
        descriptor = cute.make_rmem_tensor((4,), Int32)
        cute.autovec_copy(self._descriptor(work, tile % DESCRIPTORS), descriptor)
        rows, k_stages, row_start, m_tile = (
            descriptor[0],
            descriptor[1],
            descriptor[2],
            descriptor[3],
        )
        if row_start < 0:
            self._spill(n_least, n, acc, rows, fix_up)
        else:
            if k_stages < self.k_stages:
                self._add_partials(n_least, n, acc, rows, fix_up, k_stages, tables)
            warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
            cute.arch.mbarrier_wait(work.factors_full + tile % DESCRIPTORS, tile // DESCRIPTORS % 2)
            self._store(
                n_least,
                n,
                acc,
                out,
                row_start,
                rows,
                m_tile,
                limits,
                work.factors + tile % DESCRIPTORS * self.factors,
                s_staging + warp * (2 * STAGING_BYTES),
            )

    @cute.jit
    def _partial(self, fix_up: FixUp, cta: Int32, mb: cutlass.Constexpr):
        """Partial sums of this thread's peer in the CTA, of the warpgroup's row block mb."""
        config = self.config
        tidx, _, _ = cute.arch.thread_idx()
        first = (cta * config.warpgroups + tidx // 128) * config.m_blocks + mb
        return fix_up.partials + (first * (64 * self.tile_n_max) + tidx % 128 * 4)

    @cute.jit
    def _flag(self, fix_up: FixUp, cta: Int32):
        """Of this warp's peer in the CTA."""
        return fix_up.flags + (cta * FLAGS + cute.arch.warp_idx())

    @cute.jit
    def _wait_flag(self, flag: cute.Pointer):
        """Spin with loads that acquire at GPU scope."""
        spins = Int32(0)
        while ptx.get_flag(flag) == 0:
            if cutlass.const_expr(self.spin_limit is not None):
                spins += 1
                if spins == self.spin_limit:
                    ptx.trap()

    @cute.jit
    def _spill(
        self,
        n_least: cutlass.Constexpr,
        n: cutlass.Constexpr,
        acc: list,
        rows: Int32,
        fix_up: FixUp,
    ):
        """Partial sums of a tile that another unit began -> workspace. The elected lane sets the
        warp's flag with release at GPU scope, after the warp's stores."""
        cta, _, _ = cute.arch.block_idx()
        for mb in cutlass.range_constexpr(self.config.m_blocks):
            target = self._partial(fix_up, cta, mb)
            for i in cutlass.range_constexpr(0, n // 2, 4):
                if self._has_rows(2 * i, n_least, rows):
                    ptx.store_partial(
                        target + i * 128, acc[mb][i], acc[mb][i + 1], acc[mb][i + 2], acc[mb][i + 3]
                    )
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            ptx.set_flag(self._flag(fix_up, cta), Int32(1))

    def _has_rows(self, first: int, n_least: int, rows: Int32):
        """Whether a tile has accumulators of row `first`, a multiple of 8: known or at run time."""
        return first < n_least or rows > first

    @cute.jit
    def _add_partials(
        self,
        n_least: cutlass.Constexpr,
        n: cutlass.Constexpr,
        acc: list,
        rows: Int32,
        fix_up: FixUp,
        k_first: Int32,
        tables: Tables,
    ):
        """Fix-up: adds the partial sums of the following units, whose ranges hold this tile's
        stages from k_first on, in the order of K: the result does not depend on timing.

        A lane polls each unit's flag, so that a warp waits for all at once, and resets it. Of small
        tiles the partial sums of several units are in flight together: a tile of a few rows may be
        split a dozen ways.
        """
        unit, num_units = self._this_unit()
        cta, _, _ = cute.arch.block_idx()  # a following unit's CTA of this rank is a cluster before
        lane = cute.arch.lane_idx()
        tile_end = self._cut(unit + 1, tables) + (self.k_stages - k_first)
        parts = Int32(0)  # following units whose ranges begin inside this tile
        found = Int32(32)
        while found == 32:
            other = cutlass.min(unit + 1 + parts + lane, num_units)
            begins, ends = self._cut(other, tables), self._cut(other + 1, tables)
            is_part = other < num_units and begins < tile_end
            if is_part and ends > begins:
                flag = self._flag(fix_up, cta - (other - unit) * self.cluster)
                self._wait_flag(flag)
                flag.store(Int32(0))
            cute.arch.sync_warp()
            found = cute.arch.popc(cute.arch.vote_ballot_sync(is_part))
            parts += found
        units_in_flight = self._units_in_flight(n)
        quads = [
            (g, mb, i)
            for g in range(units_in_flight)
            for mb in range(self.config.m_blocks)
            for i in range(0, n // 2, 4)
        ]
        first = Int32(0)
        while first < parts:
            for start in cutlass.range_constexpr(0, len(quads), PARTIALS_IN_FLIGHT // 4):
                batch = quads[start : start + PARTIALS_IN_FLIGHT // 4]
                if self._has_rows(min(2 * i for _, _, i in batch), n_least, rows):
                    sums = []
                    for g, mb, i in batch:
                        after = 1 + cutlass.min(first + g, parts - 1)
                        source = self._partial(fix_up, cta - after * self.cluster, mb)
                        sums.append(ptx.load_partial(source + i * 128))
                    for (g, mb, i), values in zip(batch, sums, strict=True):
                        other = unit + 1 + first + g
                        ends, begins = self._cut(other + 1, tables), self._cut(other, tables)
                        self._add(acc[mb], i, values, first + g < parts and ends > begins)
            first += units_in_flight

    @cute.jit
    def _add(self, acc: cute.Tensor, i: cutlass.Constexpr, values: tuple, is_part):
        """Four partial sums, if they are of this tile."""
        if is_part:
            for c in cutlass.range_constexpr(4):
                acc[i + c] = acc[i + c] + values[c]

    @cute.jit
    def _store(
        self,
        n_least: cutlass.Constexpr,
        n: cutlass.Constexpr,
        acc: list,
        out: cute.Pointer,
        row_start: Int32,
        rows: Int32,
        m_tile: Int32,
        limits: tuple,
        factors: cute.Pointer,
        staging: cute.Pointer,
    ):
        """Accumulators -> rows [row_start, row_start + rows) of out; limits are SwiGLU's and, where
        h is E4M3, the inverse of its scale.

        A warp transposes 8 columns of 32 rows (fc2: 16 of 16) at a time through one of its two
        staging buffers, so that a lane stores 16 bytes of one row, or rounds them to 8 of E4M3. One
        __syncwarp a buffer is enough: the other buffer's lies between two uses of one.
        """
        config = self.config
        limit, h_factor = limits
        scale_g = factors.load()
        scalars = (scale_g, (factors + 1).load(), limit) if self.fc1 else ()
        lane = cute.arch.lane_idx()
        if cutlass.const_expr(not self.depends_on_n):
            lane = ptx.opaque(lane)  # addresses hoisted out of the loop over tiles would spill
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        columns = 8 if self.fc1 else 16
        row = lane if self.fc1 else lane // 2  # of a buffer, that this lane stores
        source = staging + self._staged(row, 0 if self.fc1 else lane % 2)
        target = staging + self._staged(
            *((lane, 0) if self.fc1 else (lane // 16 * 8 + lane % 8, lane // 8 % 2))
        )
        groups = 32 // columns  # of 8 rows, in a buffer
        for mb in cutlass.range_constexpr(config.m_blocks):
            m_block = m_tile * self.m_blocks_tile + (warp // 4) * config.m_blocks + mb
            column = m_block * (4 * columns) + (warp % 4) * columns
            if cutlass.const_expr(not self.fc1):
                column += lane % 2 * 8
            if m_block < self.m // 64:
                to = out + (Int64(row_start + row) * self.m_out + column)
                for first in cutlass.range_constexpr(0, n, 8 * groups):
                    if self._has_rows(first, n_least, rows):
                        words = []
                        for j in cutlass.range_constexpr(groups):
                            # Past the last group: the last again, never stored.
                            group = min(first // 8 + j, n // 8 - 1)
                            i = group * 4
                            if cutlass.const_expr(self.fc1):
                                word = ptx.activate(
                                    acc[mb],
                                    i,
                                    group * 8,
                                    scalars,
                                    factors + 2,
                                    lane,
                                    self.fp8,
                                    h_factor,
                                )
                                words.append(word)
                            else:
                                scales = [scale_g, scale_g]
                                if cutlass.const_expr(self.fp8):
                                    pair = ptx.factors_of_pair(factors + 2, group * 8, lane)
                                    scales = [scale_g * pair[0], scale_g * pair[1]]
                                for c in cutlass.range_constexpr(0, 4, 2):
                                    a = acc[mb][i + c] * scales[0]
                                    b = acc[mb][i + c + 1] * scales[1]
                                    words.append(ptx.pack_bf16(a, b))
                        buffer = first // (8 * groups) % 2 * STAGING_BYTES
                        ptx.store_transposed(target + buffer, words)
                        cute.arch.sync_warp()
                        if first + row < rows:
                            self._store_chunk(source + buffer, to + first * self.m_out)

    def _staged(self, row, chunk):
        """Offset of a row's 16 bytes in a buffer, swizzled against bank conflicts."""
        return row * 16 if self.fc1 else row * 32 + (chunk ^ (row // 4 % 2)) * 16

    @cute.jit
    def _store_chunk(self, source: cute.Pointer, target: cute.Pointer):
        """A lane's eight values of a row, shared -> global."""
        if cutlass.const_expr(self.h_is_fp8):
            halves = cute.make_rmem_tensor((4,), Uint32)
            cute.autovec_copy(self._words(source, 4), halves)
            codes = cute.make_rmem_tensor((2,), Uint32)
            for i in cutlass.range_constexpr(2):
                codes[i] = e4m3.narrow(halves[2 * i], halves[2 * i + 1])
            cute.autovec_copy(codes, self._words(target, 2))
        else:
            cute.autovec_copy(self._words(source, 4), self._words(target, 4))

    def _words(self, pointer: cute.Pointer, count: int) -> cute.Tensor:
        pointer = cute.recast_ptr(pointer, dtype=Uint32).align(4 * count)
        return cute.make_tensor(pointer, cute.make_layout(count))
