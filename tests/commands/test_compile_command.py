"""`dsv4-moe compile`: kernels made without a GPU, kept where a server finds them."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from dsv4_kernels.backends import BACKENDS
from dsv4_kernels.compiled import key_of
from dsv4_kernels.sm100.heuristic import all_gemms
from dsv4_kernels.types import MoeShape

from tests.support.deployments import DEPLOYMENTS, parse
from vllm_dsv4_moe.commands import compile as command
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.compile import shapes_of_config
from vllm_dsv4_moe.commands.config import find
from vllm_dsv4_moe.commands.deployment import moe_sizes, read_deployment
from vllm_dsv4_moe.commands.memory import GPUS, rank_memory
from vllm_dsv4_moe.commands.releases import RELEASES

SIZES = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "swiglu_limit": 10.0,
}


def dsv4_moe(*arguments: str, **environ: str) -> str:
    """What the command prints, in a process of its own: CuTe DSL settles on one arch."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dsv4_moe.commands.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_tiny(folder: Path, arch: str, *arguments: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps(SIZES))
    model = ["--arch", arch, "--model", str(folder), "--max-num-tokens", "1"]
    return ["compile", *model, *arguments]


def cpu_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.slow
@pytest.mark.parametrize("arch, for_image", [("sm_90a", False), ("sm_100a", True)])
def test_a_second_time_nothing_is_compiled(arch, for_image, tmp_path):
    """In this user's folder, or one that every user of an image may read; 10 s is the bar."""
    folder = tmp_path / "cache" / f"dsv4_moe_kernels-{os.geteuid()}"
    mode, arguments = 0o700, []
    if for_image:
        folder, mode = tmp_path / "image/kernels", 0o755
        arguments = ["--out", str(folder)]
    command = compile_tiny(tmp_path, arch, *arguments)
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    first = dsv4_moe(*command, **cache)
    assert first.startswith(f"2 kernels for {arch} in {folder}: 2 compiled, 0 were there")
    assert folder.stat().st_mode & 0o777 == mode
    before = cpu_seconds()
    assert ": 0 compiled, 2 were there" in dsv4_moe(*command, **cache)
    assert cpu_seconds() - before < 10  # not the clock: the tests share their cores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nano"], "nano is not flash, pro, v41, the name of"),
        (
            ["--model", "pro", "--experts", "mxfp4"],
            "this layer's are MXFP4, which vLLM's own kernels",
        ),
        (["--model", "pro", "--ep-size", "7"], "384 experts cannot be divided among 7 ranks"),
        (["--model", "pro", "--tp-size", "128"], "intermediate size 24 of this rank is not a"),
        (["--config", "flash-3xh200"], "there is no deployment or file flash-3xh200: there are fl"),
        (["--config", "/dev/null"], "/dev/null does not say max-num-batched-tokens and model"),
        (["--model", "LIST"], "LIST is JSON, but no object with the sizes of a model"),
        (["--model", "BROKEN"], "BROKEN is not JSON"),
        (["--config", "BROKEN"], "BROKEN is not YAML"),
        (["--config", "LIST"], "LIST holds no options"),
        (["--config", "TOKENS"], "max-num-batched-tokens of TOKENS is '8k': write a whole number"),
        (["--config", "SETTINGS"], "additional-config is '{x', which is not JSON"),
        (["--config", "WORD"], "speculative-config is 3: it must be an object"),
    ],
    ids=["model", "format", "experts", "intermediate", "name", "config", "list", "JSON", "YAML"]
    + ["YAML of a list", "tokens", "additional config", "draft"],
)
def test_a_users_mistake_is_a_sentence(arguments, message, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    flash = "model: flash\nmax-num-batched-tokens: 16\n"
    files = {"LIST": "[1, 2]", "BROKEN": "{x: [", "TOKENS": flash.replace("16", "8k")}
    files |= {"SETTINGS": f"{flash}additional-config: '{{x'"}
    files |= {"WORD": f"{flash}speculative-config: 3"}
    for name, text in files.items():
        Path(name).write_text(text)
    assert main(["compile", "--arch", "sm_100a", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_filled_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    assert main(compile_tiny(tmp_path, "sm_90a", "--out", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert "2 of 2 kernels could not be compiled and kept in" in error and "no-python" in error


def test_pro_on_eight_ranks_is_what_a_rank_serves():
    shape = MoeShape(384, 48, 6, 7168, 3072, 8192, True)
    chosen = {(gemm.op, gemm.config.tile) for gemm in all_gemms(shape)}
    assert chosen == {("fc1", 64), ("fc2", 64), ("fc1", 128), ("fc2", 128)}
    more = all_gemms(shape._replace(max_num_tokens=65536))
    assert {gemm.config.tile for gemm in more} == {64, 128, 256}


def served_shape(
    args, capability, monkeypatch, prefix: str, weight_format: str, environ=MappingProxyType({})
) -> MoeShape:
    """What a layer of that server asks for, by vLLM's own parser and parallel arithmetic."""
    from vllm.model_executor.layers.fused_moe import config as moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm_dsv4_moe.moe_method import moe_shape
    from vllm_dsv4_moe.settings import read_settings

    for group in ("get_dp_group", "get_pcp_group"):
        monkeypatch.setattr(moe, group, lambda: SimpleNamespace(rank_in_group=0))
    monkeypatch.setattr(moe, "get_tensor_model_parallel_rank", lambda: 0)
    tp = args.tensor_parallel_size
    shards = args.enable_expert_parallel and min(tp, args.data_parallel_size) > 1
    parallel = moe.FusedMoEParallelConfig.make(
        tp_size_=tp,
        pcp_size_=args.prefill_context_parallel_size,
        dp_size_=args.data_parallel_size,
        sp_size_=tp if shards else 1,
        vllm_parallel_config=args,
    )
    experts, top_k, hidden, intermediate = moe_sizes(RELEASES[args.model], prefix)
    config = moe.FusedMoEConfig(
        num_experts=experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts // parallel.ep_size,
        num_logical_experts=experts,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=moe.RoutingMethodType.DeepSeekV3,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        swiglu_limit=10.0,  # of every release
        max_num_tokens=args.max_num_batched_tokens,
    )
    settings = read_settings(args.additional_config, environ)
    return moe_shape(config, settings, capability, weight_format)


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_an_image_has_every_kernel_of_its_deployments(path, monkeypatch):
    """The keys of what is compiled for a file are those that its server looks for, drafts
    included."""
    gpu = path.stem[-4:]
    arch, capability = {"h200": ("sm_90a", (9, 0)), "b200": ("sm_100a", (10, 0))}[gpu]
    backend = BACKENDS[command.BACKENDS[arch]]
    args = parse(path)
    own = read_deployment(path, {}).weight_format
    served = [served_shape(args, capability, monkeypatch, "", own)]
    if arch == "sm_90a":
        served.append(served_shape(args, capability, monkeypatch, "dspark_", "mxfp4"))
    shapes = shapes_of_config(path, arch)
    filled, looked_for = (
        {key_of(kernel) for shape in group for kernel in backend.kernels(shape, arch)}
        for group in (shapes, served)
    )
    assert filled == looked_for and len(filled) >= 4


@pytest.mark.parametrize(
    ("name", "arch", "capability", "setting"),
    [
        ("flash-2xh200", "sm_90a", (9, 0), {"ACTIVATIONS": "bf16"}),
        ("v41-8xh200", "sm_90a", (9, 0), {"ACTIVATIONS": "bf16"}),
        ("flash-b200", "sm_100a", (10, 0), {"ACTIVATION_SCALE": "token"}),
    ],
)
def test_settings_of_the_environment_are_followed(name, arch, capability, setting, monkeypatch):
    """As beside a file they should be set: the server looks for other kernels then."""
    environ = {f"VLLM_DSV4_MOE_{key}": value for key, value in setting.items()}
    path = find(name)
    own = read_deployment(path, {}).weight_format
    served = served_shape(parse(path), capability, monkeypatch, "", own, environ)
    before = shapes_of_config(path, arch)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    filled = shapes_of_config(path, arch)
    assert filled[0] == served._replace(max_num_tokens=filled[0].max_num_tokens)
    assert filled[0] != before[0]


@pytest.mark.parametrize(
    ("arch", "text", "setting", "message"),
    [
        ("sm_100a", "nvidia/DeepSeek-V4-Flash-NVFP4", "fp8", "sm100 backend multiplies nvfp4 only"),
        ("sm_100a", "nvidia/DeepSeek-V4-Flash-NVFP4", "bf16", "sm100 backend multiplies nvfp4"),
        ("sm_90a", "nvidia/DeepSeek-V4-Flash-NVFP4", "nvfp4", "multiplies bf16 or fp8 only"),
    ],
    ids=["fp8", "bf16", "nvfp4"],
)
def test_activations_that_the_server_refuses_are_not_compiled_for(
    arch, text, setting, message, tmp_path
):
    path = tmp_path / "flash.yaml"
    path.write_text(
        f"model: {text}\nmax-num-batched-tokens: 100\n"
        f"additional-config: {{dsv4_moe: {{activations: {setting}}}}}\n"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of_config(path, arch)


@pytest.mark.parametrize(
    ("arch", "quant", "option", "found"),
    [
        ("sm_90a", {"quant_method": "fp8"}, [], "mxfp4"),
        ("sm_90a", {"quant_method": "fp8", "moe_quant_algo": "NVFP4"}, [], "nvfp4"),
        ("sm_90a", None, [], "mxfp4"),
        ("sm_90a", None, ["--experts", "nvfp4"], "nvfp4"),
        ("sm_100a", None, [], "nvfp4"),
    ],
)
def test_a_models_kernels_are_of_its_experts_format(arch, quant, option, found, tmp_path):
    config = SIZES | ({} if quant is None else {"quantization_config": quant})
    (tmp_path / "config.json").write_text(json.dumps(config))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["--arch", arch, "--model", str(tmp_path), *option]
    assert command.shape_of(parser.parse_args(given)).weight_format == found


def test_a_models_kernels_are_of_the_settings(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--arch", "sm_90a", "--model", "v41", "--tp-size", "8"])
    shape = command.shape_of(args)
    assert (shape.intermediate, shape.weight_format, shape.fp8) == (288, "mxfp4", True)
    monkeypatch.setenv("VLLM_DSV4_MOE_ACTIVATIONS", "bf16")
    assert command.shape_of(args) == shape._replace(fp8=False)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("tensor-parallel-size: 4", {"intermediate": 512}),
        ("tensor_parallel_size: 4", {"intermediate": 512}),
        ("tensor-parallel-size: 4\nenable-expert-parallel: true", {"num_local_experts": 64}),
        (
            "data-parallel-size: 2\nenable-expert-parallel: true",
            {"num_local_experts": 128, "max_num_tokens": 200},
        ),
        (
            "tensor-parallel-size: 8\nenable-expert-parallel: true",
            {"num_local_experts": 32, "max_num_tokens": 104},
        ),
        (
            "enable-eplb: true\neplb-config: '{\"num_redundant_experts\": 4}'",
            {"num_experts": 260, "num_local_experts": 260},
        ),
        (
            "data-parallel-size: 2\nenable-expert-parallel: true\n"
            "all2all-backend: deepep_high_throughput",
            {"num_local_experts": 128, "max_num_tokens": 200, "all_tokens_local": True},
        ),
        (
            "additional-config: {dsv4_moe: {activation_scale: token}}",
            {"scale_per_row": True},
        ),
    ],
    ids=["tp", "underscores", "tp-ep", "dp-ep", "sequence", "eplb", "deepep", "token-scale"],
)
def test_a_deployment_is_divided_as_vllm_divides_it(text, changes, tmp_path):
    path = tmp_path / "flash.yaml"
    path.write_text(f"model: nvidia/DeepSeek-V4-Flash-NVFP4\nmax-num-batched-tokens: 100\n{text}\n")
    whole = MoeShape(256, 256, 6, 4096, 2048, 100, True)
    assert shapes_of_config(path, "sm_100a") == [whole._replace(**changes)]


def test_hoppers_kernels_are_of_the_format_that_is_served(tmp_path, monkeypatch):
    """Of a file by its setting; the kernels themselves differ."""
    path = tmp_path / "flash.yaml"
    path.write_text(
        "model: flash\nmax-num-batched-tokens: 16\n"
        "additional-config: {dsv4_moe: {formats: mxfp4}}\n"
    )
    (shape,) = shapes_of_config(path, "sm_90a")
    assert shape == MoeShape(256, 256, 6, 4096, 2048, 16, False, weight_format="mxfp4", fp8=True)
    kernels = BACKENDS["sm90"].kernels
    of_nvfp4 = set(map(key_of, kernels(shape._replace(weight_format="nvfp4"), "sm_90a")))
    assert not of_nvfp4 & set(map(key_of, kernels(shape, "sm_90a")))


def test_drafts_have_kernels_of_their_own_counts(tmp_path):
    path = tmp_path / "v41.yaml"
    path.write_text(
        "model: v41\nmax-num-batched-tokens: 16\nspeculative-config: {method: dspark}\n"
        "enable-expert-parallel: true\ndata-parallel-size: 4\n"
        "additional-config: {dsv4_moe: {formats: mxfp4}}\n"
    )
    layers, drafts = shapes_of_config(path, "sm_90a")
    assert layers == MoeShape(384, 96, 6, 5120, 2304, 64, False, weight_format="mxfp4", fp8=True)
    assert drafts == layers._replace(num_experts=128, num_local_experts=32, top_k=3)


@pytest.mark.parametrize(
    ("method", "drafts"), [("mtp", 1), ("deepseek_mtp", 1), ("dspark", 1), ("ngram", 0)]
)
def test_only_drafts_of_the_checkpoint_have_layers(method, drafts, tmp_path):
    path = tmp_path / "flash.yaml"
    path.write_text(
        "model: flash\nmax-num-batched-tokens: 16\n"
        f"speculative-config: {{method: {method}, num_speculative_tokens: 2}}\n"
    )
    assert len(shapes_of_config(path, "sm_90a")) == 1 + drafts
    found = rank_memory(read_deployment(path, {}), *GPUS["h200"])
    assert (found.weights.drafts > 0) == (drafts > 0)


def test_a_deployment_whose_layers_are_vllms_is_refused(tmp_path, capsys):
    path = tmp_path / "flash.yaml"
    path.write_text(
        "model: flash\nmax-num-batched-tokens: 16\n"
        "additional-config: {dsv4_moe: {formats: nvfp4}}\n"
    )
    assert main(["compile", "--arch", "sm_90a", "--config", str(path)]) == 2
    assert "its experts are MXFP4, and the setting formats is nvfp4" in capsys.readouterr().err
