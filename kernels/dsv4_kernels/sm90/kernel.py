"""The grouped GEMM on Hopper (sm_90a): FP4 weights from registers, bf16 WGMMA (W4A16).

    fc1: h[row, i]   = w_row * silu(min(g, L)) * clamp(u, -L, L),   g = gs_g W1 x,  u = gs_u W3 x
    fc2: out[row, m] = gs W2 h[row]

One output tile is 64 * m_blocks * warpgroups weight rows (the M of WGMMA) by at most tile_n[-1]
rows of one expert (its N); the N that fits the rows at hand is chosen per tile from `tile_n`.
Each persistent block finds its work from `counts` and `offsets` alone: whole tiles, then a stretch
of the stages of K of the tiles that are left, so that whatever the routing, all blocks end together
(`Sm90Schedule`). A stretch that begins inside a tile leaves its sums in `partials`, where the block
that began the tile adds them, in the order of K: the result does not depend on timing.

One producer warpgroup fills a ring of shared-memory stages, each tile_k wide: codes and block
scales by bulk copies (`weights.prepare_weights` made them contiguous), rows of x by TMA where
they lie one after another, or gathered by 16-byte cp.async. The consumer warpgroups widen codes to
bf16 in registers, which is exact, and multiply. The blocks of a cluster work on the same rows: each
fetches some of them for all, and a stage is free when all have read it.

Widening. A word holds the eight codes of one thread in one m64k16 step; shifts and masks put each
code's sign at bit 15 and its three other bits at 8:6 of a bf16, which reads it as code * 2^-126.
A scale byte holds five exponent bits and three of mantissa; (byte << 4) | 0x7000 is the scale
times 2^119. Their product is a normal bf16, scale * code * 2^-7, without rounding: E2M1 has 2
significant bits and E4M3 has 4. The 2^7 is put back with the fp32 global scale. An MXFP4 scale is
such a byte without mantissa; it serves two steps, which NVFP4's does one.

What a step (m64, n, k16) of a warpgroup costs a multiprocessor, measured on an H200 with all in
shared memory and two warpgroups or more: WGMMA alone max(13, n / 2) cycles, whatever the groups and
their number in flight; with I other instructions a warp about max(n / 2, I + 3 + n / 4), as if
WGMMA took every second issue slot while it runs. Up to n = 90 it is instructions that count.
"""

import math

import cutlass
import cutlass.cute as cute
from cuda.bindings import driver
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from dsv4_kernels.sm90 import ptx as ptx
from dsv4_kernels.sm90.epilogue import NOTES, STAGING_BYTES, Sm90Epilogue
from dsv4_kernels.sm90.spec import FLAGS, Gemm
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK

CODE_BLOCK_BYTES = 2048  # codes of a 64 x 64 block of weights
SMEM_BYTES = 227 * 1024
TMA_ROWS = 16  # of a box


