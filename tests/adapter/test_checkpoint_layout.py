"""The layout against the published checkpoints: counts, dtypes and bytes of their files."""

from collections import Counter

import pytest

from vllm_dsv4_moe.checkpoint_layout import ModelSizes, TensorSpec, checkpoint_tensors
from vllm_dsv4_moe.commands.releases import FLASH, NVFP4, PRO, RELEASES


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


def test_flash_with_a_dspark_draft_as_published():
    tensors = tensors_of(RELEASES["deepseek-ai/DeepSeek-V4-Flash-0731"])
    assert len(tensors) == 72_317
    assert sum(spec.num_bytes for spec in tensors.values()) == 166_878_536_440
    stages = Counter(name[:5] for name in tensors if name.startswith("mtp."))
    assert stages == {"mtp.0": 1_568, "mtp.1": 1_565, "mtp.2": 1_572}


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
