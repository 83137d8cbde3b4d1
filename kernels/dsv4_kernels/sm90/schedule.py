"""Which work is whose: device code that the roles of an sm90 grouped GEMM share.

Row tiles are numbered expert by expert; times the tiles of weight rows they are all tiles, and a
tile has k_stages stages. With `grid` thread blocks, whole rounds of `grid` tiles go one tile to a
block, so that blocks at work together share experts in L2; what is left is one line of stages, cut
into a stretch for every block (stream-K). The blocks of a cluster do the same stages, each with its
own share of a tile's weight rows: here they are one block, and its tile is as high as theirs
together.

Blocks are numbered from the last of the grid to the first. One that began a tile adds the partial
sums of those after it, so it waits only for lower block indices. GPUs start those first, though
CUDA does not promise it: no block waits for one that is not resident yet, however few
multiprocessors other kernels leave.

Small tiles take the time of their weights: all the same, so less than a round is left and its
stretches are equal. Large ones take longer the more rows they have (`by_cost`): a round more is
left, and cut where the cost of every block's whole tiles and stretch comes out equal.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32

MOST_BLOCKS = 256  # in a grid


class Sm90Schedule:
    """Methods over experts_padded (a power of two), tile_n_min, tile_n_max, m_tiles, k_stages.

    Tables are in shared memory: counts, offsets, and the first row tile of each expert with their
    total at the end; by_cost, also the cost of an expert's tile, the cost of all row tiles before
    the expert's first with their total at the end, and grid + 1 cuts.
    """

    num_experts: int
    experts_padded: int
    tile_n_min: int
    tile_n_max: int
    m_tiles: int
    k_stages: int
    threads: int
    by_cost: bool
    cluster: int

    def _table_bytes(self) -> int:
        entries = 3 * self.experts_padded + 1
        if self.by_cost:
            entries += 2 * self.experts_padded + 1 + MOST_BLOCKS + 1
        return 4 * entries

    def _allocate_tables(self, allocate) -> tuple:
        """allocate(number of Int32)."""
        experts = self.experts_padded
        sizes = [experts + 1, experts, experts]
        if self.by_cost:
            sizes += [experts, experts + 1, MOST_BLOCKS + 1]
        return tuple(allocate(size) for size in sizes)

    @cute.jit
    def _this_block(self):
        """Its number, and how many there are, those of a cluster counted as one; the grid's last
        has number 0."""
        bidx, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        grid = grid // self.cluster
        return grid - 1 - bidx // self.cluster, grid

    @cute.jit
    def _plan(self, counts: cute.Pointer, offsets: cute.Pointer, tables: tuple):
        """Fills the tables; by all threads of a block."""
        s_counts, s_offsets = tables[1:3]
        tidx, _, _ = cute.arch.thread_idx()
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
        if cutlass.const_expr(self.by_cost):
            if tidx < MOST_BLOCKS:
                (tables[5] + tidx).store(Int32(0))
        cute.arch.sync_threads()
        if tidx < 32:
            self._scan_tiles(tables)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.by_cost):
            self._add_whole_tiles(tables)
            cute.arch.sync_threads()
            if tidx < 32:
                self._cut_costs(tables)
            cute.arch.sync_threads()
            if tidx <= self._this_block()[1]:
                self._cut_stages(tables, tidx)
            cute.arch.sync_threads()

    def _tile_cost(self) -> int:
        """Of a large tile, in rows, besides its rows: fitted to cycles on an H200. The more rows,
        the less of widening shows beside the tensor cores."""
        return 15 if self.tile_n_max > 112 else 65

    @cute.jit
    def _parts(self, count: Int32):
        """Rows of an expert -> (tiles, rows of each): equal, so that no tile is nearly empty."""
        parts = (count + self.tile_n_max - 1) // self.tile_n_max
        return parts, ((count + parts - 1) // cutlass.max(parts, 1) + 7) // 8 * 8

    @cute.jit
    def _scan_tiles(self, tables: tuple):
        """What comes before every expert; by one warp, each lane for a run of experts."""
        s_first_tile, s_counts = tables[:2]
        run = self.experts_padded // 32
        lane = cute.arch.lane_idx()
        tiles = [Int32(0)] * run
        costs = [Int32(0)] * run
        all_tiles = Int32(0)
        all_costs = Int32(0)
        for i in cutlass.range_constexpr(run):
            expert = lane * run + i
            parts, rows = self._parts((s_counts + expert).load())
            tiles[i], costs[i] = all_tiles, all_costs
            all_tiles += parts
            if cutlass.const_expr(self.by_cost):
                cost = cutlass.max(rows, Int32(self.tile_n_min)) + self._tile_cost()
                (tables[3] + expert).store(cost)
                all_costs += parts * cost
        before = self._sum_of_lanes_before(all_tiles, s_first_tile + self.experts_padded)
        for i in cutlass.range_constexpr(run):
            (s_first_tile + lane * run + i).store(before + tiles[i])
        if cutlass.const_expr(self.by_cost):
            before = self._sum_of_lanes_before(all_costs, tables[4] + self.experts_padded)
            for i in cutlass.range_constexpr(run):
                (tables[4] + lane * run + i).store(before + costs[i])

    @cute.jit
    def _sum_of_lanes_before(self, value: Int32, s_total: cute.Pointer):
        lane = cute.arch.lane_idx()
        total = value
        for i in cutlass.range_constexpr(5):
            left = cute.arch.shuffle_sync_up(total, 1 << i, mask_and_clamp=0)
            if lane >= 1 << i:
                total += left
        if lane == 31:
            s_total.store(total)
        return total - value

    @cute.jit
    def _add_whole_tiles(self, tables: tuple):
        """The cost of every block's whole tiles, into the cuts; each thread for a run of tiles."""
        s_first_tile, s_cost, s_cuts = tables[0], tables[3], tables[5]
        tidx, _, _ = cute.arch.thread_idx()
        _, grid = self._this_block()
        tiles = self._rounds(tables) * grid
        run = (tiles + self.threads - 1) // self.threads
        tile = tidx * run
        end = cutlass.min(tile + run, tiles)
        if tile < end:
            block = tile % grid
            expert = self._last_not_above(s_first_tile, tile // self.m_tiles)
            while tile < end:
                while (s_first_tile + expert + 1).load() * self.m_tiles <= tile:
                    expert += 1
                cute.arch.atomic_add(s_cuts + block, (s_cost + expert).load(), scope="cta")
                tile += 1
                block += 1
                if block == grid:
                    block = Int32(0)

    @cute.jit
    def _cut_costs(self, tables: tuple):
        """Costs of whole tiles -> cost of all tiles before a block's stretch; by one warp."""
        s_cost_before, s_cuts = tables[4:6]
        lane = cute.arch.lane_idx()
        _, grid = self._this_block()
        run = MOST_BLOCKS // 32
        cost = (s_cost_before + self.experts_padded).load() * self.m_tiles
        own = Int32(0)
        for i in cutlass.range_constexpr(run):
            own += (s_cuts + lane * run + i).load()
        before = self._sum_of_lanes_before(own, s_cuts + MOST_BLOCKS)
        cute.arch.sync_warp()
        # The line begins after all whole tiles.
        line = (s_cuts + MOST_BLOCKS).load()
        most = line
        cuts = [Int32(0)] * run
        for i in cutlass.range_constexpr(run):
            block = lane * run + i
            # A block whose whole tiles cost more than its share has no stretch.
            share = cost // grid * block + cutlass.min(block, cost % grid)
            most = cutlass.max(most, cutlass.min(line + share - before, cost))
            cuts[i] = most
            before += (s_cuts + block).load()
        for i in cutlass.range_constexpr(5):
            left = cute.arch.shuffle_sync_up(most, 1 << i, mask_and_clamp=0)
            if lane >= 1 << i:
                most = cutlass.max(most, left)
        most = cute.arch.shuffle_sync_up(most, 1, mask_and_clamp=0)
        for i in cutlass.range_constexpr(run):
            block = lane * run + i
            cut = cuts[i]
            if lane > 0:
                cut = cutlass.max(cut, most)
            if block >= grid:
                cut = cost
            (s_cuts + block).store(cut)
        if lane == 31:
            (s_cuts + MOST_BLOCKS).store(cost)

    @cute.jit
    def _cut_stages(self, tables: tuple, block: Int32):
        """The cost before a block's stretch -> its position."""
        s_first_tile, s_cost, s_cost_before, s_cuts = tables[0], tables[3], tables[4], tables[5]
        cost = (s_cuts + block).load()
        tiles = (s_first_tile + self.experts_padded).load() * self.m_tiles
        stages = tiles * self.k_stages
        if cost < (s_cost_before + self.experts_padded).load() * self.m_tiles:
            expert = self._last_not_above(s_cost_before, cost // self.m_tiles)
            cost -= (s_cost_before + expert).load() * self.m_tiles
            tile_cost = (s_cost + expert).load()
            tile = (s_first_tile + expert).load() * self.m_tiles + cost // tile_cost
            stages = tile * self.k_stages + cost % tile_cost * self.k_stages // tile_cost
        rounds = self._rounds(tables)
        _, grid = self._this_block()
        (s_cuts + block).store(stages - rounds * (grid - 1) * self.k_stages)

    @cute.jit
    def _rounds(self, tables: tuple):
        """Tiles that every block has whole."""
        _, grid = self._this_block()
        rounds = (tables[0] + self.experts_padded).load() * self.m_tiles // grid
        if cutlass.const_expr(self.by_cost):
            rounds = cutlass.max(rounds - 1, Int32(0))
        return rounds

    @cute.jit
    def _cut(self, block: Int32, tables: tuple):
        """Where a block's stretch begins, in stages after a block's whole tiles."""
        if cutlass.const_expr(self.by_cost):
            cut = (tables[5] + block).load()
        else:
            _, grid = self._this_block()
            tiles = (tables[0] + self.experts_padded).load() * self.m_tiles
            left = tiles % grid * self.k_stages
            cut = block * (left // grid) + cutlass.min(block, left % grid)
            cut += tiles // grid * self.k_stages
        return cut

    @cute.jit
    def _share(self, tables: tuple):
        """This block's work, in stages: whole tiles block, block + grid, ... up to `whole`, then
        the stretch [first, end) of what is left of all tiles. -> (whole, first, end)"""
        block, _ = self._this_block()
        whole = self._rounds(tables) * self.k_stages
        return whole, self._cut(block, tables), self._cut(block + 1, tables)

    @cute.jit
    def _tile_at(self, position: Int32, whole: Int32):
        """The tile that a position of this block's work is in."""
        block, grid = self._this_block()
        step = position // self.k_stages
        tile = block + step * grid
        if position >= whole:
            steps = whole // self.k_stages
            tile = steps * grid + (step - steps)
        return tile

    @cute.jit
    def _last_not_above(self, s_table: cute.Pointer, value: Int32):
        """The last entry of an ascending table of experts_padded that is not above a value."""
        found = Int32(0)
        for i in cutlass.range_constexpr(self.experts_padded.bit_length() - 1):
            candidate = found + (self.experts_padded >> (i + 1))
            if (s_table + candidate).load() <= value:
                found = candidate
        return found

    @cute.jit
    def _locate(self, tile: Int32, tables: tuple):
        """Tile index -> (expert, first row, rows, m tile). Tiles of one expert are neighbours."""
        s_first_tile, s_counts, s_offsets = tables[:3]
        row_tile = tile // self.m_tiles
        expert = self._last_not_above(s_first_tile, row_tile)
        count = (s_counts + expert).load()
        _, rows_per_tile = self._parts(count)
        start = (row_tile - (s_first_tile + expert).load()) * rows_per_tile
        rows = cutlass.min(rows_per_tile, count - start)
        return expert, (s_offsets + expert).load() + start, rows, tile % self.m_tiles