class Dsv4GroupedGemmSm90(Sm90Epilogue):
    """One grouped GEMM, compiled for one specialisation."""

    def __init__(self, gemm: Gemm):
        op, num_experts, m, k, top_k, gather, config, scale_block = gemm
        fc1 = op == "fc1"
        assert op in ("fc1", "fc2"), op
        # Who gathers does not wait for the kernel before: fc1 has done so for all of its warps.
        assert fc1 or not gather, "fc2 gathers no rows"
        assert m % 64 == 0, f"{m} weight rows, must be a multiple of 64"
        assert k % config.tile_k == 0, f"K = {k}, must be a multiple of tile_k = {config.tile_k}"
        assert config.tile_n == tuple(sorted(config.tile_n)), config.tile_n
        # Boxes fill a tile, and rows are cut by the largest size: no tile may hold more than it.
        assert config.tile_n[-1] % TMA_ROWS == 0, (
            f"largest tile_n {config.tile_n[-1]}, must be a multiple of {TMA_ROWS}"
        )
        assert 4 * config.warpgroups <= FLAGS, f"{config.warpgroups} warpgroups"
        self.config = config
        self.fc1 = fc1
        self.gather = gather
        self.num_experts = num_experts
        self.m, self.k, self.top_k = m, k, top_k
        self.m_out = m // 2 if fc1 else m
        self.tile_n_max = config.tile_n[-1]
        assert scale_block in (NVFP4_BLOCK, MXFP4_BLOCK), scale_block
        self.scale_block = scale_block
        self.scale_block_bytes = 64 * 64 // scale_block
        self.k_blocks = config.tile_k // 64
        self.k_stages = k // config.tile_k
        self.tile_n_min = config.tile_n[0]
        self.by_cost = config.tile_n[-1] > 64
        self.m_blocks_tile = config.m_blocks * config.warpgroups
        assert config.cluster == 1 or not gather, "a block gathers rows for itself alone"
        self.cluster = config.cluster
        self.m_tiles = math.ceil(m / (config.tile_m * config.cluster))
        # What a tile's sums are multiplied by: two global scales, then a weight a row.
        self.factors = 2 + (-(-self.tile_n_max // 32) * 32 if fc1 else 0)
        self.threads = 128 * (config.warpgroups + 1)
        self.experts_padded = max(32, 1 << (num_experts - 1).bit_length())
        self.stages = self._num_stages()
        assert self.stages >= 2, f"{config} leaves room for {self.stages} stages"

    @property
    def partial_floats(self) -> int:
        """Per thread block, of `partials`."""
        return self.config.tile_m * self.tile_n_max

    def _block_bytes(self) -> int:
        """Codes and scales of a 64 x 64 block of weights."""
        return CODE_BLOCK_BYTES + self.scale_block_bytes

    def _fixed_smem(self) -> int:
        warps = 4 * self.config.warpgroups
        notes = NOTES * (16 + 4 * self.factors)
        barriers_and_alignment = 4096
        staging = warps * 2 * STAGING_BYTES
        return staging + notes + self._table_bytes() + barriers_and_alignment

    def _num_stages(self) -> int:
        rows = self.tile_n_max * 128 * self.k_blocks
        weights = self.m_blocks_tile * self.k_blocks * self._block_bytes()
        budget = SMEM_BYTES // self.config.blocks_per_sm - self._fixed_smem()
        return min(32, budget // (rows + weights))

    def _registers(self) -> tuple[int, int]:
        """(producer, consumer) registers per thread, multiples of 8, within the register file."""
        per_thread = 65536 // (self.threads * self.config.blocks_per_sm) // 8 * 8
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
    ):
        """codes, block_scales: shuffled, uint8; global_scales (experts, 2) for fc1, (experts,) for
        fc2; x (tokens or rows, k) bf16; out (rows, m_out) bf16; counts (experts,), offsets
        (experts + 1,), row_to_slot (rows,) int32; slot_weights (tokens * top_k,) float32;
        partials (num_blocks * partial_floats,) float32; flags (num_blocks * FLAGS,) int32, zeros
        before and after; limit of SwiGLU, infinity for none; num_rows: of x."""
        tma_atom, tma_x = None, None
        if cutlass.const_expr(not self.gather):
            box = (TMA_ROWS, 64)
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
        ).launch(
            grid=[num_blocks, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=self.config.blocks_per_sm,
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
    ):
        config = self.config
        warps = 4 * config.warpgroups
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())

        # Phase 1: shared memory and barriers.
        smem = cutlass.utils.SmemAllocator()  # where vLLM's CuTe DSL 4.7.1 has it
        s_x = self._allocate(
            smem, BFloat16, self.stages * self.k_blocks * self.tile_n_max * 64, 1024
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
        s_notes = self._allocate(smem, Int32, NOTES * 4, 16)
        s_factors = self._allocate(smem, Float32, NOTES * self.factors, 16)
        tables = self._allocate_tables(lambda size: self._allocate(smem, Int32, size, 16))
        full = self._allocate(smem, Int64, self.stages, 8)
        landed = self._allocate(smem, Int64, self.stages, 8)
        empty = self._allocate(smem, Int64, self.stages, 8)
        weighed = self._allocate(smem, Int64, NOTES, 8)
        stored = self._allocate(smem, Int64, NOTES, 8)
        if tidx == 0:
            for note in cutlass.range_constexpr(NOTES):
                cute.arch.mbarrier_init(weighed + note, 32)
                cute.arch.mbarrier_init(stored + note, 32 * warps)
            for stage in cutlass.range_constexpr(self.stages):
                # The warp that loads weights and the one that passes on rows; 64 gather these.
                cute.arch.mbarrier_init(full + stage, 2 if self.gather else 1)
                cute.arch.mbarrier_init(landed + stage, 64)
                cute.arch.mbarrier_init(empty + stage, warps * self._arrivals())
        cute.arch.mbarrier_init_fence()
        self._meet()

        # Phase 2: which tiles are alive. fc2 comes right after fc1, which waited for the layout:
        # it waits for fc1 only where it asks for the first rows, its weights already on their way.
        if cutlass.const_expr(self.fc1):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self._plan(counts, offsets, tables)

        # Phase 3: roles.
        notes = (s_notes, s_factors, weighed, stored)
        producer_registers, consumer_registers = self._registers()
        if warp >= warps:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp == warps:
                self._load_weights(
                    codes,
                    block_scales,
                    tma_atom,
                    tma_x,
                    (global_scales, row_to_slot, slot_weights),
                    (s_x, s_codes, s_scales),
                    notes,
                    full,
                    empty,
                    tables,
                )
            if cutlass.const_expr(self.gather):
                if warp == warps + 1:
                    self._pass_on_rows(landed, full, tables)
                elif warp > warps + 1:
                    self._load_rows(x, row_to_slot, s_x, landed, empty, tables)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            self._consume(
                out,
                (partials, flags),
                limit,
                (s_x, s_codes, s_scales, s_staging),
                notes,
                full,
                empty,
                tables,
            )

        # No block of a cluster leaves while another may still signal it.
        self._meet()

    @cute.jit
    def _meet(self):
        """All blocks of a cluster."""
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
        sources: tuple,
        buffers: tuple,
        notes: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        tables: tuple,
    ):
        """One warp asks for every stage's codes and scales, and for its rows if they need no
        gathering; those of the next expert, or past the end as zeros, where a box holds more.

        It also writes every tile's note, which the first stage hands over, and its factors: see
        `Sm90Epilogue`'s file.
        """
        s_x, s_codes, s_scales = buffers
        s_notes, s_factors, weighed, stored = notes
        m_blocks_total = self.m // 64
        k_blocks_total = self.k // 64
        stage_bytes = self.m_blocks_tile * self.k_blocks * self._block_bytes()
        is_first = Boolean(True)
        rank = cute.arch.block_idx()[0] % self.cluster
        everyone = cutlass.Int16((1 << self.cluster) - 1) if self.cluster > 1 else None
        whole, first, end = self._share(tables)
        position = Int32(0) if whole > 0 else first
        stage = Int32(0)
        phase = Int32(1)
        note = Int32(0)
        note_phase = Int32(1)
        while position < end:
            expert, row_start, rows, m_tile = self._locate(self._tile_at(position, whole), tables)
            m_tile = m_tile * self.cluster + rank
            k_first = position % self.k_stages
            k_end = cutlass.min(Int32(self.k_stages), k_first + end - position)
            position += k_end - k_first
            if position == whole:
                position = first
            cute.arch.mbarrier_wait(stored + note, note_phase)
            if cute.arch.lane_idx() == 0:
                told = cute.make_rmem_tensor((4,), Int32)
                told[0], told[1], told[2], told[3] = rows, k_end - k_first, row_start, m_tile
                if k_first > 0:
                    told[2] = Int32(-1)
                cute.autovec_copy(told, self._note(s_notes, note))
            first_block = Int64(expert) * m_blocks_total
            expected = Int32(stage_bytes)
            if cutlass.const_expr(not self.gather):
                boxes = (rows + TMA_ROWS - 1) // TMA_ROWS
                expected += boxes * (TMA_ROWS * 128 * self.k_blocks)
                t_rows, t_boxes = self._row_boxes(tma_atom, tma_x, row_start, s_x)
            for k_stage in cutlass.range(k_first, k_end, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if cute.arch.lane_idx() == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, expected)
                    for mb in cutlass.range_constexpr(self.m_blocks_tile):
                        # Beyond the last rows of weights: the last block again, never stored.
                        m_block = cutlass.min(
                            m_tile * self.m_blocks_tile + mb, Int32(m_blocks_total - 1)
                        )
                        block = (first_block + m_block) * k_blocks_total + k_stage * self.k_blocks
                        in_stage = (stage * self.m_blocks_tile + mb) * self.k_blocks
                        ptx.copy_bulk(
                            s_codes + in_stage * (CODE_BLOCK_BYTES // 4),
                            codes + block * CODE_BLOCK_BYTES,
                            Int32(self.k_blocks * CODE_BLOCK_BYTES),
                            full + stage,
                        )
                        ptx.copy_bulk(
                            s_scales + in_stage * (self.scale_block_bytes // 4),
                            block_scales + block * self.scale_block_bytes,
                            Int32(self.k_blocks * self.scale_block_bytes),
                            full + stage,
                        )
                cute.arch.sync_warp()
                if cutlass.const_expr(not self.fc1):
                    if is_first:
                        cute.arch.griddepcontrol_wait()
                        is_first = False
                if cutlass.const_expr(not self.gather):
                    for box in cutlass.range(rank, boxes, self.cluster, unroll=1):
                        for kb in cutlass.range_constexpr(self.k_blocks):
                            cute.copy(
                                tma_atom,
                                t_rows[None, box, k_stage * self.k_blocks + kb],
                                t_boxes[None, box, kb, stage],
                                tma_bar_ptr=full + stage,
                                mcast_mask=everyone,
                            )
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase ^= 1
            if k_first == 0:
                self._weigh(sources, expert, row_start, rows, s_factors + note * self.factors)
            cute.arch.mbarrier_arrive(weighed + note)
            note += 1
            if note == NOTES:
                note = Int32(0)
                note_phase ^= 1
        if cutlass.const_expr(not self.fc1):
            # Also without work: that fc2 has ended must mean that fc1 has.
            cute.arch.griddepcontrol_wait()

    @cute.jit
    def _row_boxes(self, tma_atom, tma_x, row_start: Int32, s_x: cute.Pointer):
        """TMA's view of the rows from row_start: (bytes, box, k block), and of where they go:
        (bytes, box, k block of the stage, stage)."""
        atom = self._swizzle_atom()
        layout = cute.make_layout(
            ((8, TMA_ROWS // 8), 64, self.tile_n_max // TMA_ROWS, self.k_blocks, self.stages),
            stride=(
                (64, 512),
                1,
                TMA_ROWS * 64,
                self.tile_n_max * 64,
                self.k_blocks * self.tile_n_max * 64,
            ),
        )
        boxes = cute.make_tensor(cute.recast_ptr(s_x, atom.inner, dtype=BFloat16), layout)
        rows = cute.domain_offset((row_start, 0), tma_x)
        rows = cute.local_tile(rows, (TMA_ROWS, 64), (None, None))
        t_boxes, t_rows = cpasync.tma_partition(
            tma_atom,
            0,
            cute.make_layout(1),
            cute.group_modes(boxes, 0, 2),
            cute.group_modes(rows, 0, 2),
        )
        return t_rows, t_boxes

    @staticmethod
    def _swizzle_atom():
        return warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)

    @cute.jit
    def _load_rows(
        self,
        x: cute.Pointer,
        row_to_slot: cute.Pointer,
        s_x: cute.Pointer,
        landed: cute.Pointer,
        empty: cute.Pointer,
        tables: tuple,
    ):
        """Two warps gather the rows of x: a thread has one 16-byte chunk of every eighth row."""
        config = self.config
        thread = cute.arch.thread_idx()[0] - 128 * config.warpgroups - 64
        first_row = thread // 8
        chunk = thread % 8
        target_0 = s_x + (first_row * 64 + (chunk ^ first_row) * 8)
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
            # In units of 16 bytes. A row that does not exist is read as zeros: none of its bytes.
            sources = [Int32(0)] * row_groups
            for i in cutlass.range_constexpr(row_groups):
                row = first_row + 8 * i
                if row < rows:
                    token = (row_to_slot + (row_start + row)).load() // self.top_k
                    sources[i] = token * (self.k // 8)
            for k_stage in cutlass.range(k_first, k_end, unroll=1):
                column = x + (k_stage * config.tile_k + chunk * 8)
                target = target_0 + stage * (self.k_blocks * self.tile_n_max * 64)
                cute.arch.mbarrier_wait(empty + stage, phase)
                for i in cutlass.range_constexpr(row_groups):
                    if 8 * i < padded_rows:
                        live = Int32(16) if first_row + 8 * i < rows else Int32(0)
                        source = column + Int64(sources[i]) * 8
                        for kb in cutlass.range_constexpr(self.k_blocks):
                            ptx.copy_row_chunk(
                                target + (kb * self.tile_n_max + 8 * i) * 64, source + kb * 64, live
                            )
                cute.arch.cp_async_mbarrier_arrive_noinc(landed + stage)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase ^= 1
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def _pass_on_rows(self, landed: cute.Pointer, full: cute.Pointer, tables: tuple):
        """One warp passes on that a stage's rows have landed.

        cp.async writes through the generic proxy and WGMMA reads through the async one: between
        them stands this warp's fence. Who gathers cannot fence without waiting for all that it
        has in flight, and for who multiplies the fence is dear.
        """
        whole, first, end = self._share(tables)
        stage = Int32(0)
        phase = Int32(0)
        for _ in cutlass.range(whole + end - first, unroll=1):
            cute.arch.mbarrier_wait(landed + stage, phase)
            cute.arch.fence_view_async_shared()
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(full + stage)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase ^= 1

    @cute.jit
    def _consume(
        self,
        out: cute.Pointer,
        fix_up: tuple,
        limit: Float32,
        buffers: tuple,
        notes: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        tables: tuple,
    ):
        config = self.config
        s_notes, _, _, stored = notes
        whole, first, end = self._share(tables)
        left = whole + end - first
        stage = Int32(0)
        phase = Int32(0)
        tile = Int32(0)
        note = cute.make_rmem_tensor((4,), Int32)
        while left > 0:
            cute.arch.mbarrier_wait(full + stage, phase)
            cute.autovec_copy(self._note(s_notes, tile % NOTES), note)
            rows, k_stages = note[0], note[1]
            left -= k_stages
            for v in cutlass.range_constexpr(len(config.tile_n)):
                n = config.tile_n[v]
                above = config.tile_n[v - 1] if v > 0 else 0
                if rows > above and rows <= n:
                    acc, stage, phase = self._multiply(
                        n, k_stages, buffers, full, empty, stage, phase
                    )
                    self._finish(n, acc, out, fix_up, limit, notes, buffers[3], tile, tables)
            cute.arch.sync_warp()  # the next tile begins with a staging buffer of this one
            cute.arch.mbarrier_arrive(stored + tile % NOTES)
            tile += 1

    def _arrivals(self) -> int:
        """Of a warp, where it gives back a stage: one a block of the cluster."""
        return self.cluster

    @cute.jit
    def _give_back(self, empty: cute.Pointer, lane: Int32, is_read: Boolean):
        """A stage, if this warp has read it. All lanes have waited for WGMMA, so that one can speak
        for all: where each speaks for itself, Flash takes up to 10 % longer on an H200."""
        if is_read and lane < self.cluster:
            cute.arch.mbarrier_arrive(empty, lane if self.cluster > 1 else None)

    def _steps(self, n: int) -> int:
        """Of a group. Two warps a scheduler hide less: theirs is a block of four, where registers
        allow, but not of one row block: groups take two sets of registers in turn, so a stage must
        have an even number of them, and with four a tile of 200 rows took 9 % longer on an H200."""
        config = self.config
        return 4 if config.warpgroups < 3 and config.m_blocks == 2 and n <= 80 else 2

    @cute.jit
    def _multiply(
        self,
        n: cutlass.Constexpr,
        k_stages: Int32,
        buffers: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        stage: Int32,
        phase: Int32,
    ):
        """The next k_stages of one tile, of which the first has been waited for ->
        (accumulators, one a 64-row block; stage; phase).

        By units of 64 rows by 64 columns, each in groups of two or four steps: widen a group into
        one set of registers while WGMMA still reads the other, and load the next unit's codes
        under it.
        """
        config = self.config
        lane = cute.arch.lane_idx()
        # Addresses hoisted out of the loop over tiles, a set for every n, would take the registers
        # that keep WGMMA asynchronous.
        thread = ptx.opaque(cute.arch.thread_idx()[0]) % 128
        mma = cute.make_tiled_mma(
            warpgroup.MmaF16BF16Op(
                BFloat16,
                Float32,
                (64, n, 16),
                warpgroup.OperandSource.RMEM,
                OperandMajorMode.K,
                OperandMajorMode.K,
            )
        )
        mma.set(warpgroup.Field.ACCUMULATE, True)
        frag_x = self._rows_operand(mma, n, thread, buffers[0])
        steps = self._steps(n)
        groups = 4 // steps
        shape_w = mma.partition_shape_A((64, 16 * steps))
        frag_w = [mma.make_fragment_A(shape_w) for _ in range(2)]
        acc = [mma.make_fragment_C(mma.partition_shape_C((64, n))) for _ in range(config.m_blocks)]
        for mb in cutlass.range_constexpr(config.m_blocks):
            acc[mb].fill(0.0)
        t_codes, t_scales = self._thread_weights(thread, buffers[1], buffers[2])
        codes = cute.make_rmem_tensor((4,), Uint32)
        scales = cute.make_rmem_tensor((self._scale_words(),), Uint32)
        # In a register: an instruction has room for one constant, and this one's has another.
        scale_bits = Uint32(ptx.opaque(Int32(0x0FF00FF0)))
        units = self.k_blocks * config.m_blocks
        previous = stage
        cute.autovec_copy(t_codes[None, 0, 0, stage], codes)
        cute.autovec_copy(t_scales[None, 0, 0, stage], scales)
        for k_stage in cutlass.range(k_stages, unroll=1):
            # Uniform, so that WGMMA's descriptors need no moves to uniform registers.
            current = cute.arch.make_warp_uniform(stage)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase ^= 1
            for unit in cutlass.range_constexpr(units):
                kb, mb = unit // config.m_blocks, unit % config.m_blocks
                for group in cutlass.range_constexpr(groups):
                    frag = frag_w[(unit * groups + group) % 2]
                    words_w = cute.recast_tensor(frag, Uint32)
                    for i in cutlass.range_constexpr(steps):
                        step = group * steps + i
                        scale = step * 16 // self.scale_block
                        words = ptx.widen(codes[step], scales[scale // 2], scale_bits, scale % 2)
                        for j in cutlass.range_constexpr(4):
                            words_w[i * 4 + j] = words[j]
                    warpgroup.fence()
                    for i in cutlass.range_constexpr(steps):
                        cute.gemm(
                            mma,
                            acc[mb],
                            frag[None, None, i],
                            frag_x[None, None, kb * 4 + group * steps + i, current],
                            acc[mb],
                        )
                    warpgroup.commit_group()
                    if cutlass.const_expr(group == groups - 1):
                        if cutlass.const_expr(unit + 1 < units):
                            kb, mb = (unit + 1) // config.m_blocks, (unit + 1) % config.m_blocks
                            cute.autovec_copy(t_codes[None, kb, mb, current], codes)
                            cute.autovec_copy(t_scales[None, kb, mb, current], scales)
                        elif k_stage + 1 < k_stages:
                            cute.arch.mbarrier_wait(full + stage, phase)
                            cute.autovec_copy(t_codes[None, 0, 0, stage], codes)
                            cute.autovec_copy(t_scales[None, 0, 0, stage], scales)
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(unit == 0 and group == 0):
                        # Only this group is still in flight: the stage before it is free.
                        self._give_back(empty + previous, lane, k_stage > 0)
            previous = current
        warpgroup.wait_group(0)
        self._give_back(empty + previous, lane, Boolean(True))
        return acc, stage, phase

    def _rows_operand(self, mma, n: int, thread, s_x: cute.Pointer) -> cute.Tensor:
        """WGMMA's descriptors of n rows of x: (1, 1, steps of 16 columns, stages)."""
        atom = self._swizzle_atom()
        layout = cute.make_layout(
            ((8, n // 8), (64, self.k_blocks), self.stages),
            stride=(
                (64, 512),
                (1, self.tile_n_max * 64),
                self.k_blocks * self.tile_n_max * 64,
            ),
        )
        tile = cute.make_tensor(cute.recast_ptr(s_x, atom.inner, dtype=BFloat16), layout)
        return mma.make_fragment_B(mma.get_slice(thread).partition_B(tile))

    def _scale_words(self) -> int:
        """Of a thread in a 64 x 64 block: scales of two rows, two along K a word."""
        return 64 // self.scale_block // 2

    def _thread_weights(self, thread, s_codes: cute.Pointer, s_scales: cute.Pointer):
        """This thread's codes (4 words, k blocks, m blocks, stages) and scales (2 words, MXFP4 1,
        ...)."""
        config = self.config
        scale_words = self._scale_words()
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

        return (
            view(s_codes + thread * 4, 4, CODE_BLOCK_BYTES // 4),
            view(s_scales + thread // 4 * scale_words, scale_words, self.scale_block_bytes // 4),
        )
