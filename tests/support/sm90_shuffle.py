"""The oracle of sm90's `prepare_weights` in plain PyTorch, its inverse, and what one needs."""

import torch
from dsv4_kernels.reference import E2M1_VALUES, unpack_e2m1
from dsv4_kernels.types import ExpertWeights

# Of each register's code pair (codes at bits 3:0 and 19:16): which bits move, and how far left.
_BIT_FIELDS = (
    ((0x00080008, 12), (0x00070007, 6)),
    ((0x00080008, 6), (0x00070007, 0)),
    ((0x00000008, 16), (0x00080000, -16), (0x00070007, 10)),
    ((0x00080008, 10), (0x00040004, 12), (0x00030003, 4)),
)
# Where a code's bits lie when they are widened: sign, exponent and mantissa of a bf16.
_CODE_BITS = 0x81C081C0
# E4M3 byte -> byte with a fifth exponent bit. Below 8 it is subnormal, n * 2^-9.
_FIVE_BIT_EXPONENT = (0, 104, 112, 116, 120, 122, 124, 126, *range(8 + 120, 0x7F + 120))


def shuffled(weights: ExpertWeights) -> ExpertWeights:
    """New tensors in the kernel's order; those in the checkpoint's stay."""
    return _each_matrix(weights, _shuffle)


def shuffled_mxfp4(weights: ExpertWeights) -> tuple[ExpertWeights, float]:
    """The same of MXFP4, and the largest error of a weight over its expert's largest scale."""
    values = {name: getattr(weights, name).clone() for name in weights._fields}
    error = 0.0
    for name, rows in (("w13", weights.intermediate), ("w2", weights.hidden)):
        factors = values[f"{name}_global_scales"].view(weights.num_local_experts, -1)
        for expert in range(weights.num_local_experts):
            for half in range(len(factors[expert])):
                part = (expert, slice(half * rows, (half + 1) * rows))
                codes, scales = values[name][part], values[f"{name}_block_scales"][part]
                codes[:], scales[:], power, part_error = into_window(codes, scales, 30, -22)
                factors[expert, half] *= power
                error = max(error, part_error)
    return _each_matrix(ExpertWeights(**values), _shuffle_mxfp4), error


def into_window(codes: torch.Tensor, scales: torch.Tensor, window: int, least: int) -> tuple:
    """codes (R, K // 2), scales (R, K // 32) -> (codes, exponents 0 .. window, the power of two of
    the window whose exponent 0 is a 2^least, the largest error over the largest scale)."""
    magnitudes = unpack_e2m1(codes).double().unflatten(-1, (-1, 32))
    live = (magnitudes != 0).any(-1)
    largest = int(scales[live].max()) if live.any() else 0
    lowest = max(largest - window, 0)
    exact = torch.ldexp(magnitudes, scales[..., None].double() - lowest)  # over the lowest scale
    grid = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    rounded = (exact.abs() * 2).round().clamp(max=12) / 2  # the grid's steps are 0.5 up to 2
    inside = (scales >= lowest)[..., None]
    rounded = torch.where(inside, magnitudes.abs(), rounded)
    new = torch.searchsorted(grid, rounded)
    assert torch.equal(grid[new], rounded)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).unflatten(-1, (-1, 32))
    nibbles = (new.to(torch.uint8) | (nibbles & 8)).flatten(-2)
    error = (rounded.copysign(magnitudes) - exact).abs().masked_fill(inside, 0).max()
    exponents = (scales.int() - lowest).clamp(0, window).to(torch.uint8)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    power = 2.0 ** (lowest - 127 - least)
    return packed, exponents, power, float(error) * 2.0 ** (lowest - largest)


def unshuffled(weights: ExpertWeights) -> ExpertWeights:
    """The inverse, but for codes under a zero scale, which come back as zeros."""
    return _each_matrix(weights, _unshuffle)


