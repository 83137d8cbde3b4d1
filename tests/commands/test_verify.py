"""`dsv4-moe verify`: real layers pass, and what is wrong in one of them is found and named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from dsv4_kernels import reference
from safetensors.torch import load_file, save_file

from vllm_dsv4_moe.commands import verify
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import V41_DEFAULTS, TinyConfig
from vllm_dsv4_moe.safetensors_files import read_checkpoint

CONFIG = TinyConfig(layers=3, hash_layers=1, hidden=128, intermediate=64, experts=8, heads=4, mtp=1)


@pytest.fixture(scope="module", params=["nvfp4", "mxfp4"])
def original(request, tmp_path_factory):
    config = dataclasses.replace(CONFIG, expert_format=request.param)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("verify") / request.param, config)


@pytest.fixture
def checkpoint(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def reference_on_a_cpu(monkeypatch):
    monkeypatch.setenv("VLLM_DSV4_MOE_BACKEND", "reference")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def change(checkpoint: Path, name: str, function) -> None:
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = function(tensors[name])
            save_file({n: t for n, t in tensors.items() if t is not None}, file)


@pytest.mark.parametrize("activations", ["auto", "bf16", "fp8"])
def test_one_layer_of_each_kind_is_verified(original, activations, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DSV4_MOE_ACTIVATIONS", activations)
    assert main(["verify", str(original)]) == 0
    lines = capsys.readouterr().out.splitlines()
    experts = original.name.upper()
    numerics = drafts = "W4A16" if activations == "bf16" else "W4A8"
    if (original.name, activations) == ("nvfp4", "auto"):
        numerics = "W4A4"
    assert [line.partition(", error")[0] for line in lines[:3]] == [
        f"layers.0 (hash, {experts}): reference, {numerics}",
        f"layers.1 (dense, {experts}): reference, {numerics}",
        f"mtp.0 (draft, dense, MXFP4): reference, {drafts}",
    ]
    assert all(line.endswith(": ok") and "router agrees" in line for line in lines[:3])
    assert lines[3:] == ["verified: 3 kinds of layer, each as plain arithmetic has it"]


def scale_name(checkpoint: Path) -> str:
    return (
        "weight_scale" if "nvfp4" in (checkpoint / "config.json").read_text().lower() else "scale"
    )


def as_bytes(function):
    def changed(tensor):
        tensor = tensor.clone()
        function(tensor.view(torch.uint8))
        return tensor

    return changed


def set_first(value: int):
    def change_bytes(codes: torch.Tensor) -> None:
        codes.view(-1)[0] = value

    return as_bytes(change_bytes)


def test_what_is_missing_or_of_another_shape_is_named(checkpoint, capsys):
    change(checkpoint, "layers.1.ffn.experts.5.w2.weight", lambda t: None)
    change(checkpoint, "mtp.0.ffn.experts.3.w1.scale", lambda t: t[:, :1].contiguous())
    assert main(["verify", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert "layers.1.ffn.experts.5.w2.weight is missing from the checkpoint: NOT OK" in out
    assert "mtp.0.ffn.experts.3.w1.scale is F8_E8M0 [64, 1] and not F8_E8M0 or U8 [64, 4]" in out
    assert "not verified: 2 of 3 kinds of layer are not as they should be" in out


def test_the_last_expert_is_missed_by_the_gate(checkpoint, capsys):
    """All others would agree with arithmetic that leaves it out as well."""
    for linear in ("w1", "w2", "w3"):
        for leaf in ("weight", "scale", "weight_scale", "weight_scale_2", "input_scale"):
            change(checkpoint, f"layers.0.ffn.experts.7.{linear}.{leaf}", lambda t: None)
    assert main(["verify", str(checkpoint)]) == 1
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.endswith("layers.0.ffn.experts.7.w1.weight is missing from the checkpoint: NOT OK")
    assert second.endswith(": ok")


@pytest.mark.parametrize("expert", [-1, 8])
def test_an_expert_of_a_table_that_there_is_not_is_named(checkpoint, expert, capsys):
    """Of whichever token id, drawn or not."""

    def put(table):
        table[300, 2] = expert
        return table

    change(checkpoint, "layers.0.ffn.gate.tid2eid", put)
    assert main(["verify", str(checkpoint)]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert f"tid2eid[300, 2] is {expert}, and expert ids go from 0 to 7: NOT OK" in first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 and there are 8 experts"),
        ({"num_experts_per_tok": 5}, "gate.tid2eid is [512, 6] and a token has 5 experts"),
        ({"swiglu_limit": "10"}, "swiglu_limit is '10': it bounds gate and up"),
    ],
    ids=["top-k", "table", "limit"],
)
def test_a_config_of_another_model_is_a_sentence(checkpoint, changes, says, capsys):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert main(["verify", str(checkpoint)]) == 1
    assert says in capsys.readouterr().out.splitlines()[0]


def test_a_config_without_a_size_is_refused(checkpoint, capsys):
    (checkpoint / "config.json").write_text("{}")
    assert main(["verify", str(checkpoint)]) == 2
    assert "config.json has num_experts_per_tok None" in capsys.readouterr().err


def test_a_backend_of_gpus_is_refused_where_there_is_none(original, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DSV4_MOE_BACKEND", "sm90")
    assert main(["verify", str(original)]) == 2
    assert "the sm90 backend runs on NVIDIA GPUs, and vLLM sees none" in capsys.readouterr().err


def test_a_gpu_without_a_backend_verifies_nothing(original, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DSV4_MOE_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert main(["verify", str(original)]) == 2
    assert "no backend is made for compute capability 8.0: vLLM runs" in capsys.readouterr().err


def test_a_scale_that_is_no_number_is_found(checkpoint, capsys):
    scale = scale_name(checkpoint)
    nan = 0x7F if scale == "weight_scale" else 0xFF
    change(checkpoint, f"layers.0.ffn.experts.2.w3.{scale}", set_first(nan))
    assert main(["verify", str(checkpoint)]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("layers.0 (hash") and first.endswith("NOT OK")


BROKEN = {
    "one expert's W2": ("w2", lambda weight: weight * -1),
    "gate and up swapped": ("w13", lambda weight: weight.roll(len(weight) // 2, 0)),
}


@pytest.mark.parametrize("part, wrong", BROKEN.values(), ids=BROKEN)
def test_a_backend_that_errs_in_one_expert_is_found(original, part, wrong, monkeypatch, capsys):
    """Errors of a kernel, played by an oracle that takes one expert's weights for others."""
    right, calls = verify.dequantised, []

    def dequantised(codes, scales):
        weight = right(codes, scales)
        calls.append(codes)
        last = 2 * CONFIG.experts - (1 if part == "w2" else 2)  # of the layer's calls: expert 7
        return wrong(weight) if len(calls) % (2 * CONFIG.experts) == (last + 1) % 16 else weight

    monkeypatch.setattr(verify, "dequantised", dequantised)
    assert main(["verify", str(original)]) == 1
    out = capsys.readouterr().out
    assert out.count("NOT OK") == 3 and "router agrees" in out


