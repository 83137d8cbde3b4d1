"""A tiny V4.1 on a GPU through `vllm serve`, image tokens in its prompts: this plugin beside vLLM's
Marlin, and the oracle. vLLM has the model for GPUs alone, from 0.33 on."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.gpu.test_serve_gpu import CACHE, NOT_OURS, PROMPTS, distance, prompt_logprobs
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.demo import GPU_SIZES
from vllm_dsv4_moe.commands.serving import SMALL_ARGUMENTS, serve
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import IMAGE_TOKEN_ID, V41_DEFAULTS

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("servers")]

# V4.1-Flash's intermediate size at TP8.
MODEL = dataclasses.replace(
    GPU_SIZES, model="v41", intermediate=288, expert_format="mxfp4", **V41_DEFAULTS
)
MIXED = [*range(10, 40), *[IMAGE_TOKEN_ID] * 24, *range(40, 60), *[IMAGE_TOKEN_ID] * 40, 7, 8, 9]
OURS = {"VLLM_DSV4_MOE_FORMATS": "nvfp4,mxfp4", "VLLM_DSV4_MOE_ACTIVATIONS": "bf16"}
SERVERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "ours": ([], OURS),
    "ours_fp8": ([], OURS),
    "reference": (["--enforce-eager"], OURS | {"VLLM_DSV4_MOE_BACKEND": "reference"}),
    "marlin": (["--kernel-config", '{"moe_backend": "marlin"}'], NOT_OURS),
}
# Mean differences of log-probabilities, nats, of backends that multiply the same bf16 activations:
# half of what quantising them to NVFP4 does to V4's tiny model.
SAME_NUMERICS = 0.08


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """By what linears are: bf16, or fp8 as published."""
    if tuple(map(int, version("vllm").split(".")[:2])) < (0, 33):
        pytest.skip("vLLM has V4.1's model from 0.33 on")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("MXFP4 experts are this plugin's on Hopper")
    folder = tmp_path_factory.mktemp("serve_v41")
    return {
        linear: write_tiny_checkpoint(
            folder / linear, dataclasses.replace(MODEL, linear=linear), "cuda"
        )
        for linear in ("bf16", "fp8")
    }


@pytest.fixture(scope="module")
def answers(checkpoints):
    """Server's name -> (log-probability of every prompt token, those of the prompt with image
    tokens, log). All start at once."""
    with ThreadPoolExecutor(len(SERVERS)) as pool:
        asked = {name: pool.submit(ask, name, checkpoints) for name in SERVERS}
        yield lambda name: asked[name].result()


def ask(name: str, checkpoints: dict[str, Path]) -> tuple[list[float], list[float], str]:
    extra, environment = SERVERS[name]
    checkpoint = checkpoints["fp8" if name.endswith("fp8") else "bf16"]
    log = checkpoint.parent / f"{name}.log"
    arguments = [
        *SMALL_ARGUMENTS,
        '--limit-mm-per-prompt={"image": 0}',
        "--gpu-memory-utilization=0.1",
        CACHE,
        *extra,
    ]
    with serve(checkpoint, log, arguments, environment) as server:

        def logprobs(prompt) -> list[float]:
            options = {"max_tokens": 8, "temperature": 0, "prompt_logprobs": 0}
            return prompt_logprobs(server.complete(prompt, **options))

        text = [value for prompt in PROMPTS for value in logprobs(prompt)]
        return text, logprobs(MIXED), log.read_text()


@pytest.mark.parametrize("server", ["ours", "ours_fp8"])
def test_every_layer_is_ours(answers, server):
    text, mixed, log = answers(server)
    assert f"runs MXFP4 experts, on sm90: layers 0-{MODEL.layers - 1} (W4A" in log
    assert "vLLM keeps the experts" not in log
    assert all(math.isfinite(value) and value <= 0 for value in text + mixed)


@pytest.mark.parametrize("other", ["marlin", "reference"])
def test_agrees_with(answers, other, record_property):
    (text, mixed, _), (their_text, their_mixed, _) = answers("ours"), answers(other)
    found = distance(text, their_text), distance(mixed, their_mixed)
    record_property(f"ours_{other}", found)
    assert max(found) <= SAME_NUMERICS


def test_each_layer_is_as_the_oracle_has_it(checkpoints, capsys):
    """Every second token an image's, which another bias routes."""
    assert main(["verify", str(checkpoints["bf16"])]) == 0
    line, verdict = capsys.readouterr().out.splitlines()
    assert "MXFP4" in line and "sm90, W4A" in line and "router agrees" in line
    assert verdict.startswith("verified: 1 kinds of layer")
