"""Device side of the sm_100a grouped GEMM: NVFP4 x NVFP4 on the fifth-generation tensor cores.

Weights are the M operand (128 rows a CTA), tokens the N operand, and N is a run-time value: the
multiple of 8 (16 with two CTAs) that covers the tile's live rows, so a tile of one token costs an
MMA of N = 8. The kernel is persistent with a static schedule: clusters (a CTA, or a pair whose MMA
spans both) take tiles of 128 (256) weight rows x `tile` tokens in turn. The tiles follow from the
layout in device memory; experts without rows have none.

Six warps: 0-3 epilogue (TMEM lanes 32 w .. 32 w + 31 each), 4 MMA, 5 TMA producer. Accumulators are
double-buffered in TMEM, so the epilogue of a tile overlaps the MMAs of the next.

Barriers. full: of a stage; the even CTA's producer arrives and expects the bytes of both CTAs.
empty: of a stage; the MMA warp's commit arrives, on both CTAs. acc_full: of an accumulator; the MMA
warp's commit, on both CTAs. acc_empty: an elected lane of every epilogue warp of both, on the even
CTA.

FC1's 128 rows are 4 groups of 16 gate rows and the 16 up rows of the same intermediate indices:
a TMA box with those strides permutes the checkpoint's order. A warp then holds gate and up of 16
indices, one NVFP4 block, in the same registers of the same lanes.

Block scales, of weights and of tokens, are 128x4 blocks of 512 bytes: the scale of row r and
K block b is byte 512 * ((r // 128) * (K / 64) + b // 4) + 16 * (r % 32) + 4 * (r % 128 // 32)
+ b % 4 (PTX ISA, "Scale factor B/A layout in tensor memory", .scale_vec::4X).
"""

import math

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cute.runtime import make_ptr

from dsv4_kernels.sm100 import ptx as ptx
from dsv4_kernels.sm100.arguments import (
    Barriers,
    GlobalScales,
    Layout,
    Loads,
    Output,
    Routing,
    Stages,
    TileScales,
    Work,
)
from dsv4_kernels.sm100.spec import (
    CHUNK,
    MMA_K,
    MMA_WARP,
    NUM_EPILOGUE_WARPS,
    NUM_THREADS,
    SCALE_BLOCK,
    SMEM_LIMIT,
    STAGING_PITCH,
    TILE_K,
    TILE_M,
    TMA_WARP,
    TMEM_COLUMNS,
    Gemm,
)


