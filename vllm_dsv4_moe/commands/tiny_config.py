"""The sizes and the config.json of a tiny checkpoint."""

import re
from dataclasses import dataclass
from typing import Any

from vllm_dsv4_moe.checkpoint_layout import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, V41
from vllm_dsv4_moe.commands.v41_layout import FP8_BLOCK as V41_FP8_BLOCK

NUM_IMAGE_TOKEN_IDS = 5
HEAD_DIM = 512  # the only one that vLLM's V4 attention has
# The order is that of DeepSeek's ids: bos is 0 and eos is 1.
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<unk>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
MIN_VOCAB = len(SPECIAL_TOKENS) + 256
# V4.1's, of the tokens that an image's take the place of: its router knows them by the id.
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<｜deepseek_image｜>", 129_264
# What a V4.1 checkpoint has else than TinyConfig's defaults.
V41_DEFAULTS = {"hash_layers": 0, "vocab": 129_280}


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the checkpoint. Raises ValueError for what such a checkpoint cannot have."""

    model: str = "v4"  # or v41
    layers: int = 4
    hidden: int = 512
    intermediate: int = 256
    experts: int = 16
    top_k: int = 6
    hash_layers: int = 2
    heads: int = 8
    vocab: int = 512
    linear: str = "bf16"  # what is not an expert: bf16, or fp8 as published
    expert_format: str = "nvfp4"  # or mxfp4, as DeepSeek publishes them
    mtp: int = 0  # multi-token-prediction layers, with MXFP4 experts as published
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "experts", "top_k", "heads"):
            _require(getattr(self, name) > 0, f"{name} {getattr(self, name)} must be positive")
        has_mxfp4 = self.mtp or self.expert_format == "mxfp4"
        block = MXFP4_BLOCK if has_mxfp4 else NVFP4_BLOCK
        if self.linear == "fp8":
            block = V41_FP8_BLOCK if self.model == "v41" else FP8_BLOCK
        reason = "MXFP4 (or MTP) experts are" if has_mxfp4 else "NVFP4 is"
        if self.linear == "fp8":
            reason = "FP8 linears are"
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            _require(
                size % block == 0,
                f"{name} {size} must be a multiple of {block}: {reason} scaled in blocks of it",
            )
        _require(
            self.top_k <= self.experts,
            f"top_k {self.top_k} cannot be more than the number of experts, {self.experts}",
        )
        _require(
            0 <= self.hash_layers <= self.layers,
            f"hash_layers {self.hash_layers} must be from 0 to the number of layers, {self.layers}",
        )
        _require(
            self.heads % output_groups(self.heads) == 0,
            f"heads {self.heads} must be a multiple of the output projection's groups, "
            f"{output_groups(self.heads)} for so many",
        )
        _require(
            self.vocab >= MIN_VOCAB,
            f"vocab {self.vocab} is too small: the byte tokenizer needs {MIN_VOCAB}",
        )
        if self.model == "v41":
            last = IMAGE_TOKEN_ID + NUM_IMAGE_TOKEN_IDS
            _require(
                self.vocab >= last,
                f"vocab {self.vocab} is too small: V4.1's image tokens end at {last - 1}",
            )
            _require(self.hash_layers == 0, "hash_layers must be 0: V4.1 has none")
            _require(self.mtp == 0, "mtp must be 0: V4.1's drafts are not written")
        _require(self.model in ("v4", "v41"), f"model {self.model!r} must be v4 or v41")
        _require(self.linear in ("bf16", "fp8"), f"linear {self.linear!r} must be bf16 or fp8")
        _require(
            self.expert_format in ("nvfp4", "mxfp4"),
            f"expert_format {self.expert_format!r} must be nvfp4 or mxfp4",
        )
        _require(self.mtp >= 0, f"mtp {self.mtp} cannot be negative")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def tiny_config_json(config: TinyConfig) -> dict[str, Any]:
    """The checkpoint's config.json."""
    if config.model == "v41":
        return _v41_config_json(config)
    return {
        **_text_config(config),
        "compress_ratios": _ratios(config) + [0] * max(1, config.mtp),
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **_FRAME,
        "expert_dtype": "fp4",
        "quantization_config": _quantization_config(config),
    }


