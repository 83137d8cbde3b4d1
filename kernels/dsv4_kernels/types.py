"""The layout contract: what the ops hand to one another.

Rows are (token, slot) pairs that some expert of this rank owns, grouped by local expert; each
group is padded to a whole number of row tiles. How many rows exist is known on the device only,
so every buffer has a fixed capacity, and offsets say which part of it is in use.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
E2M1_MAX = 6.0
E4M3_MAX = 448.0
NUM_IMAGE_TOKEN_IDS = 5
MAX_EXPERTS, MAX_TOP_K = 512, 16  # of the router
LARGEST_H_LIMIT = 32.0
# Largest |x| that a global scale of 1 can represent: block scale 448 times code 6.
NVFP4_MAX = E2M1_MAX * E4M3_MAX


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    weights: torch.Tensor  # (num_tokens, top_k) float32; 0 on padding tokens
    ids: torch.Tensor  # (num_tokens, top_k) int32 or int64 global expert ids; -1 on padding tokens


class ImageBias(NamedTuple):
    """V4.1's second routing bias: rows of image tokens select by it, on hash layers as well."""

    bias: torch.Tensor  # (num_experts,) float32
    first_token_id: int  # of NUM_IMAGE_TOKEN_IDS consecutive ids inside the vocabulary


class ExpertLayout(NamedTuple):
    """Where the row of every (token, slot) is. Rows of one expert keep the order of their slots."""

    slot_to_row: torch.Tensor  # (num_tokens, top_k) int32; -1 where the expert is not local
    row_to_slot: torch.Tensor  # (capacity,) int32, token * top_k + slot; -1 on padding rows
    counts: torch.Tensor  # (num_local_experts,) int32, rows that exist
    offsets: torch.Tensor  # (num_local_experts + 1,) int32, first row, a multiple of the tile
    tile_to_expert: torch.Tensor  # (capacity // tile,) int32; -1 beyond the live tiles


class QuantizedRows(NamedTuple):
    """NVFP4 rows: value = E2M1 code * E4M3 block scale * global scale."""

    codes: torch.Tensor  # (rows, K // 2) uint8, two E2M1 per byte, low nibble first
    block_scales: torch.Tensor  # (rows, K // 16) float8_e4m3fn, or the 128x4 swizzle of it
    global_scales: torch.Tensor  # (rows,), (num_local_experts,) or (1,) float32


class Fp8Rows(NamedTuple):
    """E4M3 rows: value = code * the row's scale. Columns are permuted in words of 4 bytes: each 64
    columns are a 4 x 4 matrix of words, transposed, so that column 16 q + 4 j + c is at
    16 j + 4 q + c. If 32 are left, they are a 4 x 2 one: 8 q + 4 j + c is at 16 j + 4 q + c."""

    codes: torch.Tensor  # (rows, K) float8_e4m3fn
    scales: torch.Tensor  # (rows,) float32


class ExpertWeights(NamedTuple):
    """The routed experts that this rank owns, in the checkpoint's layout or, prepared, a backend's.

    w13 holds the gate's rows first, then the up's. Gate and up may have different global scales:
    both are kept, exactly.

    MXFP4 has one block scale every MXFP4_BLOCK values instead: a uint8, UE8M0, that stands for
    2^(byte - 127).
    """

    w13: torch.Tensor  # (num_local_experts, 2 * intermediate, hidden // 2) uint8
    w13_block_scales: torch.Tensor  # (num_local_experts, 2 * intermediate, hidden // 16) e4m3
    w13_global_scales: torch.Tensor  # (num_local_experts, 2) float32: gate, up
    w2: torch.Tensor  # (num_local_experts, hidden, intermediate // 2) uint8
    w2_block_scales: torch.Tensor  # (num_local_experts, hidden, intermediate // 16) e4m3
    w2_global_scales: torch.Tensor  # (num_local_experts,) float32

    @property
    def num_local_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden(self) -> int:
        return self.w13.shape[2] * 2

    @property
    def intermediate(self) -> int:
        return self.w13.shape[1] // 2


