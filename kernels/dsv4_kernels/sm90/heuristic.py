"""Which kernels run a call of the sm90 grouped GEMMs: by the rows of an expert."""

import math

from dsv4_kernels.sm90.spec import LayerConfig, Sm90Config
from dsv4_kernels.types import MoeShape

FEW_ROWS = 14  # an expert, at most, where tiles of 8 to 32 rows serve


def unsupported_reason(shape: MoeShape) -> str | None:
    """Why these kernels cannot run the layer, or None."""
    if shape.quantize_activations:
        return (
            "compute capability 9.0 has no FP4 arithmetic, so activations stay in bf16: set "
            "activations to bf16"
        )
    for name in ("hidden", "intermediate"):
        size = getattr(shape, name)
        if size % 64:
            return (
                f"{name} size {size} of this rank is not a multiple of 64: use a smaller "
                "tensor-parallel size or expert parallelism"
            )
    return None


def tile(shape: MoeShape, num_tokens: int) -> int:
    """Rows that a group is padded to: N is a multiple of 8."""
    return 8


def places_rows(shape: MoeShape, num_tokens: int) -> bool:
    """Whether fc1 wants rows as the layout says."""
    return not choose_config(shape, num_tokens).gather


def choose_config(shape: MoeShape, num_tokens: int) -> LayerConfig:
    """How both GEMMs run at a number of tokens, by the rows of an expert if routing is even.

    fc1 gathers its rows by token, which costs less than to copy them to where TMA finds them: 3 %
    of fc1 and the copy at 128 rows an expert, 2 % at 48, on an H200. But what cp.async fetches is
    one block's: a cluster, which shares rows, has them placed.
    """
    rows = num_tokens * shape.top_k / shape.num_experts
    fc1, fc2 = (_config(rows, k) for k in (shape.hidden, shape.intermediate))
    return LayerConfig(fc1.cluster == 1, fc1, fc2)


def _config(rows: float, k: int) -> Sm90Config:
    """Of the GEMM whose weights have k columns.

    Few rows: the weights' bytes bind, and then the instructions that widen them; 16 warps share
    that work and long stages spread what a stage costs. More rows: fewer, larger tiles spread what
    a tile costs, until the sums leave registers for two warpgroups only. tile_n is four sizes about
    what a tile will hold: with more, ptxas runs out of registers and makes WGMMA wait.

    Most rows: the tensor cores bind, and the power that they and all else draw. Half the weight
    rows a block leave room for all rows of an expert in one tile, so that weights are widened once,
    and for more sizes; two blocks of a cluster then share the rows.
    """
    if rows <= FEW_ROWS:
        return Sm90Config(1, 4, (8, 16, 24, 32), _tile_k(k, 256))
    if rows <= 36:
        return Sm90Config(1, 4, (24, 32, 40, 48), _tile_k(k, 256))
    tile_k = _tile_k(k, 128)
    parts, most = _even_parts(rows, 224)
    if most > 144 and _even_parts(rows, 144)[0] > parts:
        most = math.ceil(most / 32) * 32  # a kernel more for every 16 rows is not worth 2 %
        return Sm90Config(1, 2, tuple(range(most - 48, most + 8, 8)), tile_k, cluster=2)
    _, most = _even_parts(rows, 144)
    warpgroups = 3 if most <= 64 else 2
    return Sm90Config(2, warpgroups, (most - 24, most - 16, most - 8, most), tile_k)


def _even_parts(rows: float, limit: int) -> tuple[int, int]:
    """(tiles of at most `limit` rows that an expert's are cut into, the most rows of one): one
    and a half standard deviations more than the even share still fit."""
    parts = math.ceil((rows + 1.25 * math.sqrt(rows)) / limit)
    most = (rows + 1.5 * math.sqrt(rows)) / parts
    return parts, min(limit, math.ceil(most / 16) * 16)


def _tile_k(k: int, most: int) -> int:
    return next(tile for tile in (256, 128, 64) if tile <= most and k % tile == 0)
