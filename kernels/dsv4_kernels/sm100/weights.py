"""Checkpoint layout -> what the sm100 kernels read, in place, one expert at a time.

Codes stay as the checkpoint has them. Block scales become blocks of 512 bytes, each the scales of
128 rows and 64 columns of the matrix, in the order that tcgen05 wants in tensor memory; blocks
follow one another along K, then along the rows:

    (rows / 128, K / 64, 32 rows, 4 rows of 32, 4 scales)     one E4M3 byte

The rows of w13 are first put in the order of fc1's tiles: 16 gate rows, then the up rows of the
same 16 intermediate indices. Experts are apart from one another: each can be moved (EPLB) alone.
"""

import torch

from dsv4_kernels.types import ExpertWeights

BLOCK_ROWS, BLOCK_SCALES = 128, 4


def swizzle_sm100(weights: ExpertWeights) -> ExpertWeights:
    """Rewrite the block scales in place; shapes stay. Needs one expert's scales on top of them.

    Rows must be whole blocks of 128 and columns of 64 (`spec.unsupported`).
    """
    for expert in weights.w13_block_scales.view(torch.uint8):
        expert.copy_(_blocks(_interleave_gate_up(expert)).view_as(expert))
    for expert in weights.w2_block_scales.view(torch.uint8):
        expert.copy_(_blocks(expert).view_as(expert))
    return weights


def _interleave_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """(2 I, n), gate then up, -> (2 I, n) in groups of 16 of each."""
    gate, up = (half.unflatten(0, (-1, 16)) for half in rows.chunk(2))
    return torch.stack((gate, up), 1).flatten(0, 2)


def _blocks(scales: torch.Tensor) -> torch.Tensor:
    """(R, K // 16) uint8 -> (R / 128, K / 64, 32, 4, 4), a copy."""
    rows, columns = scales.shape
    assert rows % BLOCK_ROWS == 0 and columns % BLOCK_SCALES == 0, scales.shape
    fields = scales.view(rows // BLOCK_ROWS, 4, 32, columns // BLOCK_SCALES, BLOCK_SCALES)
    return fields.permute(0, 3, 2, 1, 4).contiguous()
