"""What is wrong with a checkpoint or a setting ends in one sentence, while vLLM loads it."""

import copy
import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapter.test_bad_config import with_config
from tests.support import loading
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint

CONFIG = TinyConfig(layers=2, hash_layers=1, hidden=128, intermediate=64, experts=8, heads=4)
EXPERTS = "layers.1.ffn.experts"


def load(config, checkpoint: Path, settings: dict | None = None) -> torch.nn.Module:
    config = copy.deepcopy(config)
    config.model_config.model = str(checkpoint)
    config.additional_config = {"dsv4_moe": settings or {}}
    return loading.load_model(config)


def edited(checkpoint: Path, out: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """A copy of the checkpoint with some tensors replaced, or left out where the value is None."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    out.mkdir()
    for file in checkpoint.iterdir():
        (out / file.name).symlink_to(file)
    for name, tensor in tensors.items():
        shard = out / index["weight_map"][name]
        content = load_file(shard) | {name: tensor}
        shard.unlink()
        save_file({n: t for n, t in content.items() if t is not None}, shard)
        if tensor is None:
            del index["weight_map"][name]
    (out / "model.safetensors.index.json").unlink()
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def tensor(checkpoint: Path, name: str) -> torch.Tensor:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return load_file(checkpoint / index["weight_map"][name])[name]


def test_the_checkpoint_itself_loads(vllm_config, checkpoint):
    load(vllm_config, checkpoint)


def with_value(value: float, at: tuple[int, ...] = ()):
    def change(original: torch.Tensor) -> torch.Tensor:
        changed = original.float() if original.is_floating_point() else original.clone()
        changed[at] = value
        return changed.to(original.dtype)

    return change


def missing(original: torch.Tensor) -> None:
    return None


NAN = float("nan")
BAD_TENSORS = {
    "no weight_scale_2": (f"{EXPERTS}.3.w2.weight_scale_2", missing, "missing"),
    "no weight": (f"{EXPERTS}.0.w3.weight", missing, "missing"),
    "no weight_scale": (f"{EXPERTS}.7.w1.weight_scale", missing, "missing"),
    "NaN global scale": (f"{EXPERTS}.2.w1.weight_scale_2", with_value(NAN), "is nan"),
    "zero global scale": (f"{EXPERTS}.2.w3.weight_scale_2", with_value(0.0), "is 0.0"),
    "negative global scale": (f"{EXPERTS}.2.w2.weight_scale_2", with_value(-1.0), "is -1.0"),
    "infinite global scale": (f"{EXPERTS}.0.w2.weight_scale_2", with_value(torch.inf), "is inf"),
    "NaN block scale": (f"{EXPERTS}.5.w3.weight_scale", with_value(NAN, (7, 2)), "[7, 2]"),
    "negative block scale": (f"{EXPERTS}.5.w2.weight_scale", with_value(-2.0, (9, 1)), "-2.0"),
    "minus zero as block scale": (f"{EXPERTS}.5.w1.weight_scale", with_value(-0.0, (8, 3)), "-0.0"),
    "half as wide": (f"{EXPERTS}.1.w1.weight", lambda t: t[:, :32].contiguous(), "uint8 [64, 32]"),
    "E8M0 scales": (
        f"{EXPERTS}.1.w2.weight_scale",
        lambda t: t.float().to(torch.float8_e8m0fnu),
        "wants float8_e4m3fn [128, 4]",
    ),
    "a scale for each row": (
        f"{EXPERTS}.1.w1.weight_scale_2",
        lambda t: t.repeat(64),
        "wants a float32 scalar",
    ),
    "expert id too large": ("layers.0.ffn.gate.tid2eid", with_value(8, (5, 1)), "[5, 1] is 8"),
    "negative expert id": ("layers.0.ffn.gate.tid2eid", with_value(-3, (0, 0)), "0 to 7"),
    "no hash table": ("layers.0.ffn.gate.tid2eid", missing, "missing"),
    "no bias": ("layers.1.ffn.gate.bias", missing, "missing"),
    "NaN bias": ("layers.1.ffn.gate.bias", with_value(NAN, (0,)), "not finite"),
}


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    sizes = dataclasses.replace(CONFIG, expert_format="mxfp4")
    return write_tiny_checkpoint(tmp_path_factory.mktemp("bad") / "mxfp4", sizes)


MXFP4 = {"formats": "mxfp4"}


@pytest.fixture(scope="module")
def mxfp4_config(mxfp4):
    return loading.engine_config(mxfp4, MXFP4)


def with_byte(byte: int, at: tuple[int, ...]):
    def change(original: torch.Tensor) -> torch.Tensor:
        changed = original.clone()
        changed.view(torch.uint8)[at] = byte
        return changed

    return change


BAD_MXFP4_TENSORS = {
    "no scale": (f"{EXPERTS}.7.w1.scale", missing, "missing"),
    "no weight": (f"{EXPERTS}.0.w3.weight", missing, "missing"),
    "NaN scale of gate": (f"{EXPERTS}.5.w1.scale", with_byte(255, (7, 2)), "[7, 2]"),
    "NaN scale of up": (f"{EXPERTS}.5.w3.scale", with_byte(255, (63, 3)), "[63, 3]"),
    "NaN scale of down": (f"{EXPERTS}.7.w2.scale", with_byte(255, (9, 1)), "is nan"),
    "half as wide": (f"{EXPERTS}.1.w1.weight", lambda t: t[:, :32].contiguous(), "int8 [64, 32]"),
    "half as many rows": (f"{EXPERTS}.1.w2.weight", lambda t: t[:64], "wants int8 [128, 32]"),
    "a scale for 16 values": (
        f"{EXPERTS}.2.w3.scale",
        lambda t: t.repeat_interleave(2, 1),
        "float8_e8m0fnu [64, 4]",
    ),
    "NVFP4's scales": (
        f"{EXPERTS}.1.w2.scale",
        lambda t: t.float().to(torch.float8_e4m3fn),
        "is float8_e4m3fn [128, 2]",
    ),
    "fp32 scales": (f"{EXPERTS}.6.w1.scale", lambda t: t.float(), "is float32 [64, 4]"),
    "bf16 weight": (f"{EXPERTS}.3.w2.weight", lambda t: t.bfloat16(), "is bfloat16 [128, 32]"),
    "one scale a row": (f"{EXPERTS}.4.w1.scale", lambda t: t[:, 0].contiguous(), "[64]"),
}


@pytest.mark.parametrize("name, change, says", BAD_MXFP4_TENSORS.values(), ids=BAD_MXFP4_TENSORS)
def test_a_bad_mxfp4_tensor_is_named(mxfp4_config, mxfp4, tmp_path, name, change, says):
    bad = edited(mxfp4, tmp_path / "bad", {name: change(tensor(mxfp4, name))})
    with pytest.raises(ValueError) as refusal:
        load(mxfp4_config, bad, MXFP4)
    sentence = str(refusal.value)
    assert sentence.startswith(name) and says in sentence
    assert "\n" not in sentence


def test_the_mxfp4_checkpoint_itself_loads(mxfp4_config, mxfp4):
    model = load(mxfp4_config, mxfp4, MXFP4)
    experts = model.model.layers[1].ffn.experts.routed_experts
    stored = tensor(mxfp4, f"{EXPERTS}.3.w3.scale").view(torch.uint8)
    assert torch.equal(experts.w13_weight_scale[3, 64:], stored)
    codes = tensor(mxfp4, f"{EXPERTS}.3.w2.weight").view(torch.uint8)
    assert torch.equal(experts.w2_weight[3], codes)


def test_an_intermediate_size_that_mxfp4_cannot_cut_into_blocks_is_refused(
    mxfp4_config, mxfp4, tmp_path
):
    bad = with_config(mxfp4, tmp_path / "bad", {"moe_intermediate_size": 48})
    with pytest.raises(ValueError, match="size 48 .* multiple of the MXFP4 block, 32"):
        loading.load_model(loading.engine_config(bad, MXFP4))


@pytest.mark.parametrize("name, change, says", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_bad_tensor_is_named(vllm_config, checkpoint, tmp_path, name, change, says):
    bad = edited(checkpoint, tmp_path / "bad", {name: change(tensor(checkpoint, name))})
    with pytest.raises(ValueError) as refusal:
        load(vllm_config, bad)
    sentence = str(refusal.value)
    assert sentence.startswith(name) and says in sentence
    assert "\n" not in sentence


def test_a_truncated_shard_is_named_before_any_layer_is_made(vllm_config, checkpoint, tmp_path):
    bad = edited(checkpoint, tmp_path / "bad", {})
    shard = bad / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is cut short: .* fetch it again"):
        load(vllm_config, bad)


@pytest.mark.parametrize(
    "size, says",
    [("hidden_size", "hidden size 120"), ("moe_intermediate_size", "intermediate size 120")],
)
def test_a_size_that_nvfp4_cannot_cut_into_blocks_is_refused(
    vllm_config, checkpoint, tmp_path, size, says
):
    bad = with_config(checkpoint, tmp_path / "bad", {size: 120})
    with pytest.raises(ValueError, match=f"{says}.* not a positive multiple of the NVFP4 block"):
        loading.load_model(loading.engine_config(bad))


def test_different_scales_of_gate_and_up_are_kept_and_said(vllm_config, checkpoint, tmp_path):
    name = f"{EXPERTS}.3.w3.weight_scale_2"
    doubled = tensor(checkpoint, name) * 2
    with mock.patch("vllm_dsv4_moe.moe_method.logger.info_once") as say:
        model = load(vllm_config, edited(checkpoint, tmp_path / "other", {name: doubled}))
    kernel = model.model.layers[1].ffn.experts.routed_experts.quant_method.moe_kernel
    gate, up = kernel.fused_experts.layer.weights.w13_global_scales[3]
    assert up == 2 * gate == doubled
    assert ["weight_scale_2" in call.args[0] for call in say.mock_calls] == [True]


BAD_SETTINGS = {
    "unknown": ({"tile": 8}, "dsv4_moe.tile is not a setting"),
    "a GPU's backend": ({"backend": "sm90"}, "sm90 backend runs on NVIDIA GPUs"),
    "no such file": (
        {"activation_scale": "file", "activation_scale_file": "/nowhere.json"},
        "model.layers.0.ffn.experts: activation scale file /nowhere.json cannot be read",
    ),
}


@pytest.mark.parametrize("settings, says", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_named(vllm_config, checkpoint, settings, says):
    with pytest.raises(ValueError, match=says):
        load(vllm_config, checkpoint, settings)


def test_the_checkpoint_policy_wants_every_input_scale(vllm_config, checkpoint, tmp_path):
    settings = {"activation_scale": "checkpoint"}
    model = load(vllm_config, checkpoint, settings)
    kernel = model.model.layers[1].ffn.experts.routed_experts.quant_method.moe_kernel
    fc1, fc2 = kernel.fused_experts.layer.activation_scales
    assert fc1 == tensor(checkpoint, f"{EXPERTS}.0.w1.input_scale")
    assert (fc2 == tensor(checkpoint, f"{EXPERTS}.0.w2.input_scale")).all()
    without = edited(checkpoint, tmp_path / "without", {f"{EXPERTS}.4.w2.input_scale": None})
    with pytest.raises(ValueError, match=r"layers.1.*w2.input_scale of 1 of 8 experts is missing"):
        load(vllm_config, without, settings)
    load(vllm_config, without)


def test_dummy_weights_load_with_scales_that_can_run(vllm_config, checkpoint):
    dummy = copy.deepcopy(vllm_config)
    dummy.load_config.load_format = "dummy"
    model = loading.load_model(dummy)
    experts = model.model.layers[0].ffn.experts.routed_experts
    assert (experts.w13_weight_scale_2 > 0).all() and (experts.w2_weight_scale.float() > 0).all()


def test_dummy_mxfp4_weights_load_with_scales_that_can_run(mxfp4_config):
    dummy = copy.deepcopy(mxfp4_config)
    dummy.load_config.load_format = "dummy"
    experts = loading.load_model(dummy).model.layers[0].ffn.experts.routed_experts
    assert (experts.w13_weight_scale < 255).all() and (experts.w2_weight_scale < 255).all()
