"""The layout against the published checkpoints: counts, dtypes and bytes of their files."""

from collections import Counter

import pytest

from vllm_dsv4_moe.checkpoint_layout import ModelSizes, TensorSpec, checkpoint_tensors

COMMON = {
    "hc_mult": 4,
    "head_dim": 512,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "vocab_size": 129280,
}
FLASH = COMMON | {
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "o_groups": 8,
    "q_lora_rank": 1024,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}
PRO = COMMON | {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
NVFP4 = {"quantization_config": {"moe_quant_algo": "NVFP4", "ignore": ["*.attn.*", "mtp.*"]}}


def tensors_of(config):
    return dict(checkpoint_tensors(ModelSizes.from_config(config)))


def test_flash_as_published_by_deepseek():
    tensors = tensors_of(FLASH)
    assert len(tensors) == 69_187
    assert sum(spec.num_bytes for spec in tensors.values()) == 159_609_485_896
    assert Counter(spec.dtype for spec in tensors.values()) == {
        "BF16": 433,
        "F32": 417,
        "F8_E4M3": 375,
        "F8_E8M0": 34_167,
        "I64": 3,
        "I8": 33_792,
    }


def test_pro_as_published_by_deepseek():
    tensors = tensors_of(PRO)
    assert len(tensors) == 145_116
    assert round(sum(spec.num_bytes for spec in tensors.values()) / 2**30, 2) == 805.32


@pytest.mark.parametrize(
    ("config", "count"), [(FLASH, 135_235), (PRO, 285_660)], ids=["flash", "pro"]
)
def test_nvfp4_copy_has_four_tensors_an_expert_linear_and_mxfp4_mtp(config, count):
    tensors = tensors_of(config | NVFP4)
    assert len(tensors) == count
    rows, columns = config["moe_intermediate_size"], config["hidden_size"]
    expert = "layers.5.ffn.experts.255"
    assert tensors[f"{expert}.w1.weight"] == TensorSpec("U8", (rows, columns // 2))
    assert tensors[f"{expert}.w1.weight_scale"] == TensorSpec("F8_E4M3", (rows, columns // 16))
    assert tensors[f"{expert}.w2.weight"] == TensorSpec("U8", (columns, rows // 2))
    assert tensors[f"{expert}.w2.weight_scale_2"] == TensorSpec("F32", ())
    assert tensors[f"{expert}.w2.input_scale"] == TensorSpec("F32", ())
    assert tensors["mtp.0.ffn.experts.0.w1.scale"].dtype == "F8_E8M0"


def test_layers_differ_by_routing_and_attention():
    tensors = tensors_of(FLASH | NVFP4)
    assert tensors["layers.2.ffn.gate.tid2eid"] == TensorSpec("I64", (129280, 6))
    assert "layers.2.ffn.gate.bias" not in tensors
    assert tensors["layers.3.ffn.gate.bias"] == TensorSpec("F32", (256,))
    assert "layers.0.attn.compressor.ape" not in tensors
    assert tensors["layers.2.attn.compressor.ape"] == TensorSpec("F32", (4, 1024))
    assert tensors["layers.3.attn.compressor.ape"] == TensorSpec("F32", (128, 512))
    assert "layers.3.attn.indexer.wq_b.weight" not in tensors


def test_refuses_a_config_of_another_model():
    with pytest.raises(ValueError, match="lacks moe_intermediate_size, .*not a DeepSeek-V4 config"):
        ModelSizes.from_config({"hidden_size": 4096, "n_routed_experts": 256})


def test_refuses_too_few_compress_ratios():
    with pytest.raises(ValueError, match="3 compress_ratios for 43 layers"):
        ModelSizes.from_config(FLASH | {"compress_ratios": [0, 0, 4]})
