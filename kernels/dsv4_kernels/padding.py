"""Intermediate sizes that a GPU's kernels have no tile for, filled up with zeros.

A gate and an up of zero give an h of zero, whatever scales them, and columns of w2 that are zero
add nothing: the layer stays the same. Hidden sizes are not padded.
"""

import torch

from dsv4_kernels.backends import Backend
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights, MoeShape


def padded_shape(backend: Backend, shape: MoeShape) -> MoeShape:
    """With the intermediate size that the backend's h has; itself where no padding is needed."""
    rows, _ = backend.padded_intermediate(shape.intermediate, shape.fp8)
    return shape._replace(intermediate=rows)


def padded_weights(backend: Backend, weights: ExpertWeights, fp8: bool = False) -> ExpertWeights:
    """As the backend wants them, in the checkpoint's layout. What needs no padding is the same
    tensor; otherwise a copy, codes and scales zero where the checkpoint has nothing."""
    rows, columns = backend.padded_intermediate(weights.intermediate, fp8)
    block = MXFP4_BLOCK if weights.w13_block_scales.dtype == torch.uint8 else NVFP4_BLOCK
    return weights._replace(
        w13=_with_rows(weights.w13, rows),
        w13_block_scales=_with_rows(weights.w13_block_scales, rows),
        w2=_with_columns(weights.w2, columns // 2),
        w2_block_scales=_with_columns(weights.w2_block_scales, columns // block),
    )


def _with_rows(w13: torch.Tensor, rows: int) -> torch.Tensor:
    """(E, 2 * r, C): r rows of the gate, then of the up -> (E, 2 * rows, C)."""
    experts, had, columns = w13.shape
    if had == 2 * rows:
        return w13
    halves = _zeros(w13, (experts, 2, rows, columns))
    halves[:, :, : had // 2] = _bytes(w13).unflatten(1, (2, -1))
    return halves.flatten(1, 2).view(w13.dtype)


def _with_columns(w2: torch.Tensor, columns: int) -> torch.Tensor:
    experts, rows, had = w2.shape
    if had == columns:
        return w2
    wide = _zeros(w2, (experts, rows, columns))
    wide[:, :, :had] = _bytes(w2)
    return wide.view(w2.dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def _zeros(like: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=like.device)
