"""Stream-K: which tiles a CTA works on; device code that all roles of an sm90 grouped GEMM share.

An expert's rows are cut into row tiles; row tiles (numbered expert by expert) times tiles of weight
rows are all output tiles, each of k_stages pipeline stages. Work is dealt to units: clusters, or
CTAs where cluster is 1. A cluster's CTAs walk the same stages; a unit's tile has the weight rows of
all of them.

Full waves of tiles are data-parallel: unit u takes tiles u, u + num_units, ..., so that units which
run together share experts in L2. The stages of the remaining tiles form one line, cut into a
stream-K range per unit. A unit whose range begins inside a tile spills its partial sums; the unit
that began the tile adds them.

Units are numbered from the last CTA of the grid to the first, so a unit waits only for lower
block indices. The hardware starts those first, though CUDA does not promise it: no CTA waits for
one that is not yet resident, however few multiprocessors other kernels leave.

Small tiles are bound by their weights and cost the same: less than a wave is stream-K, in ranges of
equal length. Large ones cost more the more rows they have (`by_cost`): one wave more is stream-K,
and its cuts equalise the cost of every unit's data-parallel tiles plus its range.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

MOST_UNITS = 256  # in a grid


class Tables(NamedTuple):
    """Int32 in shared memory, (experts_padded,) each unless noted; the last three by_cost only."""

    first_tile: cute.Pointer  # (experts_padded + 1,) row tiles before the expert; last: the total
    counts: cute.Pointer
    offsets: cute.Pointer
    tile_cost: cute.Pointer = None  # of one row tile of the expert
    cost_before: cute.Pointer = None  # (experts_padded + 1,) of row tiles; last: the total
    cuts: cute.Pointer = None  # (MOST_UNITS + 1,) where each unit's range begins


class Sm90Schedule:
    """Owns what the schedule depends on; subclasses read it and add what their roles need."""

    def __init__(
        self,
        *,
        num_experts: int,
        tile_n: tuple[int, ...],
        m_tiles: int,
        k_stages: int,
        threads: int,
        cluster: int,
    ):
        """tile_n ascending; m_tiles: tiles of weight rows, of a unit each; threads and cluster of
        the launch."""
        self.num_experts = num_experts
        self.experts_padded = max(32, 1 << (num_experts - 1).bit_length())
        self.tile_n_min, self.tile_n_max = tile_n[0], tile_n[-1]
        self.by_cost = self.tile_n_max > 64
        self.m_tiles = m_tiles
        self.k_stages = k_stages
        self.threads = threads
        self.cluster = cluster

    def _table_bytes(self) -> int:
        entries = 3 * self.experts_padded + 1
        if self.by_cost:
            entries += 2 * self.experts_padded + 1 + MOST_UNITS + 1
        return 4 * entries

    def _allocate_tables(self, allocate: Callable[[int], cute.Pointer]) -> Tables:
        """allocate(number of Int32) -> shared memory."""
        experts = self.experts_padded
        sizes = [experts + 1, experts, experts]
        if self.by_cost:
            sizes += [experts, experts + 1, MOST_UNITS + 1]
        return Tables(*(allocate(size) for size in sizes))

    @cute.jit
    def _this_unit(self):
        """(this CTA's unit, number of units); unit 0 has the grid's last CTA."""
        bidx, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        num_units = grid // self.cluster
        return num_units - 1 - bidx // self.cluster, num_units

    @cute.jit
    def _plan(self, counts: cute.Pointer, offsets: cute.Pointer, tables: Tables):
        """Fills the tables; all threads of a CTA, which meet before it returns."""
        tidx, _, _ = cute.arch.thread_idx()
        for i in cutlass.range_constexpr(math.ceil(self.experts_padded / self.threads)):
            expert = tidx + i * self.threads
            if expert < self.experts_padded:
                count = Int32(0)
                offset = Int32(0)
                if expert < self.num_experts:
                    count = (counts + expert).load()
                    offset = (offsets + expert).load()
                (tables.counts + expert).store(count)
                (tables.offsets + expert).store(offset)
        if cutlass.const_expr(self.by_cost):
            if tidx < MOST_UNITS:
                (tables.cuts + tidx).store(Int32(0))
        cute.arch.sync_threads()
        if tidx < 32:
            self._scan_tiles(tables)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.by_cost):
            self._sum_whole_tiles(tables)
            cute.arch.sync_threads()
            if tidx < 32:
                self._cut_costs(tables)
            cute.arch.sync_threads()
            if tidx <= self._this_unit()[1]:
                self._cut_stages(tables, tidx)
            cute.arch.sync_threads()

    def _tile_cost(self) -> int:
        """Fixed cost of a large tile, in rows: fitted to cycles on an H200. The more rows, the more
        of widening is hidden behind the tensor cores."""
        return 15 if self.tile_n_max > 112 else 65

    @cute.jit
    def _parts(self, count: Int32):
        """Rows of an expert -> (row tiles, rows of each), evened out: no tile is nearly empty."""
        parts = (count + self.tile_n_max - 1) // self.tile_n_max
        return parts, ((count + parts - 1) // cutlass.max(parts, 1) + 7) // 8 * 8

    @cute.jit
    def _scan_tiles(self, tables: Tables):
        """Exclusive prefix sums of row tiles and their costs over experts; one warp, a lane for a
        run of experts."""
        run = self.experts_padded // 32
        lane = cute.arch.lane_idx()
        tiles = [Int32(0)] * run
        costs = [Int32(0)] * run
        all_tiles = Int32(0)
        all_costs = Int32(0)
        for i in cutlass.range_constexpr(run):
            expert = lane * run + i
            parts, rows = self._parts((tables.counts + expert).load())
            tiles[i], costs[i] = all_tiles, all_costs
            all_tiles += parts
            if cutlass.const_expr(self.by_cost):
                cost = cutlass.max(rows, Int32(self.tile_n_min)) + self._tile_cost()
                (tables.tile_cost + expert).store(cost)
                all_costs += parts * cost
        before = self._exclusive_sum(all_tiles, tables.first_tile + self.experts_padded)
        for i in cutlass.range_constexpr(run):
            (tables.first_tile + lane * run + i).store(before + tiles[i])
        if cutlass.const_expr(self.by_cost):
            before = self._exclusive_sum(all_costs, tables.cost_before + self.experts_padded)
            for i in cutlass.range_constexpr(run):
                (tables.cost_before + lane * run + i).store(before + costs[i])

    @cute.jit
    def _exclusive_sum(self, value: Int32, s_total: cute.Pointer):
        """Sum of value over the lanes before this one; that of all lanes goes to s_total."""
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
    def _sum_whole_tiles(self, tables: Tables):
        """cuts[unit] = cost of the unit's data-parallel tiles; a thread adds a run of tiles."""
        tidx, _, _ = cute.arch.thread_idx()
        _, num_units = self._this_unit()
        tiles = self._waves(tables) * num_units
        run = (tiles + self.threads - 1) // self.threads
        tile = tidx * run
        end = cutlass.min(tile + run, tiles)
        if tile < end:
            unit = tile % num_units
            expert = self._last_not_above(tables.first_tile, tile // self.m_tiles)
            while tile < end:
                while (tables.first_tile + expert + 1).load() * self.m_tiles <= tile:
                    expert += 1
                cute.arch.atomic_add(
                    tables.cuts + unit, (tables.tile_cost + expert).load(), scope="cta"
                )
                tile += 1
                unit += 1
                if unit == num_units:
                    unit = Int32(0)

    @cute.jit
    def _cut_costs(self, tables: Tables):
        """cuts: cost of a unit's data-parallel tiles -> cost of all tiles before its range; one
        warp."""
        lane = cute.arch.lane_idx()
        _, num_units = self._this_unit()
        run = MOST_UNITS // 32
        cost = (tables.cost_before + self.experts_padded).load() * self.m_tiles
        own = Int32(0)
        for i in cutlass.range_constexpr(run):
            own += (tables.cuts + lane * run + i).load()
        before = self._exclusive_sum(own, tables.cuts + MOST_UNITS)
        cute.arch.sync_warp()
        # The line begins after all data-parallel tiles.
        line = (tables.cuts + MOST_UNITS).load()
        most = line
        cuts = [Int32(0)] * run
        for i in cutlass.range_constexpr(run):
            unit = lane * run + i
            # A unit whose data-parallel tiles cost more than its share has an empty range.
            share = cost // num_units * unit + cutlass.min(unit, cost % num_units)
            most = cutlass.max(most, cutlass.min(line + share - before, cost))
            cuts[i] = most
            before += (tables.cuts + unit).load()
        for i in cutlass.range_constexpr(5):
            left = cute.arch.shuffle_sync_up(most, 1 << i, mask_and_clamp=0)
            if lane >= 1 << i:
                most = cutlass.max(most, left)
        most = cute.arch.shuffle_sync_up(most, 1, mask_and_clamp=0)
        for i in cutlass.range_constexpr(run):
            unit = lane * run + i
            cut = cuts[i]
            if lane > 0:
                cut = cutlass.max(cut, most)
            if unit >= num_units:
                cut = cost
            (tables.cuts + unit).store(cut)
        if lane == 31:
            (tables.cuts + MOST_UNITS).store(cost)

    @cute.jit
    def _cut_stages(self, tables: Tables, unit: Int32):
        """cuts[unit]: cost of all tiles before the range -> its first position in the unit's work
        (see `_share`)."""
        cost = (tables.cuts + unit).load()
        tiles = (tables.first_tile + self.experts_padded).load() * self.m_tiles
        stages = tiles * self.k_stages
        if cost < (tables.cost_before + self.experts_padded).load() * self.m_tiles:
            expert = self._last_not_above(tables.cost_before, cost // self.m_tiles)
            cost -= (tables.cost_before + expert).load() * self.m_tiles
            tile_cost = (tables.tile_cost + expert).load()
            tile = (tables.first_tile + expert).load() * self.m_tiles + cost // tile_cost
            stages = tile * self.k_stages + cost % tile_cost * self.k_stages // tile_cost
        waves = self._waves(tables)
        _, num_units = self._this_unit()
        (tables.cuts + unit).store(stages - waves * (num_units - 1) * self.k_stages)

    @cute.jit
    def _waves(self, tables: Tables):
        """Data-parallel tiles of every unit."""
        _, num_units = self._this_unit()
        waves = (tables.first_tile + self.experts_padded).load() * self.m_tiles // num_units
        if cutlass.const_expr(self.by_cost):
            waves = cutlass.max(waves - 1, Int32(0))
        return waves

    @cute.jit
    def _cut(self, unit: Int32, tables: Tables):
        """Where a unit's stream-K range begins: its position in the unit's work."""
        if cutlass.const_expr(self.by_cost):
            cut = (tables.cuts + unit).load()
        else:
            _, num_units = self._this_unit()
            tiles = (tables.first_tile + self.experts_padded).load() * self.m_tiles
            left = tiles % num_units * self.k_stages
            cut = unit * (left // num_units) + cutlass.min(unit, left % num_units)
            cut += tiles // num_units * self.k_stages
        return cut

    @cute.jit
    def _share(self, tables: Tables):
        """This unit's work -> (whole, first, end), in stages: positions [0, whole) are its
        data-parallel tiles, and [first, end) its range of the stream-K line, which starts at
        position `whole` for every unit."""
        unit, _ = self._this_unit()
        whole = self._waves(tables) * self.k_stages
        return whole, self._cut(unit, tables), self._cut(unit + 1, tables)

    @cute.jit
    def _tile_at(self, position: Int32, whole: Int32):
        """The tile of a position of this unit's work."""
        unit, num_units = self._this_unit()
        step = position // self.k_stages
        tile = unit + step * num_units
        if position >= whole:
            steps = whole // self.k_stages
            tile = steps * num_units + (step - steps)
        return tile

    @cute.jit
    def _last_not_above(self, s_table: cute.Pointer, value: Int32):
        """Binary search: the last of experts_padded ascending entries that is <= value."""
        found = Int32(0)
        for i in cutlass.range_constexpr(self.experts_padded.bit_length() - 1):
            candidate = found + (self.experts_padded >> (i + 1))
            if (s_table + candidate).load() <= value:
                found = candidate
        return found

    @cute.jit
    def _locate(self, tile: Int32, tables: Tables):
        """Tile index -> (expert, first row, rows, m tile). Tiles of one expert are neighbours."""
        row_tile = tile // self.m_tiles
        expert = self._last_not_above(tables.first_tile, row_tile)
        count = (tables.counts + expert).load()
        _, rows_per_tile = self._parts(count)
        start = (row_tile - (tables.first_tile + expert).load()) * rows_per_tile
        rows = cutlass.min(rows_per_tile, count - start)
        return expert, (tables.offsets + expert).load() + start, rows, tile % self.m_tiles
