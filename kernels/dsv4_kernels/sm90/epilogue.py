"""What becomes of a tile's sums: device code of the sm90 grouped GEMM.

The weights' warp runs ahead of the consumers and tells them of every tile, so that they never look
one up or wait for its factors: a note (rows, stages, first row or -1 where an earlier block stores
the tile, m tile), which the tile's first stage hands over, and the factors that its sums are
multiplied by, which it fetches once all of the tile has been asked for (`weighed`). A place for a
tile is free again when all consumer warps are done with it (`stored`).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from dsv4_kernels.sm90 import ptx as ptx
from dsv4_kernels.sm90.schedule import Sm90Schedule
from dsv4_kernels.sm90.spec import FLAGS, Sm90Config

NOTES = 2  # places
SUMS_AT_ONCE = 32  # partial sums that a thread asks for together: more would not fit in registers
STAGING_BYTES = 512  # of a buffer in which a warp turns what it stores; each has two
UNSCALE = 128.0  # the 2^7 that widened weights lack


class Sm90Epilogue(Sm90Schedule):
    """Methods over what the kernel is specialised on.

    spin_limit: for debugging, looks at a flag after which a thread that waits for partial sums
    traps, so that a hang ends in an error; None, as served, waits without a limit.
    """

    spin_limit: int | None = None

    config: Sm90Config
    fc1: bool
    m: int
    m_out: int
    m_blocks_tile: int
    factors: int

    def _note(self, s_notes: cute.Pointer, note: Int32) -> cute.Tensor:
        return cute.make_tensor((s_notes + note * 4).align(16), cute.make_layout(4))

    @cute.jit
    def _weigh(
        self,
        sources: tuple,
        expert: Int32,
        row_start: Int32,
        rows: Int32,
        factors: cute.Pointer,
    ):
        """The factors of a tile, by one warp."""
        global_scales, row_to_slot, slot_weights = sources
        lane = cute.arch.lane_idx()
        if cutlass.const_expr(self.fc1):
            # No branches, so that loads are in flight together: past the last row, the last row.
            row_groups = (self.factors - 2) // 32
            values = [Float32(0.0)] * row_groups
            slots = [Int32(0)] * row_groups
            for i in cutlass.range_constexpr(row_groups):
                slots[i] = (row_to_slot + row_start + cutlass.min(lane + 32 * i, rows - 1)).load()
            for i in cutlass.range_constexpr(row_groups):
                values[i] = (slot_weights + slots[i]).load()
            for i in cutlass.range_constexpr(row_groups):
                (factors + 2 + lane + 32 * i).store(values[i])
            if lane < 2:
                (factors + lane).store((global_scales + 2 * expert + lane).load() * UNSCALE)
        elif lane == 0:
            factors.store((global_scales + expert).load() * UNSCALE)

    @cute.jit
    def _finish(
        self,
        n: cutlass.Constexpr,
        acc: list,
        out: cute.Pointer,
        fix_up: tuple,
        limit: Float32,
        notes: tuple,
        s_staging: cute.Pointer,
        tile: Int32,
        tables: tuple,
    ):
        """What comes after the sums of this block's tile number `tile`."""
        tile = ptx.opaque(tile)
        s_notes, s_factors, weighed, _ = notes
        note = cute.make_rmem_tensor((4,), Int32)
        cute.autovec_copy(self._note(s_notes, tile % NOTES), note)
        rows, k_stages, row_start, m_tile = note[0], note[1], note[2], note[3]
        if row_start < 0:
            self._leave(n, acc, fix_up)
        else:
            if k_stages < self.k_stages:
                self._add_parts(n, acc, fix_up, k_stages, tables)
            warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
            cute.arch.mbarrier_wait(weighed + tile % NOTES, tile // NOTES % 2)
            self._store(
                n,
                acc,
                out,
                (row_start, rows, m_tile),
                limit,
                s_factors + tile % NOTES * self.factors,
                s_staging + warp * (2 * STAGING_BYTES),
            )

    @cute.jit
    def _partial(self, partials: cute.Pointer, bidx: Int32, mb: cutlass.Constexpr):
        """Where block bidx's thread of this number keeps its partial sums of row block mb."""
        config = self.config
        tidx, _, _ = cute.arch.thread_idx()
        first = (bidx * config.warpgroups + tidx // 128) * config.m_blocks + mb
        return partials + (first * (64 * self.tile_n_max) + tidx % 128 * 4)

    @cute.jit
    def _flag(self, flags: cute.Pointer, bidx: Int32):
        """Set when this warp of block bidx has left its partial sums."""
        return flags + (bidx * FLAGS + cute.arch.warp_idx())

    @cute.jit
    def _await(self, flag: cute.Pointer):
        spins = Int32(0)
        while ptx.get_flag(flag) == 0:
            if cutlass.const_expr(self.spin_limit is not None):
                spins += 1
                if spins == self.spin_limit:
                    ptx.trap()

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
            ptx.set_flag(self._flag(flags, bidx), Int32(1))

    @cute.jit
    def _add_parts(
        self,
        n: cutlass.Constexpr,
        acc: list,
        fix_up: tuple,
        k_first: Int32,
        tables: tuple,
    ):
        """Adds what the following blocks have of this tile, from stage k_first on, in their order.

        Their block indices are lower than this one's: they are resident or have ended. A lane waits
        for each, so that all are waited for at once; and of small tiles, the sums of several blocks
        are asked for together: a tile of a few rows may be cut into a dozen parts.
        """
        partials, flags = fix_up
        block, grid = self._this_block()
        bidx, _, _ = cute.arch.block_idx()
        lane = cute.arch.lane_idx()
        tile_end = self._cut(block + 1, tables) + (self.k_stages - k_first)
        parts = Int32(0)  # following blocks that begin inside this tile
        found = Int32(32)
        while found == 32:
            other = cutlass.min(block + 1 + parts + lane, grid)
            begins, ends = self._cut(other, tables), self._cut(other + 1, tables)
            is_part = other < grid and begins < tile_end
            if is_part and ends > begins:
                flag = self._flag(flags, bidx - (other - block) * self.cluster)
                self._await(flag)
                flag.store(Int32(0))
            cute.arch.sync_warp()
            found = cute.arch.popc(cute.arch.vote_ballot_sync(is_part))
            parts += found
        at_once = max(1, SUMS_AT_ONCE // (n // 2 * self.config.m_blocks))
        quads = [
            (g, mb, i)
            for g in range(at_once)
            for mb in range(self.config.m_blocks)
            for i in range(0, n // 2, 4)
        ]
        first = Int32(0)
        while first < parts:
            for start in cutlass.range_constexpr(0, len(quads), SUMS_AT_ONCE // 4):
                batch = quads[start : start + SUMS_AT_ONCE // 4]
                sums = []
                for g, mb, i in batch:
                    after = 1 + cutlass.min(first + g, parts - 1)
                    source = self._partial(partials, bidx - after * self.cluster, mb)
                    sums.append(ptx.load_partial(source + i * 128))
                for (g, mb, i), values in zip(batch, sums, strict=True):
                    other = block + 1 + first + g
                    ends, begins = self._cut(other + 1, tables), self._cut(other, tables)
                    self._add(acc[mb], i, values, first + g < parts and ends > begins)
            first += at_once

    @cute.jit
    def _add(self, acc: cute.Tensor, i: cutlass.Constexpr, values: tuple, is_part):
        """Four partial sums, if they are this tile's."""
        if is_part:
            for c in cutlass.range_constexpr(4):
                acc[i + c] = acc[i + c] + values[c]

    @cute.jit
    def _store(
        self,
        n: cutlass.Constexpr,
        acc: list,
        out: cute.Pointer,
        place: tuple,
        limit: Float32,
        factors: cute.Pointer,
        staging: cute.Pointer,
    ):
        """Accumulators -> out at (first row, rows, m tile).

        A warp turns 8 columns of 32 rows (fc2: 16 of 16) at a time in one of its two buffers, so
        that a thread stores 16 bytes of one row; between two uses of a buffer all lanes have met.
        """
        config = self.config
        row_start, rows, m_tile = place
        scale_g = factors.load()
        scalars = (scale_g, (factors + 1).load(), limit) if self.fc1 else ()
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        columns = 8 if self.fc1 else 16
        row = lane if self.fc1 else lane // 2  # of those at a time, that this lane stores
        source = staging + self._staged(row, 0 if self.fc1 else lane % 2)
        target = staging + self._staged(
            *((lane, 0) if self.fc1 else (lane // 16 * 8 + lane % 8, lane // 8 % 2))
        )
        groups = 32 // columns  # of 8 rows, at a time
        for mb in cutlass.range_constexpr(config.m_blocks):
            m_block = m_tile * self.m_blocks_tile + (warp // 4) * config.m_blocks + mb
            column = m_block * (4 * columns) + (warp % 4) * columns
            if cutlass.const_expr(not self.fc1):
                column += lane % 2 * 8
            if m_block < self.m // 64:
                to = out + (Int64(row_start + row) * self.m_out + column)
                for first in cutlass.range_constexpr(0, n, 8 * groups):
                    words = []
                    for j in cutlass.range_constexpr(groups):
                        # Past the last group: the last again, never stored.
                        group = min(first // 8 + j, n // 8 - 1)
                        i = group * 4
                        if cutlass.const_expr(self.fc1):
                            word = ptx.activate(acc[mb], i, group * 8, scalars, factors + 2, lane)
                            words.append(word)
                        else:
                            for c in cutlass.range_constexpr(0, 4, 2):
                                a, b = acc[mb][i + c] * scale_g, acc[mb][i + c + 1] * scale_g
                                words.append(ptx.pack_bf16(a, b))
                    buffer = first // (8 * groups) % 2 * STAGING_BYTES
                    ptx.store_transposed(target + buffer, words)
                    cute.arch.sync_warp()
                    if first + row < rows:
                        cute.autovec_copy(
                            self._chunk(source + buffer), self._chunk(to + first * self.m_out)
                        )

    def _staged(self, row, chunk):
        """Where 16 bytes of a row are in a buffer: no bank is met twice, by rows or by columns."""
        return row * 16 if self.fc1 else row * 32 + (chunk ^ (row // 4 % 2)) * 16

    def _chunk(self, pointer: cute.Pointer) -> cute.Tensor:
        return cute.make_tensor(
            cute.recast_ptr(pointer, dtype=Uint32).align(16), cute.make_layout(4)
        )
