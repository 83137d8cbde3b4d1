"""Work around the MMAs: warp-instructions that the emulator counts on a ragged problem."""

import pytest
import torch
from dsv4_kernels.grouped_gemm_sm100_spec import CONFIGS, Gemm
from dsv4_kernels.reference import expert_layout

from tests.sm100_emulation import aligned, emulated

GROUPS = [300, 0, 128, 1, 77, 513, 64, 5]
WEIGHT_ROWS, K, SMS = 512, 2048, 148
# NVIDIA's public NVFP4 grouped GEMM example (CUTLASS, CuTeDSL, 128x128 tiles) executes so many on
# these groups in this emulator, with a plain bf16 epilogue: 229 for each 128x128x64 of padded work.
NVIDIAS_EXAMPLE = 380_574
MMAS = sum(-(-count // 128) for count in GROUPS) * (WEIGHT_ROWS // 128) * (K // 64)


def instructions(gemm: Gemm) -> int:
    tile, experts = gemm.config.tile, len(GROUPS)
    ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(GROUPS))[:, None]
    layout = expert_layout(ids, experts, None, tile)
    rows = len(layout.row_to_slot)
    scale_rows = -(-rows // 128) * 128
    fc1 = gemm.op == "fc1"
    zeros = {
        "weights": torch.zeros(experts, WEIGHT_ROWS, K // 2, dtype=torch.uint8),
        "weight scales": torch.zeros(experts, WEIGHT_ROWS, K // 16, dtype=torch.uint8),
        "weight global scales": torch.ones(experts, 2) if fc1 else torch.ones(experts),
        "tokens": torch.zeros(rows, K // 2, dtype=torch.uint8),
        "token scales": torch.zeros(scale_rows, K // 16, dtype=torch.uint8),
        "token global scales": torch.ones(1) if fc1 else torch.ones(experts),
    }
    out = torch.zeros(rows, gemm.out_features // (2 if fc1 else 1), dtype=torch.uint8)
    if fc1:
        scales = torch.zeros(scale_rows, gemm.out_features // 16, dtype=torch.uint8)
        more = (scales, torch.ones(experts), layout.row_to_slot, torch.ones(len(ids)))
        more = (*more, torch.zeros(1, dtype=torch.int64))
    else:
        out, more = torch.zeros(rows, gemm.out_features, dtype=torch.bfloat16), ()
    arguments = (layout.counts, layout.offsets, layout.tile_to_expert, out, *more)
    statistics = emulated(gemm).run(
        *map(aligned, zeros.values()),
        rows,
        *map(aligned, arguments),
        10.0,
        SMS // gemm.config.num_ctas,
        None,
    )
    return statistics.warp_instructions


@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("tile", [128, 256])
def test_fewer_than_nvidias_example(op, tile, record_property):
    features = WEIGHT_ROWS // 2 if op == "fc1" else WEIGHT_ROWS
    gemm = Gemm(op, len(GROUPS), features, K, CONFIGS[tile], quantize=op == "fc1")
    count = instructions(gemm)
    record_property("warp instructions per 128x128x64", round(count / MMAS, 1))
    assert count < NVIDIAS_EXAMPLE, count / MMAS
