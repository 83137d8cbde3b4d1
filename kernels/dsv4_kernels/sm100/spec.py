"""What the sm_100a grouped GEMM can run, how it is cut, and the sizes that follow.

Pure Python: what decides about buffers and backends needs no compiler and no GPU.
"""

from dataclasses import dataclass

TILE_M = 128  # weight rows a CTA
TILE_K = 256  # values of K a pipeline stage: 128 bytes of E2M1, the widest swizzle
MMA_K = 64
CHUNK = 32  # tokens the epilogue takes at a time
MMA_WARP, TMA_WARP = 4, 5
NUM_EPILOGUE_WARPS = 4
NUM_THREADS = 192
SCALE_BLOCK = 512  # bytes of block scales of 128 rows and K = 64
SMEM_LIMIT = 232_448  # bytes a CTA can have on compute capability 10.0
TMEM_COLUMNS = 512
# fp32 staging of a warp's 32 tokens x 16 outputs. 20 words a token: neither the stores (8 rows x
# 4 tokens a warp) nor the 16-byte loads (a token a lane) meet a bank twice.
STAGING_PITCH = 20 * 4


@dataclass(frozen=True)
class Config:
    """How a grouped GEMM is cut: see `choose_config`."""

    tile: int  # tokens of a tile, the most that N can be; also the row padding of the layout
    num_ctas: int  # CTAs of an MMA
    token_box: int  # token rows a TMA load brings; those that do not exist are read in vain
    stages: int

    def __str__(self) -> str:
        return f"{self.num_ctas}cta_n{self.tile}_box{self.token_box}_s{self.stages}"


# One for each tile, as many stages as fit beside FC2's staging. Boxes: a tile of the smallest
# reads at most 15 tokens too many; the largest is for prefill, where boxes are full.
CONFIGS = {
    64: Config(tile=64, num_ctas=1, token_box=16, stages=7),
    128: Config(tile=128, num_ctas=1, token_box=32, stages=5),
    256: Config(tile=256, num_ctas=2, token_box=64, stages=5),
}


@dataclass(frozen=True)
class Gemm:
    """All that a compiled kernel is specialised on."""

    op: str  # "fc1" or "fc2"
    num_experts: int  # local
    out_features: int  # intermediate or hidden: columns of the output
    k: int  # hidden or intermediate
    config: Config
    quantize: bool = False  # fc1: NVFP4 out; otherwise bf16
    scale_per_row: bool = False  # the input has one global scale per row, not one in all or expert
    batched: bool = False  # tile_to_expert and offsets are those of `batched_layout`

    @property
    def weight_rows(self) -> int:
        return self.out_features * (2 if self.op == "fc1" else 1)

    @property
    def m_tiles(self) -> int:
        """Tiles along the weight rows, each of one CTA or a pair."""
        return self.weight_rows // (TILE_M * self.config.num_ctas)

    @property
    def token_rows(self) -> int:
        """Token rows of a tile in one CTA's shared memory: a pair shares them half and half."""
        return self.config.tile // self.config.num_ctas

    @property
    def scale_blocks(self) -> int:
        """128x4 blocks of token scales beside one another in a tile."""
        return -(-self.config.tile // 128)

    @property
    def weight_bytes(self) -> int:
        """Of a stage, like the next three."""
        return TILE_M * TILE_K // 2

    @property
    def token_bytes(self) -> int:
        return self.token_rows * TILE_K // 2

    @property
    def scale_bytes(self) -> int:
        """Block scales of the weights, or of one of the blocks of 128 tokens."""
        return SCALE_BLOCK * TILE_K // MMA_K

    @property
    def token_scale_bytes(self) -> int:
        return self.scale_blocks * self.scale_bytes

    @property
    def stage_bytes(self) -> int:
        operands = self.weight_bytes + self.token_bytes
        return operands + self.scale_bytes + self.token_scale_bytes

    @property
    def staging_bytes(self) -> int:
        if self.op == "fc1":
            return NUM_EPILOGUE_WARPS * CHUNK * STAGING_PITCH
        return NUM_EPILOGUE_WARPS * 2 * CHUNK * 32 * 2

    @property
    def smem_bytes(self) -> int:
        barriers = 8 * (2 * self.config.stages + 4) + 8
        return self.config.stages * self.stage_bytes + self.staging_bytes + barriers + 1024

    @property
    def scale_columns(self) -> int:
        """TMEM columns of a stage's scales: 4 for K = 64 and 128 rows."""
        return (1 + self.scale_blocks) * 4 * (TILE_K // MMA_K)

    @property
    def acc_stride(self) -> int:
        """TMEM columns from one accumulator to the next, less than a tile where they overlap."""
        return min(self.config.tile, TMEM_COLUMNS - self.scale_columns - self.config.tile)

    @property
    def overlaps(self) -> bool:
        """Whether the last columns of the first accumulator are the first of the second."""
        return self.acc_stride < self.config.tile

    @property
    def tmem_columns(self) -> int:
        """The two accumulators, then the scales."""
        return self.acc_stride + self.config.tile + self.scale_columns