_FRAME = {
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _v41_config_json(config: TinyConfig) -> dict[str, Any]:
    """Two layers that compress and index, one of each ratio that V4.1-Flash has, and those between
    that share the first's; neither Engram nor candidate blocks. The vision tower is small."""
    sources = _sources(config)
    text = _text_config(config) | {
        "model_type": "deepseek_v41_text",
        "index_n_heads": 32,
        "compress_ratios": [0, *[2] * config.layers][: config.layers - 1] + [1],
        "kv_source_layer_ids": sources,
        "index_source_layer_ids": sources,
    }
    text["rope_scaling"]["rope_type"] = text["rope_scaling"].pop("type")
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": V41,
        **_FRAME,
        "image_token_id": IMAGE_TOKEN_ID,
        "text_config": text,
        "vision_config": {
            "model_type": "deepseek_v41_vision",
            "num_hidden_layers": 1,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "patch_size": 14,
            "rope_theta": 10000,
            "downsample_ratio": 3,
            "max_image_tokens": 1024,
            "min_pixels": 295936,
        },
        "quantization_config": _quantization_config(config) | {"expert_dtype": "fp4"},
    }


def _text_config(config: TinyConfig) -> dict[str, Any]:
    return {
        **_attention_config(config),
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "moe_intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_hash_layers": config.hash_layers,
        "num_nextn_predict_layers": config.mtp,
        "n_routed_experts": config.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": config.top_k,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hc_mult": 4,
        "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }


def _attention_config(config: TinyConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 256,
        "o_lora_rank": 128,
        "o_groups": output_groups(config.heads),
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "compress_rope_theta": 160000,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
    }


def output_groups(heads: int) -> int:
    """Of attention's output projection."""
    return max(4, heads // 8)


def _quantization_config(config: TinyConfig) -> dict[str, Any]:
    block = V41_FP8_BLOCK if config.model == "v41" else FP8_BLOCK
    quant: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [block, block],
    }
    if config.expert_format == "nvfp4":
        quant |= {
            "moe_quant_algo": "NVFP4",
            "quant_algo": "MIXED_PRECISION",
            "group_size": NVFP4_BLOCK,
            "quantized_layers": {
                f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK}
                for layer in range(config.layers)
            },
            "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        }
    names = linear_names(config)
    if config.model == "v41":  # as vLLM calls them: its V4.1 translates none
        names = [
            _FUSED.sub(lambda m: _FUSED_NAMES[m[1]], f"language_model.model.{n}") for n in names
        ]
    if names:
        quant["ignored_layers"] = list(dict.fromkeys(names))
    return quant


_FUSED_NAMES = {
    "attn.wq_a": "attn.fused_wqa_wkv",
    "attn.wkv": "attn.fused_wqa_wkv",
    "shared_experts.w1": "shared_experts.gate_up_proj",
    "shared_experts.w3": "shared_experts.gate_up_proj",
    "shared_experts.w2": "shared_experts.down_proj",
}
_FUSED = re.compile(f"({'|'.join(map(re.escape, _FUSED_NAMES))})$")


def linear_names(config: TinyConfig) -> list[str]:
    """The checkpoint's linears that are bf16."""
    if config.linear != "bf16":
        return []
    names = []
    for prefix, has_indexer in _blocks(config):
        attention = ["wq_a", "wq_b", "wkv", "wo_a", "wo_b"] + ["indexer.wq_b"] * has_indexer
        names += [f"{prefix}attn.{name}" for name in attention]
        names += [f"{prefix}ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")]
        if prefix.startswith("mtp."):
            names += [f"{prefix}{name}" for name in ("e_proj", "h_proj")]
    return names


def _blocks(config: TinyConfig) -> list[tuple[str, bool]]:
    """(prefix, whether it has an indexer) of each layer and draft."""
    if config.model == "v41":
        sources = _sources(config)
        return [(f"layers.{layer}.", layer in sources) for layer in range(config.layers)]
    blocks = [(f"layers.{layer}.", ratio == 4) for layer, ratio in enumerate(_ratios(config))]
    return blocks + [(f"mtp.{layer}.", False) for layer in range(config.mtp)]


def _ratios(config: TinyConfig) -> list[int]:
    """V4's: sliding window only, then with an indexer (4) and without (128) by turns, as Flash."""
    return [0, 0, *[4, 128] * config.layers][: config.layers]


def _sources(config: TinyConfig) -> list[int]:
    """V4.1's layers that compress and index, which later ones share."""
    return sorted({min(1, config.layers - 1), config.layers - 1})