class ActivationScales(NamedTuple):
    """Global scales of the two quantised activations; None means one scale per row (`token`)."""

    fc1: torch.Tensor | None  # (1,) float32
    fc2: torch.Tensor | None  # (num_local_experts,) float32


class MoeShape(NamedTuple):
    """What a layer's kernels and buffers are chosen and sized by, on one rank."""

    num_experts: int  # global, redundant (EPLB) copies included
    num_local_experts: int
    top_k: int
    hidden: int
    intermediate: int  # of this rank, if tensor-parallel
    max_num_tokens: int  # in one call, all dispatched ranks' tokens together
    quantize_activations: bool  # W4A4; otherwise W4A16, or W4A8 where fp8
    # Of x or h: `token`, and `warmup` of a layer without a limit. W4A8: of h, see `fp8_h_scale`.
    scale_per_row: bool = False
    weight_format: str = "nvfp4"  # or "mxfp4"
    all_tokens_local: bool = False  # the dispatch left out tokens that no local expert has
    fp8: bool = False  # W4A8: E4M3 activations on weights rounded to E4M3
    batch_rows: int = 0  # if not 0, the dispatch gives x as (local experts, batch_rows, hidden)


class ActivationAmax(NamedTuple):
    """The largest magnitudes that the two GEMMs have read so far; a calibration run's result."""

    fc1: torch.Tensor  # (1,) float32
    fc2: torch.Tensor  # (num_local_experts,) float32; 0 for an expert that has had no row


@dataclass(frozen=True)
class MoeLayer:
    """One layer's routed experts on one rank, ready to run; made by `moe.prepare_layer`."""

    backend: Any  # backends.Backend
    shape: MoeShape
    weights: ExpertWeights
    limit: float | None  # swiglu_limit
    activation_scales: ActivationScales | None  # of W4A4 alone
    # (1,) int64 on the device: NVFP4 blocks that did not fit, so far; W4A8: infinities in bf16
    saturated: torch.Tensor
    # (1,) float32 on the device: the largest error of a weight that the backend cannot hold, over
    # the largest scale of its expert; 0 where all are exact, as all of NVFP4's are
    rounding: torch.Tensor
    amax: ActivationAmax | None = None  # recorded while calibrating, see `moe.recording_layer`


@functools.lru_cache(maxsize=4096)
def rows_per_expert(shape: MoeShape, num_tokens: int) -> float:
    """Rows of a local expert, if the num_tokens of a call choose experts evenly.

    Where the dispatch sends only tokens that have a local expert (all_tokens_local), that is more:
    by one over the chance of having any, 1.8 for 48 of 384 experts and top-6.
    """
    rows = num_tokens * shape.top_k / shape.num_experts
    if not shape.all_tokens_local:
        return rows
    foreign = shape.num_experts - shape.num_local_experts
    none_local = math.comb(foreign, shape.top_k) / math.comb(shape.num_experts, shape.top_k)
    return rows / (1 - none_local)


def fp8_h_scale(limit: float | None) -> float | None:
    """W4A8's one scale of h: max(limit, 0.279) * limit, which bounds |h| of a SwiGLU clamped at the
    limit, over E4M3's 448; 1 for a limit of 0. None, for a scale per row, without a limit or above
    LARGEST_H_LIMIT, where the h of ordinary tokens would be 0 or among E4M3's subnormals. It is
    no power of two: that would round clamped values, at a limit of 10 by 4 %, all one way."""
    if limit is None or limit > LARGEST_H_LIMIT:
        return None
    return max(max(limit, 0.279) * limit / E4M3_MAX, 2.0**-100) if limit > 0 else 1.0


def capacity(num_tokens: int, top_k: int, num_local_experts: int, tile: int) -> int:
    """Rows that any routing of num_tokens fits in, a multiple of the tile.

    All num_tokens * top_k slots may be local, and a token may name one expert twice (a hash table
    that repeats itself, simulated routing), so fewer local experts than top_k do not make it
    smaller. At most one group per slot has rows, and each wastes at most tile - 1 of padding.
    """
    slots = num_tokens * top_k
    rows = slots + min(slots, num_local_experts) * (tile - 1)
    return -(-rows // tile) * tile
