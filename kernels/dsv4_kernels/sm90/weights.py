"""Checkpoint layout -> kernel layout, in place, one expert at a time.

sm90. Weights are cut into blocks of 64 rows by 64 columns; a block's codes are 2048 contiguous
bytes and its scales 256, and blocks follow one another along K, then along the rows:

    codes   (rows / 64, K / 64, 128 threads, 4 steps)     one 32-bit word
    scales  (rows / 64, K / 64, 32 row pairs, 2 pairs of steps)   one 32-bit word

Thread t = 32 w + l of the warpgroup owns, of each step (16 columns), the eight codes of WGMMA's
register operand: register i = 0..3 holds row 16 w + l // 4 + 8 (i % 2), columns
8 (i // 2) + 2 (l % 4) + {0, 1}. In the word, the first column's code is in the low half and the
second's in the high half, at these bits of it (s = sign, e1 e0 = exponent, m = mantissa; but
register 2's signs lie each in the other half):

    register 0: s 15, e1 e0 m 8 7 6      register 2: s 3, e1 e0 m 12 11 10
    register 1: s  9, e1 e0 m 2 1 0      register 3: s 13, e1 14, e0 5, m 4

Three shifts of a word, under one mask each, cannot give all of its bits: the mask does not tile
them. Four can, if register 3 is ((word << 2) ^ (word >> 6)) under the mask; `_mix` changes its bits
so that this gives its codes. A step costs four shifts and four masks.

Scales: a row pair is rows 16 w + r and 16 w + r + 8, at index 8 w + r. A scale takes 8 bits, E4M3
without its sign but with a fifth exponent bit, so that 2^-9 .. 448 are all normal numbers: exponent
x + 22, then 3 bits of mantissa. In the word of steps 2 i and 2 i + 1, the first step's are at bits
11:4 (row) and 27:20 (row + 8), and a rotation by 8 brings the second's there. Zero has no such
number: a zero scale becomes 0, and the codes it scales become zeros, which is the same matrix.

fc1's rows are permuted first: in each block, rows 16 w + r are gate rows 32 b + 8 w + r, and rows
16 w + r + 8 the up rows of the same number, so that one thread owns both operands of SwiGLU.
"""

import torch

from dsv4_kernels.types import ExpertWeights

# A matrix is shuffled in this many parts, so that its copy and a part's words fit in the bytes of
# one expert.
_PARTS = 24
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


def shuffle_sm90(weights: ExpertWeights) -> ExpertWeights:
    """Rewrite the four big tensors in place; shapes stay, the meaning of the bytes is above.

    Needs at most one expert's bytes on top of the weights.
    """
    _check_scales(weights)
    gate_up = _interleave_gate_up(weights.intermediate, weights.w13.device)
    for codes, scales, rows in (
        (weights.w13, weights.w13_block_scales, gate_up),
        (weights.w2, weights.w2_block_scales, None),
    ):
        assert codes.is_contiguous() and scales.is_contiguous()
        for expert_codes, expert_scales in zip(codes, scales.view(torch.uint8), strict=True):
            _shuffle_expert(expert_codes, expert_scales, rows)
    return weights


def _check_scales(weights: ExpertWeights) -> None:
    for name in ("w13", "w2"):
        scales = getattr(weights, f"{name}_block_scales")
        if int(scales.view(torch.uint8).max()) > 0x7E:
            raise ValueError(
                f"block scales of {name} hold a negative number or NaN, and NVFP4 has neither: "
                "convert the checkpoint again"
            )


def unshuffle_sm90(weights: ExpertWeights) -> ExpertWeights:
    """The inverse as new tensors, but for codes under a zero scale, which come back as zeros."""
    gate_up = _interleave_gate_up(weights.intermediate, weights.w13.device)

    def restore(codes, scales, rows):
        restored = [
            _unshuffle_expert(expert_codes, expert_scales, rows)
            for expert_codes, expert_scales in zip(codes, scales.view(torch.uint8), strict=True)
        ]
        new_codes, new_scales = (torch.stack(part) for part in zip(*restored, strict=True))
        return new_codes, new_scales.view(scales.dtype)

    w13, w13_scales = restore(weights.w13, weights.w13_block_scales, gate_up)
    w2, w2_scales = restore(weights.w2, weights.w2_block_scales, None)
    return weights._replace(w13=w13, w13_block_scales=w13_scales, w2=w2, w2_block_scales=w2_scales)


