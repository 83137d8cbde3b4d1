"""Tokens as they travel between ranks: quantised on their own rank, a row of bytes each.

    W4A4 (num_tokens, row_bytes) uint8:  hidden // 2   E2M1 codes, two a byte, low nibble first
                                         hidden // 16  E4M3 block scales, row-major
                                         4             float32 global scale, if each row has its own
    W4A8 (num_tokens, row_bytes) uint8:  hidden        E4M3 codes, in the order of `Fp8Rows` (by
                                                       column with the reference backend)
                                         4             float32 scale

The part before the float32 is padded to a multiple of 16 bytes, and so is the row. A global scale
of the whole layer does not travel: all ranks have it. All is one tensor, so that any exchange of
rows can carry it, in 0.28 (W4A4) and 0.50 (W4A8) times bf16's bytes.
"""

import torch

from dsv4_kernels.types import NVFP4_BLOCK, Fp8Rows, MoeLayer, MoeShape, QuantizedRows

ALIGNMENT = 16


def is_packed(tokens: torch.Tensor) -> bool:
    """Whether these are what `pack_tokens` made, rather than hidden states."""
    return tokens.dtype == torch.uint8


def packs(shape: MoeShape) -> bool:
    """Whether the layer's activations are quantised, and so can be before they travel."""
    return shape.quantize_activations or shape.fp8


def row_bytes(layer: MoeLayer) -> int:
    """Bytes of a packed token."""
    return _row_scale_at(layer.shape) + ALIGNMENT * (_layer_scale(layer) is None)


def _layer_scale(layer: MoeLayer) -> torch.Tensor | None:
    assert packs(layer.shape), layer.shape
    return None if layer.activation_scales is None else layer.activation_scales.fc1


def _row_scale_at(shape: MoeShape) -> int:
    size = shape.hidden if shape.fp8 else shape.hidden // 2 + shape.hidden // NVFP4_BLOCK
    return -(-size // ALIGNMENT) * ALIGNMENT


def unpack_tokens(packed: torch.Tensor, layer: MoeLayer) -> QuantizedRows | Fp8Rows:
    """Views of the parts, with rows row_bytes apart; global_scales is the layer's, if any."""
    hidden, start = layer.shape.hidden, _row_scale_at(layer.shape)
    scales = _layer_scale(layer)
    if scales is None:
        scales = packed[:, start : start + 4].view(torch.float32)[:, 0]
    if layer.shape.fp8:
        return Fp8Rows(packed[:, :hidden].view(torch.float8_e4m3fn), scales)
    codes, blocks, _ = packed.tensor_split((hidden // 2, hidden // 2 + hidden // NVFP4_BLOCK), 1)
    return QuantizedRows(codes, blocks.view(torch.float8_e4m3fn), scales)


def pack_tokens(hidden_states: torch.Tensor, ids: torch.Tensor, layer: MoeLayer) -> torch.Tensor:
    """What `moe` takes in place of hidden_states (num_tokens, hidden) bf16, with the same output.

    ids (num_tokens, top_k), global: rows of padding tokens, which have -1 in all slots, are left as
    they are. layer.saturated grows by what did not fit of each token, once.
    """
    from dsv4_kernels.rows.fp8_quantize import fp8_quantize
    from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize

    size = (len(hidden_states), row_bytes(layer))
    packed = torch.empty(size, dtype=torch.uint8, device=hidden_states.device)
    out, saturated = unpack_tokens(packed, layer), layer.saturated
    if layer.backend.quantize is not None:
        scale = _layer_scale(layer)
        layer.backend.quantize(hidden_states, scale, live=ids, saturated=saturated, out=out)
    elif isinstance(out, Fp8Rows):
        fp8_quantize(hidden_states, live=ids, saturated=saturated, out=out)
    else:
        scale = _layer_scale(layer)
        nvfp4_quantize(hidden_states, scale, live=ids, saturated=saturated, out=out)
    return packed
