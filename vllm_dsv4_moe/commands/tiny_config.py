"""The sizes and the config.json of a tiny checkpoint."""

from dataclasses import dataclass
from typing import Any

from vllm_dsv4_moe.checkpoint_layout import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK

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


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the checkpoint. Raises ValueError for what a V4 checkpoint cannot have."""

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
        block = FP8_BLOCK if self.linear == "fp8" else MXFP4_BLOCK if has_mxfp4 else NVFP4_BLOCK
        reason = {FP8_BLOCK: "FP8 linears are", MXFP4_BLOCK: "MXFP4 (or MTP) experts are"}.get(
            block, "NVFP4 is"
        )
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
            self.heads % 4 == 0,
            f"heads {self.heads} must be a multiple of 4, the output projection's groups",
        )
        _require(
            self.vocab >= MIN_VOCAB,
            f"vocab {self.vocab} is too small: the byte tokenizer needs {MIN_VOCAB}",
        )
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
    # Sliding window only, then with an indexer (4) and without (128) by turns, as V4-Flash.
    ratios = [0, 0, *[4, 128] * config.layers][: config.layers]
    return {
        **_attention_config(config),
        "compress_ratios": ratios + [0] * max(1, config.mtp),
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
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
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "quantization_config": _quantization_config(config, ratios),
    }


def _attention_config(config: TinyConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 256,
        "o_lora_rank": 128,
        "o_groups": max(4, config.heads // 8),
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


def _quantization_config(config: TinyConfig, ratios: list[int]) -> dict[str, Any]:
    quant: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
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
    if config.linear == "bf16":
        blocks = [(f"layers.{layer}.", ratio) for layer, ratio in enumerate(ratios)]
        blocks += [(f"mtp.{layer}.", 0) for layer in range(config.mtp)]
        quant["ignored_layers"] = [
            name for prefix, ratio in blocks for name in _linear_names(prefix, ratio)
        ]
    return quant


def _linear_names(prefix: str, ratio: int) -> list[str]:
    attention = ["wq_a", "wq_b", "wkv", "wo_a", "wo_b"] + ["indexer.wq_b"] * (ratio == 4)
    names = [f"{prefix}attn.{name}" for name in attention]
    names += [f"{prefix}ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")]
    return names + [f"{prefix}{name}" for name in ("e_proj", "h_proj") if prefix.startswith("mtp.")]
