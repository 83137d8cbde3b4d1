"""The order of weights and rows for FP8 WGMMA on sm90 (see `sm90.e4m3`), in plain torch."""

import torch
from dsv4_kernels.types import MXFP4_BLOCK, NVFP4_BLOCK, ExpertWeights

from tests.support.sm90_shuffle import into_window

LEAST = -5  # the power of two of MXFP4's scale index 0
LARGEST_INDEX = 14


def permuted_columns(x: torch.Tensor) -> torch.Tensor:
    """(..., K) in the checkpoint's order -> in the kernel's: of each 64, 4 x 4 words transposed; of
    the last 32, if K is no multiple of 64, 4 x 2."""
    whole = x.shape[-1] // 64 * 64
    parts = [
        part.unflatten(-1, (-1, 4, words, 4)).transpose(-3, -2).flatten(-4)
        for part, words in ((x[..., :whole], 4), (x[..., whole:], 2))
        if part.shape[-1]
    ]
    return torch.cat(parts, -1)


def gate_up_rows(rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Of fc1: 8 rows of the gate, then the 8 of the up of the same number, and so on, in the order
    that columns of h have."""
    half = rows // 2
    gate = permuted_columns(torch.arange(half, device=device)).view(-1, 1, 8)
    return torch.cat((gate, gate + half), dim=1).flatten()


def shuffled_fp8(weights: ExpertWeights) -> tuple[ExpertWeights, float]:
    """New tensors in the kernel's order, and MXFP4's largest error of a weight over its expert's
    largest scale."""
    values = {name: getattr(weights, name).clone() for name in weights._fields}
    is_mxfp4 = weights.w13_block_scales.dtype == torch.uint8
    block = MXFP4_BLOCK if is_mxfp4 else NVFP4_BLOCK
    error = 0.0
    for name, rows in (("w13", weights.intermediate), ("w2", weights.hidden)):
        factors = values[f"{name}_global_scales"].view(weights.num_local_experts, -1)
        order = gate_up_rows(2 * rows) if name == "w13" else slice(None)
        for expert in range(weights.num_local_experts):
            codes = values[name][expert]
            scales = values[f"{name}_block_scales"].view(torch.uint8)[expert]
            for half in range(len(factors[expert]) if is_mxfp4 else 0):
                part = slice(half * rows, (half + 1) * rows)
                window = into_window(codes[part], scales[part], LARGEST_INDEX, LEAST)
                codes[part], scales[part], power, part_error = window
                factors[expert, half] *= power
                error = max(error, part_error)
            if name == "w2" and weights.intermediate % 64:
                spread_last_half(codes, scales, block)
            codes[:] = codes_in_order(codes[order])
            scales[:] = scales_in_order(scales[order], block)
    return ExpertWeights(**values), error


def spread_last_half(codes: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """In place: of the last 64 columns, 32 and 32 of padding, a lane takes eight and eight, under
    the scale of the former."""
    last = codes[:, -32:].unflatten(1, (2, 4, 4))
    last.copy_(last.transpose(1, 2).reshape(last.shape).clone())
    count = 64 // block
    scales[:, -count:] = scales[:, -count : -count // 2].repeat_interleave(2, dim=1)


def codes_in_order(codes: torch.Tensor) -> torch.Tensor:
    """(R, K // 2) uint8 of one expert, rows in the kernel's order -> the same bytes, reordered."""
    rows, k = len(codes), 2 * codes.shape[1]
    nibbles = torch.stack((codes & 15, codes >> 4), -1).int()
    # (row block, warp, row half, row, k block, lane of a quad, word of a row, code of it)
    fields = nibbles.view(rows // 64, 4, 2, 8, k // 64, 4, 2, 8)
    place = torch.arange(8, device=codes.device, dtype=torch.int32)
    sign_at = torch.where(place < 4, 8 * place + 7, 8 * place - 29)
    words = ((fields & 7) << 4 * place).sum(-1) | ((fields >> 3) << sign_at).sum(-1)
    # -> (row block, k block, warp, row, lane of a quad, row half, word)
    words = words.int().permute(0, 4, 1, 3, 5, 2, 6).contiguous()
    return words.view(-1).view(torch.uint8).view(codes.shape)


def scales_in_order(scales: torch.Tensor, scale_block: int) -> torch.Tensor:
    """(R, K // scale_block) uint8 indices of the table -> the same bytes, reordered."""
    # (row block, warp, row half, row, k block, block)
    fields = scales.view(len(scales) // 64, 4, 2, 8, -1, 64 // scale_block)
    # -> (row block, k block, warp, row, block, row half)
    return fields.permute(0, 4, 1, 3, 5, 2).reshape(scales.shape).contiguous()
