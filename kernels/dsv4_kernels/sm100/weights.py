"""Checkpoint layout -> sm100 kernels' layout, in place, a quarter of the experts at a time.

Codes stay as the checkpoint has them. Block scales become blocks of 512 bytes, each the scales of
128 rows and 64 columns of the matrix, in the order that tcgen05 wants in tensor memory; blocks
follow one another along K, then along the rows:

    (rows / 128, K / 64, 32 rows, 4 rows of 32, 4 scales)     one E4M3 byte

The rows of w13 are first put in the order of fc1's tiles: 16 gate rows, then the up rows of the
same 16 intermediate indices. No block spans experts: each can be moved (EPLB) alone.
"""

import torch

from dsv4_kernels.types import ExpertWeights

BLOCK_ROWS, BLOCK_SCALES = 128, 4
_PARTS = 4


def prepare_weights(
    weights: ExpertWeights, rounding: torch.Tensor | None = None, fp8: bool = False
) -> ExpertWeights:
    """Rewrite the block scales in place; shapes stay. Two launches for each quarter of a tensor's
    experts, which is copied.

    Rows must be whole blocks of 128 and columns of 64 (`padding`).
    """
    assert not fp8, "fp8 is sm90's"
    for tensor, gate_up in ((weights.w13_block_scales, True), (weights.w2_block_scales, False)):
        _, rows, columns = tensor.shape
        assert rows % BLOCK_ROWS == 0 and columns % BLOCK_SCALES == 0, tensor.shape
        for scales in tensor.view(torch.int32).tensor_split(_PARTS):
            scales.copy_(_blocks(scales, gate_up).view_as(scales))
    return weights


def _blocks(scales: torch.Tensor, gate_up: bool) -> torch.Tensor:
    """(E, R, K / 64) int32 of four scales each -> (E, R / 128, K / 64, 32, 4) int32, a copy."""
    if gate_up:
        # Row r of group g in block b is row 64 b + 16 g + r of the gate's, and of the up's.
        fields = scales.unflatten(1, (2, -1, 4, 16)).permute(0, 2, 5, 1, 4, 3)
    else:
        fields = scales.unflatten(1, (-1, 4, 32)).permute(0, 1, 4, 3, 2)
    return fields.contiguous()
