"""The NVFP4 grouped GEMM on Hopper (sm_90a): W4A16, WGMMA with the weights from registers.

    fc1: h[row, i]   = w_row * silu(min(g, L)) * clamp(u, -L, L),   g = gs_g W1 x,  u = gs_u W3 x
    fc2: out[row, m] = gs W2 h[row]

One output tile is 64 * m_blocks * warpgroups weight rows (the M of WGMMA) by at most tile_n[-1]
rows of one expert (its N); the N that fits the rows at hand is chosen per tile from `tile_n`.
The live tiles, which a block finds from `counts` and `offsets` alone, times the stages of K are
one line of work, and each persistent block takes an equal stretch of it: whatever the routing,
all blocks end together. A stretch that begins inside a tile leaves its sums in `partials`, where
the block that began the tile adds them, in the order of K: the result does not depend on timing.

One producer warpgroup fills a ring of shared-memory stages, each tile_k wide: codes and block
scales by bulk copies (`weights_sm90.shuffle_sm90` made them contiguous), rows of x by TMA where
they lie one after another, or gathered by 16-byte cp.async. The consumer warpgroups widen codes to
bf16 in registers, which is exact, and multiply.

Widening. A word holds the eight codes of one thread in one m64k16 step; shifts and masks put each
code's sign at bit 15 and its three other bits at 8:6 of a bf16, which reads it as code * 2^-126.
A scale byte holds five exponent bits and three of mantissa; (byte << 4) | 0x7000 is the scale
times 2^119. Their product is a normal bf16, scale * code * 2^-7, without rounding: E2M1 has 2
significant bits and E4M3 has 4. The 2^7 is put back with the fp32 global scale.

What a step (m64, n, k16) of a warpgroup costs a multiprocessor, measured on an H200 with all in
shared memory and two warpgroups or more: WGMMA alone max(13, n / 2) cycles, whatever the groups and
their number in flight; with I other instructions a warp about max(n / 2, I + n / 4), as if WGMMA
took every second issue slot while it runs. Up to n = 90 it is therefore instructions that count.
"""

import math

import cutlass
import cutlass.cute as cute
from cuda.bindings import driver
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from dsv4_kernels import grouped_gemm_sm90_ptx as ptx
from dsv4_kernels.grouped_gemm_sm90_schedule import Sm90Schedule
from dsv4_kernels.grouped_gemm_sm90_spec import Gemm

CODE_BLOCK_BYTES = 2048  # codes of a 64 x 64 block of weights
SCALE_BLOCK_BYTES = 256  # its block scales
SMEM_BYTES = 227 * 1024
STAGING_PITCH = 48  # bytes a staged row takes: 32 of data, and no two of 8 rows share a bank
STAGING_ROWS = 32
TMA_ROWS = 16  # of a box
UNSCALE = 128.0  # 2^7, see above


