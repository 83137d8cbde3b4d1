"""Tile heuristic of the sm90 grouped GEMMs: number of tokens -> tile shapes of fc1 and fc2."""

import functools
import math

from dsv4_kernels.sm90.spec import Gemm, LayerConfig, Sm90Config
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, MoeShape, rows_per_expert

FEW_ROWS = 14  # of an expert: up to here, small tiles
FEWEST_ROWS = 2  # up to here, the smallest


def unsupported_reason(shape: MoeShape) -> str | None:
    """Why these kernels cannot run the layer, or None."""
    if shape.quantize_activations:
        return (
            "compute capability 9.0 has no FP4 arithmetic, so activations are in bf16 or fp8: set "
            "activations to auto"
        )
    if shape.hidden % 64:
        return (
            f"hidden size {shape.hidden} is not a multiple of 64: choose vLLM's own experts with "
            "--moe-backend"
        )
    return None


def padded_intermediate(size: int, fp8: bool = False) -> tuple[int, int]:
    """A block of weights has 32 rows of the gate and 32 of the up, or 64 columns of w2. A stage of
    fp8 that had one block of columns would leave WGMMA idle: rather one block of zeros more."""
    if fp8 and _tile_k(size, 320, (2, 5, 3)) == 64:
        size = -(-size // 128) * 128
    return -(-size // 32) * 32, -(-size // 64) * 64


def tile(shape: MoeShape, num_tokens: int) -> int:
    """Rows that a group is padded to: N is a multiple of 8."""
    return 8


@functools.lru_cache(maxsize=4096)
def places_rows(shape: MoeShape, num_tokens: int) -> bool:
    """Whether fc1 wants rows as the layout says."""
    return not choose_config(shape, num_tokens).gather


def choose_config(shape: MoeShape, num_tokens: int) -> LayerConfig:
    """How both GEMMs run, by the rows of an expert under even routing.

    fc1 gathers its rows by token rather than reading rows that `place_rows` has permuted: on an
    H200, 3 % less than fc1 and the permutation at 128 rows an expert, 2 % at 48. cp.async has no
    multicast, so a cluster, which shares rows, needs them permuted. A batch's already are. In W4A8
    V4.1-Flash's TP4 and TP8 ranks take 2 to 12 % less from 512 tokens on, V4-Flash, bound by power,
    as much as before (`tiles.json`).
    """
    rows = rows_per_expert(shape, num_tokens)
    inter, _ = padded_intermediate(shape.intermediate, shape.fp8)
    config = functools.partial(_fp8_config, shape) if shape.fp8 else _config
    fc1 = config(rows, 2 * inter, shape.hidden)
    fc2 = _tall_config(shape, rows, inter) or config(rows, shape.hidden, inter)
    gather = fc1.cluster == 1 and not shape.batch_rows
    if shape.fp8:
        gather = gather and fc1.tile_k % 128 == 0  # 128 bytes of a row are gathered at a time
    return LayerConfig(gather, fc1, fc2)


def _config(rows: float, m: int, k: int) -> Sm90Config:
    """Of a GEMM with m rows of weights and this K, by what bounds it.

    Few rows: bound by the bytes of the weights, then by the instructions that widen them. Four
    consumer warpgroups share the widening, three where four would widen more rows in vain, past the
    last, and then with two row blocks each where these divide m: 2 to 4 % less from 32 tokens of
    V4.1-Flash's TP4 rank on, 3 % more for one token. Long stages amortise the cost of a stage. Two
    sizes of tile_n instead of four take mostly 1 to 4 % less, 1 % more for one token of V4-Flash
    (`tiles.json`).

    More rows: larger tiles amortise the cost of a tile; accumulators then leave registers for three
    warpgroups, at last for two. tile_n has four sizes around the rows that a tile is expected to
    hold: with more, ptxas runs out of registers and serialises WGMMA.

    Most rows: bound by the tensor cores and by power. With one row block a warpgroup instead of
    two, all rows of an expert fit in one tile, so weights are widened once, and there are registers
    for more sizes of tile_n; clusters of two CTAs halve the traffic of rows.
    """
    warpgroups = min((4, 3), key=lambda count: math.ceil(m / (64 * count)) * count)
    if rows <= FEW_ROWS:
        m_blocks = 2 if warpgroups == 3 and m % 384 == 0 else 1
        return Sm90Config(m_blocks, warpgroups, _few_rows(rows), _tile_k(k, 320))
    if rows <= 36:
        return Sm90Config(1, warpgroups, (24, 32, 40, 48), _tile_k(k, 256))
    tile_k = _tile_k(k, 128)
    parts, most = _even_parts(rows, 224)
    if most > 144 and _even_parts(rows, 144)[0] > parts:
        most = math.ceil(most / 32) * 32  # in steps of 16: 2 % faster, twice the kernels
        return Sm90Config(1, 2, tuple(range(most - 48, most + 8, 8)), tile_k, cluster=2)
    _, most = _even_parts(rows, 144)
    warpgroups = 3 if most <= 64 else 2
    return Sm90Config(2, warpgroups, (most - 24, most - 16, most - 8, most), tile_k)


def _few_rows(rows: float) -> tuple[int, ...]:
    """tile_n of up to FEW_ROWS."""
    return (8, 16) if rows <= FEWEST_ROWS else (8, 16, 24, 32)


def _fp8_config(shape: MoeShape, rows: float, m: int, k: int) -> Sm90Config:
    """Of a GEMM in fp8, by `bench/results/fp8_fc1.json`: WGMMA takes half of bf16's cycles, so
    widening counts at all rows, and two row blocks a warpgroup beat one, unless they leave more of
    the last tile empty, or all rows of an expert then fit in one tile, so weights are widened
    once. Long stages beat short ones where three fit beside the schedule's tables.
    """
    parts, most = _even_parts(rows, 144)
    fewer, largest = _even_parts(rows, 224)
    if fewer < parts:
        largest = math.ceil(largest / 32) * 32
        tile_n = tuple(range(largest - 48, largest + 16, 16))
        return Sm90Config(1, 2, tile_n, _tile_k(k, 192, (2, 3)), cluster=2)
    tile_n = (most - 24, most - 16, most - 8, most)
    if rows <= FEW_ROWS or most <= 48:
        tile_n = _few_rows(rows) if rows <= FEW_ROWS else (24, 32, 40, 48)
        choices = [(1, 4, 1), (1, 3, 1)]
    elif most <= 64:
        choices = [(2, 3, 1), (1, 3, 1)]
    else:
        choices = [(2, 2, 2), (1, 3, 2), (1, 3, 1)]
    # The first that computes at most 5 % more rows than another would.
    computed = [math.ceil(m / (64 * math.prod(each))) * math.prod(each) for each in choices]
    m_blocks, warpgroups, cluster = next(
        each for each, rows in zip(choices, computed, strict=True) if rows <= 1.05 * min(computed)
    )
    blocks = (2, 5, 3) if m_blocks * warpgroups > 4 else (4, 2, 5, 3)
    longest = _longest_stage(shape, m_blocks, warpgroups, tile_n[-1], stages=3)
    return Sm90Config(m_blocks, warpgroups, tile_n, _tile_k(k, longest, blocks), cluster)


def _scale_block(shape: MoeShape) -> int:
    return MXFP4_BLOCK if shape.weight_format == "mxfp4" else NVFP4_BLOCK


def _even_parts(rows: float, limit: int) -> tuple[int, int]:
    """(row tiles of an expert, rows of the largest, at most `limit`), with room for 1.5 standard
    deviations above the mean of a Poisson routing."""
    parts = math.ceil((rows + 1.25 * math.sqrt(rows)) / limit)
    most = (rows + 1.5 * math.sqrt(rows)) / parts
    return parts, min(limit, math.ceil(most / 16) * 16)


def _tile_k(k: int, most: int, blocks: tuple[int, ...] = (4, 5, 3, 2)) -> int:
    """The first of so many blocks of 64 columns that divides K and is at most `most`, or one."""
    return next((64 * n for n in blocks if -(-k // 64) % n == 0 and 64 * n <= most), 64)


def _tall_config(shape: MoeShape, rows: float, k: int) -> Sm90Config | None:
    """fc2's, with few rows of a rank's part of h, K: a tile of one to three stages costs as much
    beside them as within, so tiles have 512 rows of weights, where there are enough for all
    multiprocessors and two stages fit. Layers of V4-Flash and V4.1-Flash under TP4 and TP8 take 1
    to 8 % less (`tiles.json`); one token, whose tiles are too few, would take 1 to 2 us more.
    """
    tiles = rows * shape.num_local_experts * shape.hidden / 512
    if k > 576 or rows > FEW_ROWS or tiles < 132:
        return None
    tile_n = (8, 16)
    tile_k = _tile_k(k, 320, (5, 4, 3, 2))
    fits = tile_k <= _longest_stage(shape, 2, 4, tile_n[-1], stages=2)
    return Sm90Config(2, 4, tile_n, tile_k) if fits else None


def _longest_stage(
    shape: MoeShape, m_blocks: int, warpgroups: int, tile_n: int, *, stages: int
) -> int:
    """Columns of a stage, where so many are to fit beside the schedule's tables."""
    tile_m = 64 * m_blocks * warpgroups
    column = tile_m // 2 + tile_m // _scale_block(shape) + tile_n * (1 if shape.fp8 else 2)
    experts_padded = 1 << (shape.num_local_experts - 1).bit_length()
    return (224_900 - 4096 * warpgroups - 20 * experts_padded) // (stages * column)


@functools.lru_cache(maxsize=4096)
def gemms(shape: MoeShape, num_tokens: int) -> tuple[Gemm, Gemm]:
    """(fc1, fc2) of a layer at a number of tokens."""
    gather, fc1, fc2 = choose_config(shape, num_tokens)
    experts, hidden = shape.num_local_experts, shape.hidden
    inter, _ = padded_intermediate(shape.intermediate, shape.fp8)
    block = _scale_block(shape)
    mode = ("fp8", shape.scale_per_row) if shape.fp8 else ("bf16", False)
    return (
        Gemm("fc1", experts, 2 * inter, hidden, shape.top_k, gather, fc1, block, *mode),
        Gemm("fc2", experts, hidden, inter, shape.top_k, False, fc2, block, *mode),
    )


@functools.cache
def all_gemms(shape: MoeShape) -> list[Gemm]:
    """Every specialisation that calls of up to shape.max_num_tokens need."""
    found: dict[Gemm, None] = {}
    for num_tokens in range(1, shape.max_num_tokens + 1):
        found |= dict.fromkeys(gemms(shape, num_tokens))
    return list(found)
