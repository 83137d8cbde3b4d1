"""Tokens as they travel between ranks in W4A4: quantised on their own rank, a row of bytes each.

    (num_tokens, row_bytes) uint8:  hidden // 2   E2M1 codes, two a byte, low nibble first
                                    hidden // 16  E4M3 block scales, row-major
                                    4             float32 global scale, if each row has its own

Block scales end, and a row ends, at a multiple of 16 bytes. The layer's own global scale, if there
is one, does not travel: all ranks have the same. One tensor, so that any exchange of rows carries
it, in 0.28 times bf16's bytes.
"""

import torch

from dsv4_kernels.types import NVFP4_BLOCK, MoeLayer, QuantizedRows

ALIGNMENT = 16


def is_packed(tokens: torch.Tensor) -> bool:
    """What `pack_tokens` made, not hidden states."""
    return tokens.dtype == torch.uint8


def row_bytes(layer: MoeLayer) -> int:
    """Of a token."""
    return _global_scale_at(layer) + ALIGNMENT * (_layer_scale(layer) is None)


def _layer_scale(layer: MoeLayer) -> torch.Tensor | None:
    assert layer.shape.quantize_activations, layer.shape
    assert layer.activation_scales is not None
    return layer.activation_scales.fc1


def _global_scale_at(layer: MoeLayer) -> int:
    hidden = layer.shape.hidden
    return -(-(hidden // 2 + hidden // NVFP4_BLOCK) // ALIGNMENT) * ALIGNMENT


def unpack_tokens(packed: torch.Tensor, layer: MoeLayer) -> QuantizedRows:
    """Views of the parts, with rows row_bytes apart; global_scales is the layer's, if any."""
    hidden, start = layer.shape.hidden, _global_scale_at(layer)
    codes, scales, _ = packed.tensor_split((hidden // 2, hidden // 2 + hidden // NVFP4_BLOCK), 1)
    global_scales = _layer_scale(layer)
    if global_scales is None:
        global_scales = packed[:, start : start + 4].view(torch.float32)[:, 0]
    return QuantizedRows(codes, scales.view(torch.float8_e4m3fn), global_scales)


def pack_tokens(hidden_states: torch.Tensor, ids: torch.Tensor, layer: MoeLayer) -> torch.Tensor:
    """What `moe` takes in place of hidden_states (num_tokens, hidden) bf16, with the same output.

    ids (num_tokens, top_k), global: rows of padding tokens, which have -1 in all slots, are left as
    they are. layer.saturated grows by each token's blocks that did not fit, once.
    """
    from dsv4_kernels.rows.nvfp4_quantize import nvfp4_quantize

    size = (len(hidden_states), row_bytes(layer))
    packed = torch.empty(size, dtype=torch.uint8, device=hidden_states.device)
    quantize = layer.backend.quantize or nvfp4_quantize
    quantize(
        hidden_states,
        _layer_scale(layer),
        live=ids,
        saturated=layer.saturated,
        out=unpack_tokens(packed, layer),
    )
    return packed
