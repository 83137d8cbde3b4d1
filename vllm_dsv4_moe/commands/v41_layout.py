"""Every tensor of a V4.1 checkpoint, from config.json: for the sum of a rank's memory, and for a
tiny one.

`checkpoint_layout` has its gates and experts. Its other layers are V4's but for attention's
compressors and indexers, which only some layers have, Engram's tables, and a vision tower. The
names are the checkpoint's; held against the published V4.1-Flash's 510.3 GB.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vllm_dsv4_moe.checkpoint_layout import (
    CONFIG_KEYS,
    MOE_FIELDS,
    MXFP4_BLOCK,
    ModelSizes,
    Named,
    TensorSpec,
    block_tensors,
    dspark_tensors,
    linear,
)
from vllm_dsv4_moe.commands.releases import text_config

FP8_BLOCK = 32
# What ModelSizes leaves out of V4.1's text_config.
_FIELDS = {"num_mtp_layers": "num_nextn_predict_layers"} | {
    field: key
    for field, key in CONFIG_KEYS.items()
    if field not in (*MOE_FIELDS, "num_hash_layers")
}


def v41_tensors(config: Mapping[str, Any], unquantized_linears: Iterable[str] = ()) -> Named:
    """Linears are FP8 but for those named. ValueError where the config lacks a size."""
    text = text_config(config)
    absent = [key for key in _FIELDS.values() if key not in text]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}: its memory cannot be summed")
    sizes = replace(
        ModelSizes.from_config(config),
        **{field: text[key] for field, key in _FIELDS.items()},
        num_dspark_targets=len(text.get("dspark_target_layer_ids") or ()),
        dspark_markov_rank=text.get("dspark_markov_rank") or 0,
        unquantized_linears=frozenset(unquantized_linears),
        fp8_block=FP8_BLOCK,
    )
    for name in ("embed", "head"):
        yield f"{name}.weight", TensorSpec("BF16", (sizes.vocab, sizes.hidden))
    yield "norm.weight", TensorSpec("BF16", (sizes.hidden,))
    for layer in range(sizes.num_layers):
        prefix = f"layers.{layer}."
        yield from block_tensors(sizes, prefix, ratio=0, is_hash=False)
        yield from _shared_attention(sizes, text, f"{prefix}attn.", layer)
        if layer in (text.get("engram_layer_ids") or ()):
            yield from _engram(sizes, text, f"{prefix}engram.", layer)
    experts = text.get("dspark_n_routed_experts") or sizes.num_experts
    draft = replace(sizes, num_experts=experts)
    for layer in range(sizes.num_mtp_layers):
        yield from block_tensors(draft, f"mtp.{layer}.", ratio=0, is_hash=False)
        yield from dspark_tensors(draft, layer)
    yield from _vision(config.get("vision_config") or {}, sizes.hidden)


def _shared_attention(sizes: ModelSizes, text: Mapping[str, Any], prefix: str, layer: int) -> Named:
    """The compressor and indexer that later layers share: both unquantised, but for wq_b."""
    if layer in (text.get("kv_source_layer_ids") or ()):
        # Nothing is pooled at ratio 1, so nothing is weighted.
        names = ("wkv", "wgate") if text["compress_ratios"][layer] > 1 else ("wkv",)
        for name in names:
            matrix = TensorSpec("BF16", (sizes.head_dim, sizes.hidden))
            yield f"{prefix}compressor.{name}.weight", matrix
        yield f"{prefix}compressor.norm.weight", TensorSpec("BF16", (sizes.head_dim,))
        keys = (sizes.index_head_dim, sizes.head_dim)
        yield f"{prefix}indexer.wk.weight", TensorSpec("BF16", keys)
        yield f"{prefix}indexer.k_norm.weight", TensorSpec("BF16", (sizes.index_head_dim,))
    if layer in (text.get("index_source_layer_ids") or ()):
        index_size = sizes.index_heads * sizes.index_head_dim
        yield from linear(sizes, f"{prefix}indexer.wq_b", index_size, sizes.q_lora)
        projection = TensorSpec("BF16", (sizes.index_heads, sizes.hidden))
        yield f"{prefix}indexer.weights_proj.weight", projection


def _engram(sizes: ModelSizes, text: Mapping[str, Any], prefix: str, layer: int) -> Named:
    """A table of rows by the hashes of n-grams, and what writes them into the residual stream."""
    rows = text["engram_num_embeddings"][text["engram_layer_ids"].index(layer)]
    width = text["engram_head_dim"]
    yield f"{prefix}embed.weight", TensorSpec("F8_E4M3", (rows, width))
    yield f"{prefix}embed.scale", TensorSpec("F8_E8M0", (rows, width // MXFP4_BLOCK))
    columns = (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"] * width
    yield from linear(sizes, f"{prefix}wkv", (sizes.hc_mult + 1) * sizes.hidden, columns)
    for name in ("q_weight", "k_weight"):
        yield f"{prefix}{name}", TensorSpec("BF16", (sizes.hc_mult, sizes.hidden))


def _vision(vision: Mapping[str, Any], hidden: int) -> Named:
    """The tower, what aligns it with the text model, and the embeddings around an image's."""
    if not vision.get("num_hidden_layers"):
        return
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    for block in range(vision["num_hidden_layers"]):
        prefix = f"vision.blocks.{block}."
        yield from _with_bias(f"{prefix}attn.wqkv", (3 * width, width))
        yield from _with_bias(f"{prefix}attn.wo", (width, width))
        yield f"{prefix}mlp.w1.weight", TensorSpec("BF16", (2 * inner, width))
        yield f"{prefix}mlp.w2.weight", TensorSpec("BF16", (width, inner))
        for norm in ("norm1", "norm2"):
            yield f"{prefix}{norm}.weight", TensorSpec("F32", (width,))
    yield "vision.norm.weight", TensorSpec("F32", (width,))
    yield from _with_bias("vision.patch_embed.proj", (width, 3 * vision["patch_size"] ** 2))
    patches = vision["downsample_ratio"] ** 2
    yield from _with_bias("aligner.w1", (hidden, width * patches))
    yield from _with_bias("aligner.w2", (hidden, hidden))
    for name in ("start", "newline", "end"):
        yield f"image_{name}", TensorSpec("F32", (hidden,))


def _with_bias(name: str, shape: tuple[int, int]) -> Named:
    yield f"{name}.weight", TensorSpec("BF16", shape)
    yield f"{name}.bias", TensorSpec("BF16", shape[:1])
