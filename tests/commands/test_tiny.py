"""The tiny checkpoint: its files hold what the layout says, its values what they should mean."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_dsv4_moe.checkpoint_layout import ModelSizes, checkpoint_tensors
from vllm_dsv4_moe.commands import tiny
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    MIN_VOCAB,
    V41_DEFAULTS,
    TinyConfig,
    linear_names,
)
from vllm_dsv4_moe.commands.v41_layout import v41_tensors

SMALL = TinyConfig(hidden=128, intermediate=128, experts=8, layers=4, mtp=1)


@pytest.fixture(
    scope="module",
    params=[{"linear": "bf16"}, {"linear": "fp8"}, {"expert_format": "mxfp4"}],
    ids=["bf16", "fp8", "mxfp4"],
)
def checkpoint(request, tmp_path_factory):
    config = TinyConfig(**vars(SMALL) | request.param)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "out", config)


def test_files_hold_every_tensor_of_the_layout(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    expected = dict(checkpoint_tensors(ModelSizes.from_config(config)))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert stored(checkpoint) == {name: tuple(spec) for name, spec in expected.items()}
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in expected.values())


def stored(checkpoint: Path) -> dict[str, tuple]:
    """(dtype, shape) of every tensor, which is in the file that the index names."""
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                tensor = shard.get_slice(name)
                found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
                assert weight_map[name] == file.name
    return found


V41 = TinyConfig(**vars(SMALL) | {"model": "v41", "mtp": 0} | V41_DEFAULTS)


@pytest.mark.parametrize("linear", ["bf16", "fp8"])
def test_a_v41_holds_every_tensor_of_the_layout(linear, tmp_path):
    config = dataclasses.replace(V41, linear=linear, expert_format="mxfp4", intermediate=96)
    checkpoint = write_tiny_checkpoint(tmp_path / "v41", config)
    content = json.loads((checkpoint / "config.json").read_text())
    expected = dict(v41_tensors(content, linear_names(config)))
    assert stored(checkpoint) == {name: tuple(spec) for name, spec in expected.items()}
    scale = expected.get("layers.1.attn.indexer.wq_b.scale")
    assert (scale and scale.shape) == ((32 * 128 // 32, 256 // 32) if linear == "fp8" else None)
    names = {".".join(name.split(".")[2:]) for name in expected if name.startswith("layers.1.")}
    assert {"ffn.gate.bias_vl", "attn.compressor.wgate.weight", "attn.indexer.wk.weight"} <= names
    text = content["text_config"]
    assert text["compress_ratios"] == [0, 2, 2, 1] and text["kv_source_layer_ids"] == [1, 3]
    assert "layers.3.attn.compressor.wgate.weight" not in expected, "of ratio 1 nothing is pooled"
    # vLLM's names, which its V4.1 does not translate.
    ignored = content["quantization_config"].get("ignored_layers", [])
    names = ("attn.fused_wqa_wkv", "attn.indexer.wq_b", "ffn.shared_experts.gate_up_proj")
    for name in names:
        assert (f"language_model.model.layers.1.{name}" in ignored) == (linear == "bf16")


def test_a_v41_s_tokenizer_has_its_image_token(tmp_path):
    from transformers import AutoTokenizer

    tiny._write_tokenizer(tmp_path, V41)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == IMAGE_TOKEN_ID
    assert tokenizer(f"a{IMAGE_TOKEN}b", add_special_tokens=False).input_ids[1] == IMAGE_TOKEN_ID


def test_experts_dequantise_to_a_unit_gain_matrix(checkpoint):
    tensors = load_file(checkpoint / "model-00002-of-00006.safetensors")
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([grid, -grid])
    for name in ("w1", "w2", "w3"):
        linear = f"layers.0.ffn.experts.3.{name}"
        packed = tensors[f"{linear}.weight"].view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        if f"{linear}.scale" in tensors:
            scales = tensors[f"{linear}.scale"].float().repeat_interleave(32, dim=-1)
        else:
            scales = tensors[f"{linear}.weight_scale"].float().repeat_interleave(16, dim=-1)
            scales *= tensors[f"{linear}.weight_scale_2"]
        weight = grid[codes.int()] * scales
        assert (weight.square().sum(-1).mean() - 1).abs() < 0.1
        assert weight.mean().abs() < 0.01
    scale_2 = "layers.0.ffn.experts.3.{}.weight_scale_2"
    assert tensors.get(scale_2.format("w1")) == tensors.get(scale_2.format("w3"))


def test_hash_table_names_distinct_experts(checkpoint):
    table = load_file(checkpoint / "model-00002-of-00006.safetensors")["layers.0.ffn.gate.tid2eid"]
    assert table.dtype == torch.int64 and table.shape == (SMALL.vocab, SMALL.top_k)
    assert table.min() >= 0 and table.max() < SMALL.experts
    assert all(len(set(row)) == SMALL.top_k for row in table.tolist())


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    config = TinyConfig(hidden=128, intermediate=128, experts=8, layers=1, hash_layers=1)
    first, again = (write_tiny_checkpoint(tmp_path / name, config) for name in "ab")
    other = write_tiny_checkpoint(tmp_path / "c", TinyConfig(**{**vars(config), "seed": 1}))
    for file in first.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert file.read_bytes() != (other / file.name).read_bytes()


def test_e2m1_is_nearest_with_ties_to_the_even_code():
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.linspace(-6, 6, 4802)  # 24 steps in 0.06: reaches every midpoint's neighbours
    values = torch.cat([values, (grid[1:] + grid[:-1]) / 2, torch.zeros(1)])
    packed = tiny._e2m1(values)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
    distance = (values.abs()[:, None] - grid).abs()
    nearest = distance.min(dim=1).values
    chosen = (codes & 7).long()
    assert torch.equal(distance[torch.arange(len(values)), chosen], nearest)
    tied = (distance == nearest[:, None]).sum(1) == 2
    assert tied.sum() == 7 and (chosen[tied] % 2 == 0).all()
    assert torch.equal(codes >= 8, values < 0)


@pytest.mark.parametrize(
    ("quantise", "block", "shape", "error"),
    [
        pytest.param(partial(tiny._fp8, block=128), 128, (200, 300), 0.04, id="fp8-ragged"),
        pytest.param(partial(tiny._fp8, block=32), 32, (72, 96), 0.04, id="fp8-v41"),
        pytest.param(tiny._mxfp4, 32, (48, 96), 0.2, id="mxfp4"),
    ],
)
def test_other_formats_hold_their_matrix(quantise, block, shape, error):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(matrix)
    assert scales.dtype == torch.float8_e8m0fnu
    scales = scales.float().repeat_interleave(block, dim=1)[:, : shape[1]]
    if codes.dtype == torch.int8:
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        packed = codes.view(torch.uint8).int()
        nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        values = torch.cat([grid, -grid])[nibbles]
    else:
        values = codes.float()
        scales = scales.repeat_interleave(block, dim=0)[: shape[0]]
    assert (values * scales - matrix).norm() < error * matrix.norm()


def test_tokenizer_gives_the_text_back(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "Hello, wörld! \n 你好"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) and max(ids) < SMALL.vocab
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"
    assert tokenizer(chat, add_special_tokens=False).input_ids[:2] == [0, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"hidden": 500}, "hidden 500 must be a multiple of 16", id="hidden"),
        pytest.param(
            {"hidden": 192, "linear": "fp8"}, "hidden 192 must be a multiple of 128", id="fp8"
        ),
        pytest.param({"intermediate": 48, "mtp": 1}, "multiple of 32", id="mtp-intermediate"),
        pytest.param(
            {"hidden": 48, "expert_format": "mxfp4"}, "multiple of 32: MXFP4", id="mxfp4-hidden"
        ),
        pytest.param({"expert_format": "int4"}, "must be nvfp4 or mxfp4", id="format"),
        pytest.param({"experts": 4}, "top_k 6 cannot be more than the number", id="top-k"),
        pytest.param({"hash_layers": 5}, "hash_layers 5 must be from 0 to", id="hash-layers"),
        pytest.param({"heads": 6}, "heads 6 must be a multiple of .*, 4 for", id="heads"),
        pytest.param({"heads": 44}, "heads 44 must be a multiple of .*, 5 for", id="many-heads"),
        pytest.param({"vocab": 100}, f"needs {MIN_VOCAB}", id="vocab"),
        pytest.param({"linear": "int8"}, "must be bf16 or fp8", id="linear"),
        pytest.param({"layers": 0}, "layers 0 must be positive", id="layers"),
        pytest.param({"model": "v5"}, "must be v4 or v41", id="model"),
        pytest.param({"model": "v41"}, "vocab 512 is too small: V4.1's image", id="v41-vocab"),
        pytest.param(
            {"model": "v41", "vocab": 129_280}, "hash_layers must be 0", id="v41-hash-layers"
        ),
        pytest.param(vars(V41) | {"mtp": 1}, "mtp must be 0", id="v41-mtp"),
    ],
)
def test_refuses_what_v4_cannot_have(change, words):
    with pytest.raises(ValueError, match=words):
        TinyConfig(**change)


def test_command_writes_and_refuses_a_folder_with_files(tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ["--hidden", "128", "--intermediate", "64", "--layers", "1", "--hash-layers", "0"]
    assert main(["tiny", str(out), *sizes]) == 0
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 128
    mxfp4 = [str(tmp_path / "mxfp4"), "--experts", "mxfp4", "--num-experts", "7"]
    assert main(["tiny", *mxfp4, *sizes]) == 0
    assert "7 MXFP4 experts" in capsys.readouterr().out
    config = json.loads((tmp_path / "mxfp4/config.json").read_text())
    assert config["n_routed_experts"] == 7
    assert "moe_quant_algo" not in config["quantization_config"]
    v41 = [str(tmp_path / "v41"), "--model", "v41", "--hidden", "64", "--intermediate", "32"]
    assert main(["tiny", *v41, "--layers", "1"]) == 0
    config = json.loads((tmp_path / "v41/config.json").read_text())
    assert config["model_type"] == "deepseek_v41"
    assert config["text_config"]["vocab_size"] == 129_280
    assert main(["tiny", str(out), *sizes]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
