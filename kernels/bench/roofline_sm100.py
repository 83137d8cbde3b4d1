"""A prediction of the layer on one B200 of eight (EP8), beside figures that others published.

    python -m bench.roofline_sm100 [--json roofline.json]

No B200 was at hand: nothing here was measured on one. Each GEMM takes the longest of what it must
read, of its MMAs, and of its epilogue, for even routing; steps follow one another. That leaves out
throttling, L2 misses on tokens and uneven routing, so a real time will be longer. Published figures
are of other kernels under other conditions, which the table names.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

from dsv4_kernels.sm100.heuristic import choose_config, gemms
from dsv4_kernels.sm100.spec import CHUNK, TILE_M, Gemm
from dsv4_kernels.types import MoeShape

SMS = 148  # CUTLASS's Blackwell examples; B200's multiprocessor count
CLOCK = 1.85e9  # Hz; with the next, 148 SMs give 9 PFLOP/s
# Dense NVFP4 multiply-adds of an SM in a cycle: NVIDIA's HGX B200 data sheet, 9 PFLOP/s a GPU.
MACS_PER_CYCLE = 16384
# Bytes an SM's MMAs can read from shared memory in a cycle, operands of both sides: SemiAnalysis,
# "Dissecting Nvidia Blackwell", 2026-03-31, which finds N < 128 bound by it.
SMEM_BYTES_PER_CYCLE = 128
HBM_PEAK = 8e12  # bytes/s; NVIDIA's HGX B200 data sheet
HBM_REACHED = 6.6e12  # bytes/s; what asynchronous copies reach there, the same article
# Assumption: from one kernel's last block to the next one's first load, launched dependently.
LAUNCH_GAP = 1.5e-6
# Cycles from a stage's request to its data, once a tile where nothing hides it. Assumption.
FIRST_LOAD = 1500
# Warp-instructions a warp executes for 32 tokens x 32 TMEM lanes, counted in the PTX emulator
# (tests/kernels/test_instructions_sm100.py), one a cycle on each of an SM's four schedulers.
EPILOGUE = {"fc1": 329, "fc2": 77}
WEIGHT_BYTES = 0.5 + 1 / 16  # E2M1 and its share of an E4M3 scale


class Published(NamedTuple):
    name: str
    source: str
    measured: str  # what the figures are of
    shape: MoeShape  # of one rank
    tokens_per_rank: bool  # its token counts are per rank, of 8
    microseconds: dict[int, float]  # by tokens


# The description of the pull request, which DeepGEMM's README (54e2261) names for these figures;
# timed as in its tests/test_mega_moe.py.
PULL_316 = "github.com/deepseek-ai/DeepGEMM/pull/316, 2026-04-24"
MEGA_MOE = (
    "one kernel, FP8 x FP4, with dispatch and combine over NVLink; tokens of one rank of 8, mean "
    "of the ranks and of 30 runs, L2 flushed; the GPU is not named"
)
# Its table of medians; one B200 at 128 tokens, TRTLLM 143 to 144 us and CuteDSL 147: pull/3301.
PULL_5301 = "github.com/flashinfer-ai/flashinfer/pull/5301, 2026-09-17, not merged"
R1_SHARD = (
    "NVFP4, routing, quantisation, experts and finalisation of 32 of 256 experts, alone on one "
    "B300; tokens of all 8 ranks, CUDA graph, L2 flushed, median of 100 runs and of 3 processes"
)
R1 = MoeShape(256, 32, 8, 7168, 2048, 1 << 20, True)
PUBLISHED = (
    Published(
        "DeepGEMM Mega MoE, DeepSeek-V4-Pro",
        PULL_316,
        MEGA_MOE,
        MoeShape(384, 48, 6, 7168, 3072, 1 << 20, True),
        True,
        {1: 108.1, 512: 369.6, 8192: 2818.5, 32768: 10655.2},
    ),
    Published(
        "DeepGEMM Mega MoE, DeepSeek-V4-Flash",
        PULL_316,
        MEGA_MOE,
        MoeShape(256, 32, 6, 4096, 2048, 1 << 20, True),
        True,
        {1: 56.5, 512: 146.5, 8192: 1283.1, 32768: 4855.5},
    ),
    Published(
        "FlashInfer with TRTLLM's kernels, DeepSeek-R1",
        PULL_5301,
        R1_SHARD,
        R1,
        False,
        {1: 26.1, 8: 65.1, 64: 140.0, 512: 163.6, 4096: 308.5},
    ),
    Published(
        "FlashInfer with its CuTe DSL kernels, DeepSeek-R1",
        PULL_5301,
        R1_SHARD,
        R1,
        False,
        {1: 32.5, 8: 71.1, 64: 143.8, 512: 157.8, 4096: 214.8},
    ),
)


class Step(NamedTuple):
    name: str
    microseconds: float
    bound: str


def gemm_step(gemm: Gemm, experts: float, rows: float) -> Step:
    """experts that have rows, with so many rows each."""
    config = gemm.config
    tiles_per_expert = math.ceil(rows / config.tile)
    granule = 8 * config.num_ctas
    n = math.ceil(rows / tiles_per_expert / granule) * granule
    # One K = 64 step of one CTA: 128 rows of weights and its share of the tokens.
    mma = TILE_M * n * 64 / MACS_PER_CYCLE
    smem = (TILE_M + n / config.num_ctas) * 64 / 2 / SMEM_BYTES_PER_CYCLE
    main = max(mma, smem) * gemm.k / 64
    epilogue = EPILOGUE[gemm.op] * math.ceil(n / CHUNK)
    waves = math.ceil(experts * tiles_per_expert * gemm.m_tiles / (SMS // config.num_ctas))
    cycles = waves * max(main, epilogue) + epilogue + FIRST_LOAD
    inputs = experts * rows * gemm.k * WEIGHT_BYTES
    out_bytes = WEIGHT_BYTES if gemm.quantize else 2
    outputs = experts * rows * gemm.out_features * out_bytes
    weights = experts * gemm.weight_rows * gemm.k * WEIGHT_BYTES
    memory = (weights + inputs + outputs) / HBM_REACHED + FIRST_LOAD / CLOCK
    compute = "epilogue" if epilogue > main else "MMA" if mma >= smem else "shared memory"
    if memory > cycles / CLOCK:
        return Step(gemm.op, memory * 1e6, "memory")
    return Step(gemm.op, cycles / CLOCK * 1e6, compute)


def predict(shape: MoeShape, num_tokens: int) -> list[Step]:
    """The layer's steps at num_tokens (of all ranks together) under even routing."""
    share = shape.num_local_experts / shape.num_experts
    rows = num_tokens * shape.top_k * share
    # Experts that at least one of the tokens names.
    experts = shape.num_local_experts * (1 - (1 - shape.top_k / shape.num_experts) ** num_tokens)
    tile = choose_config(shape, num_tokens).tile
    local_tokens = num_tokens * (1 - (1 - share) ** shape.top_k)

    def moving(name: str, size: float) -> Step:
        return Step(name, size / HBM_REACHED * 1e6, "memory")

    steps = [
        moving("layout", num_tokens * shape.top_k * 4 * 3),
        moving("quantise", local_tokens * shape.hidden * 2 + rows * shape.hidden * WEIGHT_BYTES),
        *(gemm_step(gemm, experts, rows / experts) for gemm in gemms(shape, tile, False)),
        moving("combine", rows * shape.hidden * 2 + num_tokens * shape.hidden * 2),
    ]
    gap = LAUNCH_GAP * 1e6
    return [step._replace(microseconds=step.microseconds + gap) for step in steps]


