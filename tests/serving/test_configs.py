"""Every file of configs/ goes through the own parser of each supported vLLM, and says what memory
it takes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deployments import DEPLOYMENTS, parse, said
from tests.support.vllm_sources import next_with_installed_operators
from vllm_dsv4_moe.commands.deployment import read_deployment
from vllm_dsv4_moe.commands.memory import GIB, GPUS, rank_memory

ROOT = Path(__file__).parents[2]
# Name -> model, nodes, GPUs, tensor- and data-parallel ranks, whether experts stay whole.
TOPOLOGIES = {
    "flash-2xh200": ("deepseek-ai/DeepSeek-V4-Flash-0731", 1, 2, 1, 2, True),
    "flash-4xh200": ("deepseek-ai/DeepSeek-V4-Flash-0731", 1, 4, 1, 4, True),
    "flash-b200": ("nvidia/DeepSeek-V4-Flash-NVFP4", 1, 1, 1, 1, False),
    "pro-2x8xh200": ("deepseek-ai/DeepSeek-V4-Pro-0813", 2, 16, 1, 16, True),
    "pro-8xb200": ("nvidia/DeepSeek-V4-Pro-NVFP4", 1, 8, 1, 8, True),
    "pro-8xh200": ("deepseek-ai/DeepSeek-V4-Pro-0813", 1, 8, 4, 2, True),
    "v41-4xb200": ("nvidia/DeepSeek-V4.1-Flash-NVFP4", 1, 4, 4, 1, False),
    "v41-4xh200": ("deepseek-ai/DeepSeek-V4.1-Flash", 1, 4, 4, 1, False),
    "v41-8xb200": ("nvidia/DeepSeek-V4.1-Flash-NVFP4", 1, 8, 8, 1, False),
    "v41-8xh200": ("deepseek-ai/DeepSeek-V4.1-Flash", 1, 8, 8, 1, False),
    "v41-ep-8xb200": ("nvidia/DeepSeek-V4.1-Flash-NVFP4", 1, 8, 1, 8, True),
    "v41-ep-8xh200": ("deepseek-ai/DeepSeek-V4.1-Flash", 1, 8, 1, 8, True),
}
NAMED = ("reasoning_parser", "tool_call_parser", "tokenizer_mode")
deployments = pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def next_said(tmp_path_factory):
    """As `said` of the vLLM that is not installed."""
    folder = next_with_installed_operators(tmp_path_factory.mktemp("next"))
    paths = [folder, ROOT, ROOT / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.deployments"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["0.32", pytest.param("0.33", marks=pytest.mark.slow)])
def vllm(request):
    """What a vLLM's own parser makes of all files, and the names that it knows."""
    found = installed() if request.param == "0.32" else request.getfixturevalue("next_said")
    assert found["version"].startswith(request.param)
    return found


installed = functools.cache(said)


@deployments
def test_each_vllm_takes_it(vllm, path):
    args = vllm["arguments"][path.stem]
    model, nodes, gpus, tensor_parallel, data_parallel, whole = TOPOLOGIES[path.stem]
    assert args["model"] == model
    assert args["tensor_parallel_size"] == tensor_parallel
    assert args["data_parallel_size"] == data_parallel
    assert tensor_parallel * data_parallel == gpus
    assert args["enable_expert_parallel"] == whole
    assert (args["data_parallel_size_local"] or data_parallel) * nodes == data_parallel
    assert args["max_num_batched_tokens"] > 0 and args["enable_auto_tool_choice"]


@deployments
def test_each_vllm_knows_what_it_names(vllm, path):
    args = vllm["arguments"][path.stem]
    tool = "deepseek_v41" if path.stem.startswith("v41") else "deepseek_v4"
    for option in NAMED:
        assert args[option] == tool and tool in vllm["known"][option]
    drafts = args["speculative_config"]
    assert set(drafts) <= set(vllm["known"]["speculative_config"])
    # NVIDIA's copies of V4 have a layer of multi-token prediction, all other releases DSpark.
    v4_of_nvidia = args["model"].startswith("nvidia/DeepSeek-V4-")
    assert drafts["method"] == ("mtp" if v4_of_nvidia else "dspark")


@deployments
def test_experts_are_this_plugins(path):
    arch = GPUS[path.stem[-4:]][1]
    layers, drafts = read_deployment(path, {}).shapes(arch)
    assert layers is not None and (drafts is not None) == (arch == "sm_90a")


@deployments
def test_memory_is_what_doctor_says(path):
    found = rank_memory(read_deployment(path, {}), *GPUS[path.stem[-4:]])
    assert found.comment() in path.read_text(), f"{path.name} should say\n{found.comment()}"
    assert found.left > 6 * GIB


def test_every_topology_has_a_file():
    assert {path.stem for path in DEPLOYMENTS} == set(TOPOLOGIES)


def test_vllm_refuses_an_option_it_does_not_know(tmp_path, capsys):
    path = tmp_path / "flash-b200.yaml"
    path.write_text("model: m\nno-such-option: 1\n")
    with pytest.raises(SystemExit):
        parse(path)
    assert "no-such-option" in capsys.readouterr().err