@pytest.mark.parametrize("router", ["hash", "dense"])
def test_a_router_that_prefers_other_experts_is_found(original, router, monkeypatch, capsys):
    from dsv4_kernels import reference

    right = reference.router_topk

    def router_topk(*args, **kwargs):
        routing = right(*args, **kwargs)
        if (kwargs["table"] is not None) == (router == "hash"):
            # One token's first expert is one that it does not have.
            routing.ids[5, 0] = min(set(range(CONFIG.experts)) - set(routing.ids[5].tolist()))
        return routing

    monkeypatch.setattr(reference, "router_topk", router_topk)
    assert main(["verify", str(original)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "NOT OK" in line]
    assert all(router in line and "prefers other experts" in line for line in wrong)
    assert len(wrong) == (1 if router == "hash" else 2)


def test_what_fp8_cannot_hold_is_to_be_served_in_bf16(tmp_path, capsys):
    """h of 2^-16 and less is 0 under the one scale that W4A8 has for it."""
    sizes = {"layers": 1, "mtp": 0, "expert_format": "mxfp4"}
    checkpoint = write_tiny_checkpoint(tmp_path / "small", dataclasses.replace(CONFIG, **sizes))
    for expert in range(CONFIG.experts):
        for linear in ("w1", "w3"):
            name = f"layers.0.ffn.experts.{expert}.{linear}.scale"
            change(checkpoint, name, as_bytes(lambda scales: scales.sub_(8)))
    assert main(["verify", str(checkpoint)]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert "with activations set to bf16 it agrees: serve so: NOT OK" in first
    change(checkpoint, "layers.0.ffn.experts.3.w2.scale", set_first(255))
    assert main(["verify", str(checkpoint)]) == 1
    assert "bf16" not in capsys.readouterr().out


def test_image_tokens_of_v41_go_by_their_own_bias(tmp_path, monkeypatch, capsys):
    sizes = {"layers": 1, "mtp": 0, "model": "v41", "expert_format": "mxfp4"}
    config = dataclasses.replace(CONFIG, **sizes, **V41_DEFAULTS)
    checkpoint = write_tiny_checkpoint(tmp_path / "v41", config)
    assert main(["verify", str(checkpoint)]) == 0
    assert "layers.0 (dense, MXFP4)" in capsys.readouterr().out
    right = reference.router_topk

    def router_topk(*args, image_bias, **options):
        assert image_bias is not None
        return right(*args, **options)

    monkeypatch.setattr(reference, "router_topk", router_topk)
    assert main(["verify", str(checkpoint)]) == 1
    assert "the router prefers other experts" in capsys.readouterr().out


def test_mxfp4_is_vllms_where_no_kernel_runs_it(original):
    stored = read_checkpoint(original)
    config = json.loads((original / "config.json").read_text())
    (draft,) = [layer for layer in verify.layers_of(stored.tensors, config) if layer.is_draft]
    from vllm_dsv4_moe.settings import Settings

    reason = verify.vllms_reason(draft, Settings(), "sm100")
    assert reason == "the sm100 backend runs NVFP4 alone"
    assert verify.vllms_reason(draft, Settings(), "sm90") is None


def test_layers_that_the_setting_leaves_to_vllm_are_not_run(original, monkeypatch, capsys):
    other = {"nvfp4": "mxfp4", "mxfp4": "nvfp4"}[original.name]
    monkeypatch.setenv("VLLM_DSV4_MOE_FORMATS", other)
    drafts_are_ours = other == "mxfp4"
    assert main(["verify", str(original)]) == (0 if drafts_are_ours else 2)
    said = capsys.readouterr()
    assert f"layers.0 (hash, {original.name.upper()}): vLLM's, as the setting formats" in said.out
    assert ("verified: 1 kinds of layer" in said.out) == drafts_are_ours
    assert ("this plugin runs no layer of" in said.err) != drafts_are_ours


def test_a_draft_of_v41_has_its_own_counts(original):
    stored = read_checkpoint(original).tensors
    text = {"num_experts_per_tok": 6, "dspark_num_experts_per_tok": 3, "swiglu_limit": 7.0}
    *layers, draft = verify.layers_of(stored, {"model_type": "deepseek_v41", "text_config": text})
    assert {layer.top_k for layer in layers} == {6} and draft.top_k == 3
    assert draft.num_experts == CONFIG.experts and draft.limit == 7.0


def test_a_folder_without_experts_is_refused(tmp_path, capsys):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no layer with NVFP4 or MXFP4 experts" in capsys.readouterr().err
