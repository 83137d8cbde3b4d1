"""Specialisation of the sm90 grouped GEMM."""

from dataclasses import dataclass
from typing import NamedTuple

from dsv4_kernels.types import NVFP4_BLOCK

# Accumulators of a CTA's largest tile: 256 weight rows by 144 rows of an expert.
MOST_PARTIALS = 256 * 144
FLAGS = 16  # of a CTA: one a consumer warp, of which there are at most 16


@dataclass(frozen=True)
class Sm90Config:
    """What a compiled kernel is specialised on, besides the layer's shape.

    m_blocks: 64-row blocks of weights a warpgroup owns; warpgroups: consumer warpgroups;
    tile_n: ascending multiples of 8, the N of WGMMA to choose from; tile_k: 64 to 320, by 64;
    cluster: CTAs that share a row tile, its rows by TMA multicast, each with its own weight rows.
    """

    m_blocks: int
    warpgroups: int
    tile_n: tuple[int, ...]
    tile_k: int
    cluster: int = 1

    @property
    def tile_m(self) -> int:
        return 64 * self.m_blocks * self.warpgroups


class Gemm(NamedTuple):
    """All that a kernel is specialised on: a layer's GEMM and how it is run."""

    op: str  # "fc1", fused with SwiGLU and the routing weight, or "fc2"
    num_experts: int  # of this rank
    m: int  # weight rows: 2 * intermediate for fc1, hidden for fc2
    k: int  # columns
    top_k: int
    gather: bool  # rows of x by row_to_slot; otherwise x is permuted as the layout says
    config: Sm90Config
    scale_block: int = NVFP4_BLOCK  # columns that share a scale; MXFP4_BLOCK for MXFP4's weights
    activations: str = "bf16"  # or "fp8": E4M3, on FP8 WGMMA
    # fp8: fc2's input has a scale a row, so fc1 leaves it in bf16; otherwise one scale for all, and
    # fc1 leaves it in E4M3. fc1's input always has a scale a row.
    h_row_scales: bool = False


class LayerConfig(NamedTuple):
    """How both GEMMs of a call run."""

    gather: bool  # fc1 gathers rows of x by token; otherwise x is permuted
    fc1: Sm90Config
    fc2: Sm90Config
