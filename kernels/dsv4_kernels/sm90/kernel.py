"""The grouped GEMM on Hopper (sm_90a): FP4 weights from registers, bf16 WGMMA (W4A16).

    fc1: h[row, i]   = w_row * silu(min(g, L)) * clamp(u, -L, L),   g = gs_g W1 x,  u = gs_u W3 x
    fc2: out[row, m] = gs W2 h[row]

With fp8 (W4A8) weights become E4M3 instead (`e4m3`), and w_row is a factor of fc2's.

A CTA's output tile is 64 * m_blocks * warpgroups weight rows (M of WGMMA) by at most tile_n[-1]
rows of one expert (N); each tile takes the smallest N of `tile_n` that covers its rows. The kernel
is persistent, and derives its stream-K schedule (`schedule`) on the device, from `counts` and
`offsets`: all CTAs end together whatever the routing. Work descriptors and fix-up: `epilogue`.

One producer warpgroup fills a ring of pipeline stages, each tile_k wide: codes and block scales by
bulk copies (`weights` made them contiguous), rows of x by TMA where they are contiguous, otherwise
gathered by 16-byte cp.async. Consumer warpgroups widen codes to bf16 in registers, exactly, and
multiply with A from registers. The CTAs of a cluster share a row tile: each multicasts some of its
boxes to all, and a stage is empty when the consumers of all have arrived.

Barriers of a stage. full: the elected lane of the weights' warp arrives and expects the bytes of
its copies; with gather, `_signal_rows` arrives as well. rows_landed (gather): one cp.async arrival
a gathering thread. empty: an elected lane a consumer warp, on each CTA of the cluster.

Widening. A word holds a thread's eight codes of one m64k16 step; shifts and masks put each code's
sign at bit 15 and its three other bits at 8:6 of a bf16, whose value is then code * 2^-126. A scale
byte has five exponent bits and three of mantissa; (byte << 4) | 0x7000 is the scale times 2^119.
The product, scale * code * 2^-7, is a normal bf16 and exact: E2M1 has 2 significant bits and E4M3
4. The epilogue's fp32 global scale restores the 2^7. An MXFP4 scale is such a byte without
mantissa, and serves two steps to NVFP4's one.

Cycles of a multiprocessor for a warpgroup's step (m64, n, k16), measured on an H200 with operands
in shared memory and two warpgroups or more: WGMMA alone max(13, n / 2), whatever the number of
groups in flight; with I other instructions a warp about max(n / 2, I + 3 + n / 4), as if WGMMA took
every second issue slot. Up to n = 90 the kernel is bound by instruction issue.
"""

import math
from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cuda.bindings import driver
from cutlass import (
    BFloat16,
    Boolean,
    Float8E4M3FN,
    Float32,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
)
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from dsv4_kernels.sm90 import e4m3 as e4m3
from dsv4_kernels.sm90 import ptx as ptx
from dsv4_kernels.sm90.epilogue import (
    DESCRIPTORS,
    STAGING_BYTES,
    FactorSources,
    FixUp,
    Sm90Epilogue,
    WorkRing,
)
from dsv4_kernels.sm90.schedule import Tables
from dsv4_kernels.sm90.spec import FLAGS, Gemm
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK

CODE_BLOCK_BYTES = 2048  # codes of a 64 x 64 block of weights
SMEM_BYTES = 227 * 1024
TMA_ROWS = 16  # of a box


class Pipeline(NamedTuple):
    """The ring of stages in shared memory, and its mbarriers."""

    x: cute.Pointer  # (stages, x_blocks, tile_n_max, x_columns) of x_type, swizzled as wide
    codes: cute.Pointer  # (stages, m_blocks_tile, k_blocks, 512) uint32
    scales: cute.Pointer  # (stages, m_blocks_tile, k_blocks, scale_block_bytes / 4) uint32
    full: cute.Pointer
    rows_landed: cute.Pointer
    empty: cute.Pointer
    table: cute.Pointer | None  # fp8: `e4m3`'s


class ThreadWeights(NamedTuple):
    """This thread's codes, (4 words, k blocks, m blocks, stages), and scales, (2 words, MXFP4 1,
    ...); fp8: (1 pair of bytes, ...)."""

    codes: cute.Tensor
    scales: cute.Tensor

    def load(self, kb, mb, stage, codes: cute.Tensor, scales: cute.Tensor) -> None:
        """Of a 64 x 64 block, to registers."""
        cute.autovec_copy(self.codes[None, kb, mb, stage], codes)
        if self.scales.element_type.width == 16:
            scales[0] = Uint32(self.scales[0, kb, mb, stage])
        else:
            cute.autovec_copy(self.scales[None, kb, mb, stage], scales)


