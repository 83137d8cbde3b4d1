"""Layers of the published models: their sizes, as `vllm_dsv4_moe.commands.releases` has them."""

from typing import Any

from dsv4_kernels.types import MoeShape

from vllm_dsv4_moe.commands.deployment import moe_sizes
from vllm_dsv4_moe.commands.releases import RELEASES, text_config

MODELS = {"flash": "V4-Flash", "pro": "V4-Pro", "v41": "V4.1-Flash"}


def released_shape(
    model: str, weight_format: str = "nvfp4", *, ep: int = 1, tp: int = 1, tokens: int = 8192
) -> MoeShape:
    """Of a rank, in W4A16."""
    experts, top_k, hidden, intermediate = moe_sizes(RELEASES[model])
    sizes = (experts, experts // ep, top_k, hidden, intermediate // tp, tokens)
    return MoeShape(*sizes, quantize_activations=False, weight_format=weight_format)


def num_layers(model: str) -> int:
    return text_config(RELEASES[model])["num_hidden_layers"]


def layer_sizes(model: str, layers: int) -> dict[str, Any]:
    """TinyConfig's, of a model of so many such layers."""
    config = text_config(RELEASES[model])
    experts, top_k, hidden, intermediate = moe_sizes(config)
    return {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "experts": experts,
        "top_k": top_k,
        "hash_layers": min(layers, config.get("num_hash_layers", 0)),
        "heads": config["num_attention_heads"],
    }