class Dsv4GroupedGemmSm100:
    """One specialisation; calling it (through cute.compile) launches the kernel."""

    def __init__(self, gemm: Gemm):
        config = gemm.config
        assert gemm.op in ("fc1", "fc2"), gemm.op
        assert gemm.weight_rows % (TILE_M * config.num_ctas) == 0, gemm
        assert gemm.k % MMA_K == 0, gemm.k
        assert config.tile % CHUNK == 0 and config.tile <= 256, config
        assert gemm.token_rows % config.token_box == 0 and config.token_box % 8 == 0, config
        assert gemm.smem_bytes <= SMEM_LIMIT, (gemm.smem_bytes, gemm)
        assert gemm.acc_stride >= config.tile // 2, gemm.acc_stride
        self.gemm = gemm
        self.k_tiles = -(-gemm.k // TILE_K)
        self.sfa_column = gemm.acc_stride + config.tile
        self.sfb_column = self.sfa_column + 4 * (TILE_K // MMA_K)
        # TMEM columns from one K = 64 to the next: the scales of all token blocks are adjacent.
        self.sfb_step = 4 * gemm.scale_blocks
        self.group = tcgen05.CtaGroup.TWO if config.num_ctas == 2 else tcgen05.CtaGroup.ONE
        self.n_granule = 8 * config.num_ctas

    # ---- host: tensor maps and launch

    @cute.jit
    def __call__(
        self,
        weights: cute.Pointer,  # (E, weight_rows, K / 2) uint8
        weight_scales: cute.Pointer,  # (E, weight_rows / 128, K / 64, 512) bytes
        weight_global_scales: cute.Pointer,  # fc1 (E, 2), fc2 (E,) float32
        tokens: cute.Pointer,  # (rows, K / 2) uint8
        token_scales: cute.Pointer,  # (ceil(rows / 128), K / 64, 512) bytes
        token_global_scales: cute.Pointer,  # fc1 (1,), fc2 (E,), or (rows,) float32
        rows: Int32,  # capacity, a multiple of the tile
        counts: cute.Pointer,  # (E,) int32
        offsets: cute.Pointer,  # (E + 1,) int32
        tile_to_expert: cute.Pointer,  # (rows / tile,) int32
        out: cute.Pointer,  # (rows, out_features) bf16, or (rows, out_features / 2) uint8
        out_scales: cute.Pointer | None,  # quantize: (ceil(rows / 128), out_features / 64, 512)
        out_global_scales: cute.Pointer | None,  # quantize: (E,) float32
        row_to_slot: cute.Pointer | None,  # fc1: (rows,) int32
        routing_weights: cute.Pointer | None,  # fc1: (num_tokens * top_k,) float32
        saturated: cute.Pointer | None,  # quantize: (1,) int64, grows
        limit: Float32,  # fc1: swiglu_limit, or infinity
        num_clusters: Int32,
        stream: cuda.CUstream,
    ):
        gemm, config = self.gemm, self.gemm.config
        load = cpasync.CopyBulkTensorTileG2SOp(self.group)
        k_bytes = gemm.k // 2
        k_blocks = gemm.k // MMA_K

        weight_tma, _ = cpasync.make_tiled_tma_atom(
            load, self._weight_tensor(weights), self._operand_layout(TILE_M), self._weight_tiler()
        )
        mX = cute.make_tensor(tokens, cute.make_layout((rows, k_bytes), stride=(k_bytes, 1)))
        token_tma, _ = cpasync.make_tiled_tma_atom(
            load, mX, self._operand_layout(config.token_box), (config.token_box, TILE_K // 2)
        )
        # Block scales as lines of 128 words, each of 128 rows and K = 64.
        scale_box = (TILE_K // MMA_K, SCALE_BLOCK // 4)
        scale_layout = cute.make_layout(scale_box, stride=(SCALE_BLOCK // 4, 1))
        lines = gemm.num_experts * (gemm.weight_rows // TILE_M) * k_blocks
        sfa_tma, _ = cpasync.make_tiled_tma_atom(
            load, self._lines(weight_scales, lines), scale_layout, scale_box
        )
        lines = (rows + 127) // 128 * k_blocks
        sfb_tma, _ = cpasync.make_tiled_tma_atom(
            load, self._lines(token_scales, lines), scale_layout, scale_box
        )
        out_tma, mOut = None, out
        if cutlass.const_expr(gemm.op == "fc2"):
            out_layout = cute.make_layout((rows, gemm.out_features), stride=(gemm.out_features, 1))
            out_tma, mOut = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(),
                cute.make_tensor(out, out_layout),
                self._out_staging_layout(),
                (CHUNK, 32),
            )
        self.kernel(
            Loads(weight_tma, sfa_tma, token_tma, sfb_tma),
            Layout(counts, offsets, tile_to_expert),
            GlobalScales(weight_global_scales, token_global_scales),
            Output(out_tma, mOut, out_scales, out_global_scales),
            Routing(row_to_slot, routing_weights, saturated, limit),
        ).launch(
            grid=(num_clusters * config.num_ctas, 1, 1),
            block=(NUM_THREADS, 1, 1),
            cluster=(config.num_ctas, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    def _weight_tensor(self, weights):
        """(rows of a tile in its order, K bytes, expert), from the checkpoint's layout."""
        gemm = self.gemm
        k_bytes, n = gemm.k // 2, gemm.out_features
        rows, strides = n, k_bytes
        if gemm.op == "fc1":
            rows, strides = (16, 2, n // 16), (k_bytes, n * k_bytes, 16 * k_bytes)
        # Dynamic: a tensor map drops static extents of 1, and with them a coordinate.
        shape = (rows, k_bytes, Int32(gemm.num_experts))
        layout = cute.make_layout(shape, stride=(strides, 1, gemm.weight_rows * k_bytes))
        return cute.make_tensor(weights, layout)

    def _weight_tiler(self):
        return ((16, 2, 4) if self.gemm.op == "fc1" else TILE_M, TILE_K // 2)

    def _operand_layout(self, rows: int):
        """(rows, 128 bytes), swizzled in units of 16 bytes over 8 rows."""
        return cute.make_composed_layout(
            cute.make_swizzle(3, 4, 3), 0, cute.make_layout((rows, TILE_K // 2), stride=(128, 1))
        )

    def _out_staging_layout(self):
        """(32 tokens, 32 hidden) bf16: 64 bytes a token, swizzled for stmatrix."""
        return cute.make_composed_layout(
            cute.make_swizzle(2, 4, 3), 0, cute.make_layout((CHUNK, 32), stride=(32, 1))
        )

    def _lines(self, scales, lines):
        words = SCALE_BLOCK // 4
        return cute.make_tensor(
            cute.recast_ptr(scales, dtype=Uint32),
            cute.make_layout((Int32(lines), words), stride=(words, 1)),
        )

    # ---- device

    @cute.kernel
    def kernel(
        self,
        loads: Loads,
        layout: Layout,
        global_scales: GlobalScales,
        output: Output,
        routing: Routing,
    ):
        config = self.gemm.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        first = Uint32(cute.arch.block_idx()[0]) // config.num_ctas
        step = Uint32(cute.arch.grid_dim()[0]) // config.num_ctas

        # Phase 1, overlapping earlier kernels (PDL), reads nothing of theirs: barriers, TMEM, maps.
        smem = cutlass.memory.SmemAllocator()
        barriers = Barriers(
            full=smem.allocate_array(Int64, config.stages),
            empty=smem.allocate_array(Int64, config.stages),
            acc_full=smem.allocate_array(Int64, 2),
            acc_empty=smem.allocate_array(Int64, 2),
        )
        tmem_slot = smem.allocate_array(Int32, 1)
        stages = self._allocate_stages(smem)
        staging = smem.allocate_array(Uint8, self.gemm.staging_bytes, byte_alignment=1024)
        if warp == TMA_WARP:
            self._init_barriers(barriers)
            for atom in loads:
                cpasync.prefetch_descriptor(atom)
        if cutlass.const_expr(config.num_ctas == 2):
            # TMEM allocation spans the pair, whose other CTA may not have started.
            self._sync_cluster()
        if warp == MMA_WARP:
            cute.arch.alloc_tmem(
                TMEM_COLUMNS, tmem_slot, is_two_cta=cutlass.const_expr(config.num_ctas == 2)
            )
        self._sync_cluster()
        tmem = cute.make_tensor(tmem_slot, cute.make_layout(1))[0]

        # Phase 2: after the earlier kernels, which wrote layout and tokens: the work, by role.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        mOffsets = cute.make_tensor(layout.offsets, cute.make_layout(self.gemm.num_experts + 1))
        num_work = Uint32(mOffsets[self.gemm.num_experts]) // config.tile * self.gemm.m_tiles
        work = Work(first, step, num_work)
        if warp == TMA_WARP:
            self._load(work, rank, loads, layout, barriers, stages)
        elif warp == MMA_WARP:
            if rank == 0:
                self._multiply(work, layout, barriers, stages, tmem)
        else:
            self._epilogue(
                work, rank, layout, global_scales, output, routing, barriers, staging, tmem
            )

        # Phase 3: a CTA must not exit while its pair may still arrive on its barriers.
        ptx.fence_before_sync()
        self._sync_cluster()
        if warp == MMA_WARP:
            ptx.fence_after_sync()
            cute.arch.relinquish_tmem_alloc_permit(
                is_two_cta=cutlass.const_expr(config.num_ctas == 2)
            )
            pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, tmem_slot)
            cute.arch.dealloc_tmem(
                pointer, TMEM_COLUMNS, is_two_cta=cutlass.const_expr(config.num_ctas == 2)
            )

    @cute.jit
    def _allocate_stages(self, smem):
        gemm, stages = self.gemm, self.gemm.config.stages
        sizes = (gemm.weight_bytes, gemm.token_bytes, gemm.scale_bytes, gemm.token_scale_bytes)
        return Stages(
            *(
                ptx.smem_address(smem.allocate_array(Uint8, size * stages, byte_alignment=1024))
                for size in sizes
            )
        )

    @cute.jit
    def _init_barriers(self, barriers: Barriers):
        config = self.gemm.config
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(config.stages):
                cute.arch.mbarrier_init(barriers.full + i, 1)
                cute.arch.mbarrier_init(barriers.empty + i, 1)
            for i in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(barriers.acc_full + i, 1)
                cute.arch.mbarrier_init(
                    barriers.acc_empty + i, NUM_EPILOGUE_WARPS * config.num_ctas
                )
        cute.arch.mbarrier_init_fence()

    @cute.jit
    def _sync_cluster(self):
        if cutlass.const_expr(self.gemm.config.num_ctas == 2):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _locate(self, index, layout: Layout):
        """Tile index -> (weight tile, expert, first token row, live rows)."""
        config, big = self.gemm.config, cute.make_layout(1 << 30)
        token_tile = index // self.gemm.m_tiles
        m_tile = Int32(index - token_tile * self.gemm.m_tiles)
        row = Int32(token_tile * config.tile)
        expert = cute.make_tensor(layout.tile_to_expert, big)[token_tile]
        counts, offsets = (cute.make_tensor(p, big) for p in (layout.counts, layout.offsets))
        if cutlass.const_expr(self.gemm.batched):
            # The list has the live tiles' places; each expert has room for offsets[1] rows.
            row = expert * config.tile
            expert = row // offsets[1]
        end = counts[expert] + offsets[expert]
        return m_tile, expert, row, cutlass.min(end - row, config.tile)

    @cute.jit
    def _mma_n(self, live):
        """Live rows, rounded up to an N that the MMA has."""
        granule = self.n_granule
        return (live + (granule - 1)) & -granule

    # ---- warp 5, the producer: operands from global to shared memory

    @cute.jit
    def _load(
        self, work: Work, rank, loads: Loads, layout: Layout, barriers: Barriers, stages: Stages
    ):
        gemm, config = self.gemm, self.gemm.config
        k_blocks = gemm.k // MMA_K
        maps = Loads(*(ptx.tensor_map_address(atom) for atom in loads))
        index, step, num_work = work
        stage, phase = Int32(0), Int32(1)
        while index < num_work:
            m_tile, expert, row, live = self._locate(index, layout)
            m_tile = m_tile * config.num_ctas + rank
            # Each CTA of a pair holds one half of N.
            rows_here = self._mma_n(live) >> (config.num_ctas - 1)
            boxes = Int32(Uint32(rows_here + (config.token_box - 1)) // config.token_box)
            weight_line = (expert * (gemm.weight_rows // TILE_M) + m_tile) * k_blocks
            token_line = (row >> 7) * k_blocks
            tile = (m_tile, expert, row + rank * rows_here, boxes, weight_line, token_line)
            for k in cutlass.range(self.k_tiles, unroll=1):
                cute.arch.mbarrier_wait(barriers.empty + stage, phase)
                with cute.arch.elect_one():
                    if rank == 0:
                        cute.arch.mbarrier_arrive_and_expect_tx(
                            barriers.full + stage, self._bytes_of_stage(boxes)
                        )
                    self._load_stage(k, stage, tile, maps, barriers, stages)
                stage, phase = self._advance(stage, phase)
            index += step
        if cutlass.const_expr(config.num_ctas == 2):
            # The even CTA commits to this one's empty barriers too: drain them before exit.
            for _ in cutlass.range(config.stages, unroll=1):
                cute.arch.mbarrier_wait(barriers.empty + stage, phase)
                stage, phase = self._advance(stage, phase)

    def _bytes_of_stage(self, boxes):
        """Of the CTA, or of the pair together."""
        gemm, config = self.gemm, self.gemm.config
        box_bytes = config.token_box * (TILE_K // 2)
        return config.num_ctas * (gemm.stage_bytes - gemm.token_bytes) + boxes * (
            config.num_ctas * box_bytes
        )

    @cute.jit
    def _load_stage(self, k, stage, tile: tuple, maps: Loads, barriers: Barriers, stages: Stages):
        gemm, config = self.gemm, self.gemm.config
        m_tile, expert, row, boxes, weight_line, token_line = tile
        barrier = ptx.smem_address(barriers.full + stage)
        if cutlass.const_expr(config.num_ctas == 2):
            barrier = barrier & ptx.EVEN_CTA
        ctas, k_byte, line = config.num_ctas, k * (TILE_K // 2), k * (TILE_K // MMA_K)
        place: tuple = (m_tile * TILE_M, expert)
        if cutlass.const_expr(gemm.op == "fc1"):
            place = (0, 0, m_tile * (TILE_M // 32), expert)
        to = stages.weights + stage * gemm.weight_bytes
        ptx.load_box(maps.weights, (k_byte, *place), to, barrier, ctas)
        to = stages.weight_scales + stage * gemm.scale_bytes
        ptx.load_box(maps.weight_scales, (0, weight_line + line), to, barrier, ctas)
        to = stages.token_scales + stage * gemm.token_scale_bytes
        for b in cutlass.range_constexpr(gemm.scale_blocks):
            place = (0, token_line + b * (gemm.k // MMA_K) + line)
            ptx.load_box(maps.token_scales, place, to + b * gemm.scale_bytes, barrier, ctas)
        to = stages.tokens + stage * gemm.token_bytes
        for b in cutlass.range(boxes, unroll=1):
            place = (k_byte, row + b * config.token_box)
            ptx.load_box(
                maps.tokens, place, to + b * (config.token_box * TILE_K // 2), barrier, ctas
            )

    @cute.jit
    def _partition(self, atom, s, g):
        return cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
        )

    @cute.jit
    def _advance(self, stage, phase):
        stage += 1
        if stage == self.gemm.config.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    # ---- warp 4 of the even CTA: block scales to TMEM, and the MMAs

    @cute.jit
    def _multiply(self, work: Work, layout: Layout, barriers: Barriers, stages: Stages, tmem):
        gemm, config = self.gemm, self.gemm.config
        descs = (
            (ptx.smem_desc(stages.weights, ptx.OPERAND_DESC), gemm.weight_bytes),
            (ptx.smem_desc(stages.tokens, ptx.OPERAND_DESC), gemm.token_bytes),
            (ptx.smem_desc(stages.weight_scales, ptx.SCALES_DESC), gemm.scale_bytes),
            (ptx.smem_desc(stages.token_scales, ptx.SCALES_DESC), gemm.token_scale_bytes),
        )
        index, step, num_work = work
        stage, phase = Int32(0), Int32(0)
        buffer = Int32(0)
        # The accumulator on whose acc_empty this tile waits: its own, or, where the two alias, the
        # previous tile's, whose shared columns the epilogue reads first (`_chunk_order`).
        waited, acc_phase = Int32(1 if gemm.overlaps else 0), Int32(1)
        while index < num_work:
            _, _, row, live = self._locate(index, layout)
            idesc = ptx.instruction_descriptor(TILE_M * config.num_ctas) | (
                self._mma_n(live) // 8 << 17
            )
            d = tmem + buffer * gemm.acc_stride
            # A tile of 64 rows may start in the middle of a 128-row block of scales.
            sfb = tmem + self.sfb_column + ((row & 127) >> 5)
            cute.arch.mbarrier_wait(barriers.acc_empty + waited, acc_phase)
            ptx.fence_after_sync()
            for k in cutlass.range(self.k_tiles, unroll=1):
                cute.arch.mbarrier_wait(barriers.full + stage, phase)
                ptx.fence_after_sync()
                with cute.arch.elect_one():
                    # A descriptor's address is its lowest field, in units of 16 bytes.
                    operands = [desc + Int64(stage * (size >> 4)) for desc, size in descs]
                    self._multiply_stage(k, operands, tmem, sfb, d, idesc)
                    self._commit(barriers.empty + stage)
                stage, phase = self._advance(stage, phase)
            with cute.arch.elect_one():
                self._commit(barriers.acc_full + buffer)
            buffer ^= 1
            waited ^= 1
            acc_phase ^= waited ^ 1
            index += step

    @cute.jit
    def _multiply_stage(self, k, operands, tmem, sfb, d, idesc):
        gemm, ctas = self.gemm, self.gemm.config.num_ctas
        a_desc, b_desc, a_scales, b_scales = operands
        k_steps = TILE_K // MMA_K
        line = SCALE_BLOCK >> 4
        for i in cutlass.range_constexpr(k_steps):
            ptx.copy_scales(tmem + self.sfa_column + 4 * i, a_scales + line * i, ctas)
            for block in cutlass.range_constexpr(gemm.scale_blocks):
                ptx.copy_scales(
                    tmem + self.sfb_column + self.sfb_step * i + 4 * block,
                    b_scales + line * (block * k_steps + i),
                    ctas,
                )
        for i in cutlass.range_constexpr(k_steps):
            if cutlass.const_expr(gemm.k % TILE_K == 0) or k * k_steps + i < gemm.k // MMA_K:
                advance = (MMA_K // 2 >> 4) * i
                ptx.mma_mxf4nvf4(
                    d,
                    a_desc + advance,
                    b_desc + advance,
                    idesc,
                    tmem + self.sfa_column + 4 * i,
                    sfb + self.sfb_step * i,
                    Boolean(True) if i > 0 else k > 0,
                    ctas,
                )

    @cute.jit
    def _commit(self, barrier):
        if cutlass.const_expr(self.gemm.config.num_ctas == 2):
            tcgen05.commit(barrier, 0b11, self.group)
        else:
            tcgen05.commit(barrier, None, self.group)

    # ---- warps 0-3: accumulators to output rows

    @cute.jit
    def _epilogue(
        self,
        work: Work,
        rank,
        layout: Layout,
        global_scales: GlobalScales,
        output: Output,
        routing: Routing,
        barriers: Barriers,
        staging: cute.Pointer,
        tmem,
    ):
        gemm, config = self.gemm, self.gemm.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        index, step, num_work = work
        buffer, acc_phase = Int32(0), Int32(0)
        slot, overflow = Int32(0), Int32(0)
        while index < num_work:
            m_tile, expert, row, live = self._locate(index, layout)
            m_tile = m_tile * config.num_ctas + rank
            scales = self._tile_scales(expert, global_scales, output, routing.limit)
            chunks = (live + (CHUNK - 1)) >> 5
            chunk, stride, last = self._chunk_order(chunks, buffer)
            source = tmem + buffer * gemm.acc_stride + (warp << 21)
            weight = self._routing_weight(row, live, chunk, routing)
            cute.arch.mbarrier_wait(barriers.acc_full + buffer, acc_phase)
            ptx.fence_after_sync()
            for i in cutlass.range(chunks, unroll=1):
                row_scales = self._row_scales(row + chunk * CHUNK, global_scales)
                low, high = ptx.load_accumulators(source + chunk * CHUNK)
                if i == last:
                    ptx.fence_before_sync()
                    with cute.arch.elect_one():
                        self._release(barriers.acc_empty + buffer)
                place = (m_tile, row + chunk * CHUNK, live - chunk * CHUNK)
                chunk += stride
                if cutlass.const_expr(gemm.op == "fc2"):
                    self._store_rows(place, low, high, scales, row_scales, output, staging, slot)
                    slot ^= 1
                else:
                    next_weight = self._routing_weight(row, live, chunk, routing)
                    overflow += self._store_activations(
                        place, low, high, scales, row_scales, weight, output, staging
                    )
                    weight = next_weight
            buffer ^= 1
            acc_phase ^= buffer ^ 1
            index += step
        if cutlass.const_expr(gemm.op == "fc2"):
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(gemm.quantize):
            overflow = cute.arch.warp_redux_sync(overflow, "add")
            if overflow > 0:
                with cute.arch.elect_one():
                    count = Int64(overflow)
                    cute.arch.red(
                        routing.saturated, count, op="add", dtype="u64", sem="relaxed", scope="gpu"
                    )

    @cute.jit
    def _chunk_order(self, chunks, buffer):
        """(first chunk of a tile, step to the next, iteration after which acc_empty is signalled).

        Where the accumulators alias, the first is read from its end and the second from its start:
        MMAs may overwrite the other once the shared columns have been read.
        """
        chunk, stride, last = Int32(0), Int32(1), chunks - 1
        if cutlass.const_expr(self.gemm.overlaps):
            own = self.gemm.acc_stride // CHUNK  # chunks that the second does not alias
            shared = -(-(self.gemm.config.tile - self.gemm.acc_stride) // CHUNK)
            last = cutlass.min(last, shared - 1)
            if buffer == 0:
                chunk, stride = chunks - 1, Int32(-1)
                last = cutlass.max(chunks - 1 - own, 0)
        return chunk, stride, last

    @cute.jit
    def _release(self, barrier):
        if cutlass.const_expr(self.gemm.config.num_ctas == 2):
            cute.arch.mbarrier_arrive(barrier, 0)
        else:
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def _tile_scales(self, expert, global_scales: GlobalScales, output: Output, limit):
        gemm, big = self.gemm, cute.make_layout(1 << 30)
        weights, tokens = (cute.make_tensor(p, big) for p in global_scales)
        common = Float32(1.0)
        if cutlass.const_expr(gemm.op == "fc1"):
            first, second = weights[2 * expert], weights[2 * expert + 1]
            if cutlass.const_expr(not gemm.scale_per_row):
                common = tokens[0]
        else:
            first = second = weights[expert]
            if cutlass.const_expr(not gemm.scale_per_row):
                common = tokens[expert]
        out_scale = Float32(1.0)
        if cutlass.const_expr(gemm.quantize):
            out_scale = cute.make_tensor(output.global_scales, big)[expert]
        return TileScales(first * common, second * common, out_scale, limit)

    @cute.jit
    def _row_scales(self, row, global_scales: GlobalScales):
        """`token` policy: global scales of this lane's 8 columns of a chunk, else ones."""
        scales = [Float32(1.0)] * 8
        if cutlass.const_expr(self.gemm.scale_per_row):
            tokens = cute.make_tensor(global_scales.tokens, cute.make_layout(1 << 30))
            column = row + cute.arch.lane_idx() % 4 * 2
            scales = [tokens[column + 8 * j + i] for j in range(4) for i in range(2)]
        return scales

    @cute.jit
    def _routing_weight(self, row, live, chunk, routing: Routing):
        """fc1: the routing weight of this lane's token of a chunk, if there is one."""
        weight = Float32(0.0)
        if cutlass.const_expr(self.gemm.op == "fc1"):
            big, token = cute.make_layout(1 << 30), chunk * CHUNK + cute.arch.lane_idx()
            if token >= 0 and token < live:
                slot = cute.make_tensor(routing.row_to_slot, big)[row + token]
                weight = cute.make_tensor(routing.weights, big)[slot]
        return weight

    # ---- fc2: bf16 rows

    @cute.jit
    def _store_rows(
        self,
        place: tuple,
        low,
        high,
        scales: TileScales,
        row_scales,
        output: Output,
        staging: cute.Pointer,
        slot,
    ):
        """32 tokens x this warp's 32 hidden values to bf16, transposed, and out by TMA."""
        m_tile, row, _ = place
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        layout = self._out_staging_layout()
        start = (warp * 2 + slot) * (CHUNK * 32 * 2)
        # Double-buffered: the TMA store that read this buffer last has done so.
        cute.arch.cp_async_bulk_wait_group(1, read=True)
        cute.arch.sync_warp()
        token, group = lane % 8, lane // 8
        address = ptx.smem_address(staging) + start + token * 64 + (group ^ (token >> 1)) * 16
        for j in cutlass.range_constexpr(CHUNK // 8):
            factors = [scales.gate * row_scales[2 * j + i] for i in range(2)]
            matrices = [
                ptx.bf16x2_pack(half[i] * factors[0], half[i + 1] * factors[1])
                for half in (low, high)
                for i in (4 * j, 4 * j + 2)
            ]
            ptx.stmatrix_x4_trans(address, matrices, j * 8 * 64)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        pointer = cute.recast_ptr(staging + start, layout.inner, dtype=BFloat16)
        sOut = cute.make_tensor(pointer, layout.outer)
        gOut = cute.local_tile(
            cute.domain_offset((row, m_tile * TILE_M + warp * 32), output.rows),
            (CHUNK, 32),
            (None, None),
        )
        tSs, tSg = self._partition(output.store, sOut, gOut)
        cute.copy(output.store, tSs, tSg[None, 0, 0])
        cute.arch.cp_async_bulk_commit_group()

    # ---- fc1: SwiGLU, routing weight, and NVFP4 or bf16

    @cute.jit
    def _store_activations(
        self,
        place: tuple,
        low,
        high,
        scales: TileScales,
        row_scales,
        weight,
        output: Output,
        staging: cute.Pointer,
    ):
        """32 tokens x this warp's 16 intermediate values -> 1 if this lane's block saturated."""
        m_tile, row, live = place
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        weights = ptx.pack(weight, weight)
        pairs = self._transpose(self._swiglu(low, high, scales, row_scales), staging)
        pairs = [ptx.mul2(pair, weights) for pair in pairs]
        values = [value for pair in pairs for value in ptx.unpack(pair)]
        column = (m_tile * NUM_EPILOGUE_WARPS + warp) * 16
        out = Int64(output.rows.toint())
        width = self.gemm.out_features
        saturated = Int32(0)
        if cutlass.const_expr(self.gemm.quantize):
            codes, scale, saturated = self._quantize(pairs, values, scales.out)
            line = (row >> 7) * (width // 64) + m_tile
            scale_at = Int64(line) * SCALE_BLOCK + (lane * 16 + ((row & 96) >> 3) + warp)
            if lane < live:
                ptx.store_global(out + (Int64(row + lane) * (width // 2) + column // 2), codes)
                ptx.store_global_byte(Int64(output.scales.toint()) + scale_at, scale)
            else:
                saturated = Int32(0)
        else:
            words = [ptx.bf16x2_pack(values[2 * i], values[2 * i + 1]) for i in range(8)]
            if lane < live:
                address = out + (Int64(row + lane) * (width * 2) + column * 2)
                ptx.store_global(address, words[:4])
                ptx.store_global(address + 16, words[4:])
        return saturated

    @cute.jit
    def _swiglu(self, gate, up, scales: TileScales, row_scales):
        """silu(min(gate, limit)) * clamp(up, -limit, limit) of the scaled accumulators."""
        values, limit = [], scales.limit
        for r in cutlass.range_constexpr(16):
            row_scale = row_scales[r // 4 * 2 + r % 2]
            g = cute.arch.fmin(gate[r] * (scales.gate * row_scale), limit, nan=True)
            u = ptx.clamp(up[r] * (scales.up * row_scale), limit)
            exponential = cute.math.exp2(g * -1.4426950408889634, fastmath=True)
            values.append(g * cute.arch.rcp_approx(1.0 + exponential) * u)
        return values

    @cute.jit
    def _transpose(self, values, staging):
        """Through shared memory: a lane's 2 rows x 8 tokens -> its one token's 16 rows, 8 pairs."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        base = ptx.smem_address(staging) + warp * (CHUNK * STAGING_PITCH)
        to = base + lane % 4 * (2 * STAGING_PITCH) + lane // 4 * 4
        cute.arch.sync_warp()  # the previous chunk has been read
        for r in cutlass.range_constexpr(16):
            token, half = r // 4 * 8 + r % 2, r // 2 % 2
            ptx.store_shared(to, values[r], token * STAGING_PITCH + half * 8 * 4)
        cute.arch.sync_warp()
        return [
            pair
            for i in range(4)
            for pair in ptx.load_shared_pairs(base + lane * STAGING_PITCH, 16 * i)
        ]

    @cute.jit
    def _quantize(self, pairs, values, global_scale):
        """A block of 16, bit-equal to `reference.nvfp4_quantize` -> (2 words of codes, scale byte,
        1 if saturated)."""
        largest = self._largest(values, nan=True)
        saturated = Int32(0)
        if largest != largest:
            largest = self._largest(values, nan=False)
            saturated = Int32(1)
        sixth = self._divide(
            cute.arch.fmin(largest, 3.4028234663852886e38), Float32(6.0), Float32(1.0 / 6.0)
        )
        # Beyond 464 global scales all is saturation; 512 keeps the quotient finite.
        quotient = self._divide(
            cute.arch.fmin(sixth, 512.0 * global_scale),
            global_scale,
            cute.arch.rcp_approx(global_scale),
        )
        if quotient > 464.0:
            saturated = Int32(1)
        byte, unit = ptx.e4m3_round(quotient)
        scale = unit * global_scale
        if saturated > 0:
            # What is 6 or more anyway, infinities and NaN among it, must not overflow below.
            pairs = [self._bounded(pair, 8.0 * scale) for pair in pairs]
        quotients = self._divide_pairs(pairs, scale, cute.arch.rcp_approx(scale))
        codes = [ptx.e2m1_pack(quotients[i : i + 8]) for i in (0, 8)]
        if unit == 0.0:
            codes = [Uint32(0), Uint32(0)]
        return codes, byte, saturated

    @cute.jit
    def _largest(self, values, nan: cutlass.Constexpr[bool]):
        largest = ptx.max_abs3(values[0], values[1], values[2], nan)
        for i in cutlass.range_constexpr(3, 15, 2):
            largest = ptx.max_abs3(largest, values[i], values[i + 1], nan)
        return ptx.max_abs3(largest, values[15], values[15], nan)

    @cute.jit
    def _divide(self, x, divisor, inverse):
        """x / divisor, correctly rounded: inverse is about 1 / divisor, and one step of its exact
        remainder corrects the quotient (Markstein)."""
        quotient = x * inverse
        return ptx.fma(ptx.fma(quotient, -divisor, x), inverse, quotient)

    @cute.jit
    def _divide_pairs(self, pairs, divisor, inverse):
        """`_divide` of the 16 values of 8 pairs."""
        minus, inverses = ptx.pack(-divisor, -divisor), ptx.pack(inverse, inverse)
        values = []
        for pair in pairs:
            quotient = ptx.mul2(pair, inverses)
            quotient = ptx.fma2(ptx.fma2(quotient, minus, pair), inverses, quotient)
            values += ptx.unpack(quotient)
        return values

    @cute.jit
    def _bounded(self, pair, bound):
        values = [cute.arch.fmax(cute.arch.fmin(x, bound), -bound) for x in ptx.unpack(pair)]
        return ptx.pack(values[0], values[1])


def example_arguments(gemm: Gemm) -> tuple:
    """What `cute.compile` is given for a specialisation: types and alignments."""
    quantize, fc1 = gemm.quantize, gemm.op == "fc1"
    dtypes = (
        *(Uint8, Uint8, Float32, Uint8, Uint8, Float32, None, Int32, Int32, Int32),
        *((Uint8, Uint8, Float32) if quantize else (BFloat16, None, None)),
        *((Int32, Float32) if fc1 else (None, None)),
        Int64 if quantize else None,
    )
    pointers = [None if dtype is None else pointer(dtype, 1 << 20) for dtype in dtypes]
    pointers[6] = Int32(gemm.config.tile)  # rows
    return (*pointers, Float32(math.inf), Int32(1), cuda.CUstream(0))


def pointer(dtype, address: int) -> cute.Pointer:
    align = {Int32: 4, Float32: 4, Int64: 8}.get(dtype, 16)
    return make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)