class Dsv4GroupedGemmSm90(Sm90Epilogue):
    """One grouped GEMM, compiled for one specialisation; owns the pipeline and the launch."""

    def __init__(self, gemm: Gemm):
        op, _, m, k, _, gather, config, scale_block, activations, _ = gemm
        assert op in ("fc1", "fc2"), op
        # The gathering warps rely on fc1's griddepcontrol.wait, in which all warps take part.
        assert op == "fc1" or not gather, "fc2 gathers no rows"
        assert m % 64 == 0, f"{m} weight rows, must be a multiple of 64"
        # The last columns of x that a block of weights lacks are zeros, by TMA.
        assert k % (64 if gather else 8) == 0, f"K = {k}"
        assert math.ceil(k / 64) * 64 % config.tile_k == 0, (
            f"K = {k}, must be whole stages of tile_k = {config.tile_k} in blocks of 64"
        )
        assert config.tile_n == tuple(sorted(config.tile_n)), config.tile_n
        # Boxes fill a tile, and rows are cut by the largest size: no tile may hold more than it.
        assert config.tile_n[-1] % TMA_ROWS == 0, (
            f"largest tile_n {config.tile_n[-1]}, must be a multiple of {TMA_ROWS}"
        )
        assert 4 * config.warpgroups <= FLAGS, f"{config.warpgroups} warpgroups"
        assert scale_block in (NVFP4_BLOCK, MXFP4_BLOCK), scale_block
        assert config.cluster == 1 or not gather, "a CTA gathers rows for itself alone"
        assert activations in ("bf16", "fp8"), activations
        super().__init__(gemm)
        self.x_type = Float8E4M3FN if self.fp8 else BFloat16
        # 128 bytes, or 64 where they do not divide a stage, are swizzled together.
        self.x_columns = math.gcd(1024 // self.x_type.width, config.tile_k)
        self.x_bytes = self.x_columns * self.x_type.width // 8
        assert self.x_bytes == 128 or not gather, f"tile_k {config.tile_k}, gathered by 128 bytes"
        self.step_k = 256 // self.x_type.width  # K of WGMMA
        self.k = k
        self.scale_block = scale_block
        self.scale_block_bytes = 64 * 64 // scale_block
        self.k_blocks = config.tile_k // 64  # of a stage
        self.x_blocks = config.tile_k // self.x_columns
        self.stages = self._num_stages()
        assert self.stages >= 2, f"{config} leaves room for {self.stages} stages"

    @property
    def partial_floats(self) -> int:
        """Of a CTA, in `partials`."""
        return self.config.tile_m * self.tile_n_max

    def _block_bytes(self) -> int:
        """Codes and scales of a 64 x 64 block of weights."""
        return CODE_BLOCK_BYTES + self.scale_block_bytes

    def _fixed_smem(self) -> int:
        warps = 4 * self.config.warpgroups
        work = DESCRIPTORS * (16 + 4 * self.factors)
        barriers_and_alignment = 4096
        staging = warps * 2 * STAGING_BYTES
        table = e4m3.TABLE_BYTES if self.fp8 else 0
        return staging + work + self._table_bytes() + table + barriers_and_alignment

    def _num_stages(self) -> int:
        rows = self.tile_n_max * self.x_bytes * self.x_blocks
        weights = self.m_blocks_tile * self.k_blocks * self._block_bytes()
        budget = SMEM_BYTES - self._fixed_smem()
        return min(32, budget // (rows + weights))

    def _registers(self) -> tuple[int, int]:
        """(producer, consumer) registers per thread, multiples of 8, within the register file."""
        per_thread = 65536 // self.threads // 8 * 8
        producer = min(per_thread, 56 if self.gather else 32)
        spare = (per_thread - producer) * 128
        consumer = per_thread + spare // (128 * self.config.warpgroups)
        return producer, min(240, consumer // 8 * 8)

    @cute.jit
    def __call__(
        self,
        codes: cute.Pointer,
        block_scales: cute.Pointer,
        global_scales: cute.Pointer,
        x: cute.Pointer,
        out: cute.Pointer,
        counts: cute.Pointer,
        offsets: cute.Pointer,
        row_to_slot: cute.Pointer,
        slot_weights: cute.Pointer,
        partials: cute.Pointer,
        flags: cute.Pointer,
        limit: Float32,
        num_rows: Int32,
        num_blocks: Int32,
        stream: driver.CUstream,
        row_scales: cute.Pointer | None = None,
        scale_stride: Optional[Int32] = None,  # noqa: UP045 (what CuTe DSL exports, like the next)
        x_stride: Optional[Int32] = None,  # noqa: UP045
        h_scale: Optional[Float32] = None,  # noqa: UP045
    ):
        """codes, block_scales: shuffled, uint8; global_scales (experts, 2) for fc1, (experts,) for
        fc2; x (tokens or rows, k) bf16; out (rows, m_out) bf16; counts (experts,), offsets
        (experts + 1,), row_to_slot (rows,) int32; slot_weights (tokens * top_k,) float32;
        partials (num_blocks * partial_floats,) float32; flags (num_blocks * FLAGS,) int32, zeros
        before and after; limit of SwiGLU, infinity for none; num_rows of x; num_blocks: CTAs.

        fp8: x E4M3 in `e4m3`'s order of columns, row_scales (tokens or rows,) float32, read as the
        gemm says, and h_scale otherwise. Of gathered rows, how many elements lie from one to the
        next: x_stride, a multiple of 16, and scale_stride. fc1 leaves the routing weight to fc2."""
        tma_atom, tma_x = None, None
        if cutlass.const_expr(not self.gather):
            box = (TMA_ROWS, self.x_columns)
            op = cpasync.CopyBulkTensorTileG2SOp()
            if cutlass.const_expr(self.cluster > 1):
                op = cpasync.CopyBulkTensorTileG2SMulticastOp()
            tma_atom, tma_x = cpasync.make_tiled_tma_atom(
                op,
                cute.make_tensor(x, cute.make_layout((num_rows, self.k), stride=(self.k, 1))),
                cute.tile_to_shape(self._swizzle_atom(), box, order=(0, 1)),
                box,
            )
        self.kernel(
            codes,
            block_scales,
            global_scales,
            x,
            tma_atom,
            tma_x,
            out,
            counts,
            offsets,
            row_to_slot,
            slot_weights,
            partials,
            flags,
            limit,
            row_scales,
            scale_stride,
            x_stride,
            h_scale,
        ).launch(
            grid=[num_blocks, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        codes: cute.Pointer,
        block_scales: cute.Pointer,
        global_scales: cute.Pointer,
        x: cute.Pointer,
        tma_atom: cute.CopyAtom | None,
        tma_x: cute.Tensor | None,
        out: cute.Pointer,
        counts: cute.Pointer,
        offsets: cute.Pointer,
        row_to_slot: cute.Pointer,
        slot_weights: cute.Pointer,
        partials: cute.Pointer,
        flags: cute.Pointer,
        limit: Float32,
        row_scales: cute.Pointer | None,
        scale_stride: Int32 | None,
        x_stride: Int32 | None,
        h_scale: Float32 | None,
    ):
        config = self.config
        warps = 4 * config.warpgroups
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())

        # Phase 1: shared memory and barriers.
        smem = cutlass.memory.SmemAllocator()
        s_x = self._allocate(
            smem,
            self.x_type,
            self.stages * self.x_blocks * self.tile_n_max * self.x_columns,
            1024,
        )
        s_codes = self._allocate(
            smem,
            Uint32,
            self.stages * self.m_blocks_tile * self.k_blocks * CODE_BLOCK_BYTES // 4,
            128,
        )
        s_scales = self._allocate(
            smem,
            Uint32,
            self.stages * self.m_blocks_tile * self.k_blocks * self.scale_block_bytes // 4,
            128,
        )
        s_staging = self._allocate(smem, Uint8, warps * 2 * STAGING_BYTES, 128)
        s_descriptors = self._allocate(smem, Int32, DESCRIPTORS * 4, 16)
        s_factors = self._allocate(smem, Float32, DESCRIPTORS * self.factors, 16)
        tables = self._allocate_tables(lambda size: self._allocate(smem, Int32, size, 16))
        full = self._allocate(smem, Int64, self.stages, 8)
        rows_landed = self._allocate(smem, Int64, self.stages, 8)
        empty = self._allocate(smem, Int64, self.stages, 8)
        factors_full = self._allocate(smem, Int64, DESCRIPTORS, 8)
        work_empty = self._allocate(smem, Int64, DESCRIPTORS, 8)
        table = None
        if cutlass.const_expr(self.fp8):
            table = self._allocate(smem, Uint32, e4m3.TABLE_BYTES // 4, 16)
            e4m3.fill_table(table, self.scale_block)
        pipeline = Pipeline(s_x, s_codes, s_scales, full, rows_landed, empty, table)
        work = WorkRing(s_descriptors, s_factors, factors_full, work_empty)
        if tidx == 0:
            for i in cutlass.range_constexpr(DESCRIPTORS):
                cute.arch.mbarrier_init(factors_full + i, 32)
                cute.arch.mbarrier_init(work_empty + i, 32 * warps)
            for stage in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(full + stage, 2 if self.gather else 1)
                cute.arch.mbarrier_init(rows_landed + stage, 64)
                cute.arch.mbarrier_init(empty + stage, warps * self._arrivals())
        cute.arch.mbarrier_init_fence()
        self._sync_cluster()

        # Phase 2: the schedule. PDL: fc1 waits for the layout here. fc2 directly follows fc1, which
        # has waited, so it reads the layout early; it waits for fc1's h before the first load of
        # rows, when the first stage's weights are already in flight (`_load_weights`).
        if cutlass.const_expr(self.fc1):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self._plan(counts, offsets, tables)

        # Phase 3: roles.
        producer_registers, consumer_registers = self._registers()
        if warp >= warps:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp == warps:
                self._load_weights(
                    codes,
                    block_scales,
                    tma_atom,
                    tma_x,
                    FactorSources(
                        global_scales, row_to_slot, slot_weights, row_scales, scale_stride, h_scale
                    ),
                    pipeline,
                    work,
                    tables,
                )
            if cutlass.const_expr(self.gather):
                if warp == warps + 1:
                    self._signal_rows(pipeline, tables)
                elif warp > warps + 1:
                    stride = x_stride if self.fp8 else self.k
                    self._gather_rows(x, stride, row_to_slot, pipeline, tables)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            limits = (limit, 1.0 / h_scale if self.h_is_fp8 else None)  # type: ignore[operator]
            self._consume(out, FixUp(partials, flags), limits, pipeline, s_staging, work, tables)

        # A CTA must not exit while another of its cluster may still arrive on its barriers.
        self._sync_cluster()

    @cute.jit
    def _sync_cluster(self):
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def _allocate(self, smem, dtype, count: int, align: int) -> cute.Pointer:
        pointer = smem.allocate(count * dtype.width // 8, byte_alignment=align)
        return cute.recast_ptr(pointer, dtype=dtype)

    @cute.jit
    def _load_weights(
        self,
        codes: cute.Pointer,
        block_scales: cute.Pointer,
        tma_atom: cute.CopyAtom | None,
        tma_x: cute.Tensor | None,
        sources: FactorSources,
        pipeline: Pipeline,
        work: WorkRing,
        tables: Tables,
    ):
        """Producer warp 0: every stage's codes and scales and, without gather, its rows; a tile's
        last box also brings rows of the next expert, and zeros past the end of x.

        It writes each tile's work descriptor before it arrives on the full barrier of the tile's
        first stage, which publishes it, and the factors after the tile's last copies.
        """
        m_blocks_total = self.m // 64
        k_blocks_total = math.ceil(self.k / 64)
        stage_bytes = self.m_blocks_tile * self.k_blocks * self._block_bytes()
        is_first = Boolean(True)
        rank = cute.arch.block_idx()[0] % self.cluster
        everyone = cutlass.Int16((1 << self.cluster) - 1) if self.cluster > 1 else None
        whole, first, end = self._share(tables)
        position = Int32(0) if whole > 0 else first
        stage = Int32(0)
        phase = Int32(1)
        index = Int32(0)
        index_phase = Int32(1)
        while position < end:
            expert, row_start, rows, m_tile = self._locate(self._tile_at(position, whole), tables)
            m_tile = m_tile * self.cluster + rank
            k_first = position % self.k_stages
            k_end = cutlass.min(Int32(self.k_stages), k_first + end - position)
            position += k_end - k_first
            if position == whole:
                position = first
            cute.arch.mbarrier_wait(work.empty + index, index_phase)
            if cute.arch.lane_idx() == 0:
                descriptor = cute.make_rmem_tensor((4,), Int32)
                descriptor[0], descriptor[1] = rows, k_end - k_first
                descriptor[2], descriptor[3] = row_start, m_tile
                if k_first > 0:
                    descriptor[2] = Int32(-1)
                cute.autovec_copy(descriptor, self._descriptor(work, index))
            first_block = Int64(expert) * m_blocks_total
            expected = Int32(stage_bytes)
            if cutlass.const_expr(not self.gather):
                boxes = (rows + TMA_ROWS - 1) // TMA_ROWS
                expected += boxes * (TMA_ROWS * self.x_bytes * self.x_blocks)
                t_rows, t_boxes = self._row_boxes(tma_atom, tma_x, row_start, pipeline.x)
            for k_stage in cutlass.range(k_first, k_end, unroll=1):
                cute.arch.mbarrier_wait(pipeline.empty + stage, phase)
                if cute.arch.lane_idx() == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(pipeline.full + stage, expected)
                    for mb in cutlass.range_constexpr(self.m_blocks_tile):
                        # Past the last row block of weights: the last again, never stored.
                        m_block = cutlass.min(
                            m_tile * self.m_blocks_tile + mb, Int32(m_blocks_total - 1)
                        )
                        block = (first_block + m_block) * k_blocks_total + k_stage * self.k_blocks
                        in_stage = (stage * self.m_blocks_tile + mb) * self.k_blocks
                        ptx.copy_bulk(
                            pipeline.codes + in_stage * (CODE_BLOCK_BYTES // 4),
                            codes + block * CODE_BLOCK_BYTES,
                            Int32(self.k_blocks * CODE_BLOCK_BYTES),
                            pipeline.full + stage,
                        )
                        ptx.copy_bulk(
                            pipeline.scales + in_stage * (self.scale_block_bytes // 4),
                            block_scales + block * self.scale_block_bytes,
                            Int32(self.k_blocks * self.scale_block_bytes),
                            pipeline.full + stage,
                        )
                cute.arch.sync_warp()
                if cutlass.const_expr(not self.fc1):
                    if is_first:
                        cute.arch.griddepcontrol_wait()
                        is_first = False
                if cutlass.const_expr(not self.gather):
                    for box in cutlass.range(rank, boxes, self.cluster, unroll=1):
                        for kb in cutlass.range_constexpr(self.x_blocks):
                            cute.copy(
                                tma_atom,
                                t_rows[None, box, k_stage * self.x_blocks + kb],
                                t_boxes[None, box, kb, stage],
                                tma_bar_ptr=pipeline.full + stage,
                                mcast_mask=everyone,
                            )
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase ^= 1
            if k_first == 0:
                self._load_factors(
                    sources, expert, row_start, rows, work.factors + index * self.factors
                )
            cute.arch.mbarrier_arrive(work.factors_full + index)
            index += 1
            if index == DESCRIPTORS:
                index = Int32(0)
                index_phase ^= 1
        if cutlass.const_expr(not self.fc1):
            # Also without work: that fc2 has completed must imply that fc1 has.
            cute.arch.griddepcontrol_wait()

    @cute.jit
    def _row_boxes(self, tma_atom, tma_x, row_start: Int32, s_x: cute.Pointer):
        """TMA partitions: of x from row_start on, (box's elements, box, block of x_columns), and of
        the stages, (box's elements, box, block of the stage, stage)."""
        atom = self._swizzle_atom()
        columns = self.x_columns
        layout = cute.make_layout(
            ((8, TMA_ROWS // 8), columns, self.tile_n_max // TMA_ROWS, self.x_blocks, self.stages),
            stride=(
                (columns, 8 * columns),
                1,
                TMA_ROWS * columns,
                self.tile_n_max * columns,
                self.x_blocks * self.tile_n_max * columns,
            ),
        )
        boxes = cute.make_tensor(cute.recast_ptr(s_x, atom.inner, dtype=self.x_type), layout)
        rows = cute.domain_offset((row_start, 0), tma_x)
        rows = cute.local_tile(rows, (TMA_ROWS, columns), (None, None))
        t_boxes, t_rows = cpasync.tma_partition(
            tma_atom,
            0,
            cute.make_layout(1),
            cute.group_modes(boxes, 0, 2),
            cute.group_modes(rows, 0, 2),
        )
        return t_rows, t_boxes

    def _swizzle_atom(self):
        kinds = {
            128: warpgroup.SmemLayoutAtomKind.K_SW128,
            64: warpgroup.SmemLayoutAtomKind.K_SW64,
        }
        return warpgroup.make_smem_layout_atom(kinds[self.x_bytes], self.x_type)

    @cute.jit
    def _gather_rows(
        self,
        x: cute.Pointer,
        x_stride: Int32 | int,
        row_to_slot: cute.Pointer,
        pipeline: Pipeline,
        tables: Tables,
    ):
        """Producer warps 2 and 3, with gather: rows of x by token. A thread copies one 16-byte
        chunk of every eighth row."""
        config = self.config
        columns = self.x_columns
        of_chunk = columns // 8
        thread = cute.arch.thread_idx()[0] - 128 * config.warpgroups - 64
        first_row = thread // 8
        chunk = thread % 8
        target_0 = pipeline.x + (first_row * columns + (chunk ^ first_row) * of_chunk)
        row_groups = self.tile_n_max // 8
        whole, first, end = self._share(tables)
        position = Int32(0) if whole > 0 else first
        stage = Int32(0)
        phase = Int32(1)
        while position < end:
            _, row_start, rows, _ = self._locate(self._tile_at(position, whole), tables)
            k_first = position % self.k_stages
            k_end = cutlass.min(Int32(self.k_stages), k_first + end - position)
            position += k_end - k_first
            if position == whole:
                position = first
            padded_rows = Int32(config.tile_n[0])
            for i in cutlass.range_constexpr(len(config.tile_n) - 1):
                if rows > config.tile_n[i]:
                    padded_rows = Int32(config.tile_n[i + 1])
            # In units of 16 bytes. cp.async reads no byte of a row past the last and writes zeros.
            sources = [Int32(0)] * row_groups
            for i in cutlass.range_constexpr(row_groups):
                row = first_row + 8 * i
                if row < rows:
                    token = (row_to_slot + (row_start + row)).load() // self.top_k
                    sources[i] = token * (x_stride // of_chunk)
            for k_stage in cutlass.range(k_first, k_end, unroll=1):
                column = x + (k_stage * config.tile_k + chunk * of_chunk)
                target = target_0 + stage * (self.x_blocks * self.tile_n_max * columns)
                cute.arch.mbarrier_wait(pipeline.empty + stage, phase)
                for i in cutlass.range_constexpr(row_groups):
                    if 8 * i < padded_rows:
                        live = Int32(16) if first_row + 8 * i < rows else Int32(0)
                        source = column + Int64(sources[i]) * of_chunk
                        for kb in cutlass.range_constexpr(self.x_blocks):
                            ptx.copy_row_chunk(
                                target + (kb * self.tile_n_max + 8 * i) * columns,
                                source + kb * columns,
                                live,
                            )
                cute.arch.cp_async_mbarrier_arrive_noinc(pipeline.rows_landed + stage)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase ^= 1
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def _signal_rows(self, pipeline: Pipeline, tables: Tables):
        """Producer warp 1, with gather: rows_landed -> proxy fence -> full.

        cp.async writes through the generic proxy and WGMMA reads through the async proxy. A
        gathering warp could fence only after draining its copies in flight, and a consumer warp has
        no issue slots to spare; so this one fences, and its elected lane arrives.
        """
        whole, first, end = self._share(tables)
        stage = Int32(0)
        phase = Int32(0)
        for _ in cutlass.range(whole + end - first, unroll=1):
            cute.arch.mbarrier_wait(pipeline.rows_landed + stage, phase)
            cute.arch.fence_view_async_shared()
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(pipeline.full + stage)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase ^= 1

    @cute.jit
    def _consume(
        self,
        out: cute.Pointer,
        fix_up: FixUp,
        limits: tuple,
        pipeline: Pipeline,
        s_staging: cute.Pointer,
        work: WorkRing,
        tables: Tables,
    ):
        """Consumer warpgroups: main loop and epilogue of every tile. N is chosen per tile among the
        instances of the main loop for `tile_n`, unrolled here; all leave their sums in the same
        registers for one epilogue, unless that `depends_on_n`."""
        config = self.config
        whole, first, end = self._share(tables)
        left = whole + end - first
        stage = Int32(0)
        phase = Int32(0)
        tile = Int32(0)
        descriptor = cute.make_rmem_tensor((4,), Int32)
        while left > 0:
            cute.arch.mbarrier_wait(pipeline.full + stage, phase)
            cute.autovec_copy(self._descriptor(work, tile % DESCRIPTORS), descriptor)
            rows, k_stages = descriptor[0], descriptor[1]
            left -= k_stages
            shared = self._sums(self.tile_n_max)
            for v in cutlass.range_constexpr(len(config.tile_n)):
                n = config.tile_n[v]
                above = config.tile_n[v - 1] if v > 0 else 0
                if rows > above and rows <= n:
                    sums = self._sums(n) if self.depends_on_n else shared
                    stage, phase = self._multiply(n, sums, k_stages, pipeline, stage, phase)
                    if cutlass.const_expr(self.depends_on_n):
                        self._epilogue(
                            n, n, sums, out, fix_up, limits, work, s_staging, tile, tables
                        )
            if cutlass.const_expr(not self.depends_on_n):
                least, most = self.tile_n_min, self.tile_n_max
                self._epilogue(
                    least, most, shared, out, fix_up, limits, work, s_staging, tile, tables
                )
            cute.arch.sync_warp()  # the next tile's epilogue reuses the staging buffers
            cute.arch.mbarrier_arrive(work.empty + tile % DESCRIPTORS)
            tile += 1

    def _sums(self, n: int) -> list:
        """Registers of a thread for its accumulators of n rows, by 64-row block of weights."""
        return [cute.make_rmem_tensor((n // 2,), Float32) for _ in range(self.config.m_blocks)]

    def _arrivals(self) -> int:
        """Of a warp on an empty barrier: one from each CTA of the cluster."""
        return self.cluster

    @cute.jit
    def _give_back(self, empty: cute.Pointer, lane: Int32, is_read: Boolean):
        """Arrive on a stage's empty barrier, lane i on that of the cluster's CTA i. All lanes have
        waited for WGMMA, so one arrival a warp is enough: with one a lane, Flash took up to 10 %
        longer on an H200."""
        if is_read and lane < self.cluster:
            cute.arch.mbarrier_arrive(empty, lane if self.cluster > 1 else None)

    def _steps(self, n: int) -> int:
        """K steps of a WGMMA group: four where only two warps a scheduler hide latency and
        registers allow, otherwise two. Not with one row block: groups alternate between two
        register fragments, so a stage needs an even number of groups, and with four a tile of 200
        rows took 9 % longer on an H200."""
        config = self.config
        few_rows = config.warpgroups < 3 and config.m_blocks == 2 and n <= 80
        return 4 if few_rows and not self.fp8 else 2

    @cute.jit
    def _multiply(
        self,
        n: cutlass.Constexpr,
        sums: list,
        k_stages: Int32,
        pipeline: Pipeline,
        stage: Int32,
        phase: Int32,
    ):
        """Main loop over k_stages of a tile, the first already waited for; accumulates in the first
        n / 2 of each of sums -> (stage, phase).

        Each 64 x 64 block of weights is a few WGMMA groups of `_steps`: a group is widened into one
        register fragment while the WGMMAs in flight read the other, and the next block's codes load
        meanwhile.
        """
        config = self.config
        lane = cute.arch.lane_idx()
        # Opaque: addresses hoisted out of the loop over tiles, a set for every n, would take the
        # registers that keep WGMMA asynchronous.
        thread = ptx.opaque(cute.arch.thread_idx()[0]) % 128
        mma = self._mma(n)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        frag_x = self._rows_operand(mma, n, thread, pipeline.x)
        steps = self._steps(n)
        groups = 64 // self.step_k // steps
        shape_w = mma.partition_shape_A((64, self.step_k * steps))
        frag_w = [mma.make_fragment_A(shape_w) for _ in range(2)]
        layout = mma.make_fragment_C(mma.partition_shape_C((64, n))).layout
        acc = [cute.make_tensor(part.iterator, layout) for part in sums]
        for mb in cutlass.range_constexpr(config.m_blocks):
            acc[mb].fill(0.0)
        weights = self._thread_weights(thread, pipeline)
        codes = cute.make_rmem_tensor((4,), Uint32)
        scales = cute.make_rmem_tensor((self._scale_words(),), Uint32)
        # In a register: LOP3 takes one immediate, and this one's has another.
        scale_bits = None if self.fp8 else Uint32(ptx.opaque(Int32(0x0FF00FF0)))
        blocks = self.k_blocks * config.m_blocks
        # Of an odd number of groups, the last has the fragment that the next stage begins with.
        last_in_flight = 1 - blocks * groups % 2
        previous = stage
        weights.load(0, 0, stage, codes, scales)
        for k_stage in cutlass.range(k_stages, unroll=1):
            # Warp-uniform: WGMMA's shared-memory descriptors need no moves to uniform registers.
            current = cute.arch.make_warp_uniform(stage)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase ^= 1
            for block in cutlass.range_constexpr(blocks):
                kb, mb = block // config.m_blocks, block % config.m_blocks
                for group in cutlass.range_constexpr(groups):
                    frag = frag_w[(block * groups + group) % 2]
                    words_w = cute.recast_tensor(frag, Uint32)
                    entries = self._look_up(scales, pipeline)
                    for i in cutlass.range_constexpr(steps):
                        words = self._widen(codes, entries, scale_bits, group * steps + i)
                        for j in cutlass.range_constexpr(4):
                            words_w[i * 4 + j] = words[j]
                    warpgroup.fence()
                    for i in cutlass.range_constexpr(steps):
                        cute.gemm(
                            mma,
                            acc[mb],
                            frag[None, None, i],
                            frag_x[
                                None, None, kb * (64 // self.step_k) + group * steps + i, current
                            ],
                            acc[mb],
                        )
                    warpgroup.commit_group()
                    if cutlass.const_expr(group == groups - 1):
                        if cutlass.const_expr(block + 1 < blocks):
                            kb, mb = (block + 1) // config.m_blocks, (block + 1) % config.m_blocks
                            weights.load(kb, mb, current, codes, scales)
                        elif k_stage + 1 < k_stages:
                            cute.arch.mbarrier_wait(pipeline.full + stage, phase)
                            weights.load(0, 0, stage, codes, scales)
                    is_last = block == blocks - 1 and group == groups - 1
                    warpgroup.wait_group(last_in_flight if is_last else 1)
                    if cutlass.const_expr(block == 0 and group == 0):
                        # Only this group is in flight: no WGMMA reads the previous stage any more.
                        self._give_back(pipeline.empty + previous, lane, k_stage > 0)
            previous = current
        warpgroup.wait_group(0)
        self._give_back(pipeline.empty + previous, lane, Boolean(True))
        return stage, phase

    def _mma(self, n: int):
        """WGMMA with A, the weights, from registers."""
        shape, source = (64, n, self.step_k), warpgroup.OperandSource.RMEM
        k_major = (OperandMajorMode.K, OperandMajorMode.K)
        if self.fp8:
            op = warpgroup.MmaF8Op(self.x_type, self.x_type, Float32, shape, source, *k_major)
        else:
            op = warpgroup.MmaF16BF16Op(self.x_type, Float32, shape, source, *k_major)
        return cute.make_tiled_mma(op)

    def _look_up(self, scales: cute.Tensor, pipeline: Pipeline):
        """What `_widen` needs of a block's scales; fp8: what the table has under them."""
        return e4m3.look_up(scales, pipeline.table) if self.fp8 else scales

    def _widen(self, codes, entries, scale_bits, step: int):
        """The thread's four words of A of a step of a 64 x 64 block."""
        if self.fp8:
            return e4m3.widen(codes, entries, step)
        scale = step * 16 // self.scale_block
        return ptx.widen(codes[step], entries[scale // 2], scale_bits, scale % 2)

    def _rows_operand(self, mma, n: int, thread, s_x: cute.Pointer) -> cute.Tensor:
        """Operand B, n rows of x, as descriptors: (1, 1, k steps, stages)."""
        atom = self._swizzle_atom()
        columns = self.x_columns
        layout = cute.make_layout(
            ((8, n // 8), (columns, self.x_blocks), self.stages),
            stride=(
                (columns, 8 * columns),
                (1, self.tile_n_max * columns),
                self.x_blocks * self.tile_n_max * columns,
            ),
        )
        tile = cute.make_tensor(cute.recast_ptr(s_x, atom.inner, dtype=self.x_type), layout)
        return mma.make_fragment_B(mma.get_slice(thread).partition_B(tile))

    def _scale_words(self) -> int:
        """Of a thread, a 64 x 64 block: scales of two rows, two along K a word; fp8: those of one
        block of K, in half a word."""
        return 1 if self.fp8 else 64 // self.scale_block // 2

    def _thread_weights(self, thread, pipeline: Pipeline) -> ThreadWeights:
        config = self.config
        first_block = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4 * config.m_blocks

        def view(pointer, words, block_words):
            layout = cute.make_layout(
                (words, self.k_blocks, config.m_blocks, self.stages),
                stride=(
                    1,
                    block_words,
                    self.k_blocks * block_words,
                    self.m_blocks_tile * self.k_blocks * block_words,
                ),
            )
            return cute.make_tensor(pointer + first_block * (self.k_blocks * block_words), layout)

        codes = view(pipeline.codes + thread * 4, 4, CODE_BLOCK_BYTES // 4)
        words = self._scale_words()
        if cutlass.const_expr(self.fp8):
            pairs = cute.recast_ptr(pipeline.scales, dtype=Uint16)
            pairs = pairs + thread * 16 // self.scale_block
            return ThreadWeights(codes, view(pairs, 1, self.scale_block_bytes // 2))
        scales = pipeline.scales + thread // 4 * words
        return ThreadWeights(codes, view(scales, words, self.scale_block_bytes // 4))
