"""Which work is whose: device code that the roles of an sm90 grouped GEMM share.

Row tiles are numbered expert by expert; times the tiles of weight rows they are all tiles, and a
tile has k_stages stages. With `grid` thread blocks, whole rounds of `grid` tiles go one tile to a
block, so that blocks at work together share experts in L2; what is left of the last round is one
line of stages, cut into equal stretches.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Sm90Schedule:
    """Methods over experts_padded (a power of two, of tables in shared memory: counts, offsets, and
    the first row tile of each expert with their total at the end), tile_n_max, m_tiles, k_stages.
    """

    experts_padded: int
    tile_n_max: int
    m_tiles: int
    k_stages: int

    @cute.jit
    def _scan_tiles(self, s_counts: cute.Pointer, s_first_tile: cute.Pointer):
        """First row tile of every expert; by one warp, each lane for a run of experts."""
        run = self.experts_padded // 32
        lane = cute.arch.lane_idx()
        tiles = [Int32(0)] * run
        total = Int32(0)
        for i in cutlass.range_constexpr(run):
            count = (s_counts + lane * run + i).load()
            tiles[i] = total
            total += (count + self.tile_n_max - 1) // self.tile_n_max
        before = total
        for i in cutlass.range_constexpr(5):
            left = cute.arch.shuffle_sync_up(before, 1 << i, mask_and_clamp=0)
            if lane >= 1 << i:
                before += left
        if lane == 31:
            (s_first_tile + self.experts_padded).store(before)
        before -= total
        for i in cutlass.range_constexpr(run):
            (s_first_tile + lane * run + i).store(before + tiles[i])

    @cute.jit
    def _share(self, tables: tuple):
        """This block's work, in stages: whole tiles block, block + grid, ... up to `whole`, then
        the stretch [first, end) of what is left of all tiles. -> (whole, first, end, length,
        longer): block b's stretch has `length` stages, and one more if b < longer."""
        s_first_tile, _, _ = tables
        bidx, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        tiles = (s_first_tile + self.experts_padded).load() * self.m_tiles
        whole = tiles // grid * self.k_stages
        left = tiles % grid * self.k_stages
        length, longer = left // grid, left % grid
        first = bidx * length + cutlass.min(bidx, longer)
        return whole, whole + first, whole + first + length + Int32(bidx < longer), length, longer

    @cute.jit
    def _tile_at(self, position: Int32, whole: Int32):
        """The tile that a position of this block's work is in."""
        bidx, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        step = position // self.k_stages
        tile = bidx + step * grid
        if position >= whole:
            steps = whole // self.k_stages
            tile = steps * grid + (step - steps)
        return tile

    @cute.jit
    def _locate(self, tile: Int32, tables: tuple):
        """Tile index -> (expert, first row, rows, m tile). Tiles of one expert are neighbours."""
        s_first_tile, s_counts, s_offsets = tables
        row_tile = tile // self.m_tiles
        expert = Int32(0)
        for i in cutlass.range_constexpr(self.experts_padded.bit_length() - 1):
            candidate = expert + (self.experts_padded >> (i + 1))
            if (s_first_tile + candidate).load() <= row_tile:
                expert = candidate
        count = (s_counts + expert).load()
        # Equal parts, so that no tile is nearly empty.
        parts = (count + self.tile_n_max - 1) // self.tile_n_max
        rows_per_tile = ((count + parts - 1) // parts + 7) // 8 * 8
        start = (row_tile - (s_first_tile + expert).load()) * rows_per_tile
        rows = cutlass.min(rows_per_tile, count - start)
        return expert, (s_offsets + expert).load() + start, rows, tile % self.m_tiles