def without_dead_codes(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Zero codes under a zero scale, which covers 16 codes, 8 bytes."""
    dead = (scales.view(torch.uint8) == 0).unsqueeze(-1)
    return codes.unflatten(-1, (-1, 8)).masked_fill(dead, 0).flatten(-2)


def _each_matrix(weights: ExpertWeights, change) -> ExpertWeights:
    # Of fc1's rows, 8 of the gate, then the 8 of the up with the same columns, and so on.
    column = torch.arange(weights.intermediate, device=weights.w13.device).view(-1, 1, 8)
    gate_up = torch.cat((column, column + weights.intermediate), dim=1).flatten()
    changed = {}
    for name, rows in (("w13", gate_up), ("w2", slice(None))):
        codes, scales = getattr(weights, name), getattr(weights, f"{name}_block_scales")
        parts = [
            change(expert_codes, expert_scales, rows)
            for expert_codes, expert_scales in zip(codes, scales.view(torch.uint8), strict=True)
        ]
        new_codes, new_scales = (torch.stack(part) for part in zip(*parts, strict=True))
        changed |= {name: new_codes, f"{name}_block_scales": new_scales.view(scales.dtype)}
    return weights._replace(**changed)


def _shuffle(codes: torch.Tensor, scales: torch.Tensor, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """codes (R, K // 2) uint8, scales (R, K // 16) uint8 of one expert."""
    codes = without_dead_codes(codes, scales)
    new_codes = _code_words(codes[rows]).flatten().view(torch.uint8).view(codes.shape)
    new_scales = _scale_words(scales[rows]).flatten().view(torch.uint8).view(scales.shape)
    return new_codes, new_scales


def _shuffle_mxfp4(codes: torch.Tensor, scales: torch.Tensor, rows) -> tuple:
    """Of one expert's codes and exponents in the window, (R, K // 32) uint8."""
    new_codes = _code_words(codes[rows]).flatten().view(torch.uint8).view(codes.shape)
    # (row block, warp, row half, row, k block, scale of two steps)
    fields = scales[rows].int().view(len(scales) // 64, 4, 2, 8, -1, 2).permute(0, 4, 1, 3, 5, 2)
    words = _words_of_scales(fields << 3)
    return new_codes, words.flatten().view(torch.uint8).view(scales.shape)


def _code_words(codes: torch.Tensor) -> torch.Tensor:
    """(R, K // 2) uint8 -> (R / 64, K / 64, 4 warps, 8 rows, 4 columns, 4 steps) int32 words."""
    # (row block, warp, row half, row, k block, step, k half, column pair)
    fields = codes.view(len(codes) // 64, 4, 2, 8, -1, 4, 2, 4)
    registers = fields.permute(0, 4, 1, 3, 7, 5, 6, 2).flatten(-2)
    words = torch.zeros(registers.shape[:-1], dtype=torch.int32, device=codes.device)
    for i, parts in enumerate(_BIT_FIELDS):
        byte = registers[..., i].int()
        pair = (byte & 15) | (byte >> 4 << 16)
        for mask, shift in parts:
            words |= (pair & mask) << shift if shift >= 0 else (pair & mask) >> -shift
    # Register 3's codes are ((word << 2) ^ (word >> 6)) & _CODE_BITS: every bit of theirs takes in
    # what the other shift brings to its place.
    words ^= (words & 0x00400040) << 8
    for mask in (0x10001000, 1 << 29, 1 << 21, 1 << 13):
        words ^= (words & mask) >> 8
    return words


def _scale_words(scales: torch.Tensor) -> torch.Tensor:
    """(R, K // 16) E4M3 as uint8 -> (R / 64, K / 64, 4 warps, 8 rows, 2 pairs of steps) int32."""
    # (row block, warp, row half, row, k block, pair of steps, step)
    fields = scales.view(len(scales) // 64, 4, 2, 8, -1, 2, 2).permute(0, 4, 1, 3, 5, 6, 2)
    table = torch.tensor(_FIVE_BIT_EXPONENT, dtype=torch.int32, device=scales.device)
    return _words_of_scales(table[fields.contiguous().int()])


def _words_of_scales(bits: torch.Tensor) -> torch.Tensor:
    """(..., 2 along K, row and row + 8) bytes -> (...) int32."""
    first, second = bits.unbind(-2)
    words = first[..., 0] << 4 | first[..., 1] << 20 | second[..., 0] << 12
    return words | second[..., 1] << 28 | second[..., 1] >> 4


def _unshuffle(
    codes: torch.Tensor, scales: torch.Tensor, rows
) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = len(codes) // 64
    words = codes.flatten().view(torch.int32).view(blocks, -1, 4, 8, 4, 4)
    registers = []
    for pair in _widened_codes(words):
        pair = (pair >> 12 & 0x00080008) | (pair >> 6 & 0x00070007)
        registers.append((pair & 15) | (pair >> 12 & 0xF0))
    fields = torch.stack(registers, dim=-1).unflatten(-1, (2, 2)).to(torch.uint8)
    new_codes = torch.empty_like(codes)
    new_scales = torch.empty_like(scales)
    new_codes[rows] = fields.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(codes.shape)
    words = scales.flatten().view(torch.int32).view(blocks, -1, 4, 8, 2)
    bits = [words >> 4, words >> 20, words >> 12, (words >> 28 & 15) | (words << 4)]
    five_bit = (torch.stack(bits, dim=-1) & 255).unflatten(-1, (2, 2))
    five_bit = five_bit.permute(0, 2, 6, 3, 1, 4, 5).reshape(scales.shape)
    inverse = [0] * 256
    for e4m3, byte in enumerate(_FIVE_BIT_EXPONENT):
        inverse[byte] = e4m3
    table = torch.tensor(inverse, dtype=torch.uint8, device=scales.device)
    new_scales[rows] = table[five_bit]
    return new_codes, new_scales


def _widened_codes(words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A step's four registers before they are scaled, as the GEMMs make them."""
    turned = (words >> 4 & 0x0FFFFFFF) | words << 28
    mixed = words << 2 ^ (words >> 6 & 0x03FFFFFF)
    return tuple(part & _CODE_BITS for part in (words, words << 6, turned, mixed))