class Dsv4GroupedGemmSm90(Sm90Schedule):
    """One grouped GEMM, compiled for one specialisation."""

    def __init__(self, gemm: Gemm):
        op, num_experts, m, k, top_k, gather, config = gemm
        fc1 = op == "fc1"
        assert op in ("fc1", "fc2"), op
        assert m % 64 == 0, f"{m} weight rows, must be a multiple of 64"
        assert k % config.tile_k == 0, f"K = {k}, must be a multiple of tile_k = {config.tile_k}"
        assert config.tile_n == tuple(sorted(config.tile_n)), config.tile_n
        self.config = config
        self.fc1 = fc1
        self.gather = gather
        self.num_experts = num_experts
        self.m, self.k, self.top_k = m, k, top_k
        self.m_out = m // 2 if fc1 else m
        # A box may reach past the last size's rows.
        self.tile_n_max = -(-config.tile_n[-1] // TMA_ROWS) * TMA_ROWS
        self.k_blocks = config.tile_k // 64
        self.k_stages = k // config.tile_k
        self.m_blocks_tile = config.m_blocks * config.warpgroups
        self.m_tiles = math.ceil(m / config.tile_m)
        # A warp's copy of what it multiplies sums by: two global scales, then a weight a row.
        self.factors = 2 + (self.tile_n_max if fc1 else 0)
        self.threads = 128 * (config.warpgroups + 1)
        self.experts_padded = max(32, 1 << (num_experts - 1).bit_length())
        self.stages = self._num_stages()
        assert self.stages >= 2, f"{config} leaves room for {self.stages} stages"

    @property
    def partial_floats(self) -> int:
        """Per thread block, of `partials`."""
        return self.config.tile_m * self.tile_n_max

    def _fixed_smem(self) -> int:
        warps = 4 * self.config.warpgroups
        staging = warps * STAGING_ROWS * STAGING_PITCH
        return staging + warps * self.factors * 4 + 3 * self.experts_padded * 4 + 4096

    def _num_stages(self) -> int:
        rows = self.tile_n_max * 128 * self.k_blocks
        weights = self.m_blocks_tile * self.k_blocks * (CODE_BLOCK_BYTES + SCALE_BLOCK_BYTES)
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
        partials (num_blocks * partial_floats,) float32; flags (num_blocks * 16,) int32, zeros
        before and after; limit of SwiGLU, infinity for none; num_rows: of x."""
        tma_atom, tma_x = None, None
        if cutlass.const_expr(not self.gather):
            box = (TMA_ROWS, 64)
            tma_atom, tma_x = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(),
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
            self.stages * self.m_blocks_tile * self.k_blocks * SCALE_BLOCK_BYTES // 4,
            128,
        )
        s_staging = self._allocate(smem, Uint8, warps * STAGING_ROWS * STAGING_PITCH, 128)
        s_factors = self._allocate(smem, Float32, warps * self.factors, 16)
        s_first_tile = self._allocate(smem, Int32, self.experts_padded + 1, 16)
        s_counts = self._allocate(smem, Int32, self.experts_padded, 16)
        s_offsets = self._allocate(smem, Int32, self.experts_padded, 16)
        full = self._allocate(smem, Int64, self.stages, 8)
        landed = self._allocate(smem, Int64, self.stages, 8)
        empty = self._allocate(smem, Int64, self.stages, 8)
        if tidx == 0:
            for stage in cutlass.range_constexpr(self.stages):
                # The warp that loads weights and the one that passes on rows; 64 gather these.
                cute.arch.mbarrier_init(full + stage, 2 if self.gather else 1)
                cute.arch.mbarrier_init(landed + stage, 64)
                cute.arch.mbarrier_init(empty + stage, warps)
        cute.arch.mbarrier_init_fence()

        # Phase 2: which tiles are alive. fc2 comes right after fc1, which waited for the layout:
        # it waits for fc1 only where it asks for the first rows, its weights already on their way.
        if cutlass.const_expr(self.fc1):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for i in cutlass.range_constexpr(math.ceil(self.experts_padded / self.threads)):
            expert = tidx + i * self.threads
            if expert < self.experts_padded:
                count = Int32(0)
                offset = Int32(0)
                if expert < self.num_experts:
                    count = (counts + expert).load()
                    offset = (offsets + expert).load()
                (s_counts + expert).store(count)
                (s_offsets + expert).store(offset)
        cute.arch.sync_threads()
        if warp == 0:
            self._scan_tiles(s_counts, s_first_tile)
        cute.arch.sync_threads()

        # Phase 3: roles.
        tables = (s_first_tile, s_counts, s_offsets)
        producer_registers, consumer_registers = self._registers()
        if warp >= warps:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp == warps:
                self._load_weights(
                    codes,
                    block_scales,
                    tma_atom,
                    tma_x,
                    (s_x, s_codes, s_scales),
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
                global_scales,
                out,
                row_to_slot,
                slot_weights,
                (partials, flags),
                limit,
                (s_x, s_codes, s_scales, s_staging, s_factors),
                full,
                empty,
                tables,
            )

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
        buffers: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        tables: tuple,
    ):
        """One warp asks for every stage's codes and scales, and for its rows if they need no
        gathering; those of the next expert, or past the end as zeros, where a box holds more."""
        s_x, s_codes, s_scales = buffers
        m_blocks_total = self.m // 64
        k_blocks_total = self.k // 64
        stage_bytes = self.m_blocks_tile * self.k_blocks * (CODE_BLOCK_BYTES + SCALE_BLOCK_BYTES)
        is_first = Boolean(True)
        whole, first, end, _, _ = self._share(tables)
        position = Int32(0) if whole > 0 else first
        stage = Int32(0)
        phase = Int32(1)
        while position < end:
            expert, row_start, rows, m_tile = self._locate(self._tile_at(position, whole), tables)
            k_first = position % self.k_stages
            k_end = cutlass.min(Int32(self.k_stages), k_first + end - position)
            position += k_end - k_first
            if position == whole:
                position = first
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
                            s_scales + in_stage * (SCALE_BLOCK_BYTES // 4),
                            block_scales + block * SCALE_BLOCK_BYTES,
                            Int32(self.k_blocks * SCALE_BLOCK_BYTES),
                            full + stage,
                        )
                cute.arch.sync_warp()
                if cutlass.const_expr(not self.fc1):
                    if is_first:
                        cute.arch.griddepcontrol_wait()
                        is_first = False
                if cutlass.const_expr(not self.gather):
                    for box in cutlass.range(boxes, unroll=1):
                        for kb in cutlass.range_constexpr(self.k_blocks):
                            cute.copy(
                                tma_atom,
                                t_rows[None, box, k_stage * self.k_blocks + kb],
                                t_boxes[None, box, kb, stage],
                                tma_bar_ptr=full + stage,
                            )
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase ^= 1
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
        whole, first, end, _, _ = self._share(tables)
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
                    source = row_start + row
                    if cutlass.const_expr(self.fc1):
                        source = (row_to_slot + source).load() // self.top_k
                    sources[i] = source * (self.k // 8)
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
        whole, first, end, _, _ = self._share(tables)
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
        global_scales: cute.Pointer,
        out: cute.Pointer,
        row_to_slot: cute.Pointer,
        slot_weights: cute.Pointer,
        fix_up: tuple,
        limit: Float32,
        buffers: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        tables: tuple,
    ):
        config = self.config
        _, _, _, s_staging, s_factors = buffers
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        factors = s_factors + warp * self.factors
        whole, first, end, _, _ = self._share(tables)
        position = Int32(0) if whole > 0 else first
        stage = Int32(0)
        phase = Int32(0)
        while position < end:
            k_first = position % self.k_stages
            k_end = cutlass.min(Int32(self.k_stages), k_first + end - position)
            expert, row_start, rows, _ = self._locate(self._tile_at(position, whole), tables)
            # Every warp keeps its own copy of what the epilogue multiplies by: no barrier.
            cute.arch.sync_warp()
            if cutlass.const_expr(self.fc1):
                for i in cutlass.range_constexpr(math.ceil(self.tile_n_max / 32)):
                    row = lane + 32 * i
                    if row < rows:
                        slot = (row_to_slot + row_start + row).load()
                        (factors + 2 + row).store((slot_weights + slot).load())
                if lane < 2:
                    (factors + lane).store((global_scales + 2 * expert + lane).load() * UNSCALE)
            elif lane == 0:
                factors.store((global_scales + expert).load() * UNSCALE)
            cute.arch.sync_warp()
            for v in cutlass.range_constexpr(len(config.tile_n)):
                n = config.tile_n[v]
                above = config.tile_n[v - 1] if v > 0 else 0
                if rows > above and rows <= n:
                    acc, stage, phase = self._multiply(
                        n, k_end - k_first, buffers, full, empty, stage, phase
                    )
                    self._finish(n, acc, out, fix_up, limit, factors, s_staging, position, tables)
            position += k_end - k_first
            if position == whole:
                position = first

    @cute.jit
    def _finish(
        self,
        n: cutlass.Constexpr,
        acc: list,
        out: cute.Pointer,
        fix_up: tuple,
        limit: Float32,
        factors: cute.Pointer,
        s_staging: cute.Pointer,
        position: Int32,
        tables: tuple,
    ):
        """What comes after a tile's sums. It looks the tile up again: registers are scarce."""
        position = ptx.opaque(position)
        whole, _, end, length, longer = self._share(tables)
        if position % self.k_stages > 0:
            self._leave(n, acc, fix_up)
        else:
            if end - position < self.k_stages:
                self._gather(n, acc, fix_up, end - position, length, longer)
            _, row_start, rows, m_tile = self._locate(self._tile_at(position, whole), tables)
            warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
            staging = s_staging + warp * (STAGING_ROWS * STAGING_PITCH)
            self._store(n, acc, out, row_start, rows, m_tile, limit, factors, staging)

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
        """The next k_stages of one tile -> (accumulators, one a 64-row block; stage; phase).

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
        # Two warps a scheduler hide less: theirs is a block of four steps, where registers allow.
        steps = 4 if config.warpgroups < 3 and config.m_blocks * n <= 160 else 2
        groups = 4 // steps
        shape_w = mma.partition_shape_A((64, 16 * steps))
        frag_w = [mma.make_fragment_A(shape_w) for _ in range(2)]
        acc = [mma.make_fragment_C(mma.partition_shape_C((64, n))) for _ in range(config.m_blocks)]
        for mb in cutlass.range_constexpr(config.m_blocks):
            acc[mb].fill(0.0)
        t_codes, t_scales = self._thread_weights(thread, buffers[1], buffers[2])
        codes = cute.make_rmem_tensor((4,), Uint32)
        scales = cute.make_rmem_tensor((2,), Uint32)
        # In a register: an instruction has room for one constant, and this one's has another.
        scale_bits = Uint32(ptx.opaque(Int32(0x0FF00FF0)))
        units = self.k_blocks * config.m_blocks
        previous = stage
        cute.arch.mbarrier_wait(full + stage, phase)
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
                        words = ptx.widen(codes[step], scales[step // 2], scale_bits, step % 2)
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
                        if k_stage > 0 and lane == 0:
                            cute.arch.mbarrier_arrive(empty + previous)
            previous = current
        warpgroup.wait_group(0)
        if lane == 0:
            cute.arch.mbarrier_arrive(empty + previous)
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

    def _thread_weights(self, thread, s_codes: cute.Pointer, s_scales: cute.Pointer):
        """This thread's codes (4 words, k blocks, m blocks, stages) and scales (2 words, ...)."""
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

        return (
            view(s_codes + thread * 4, 4, CODE_BLOCK_BYTES // 4),
            view(s_scales + thread // 4 * 2, 2, SCALE_BLOCK_BYTES // 4),
        )

    @cute.jit
    def _partial(self, partials: cute.Pointer, block: Int32, mb: cutlass.Constexpr):
        """Where block's thread of this number keeps its partial sums of row block mb."""
        config = self.config
        tidx, _, _ = cute.arch.thread_idx()
        first = (block * config.warpgroups + tidx // 128) * config.m_blocks + mb
        return partials + (first * (64 * self.tile_n_max) + tidx % 128 * 4)

    @cute.jit
    def _leave(self, n: cutlass.Constexpr, acc: list, fix_up: tuple):
        """The sums of a tile that an earlier block began."""
        partials, flags = fix_up
        bidx, _, _ = cute.arch.block_idx()
        for mb in cutlass.range_constexpr(self.config.m_blocks):
            target = self._partial(partials, bidx, mb)
            for i in cutlass.range_constexpr(0, n // 2, 4):
                ptx.store_partial(
                    target + i * 128, acc[mb][i], acc[mb][i + 1], acc[mb][i + 2], acc[mb][i + 3]
                )
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            ptx.set_flag(flags + (bidx * 16 + cute.arch.warp_idx()), Int32(1))

    @cute.jit
    def _gather(
        self,
        n: cutlass.Constexpr,
        acc: list,
        fix_up: tuple,
        k_first: Int32,
        length: Int32,
        longer: Int32,
    ):
        """Adds what the following blocks have of this tile, from stage k_first on."""
        partials, flags = fix_up
        block, _, _ = cute.arch.block_idx()
        while k_first < self.k_stages:
            block += 1
            flag = flags + (block * 16 + cute.arch.warp_idx())
            if cute.arch.lane_idx() == 0:
                while ptx.get_flag(flag) == 0:
                    pass
            cute.arch.sync_warp()
            for mb in cutlass.range_constexpr(self.config.m_blocks):
                source = self._partial(partials, block, mb)
                for i in cutlass.range_constexpr(0, n // 2, 4):
                    values = ptx.load_partial(source + i * 128)
                    for c in cutlass.range_constexpr(4):
                        acc[mb][i + c] = acc[mb][i + c] + values[c]
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                flag.store(Int32(0))
            k_first += length + Int32(block < longer)

    @cute.jit
    def _store(
        self,
        n: cutlass.Constexpr,
        acc: list,
        out: cute.Pointer,
        row_start: Int32,
        rows: Int32,
        m_tile: Int32,
        limit: Float32,
        factors: cute.Pointer,
        staging: cute.Pointer,
    ):
        """Accumulators -> out, through the warp's own staging: 16 (fc1: 8) columns of 32 rows."""
        config = self.config
        scale_g = factors.load()
        scalars = (scale_g, (factors + 1).load(), limit) if self.fc1 else ()
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        matrix_row = staging + (lane % 8) * STAGING_PITCH + (lane // 8 % 2) * 16
        columns = 8 if self.fc1 else 16
        chunks = columns // 8  # of 16 bytes in a staged row
        for mb in cutlass.range_constexpr(config.m_blocks):
            m_block = m_tile * self.m_blocks_tile + (warp // 4) * config.m_blocks + mb
            column = m_block * (4 * columns) + (warp % 4) * columns
            if m_block < self.m // 64:
                for first in cutlass.range_constexpr(0, n, STAGING_ROWS):
                    staged = min(STAGING_ROWS, n - first)
                    cute.arch.sync_warp()
                    for j in cutlass.range_constexpr(staged // 8):
                        i = (first // 8 + j) * 4
                        if cutlass.const_expr(self.fc1):
                            a = ptx.activate(acc[mb], i, first + j * 8, scalars, factors + 2, lane)
                            b = a
                        else:
                            a = ptx.pack_bf16(acc[mb][i] * scale_g, acc[mb][i + 1] * scale_g)
                            b = ptx.pack_bf16(acc[mb][i + 2] * scale_g, acc[mb][i + 3] * scale_g)
                        ptx.store_transposed(matrix_row + j * 8 * STAGING_PITCH, a, b)
                    cute.arch.sync_warp()
                    for i in cutlass.range_constexpr(math.ceil(staged * chunks / 32)):
                        item = lane + 32 * i
                        row = item // chunks
                        chunk = item % chunks
                        if row < staged and first + row < rows:
                            source = cute.make_tensor(
                                cute.recast_ptr(
                                    staging + row * STAGING_PITCH + chunk * 16, dtype=Uint32
                                ).align(16),
                                cute.make_layout(4),
                            )
                            target = cute.make_tensor(
                                cute.recast_ptr(
                                    out
                                    + (
                                        Int64(row_start + first + row) * self.m_out
                                        + (column + chunk * 8)
                                    ),
                                    dtype=Uint32,
                                ).align(16),
                                cute.make_layout(4),
                            )
                            cute.autovec_copy(source, target)