def floor(shape: MoeShape, num_tokens: int) -> float:
    """Microseconds below which no kernel can go: data sheet peaks, weights or operations alone."""
    experts = shape.num_local_experts * (1 - (1 - shape.top_k / shape.num_experts) ** num_tokens)
    parameters = 3 * shape.hidden * shape.intermediate
    rows = num_tokens * shape.top_k * shape.num_local_experts / shape.num_experts
    operations = rows * parameters / (MACS_PER_CYCLE * SMS * CLOCK)
    return max(experts * parameters * WEIGHT_BYTES / HBM_PEAK, operations) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(
        "PREDICTION for one B200 of 8, us a layer, even routing; not measured on a B200. "
        "Published figures are of other kernels."
    )
    rows = []
    for published in PUBLISHED:
        print(f"\n{published.name} ({published.source}):\n{published.measured}")
        print(f"{'tokens':>7} {'published':>9} {'predicted':>9} {'floor':>7}   steps")
        for tokens, theirs in published.microseconds.items():
            everyone = tokens * (8 if published.tokens_per_rank else 1)
            steps = predict(published.shape, everyone)
            total = sum(step.microseconds for step in steps)
            bound = floor(published.shape, everyone)
            detail = ", ".join(f"{s.name} {s.microseconds:.1f} ({s.bound})" for s in steps)
            print(f"{tokens:7} {theirs:9.1f} {total:9.1f} {bound:7.1f}   {detail}")
            rows.append(
                {
                    "published": published.name,
                    "source": published.source,
                    "measured": published.measured,
                    "tokens": tokens,
                    "published_us": theirs,
                    "predicted_us": round(total, 1),
                    "floor_us": round(bound, 1),
                }
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