def _interleave_gate_up(intermediate: int, device: torch.device) -> torch.Tensor:
    """(2 * intermediate,) the checkpoint's row for each row of the kernel's fc1."""
    column = torch.arange(intermediate, device=device).view(-1, 1, 8)
    return torch.cat((column, column + intermediate), dim=1).flatten()


def _shuffle_expert(codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None) -> None:
    """codes (R, K // 2) uint8, scales (R, K // 16) uint8: both are overwritten."""
    source_codes, source_scales = codes.clone(), scales.clone()
    step = max(len(codes) // _PARTS // 64, 1) * 64
    for start in range(0, len(codes), step):
        stop = min(start + step, len(codes))
        part = slice(start, stop) if rows is None else rows[start:stop]
        block_codes, block_scales = source_codes[part], source_scales[part]
        # A scale covers 16 codes, 8 bytes.
        dead = (block_scales == 0).unsqueeze(-1)
        block_codes = block_codes.unflatten(1, (-1, 8)).masked_fill(dead, 0).flatten(1)
        words = _code_words(block_codes)
        codes[start:stop] = words.flatten().view(torch.uint8).view(stop - start, -1)
        words = _scale_words(block_scales)
        scales[start:stop] = words.flatten().view(torch.uint8).view(stop - start, -1)


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
    return _mix(words)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Register 3's codes are ((word << 2) ^ (word >> 6)) & _CODE_BITS: every bit of theirs takes in
    what the other shift brings to its place."""
    words ^= (words & 0x00400040) << 8
    for mask in (0x10001000, 1 << 29, 1 << 21, 1 << 13):
        words ^= (words & mask) >> 8
    return words


def _widened_codes(words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A step's four registers before they are scaled, as the kernel makes them."""
    turned = (words >> 4 & 0x0FFFFFFF) | words << 28
    mixed = words << 2 ^ (words >> 6 & 0x03FFFFFF)
    return tuple(part & _CODE_BITS for part in (words, words << 6, turned, mixed))


def _scale_words(scales: torch.Tensor) -> torch.Tensor:
    """(R, K // 16) E4M3 as uint8 -> (R / 64, K / 64, 4 warps, 8 rows, 2 pairs of steps) int32."""
    # (row block, warp, row half, row, k block, pair of steps, step)
    fields = scales.view(len(scales) // 64, 4, 2, 8, -1, 2, 2).permute(0, 4, 1, 3, 5, 6, 2)
    table = torch.tensor(_FIVE_BIT_EXPONENT, dtype=torch.int32, device=scales.device)
    bits = table[fields.contiguous().int()]
    first, second = bits.unbind(-2)
    words = first[..., 0] << 4 | first[..., 1] << 20 | second[..., 0] << 12
    return words | second[..., 1] << 28 | second[..., 1] >> 4


def _unshuffle_expert(
    codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of _shuffle_expert, as new tensors."""
    blocks = len(codes) // 64
    words = codes.flatten().view(torch.int32).view(blocks, -1, 4, 8, 4, 4)
    registers = []
    for pair in _widened_codes(words):
        pair = (pair >> 12 & 0x00080008) | (pair >> 6 & 0x00070007)
        registers.append((pair & 15) | (pair >> 12 & 0xF0))
    fields = torch.stack(registers, dim=-1).unflatten(-1, (2, 2)).to(torch.uint8)
    new_codes = torch.empty_like(codes)
    new_scales = torch.empty_like(scales)
    target = slice(None) if rows is None else rows
    new_codes[target] = fields.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(codes.shape)
    words = scales.flatten().view(torch.int32).view(blocks, -1, 4, 8, 2)
    bits = [words >> 4, words >> 20, words >> 12, (words >> 28 & 15) | (words << 4)]
    five_bit = (torch.stack(bits, dim=-1) & 255).unflatten(-1, (2, 2))
    five_bit = five_bit.permute(0, 2, 6, 3, 1, 4, 5).reshape(scales.shape)
    inverse = [0] * 256
    for e4m3, byte in enumerate(_FIVE_BIT_EXPONENT):
        inverse[byte] = e4m3
    table = torch.tensor(inverse, dtype=torch.uint8, device=scales.device)
    new_scales[target] = table[five_bit]
    return new_codes, new_scales
