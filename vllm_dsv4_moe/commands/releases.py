"""The published checkpoints: what their config.json says of sizes and formats, by repository."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_V4: dict[str, Any] = {
    "hc_mult": 4,
    "head_dim": 512,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "swiglu_limit": 10.0,
    "vocab_size": 129280,
}
FLASH = _V4 | {
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "o_groups": 8,
    "q_lora_rank": 1024,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}
PRO = _V4 | {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
V41_FLASH: dict[str, Any] = {
    "model_type": "deepseek_v41",
    "text_config": {
        "hc_mult": 4,
        "head_dim": 512,
        "hidden_size": 5120,
        "moe_intermediate_size": 2304,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 40,
        "num_nextn_predict_layers": 3,
        "num_attention_heads": 64,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1280,
        "swiglu_limit": 10.0,
        "vocab_size": 129280,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20],
        "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "index_head_dim": 128,
        "index_n_heads": 32,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384_006_168, 384_016_682],
        "engram_head_dim": 256,
        "engram_n_heads": 8,
        "engram_max_ngram_size": 4,
        "dspark_target_layer_ids": [37, 38, 39],
        "dspark_markov_rank": 256,
        "dspark_n_routed_experts": 128,
        "dspark_num_experts_per_tok": 3,
    },
    "vision_config": {
        "num_hidden_layers": 32,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "patch_size": 14,
        "downsample_ratio": 3,
    },
}
# NVIDIA's copies; the layers of drafts stay MXFP4.
NVFP4 = {"quantization_config": {"moe_quant_algo": "NVFP4", "ignore": ["*.attn.*", "mtp.*"]}}


def _dspark(target_layer_ids: list[int]) -> dict[str, Any]:
    return {"dspark_target_layer_ids": target_layer_ids, "dspark_markov_rank": 256}


RELEASES: dict[str, dict[str, Any]] = {
    "flash": FLASH,
    "deepseek-ai/DeepSeek-V4-Flash": FLASH,
    "deepseek-ai/DeepSeek-V4-Flash-0731": FLASH | _dspark([40, 41, 42]),
    "nvidia/DeepSeek-V4-Flash-NVFP4": FLASH | NVFP4,
    "pro": PRO,
    "deepseek-ai/DeepSeek-V4-Pro": PRO,
    "deepseek-ai/DeepSeek-V4-Pro-0813": PRO | _dspark([58, 59, 60]),
    "nvidia/DeepSeek-V4-Pro-NVFP4": PRO | NVFP4,
    "v41": V41_FLASH,
    "deepseek-ai/DeepSeek-V4.1-Flash": V41_FLASH,
    "nvidia/DeepSeek-V4.1-Flash-NVFP4": V41_FLASH | NVFP4,
}


def model_config(model: str) -> Mapping[str, Any]:
    """config.json of a published checkpoint, by name, or of a file or folder; ValueError for
    anything else."""
    if model in RELEASES:
        return RELEASES[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{model} is not flash, pro, v41, the name of a published checkpoint, a config.json or "
            "a folder with one"
        )
    return _parsed(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Of a downloaded checkpoint; ValueError where there is none, or what is there is no config."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a downloaded checkpoint")
    return _parsed(path)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is JSON, but no object with the sizes of a model")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the text model's sizes are: V4.1 has them in an object of their own."""
    return {**config, **(config.get("text_config") or {})}
