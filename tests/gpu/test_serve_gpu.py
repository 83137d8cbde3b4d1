"""A tiny V4 on a GPU through `vllm serve`: this plugin beside vLLM's own FP4 backends.

Experts are NVFP4 and linears bf16, where a server's checkpoint does not say otherwise.
"""

import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dsv4_kernels
import pytest
import torch

from vllm_dsv4_moe.commands.demo import GPU_SIZES
from vllm_dsv4_moe.commands.serving import SMALL_ARGUMENTS, serve
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

# One process starts each server once.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("servers")]

MODEL = GPU_SIZES  # of the demo
PROMPTS = ("Hello world", "The quick brown fox jumps over the lazy dog", "0123456789" * 12, "a")
NOT_OURS = {"VLLM_PLUGINS": ""}
Servers = dict[str, tuple[list[str], dict[str, str]]]  # arguments and environment
# The expert backend is the difference; the rest is what every GPU host has.
SERVERS: Servers = {
    "ours": ([], {}),
    "ours_fp8": ([], {}),
    "ours_bf16_reference": (
        ["--enforce-eager"],
        {"VLLM_DSV4_MOE_BACKEND": "reference", "VLLM_DSV4_MOE_ACTIVATIONS": "bf16"},
    ),
    "marlin": (["--kernel-config", '{"moe_backend": "marlin"}'], NOT_OURS),
    "emulation": (["--kernel-config", '{"moe_backend": "emulation"}'], NOT_OURS),
    "mxfp4": ([], {"VLLM_DSV4_MOE_FORMATS": "mxfp4", "VLLM_DSV4_MOE_ACTIVATIONS": "bf16"}),
    "mxfp4_reference": (
        ["--enforce-eager"],
        {
            "VLLM_DSV4_MOE_BACKEND": "reference",
            "VLLM_DSV4_MOE_FORMATS": "mxfp4",
            "VLLM_DSV4_MOE_ACTIVATIONS": "bf16",
        },
    ),
    "mxfp4_marlin": (["--kernel-config", '{"moe_backend": "marlin"}'], NOT_OURS),
    "drafts": (
        ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}'],
        {"VLLM_DSV4_MOE_FORMATS": "nvfp4,mxfp4"},
    ),
}
# What a server's checkpoint has else than MODEL, and MXFP4 experts where the server's name begins
# so; linears in FP8 are as published.
CHECKPOINTS: dict[str, dict] = {"ours_fp8": {"linear": "fp8"}, "drafts": {"mtp": 1}}
CACHE = f"--kv-cache-memory-bytes={2 << 30}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    yield from ask_all(SERVERS, tmp_path_factory.mktemp("serve_gpu"))


def ask_all(servers: Servers, folder: Path):
    """Server's name -> (log-probability of every prompt token, greedy tokens, log).

    All servers start at once, since starting takes most of their time.
    """
    for name in servers:
        sizes = dataclasses.replace(MODEL, **changes(name))
        if not (folder / _folder(name)).exists():
            write_tiny_checkpoint(folder / _folder(name), sizes, "cuda")
    with ThreadPoolExecutor(len(servers)) as pool:
        asked = {name: pool.submit(ask, name, *servers[name], folder) for name in servers}
        yield lambda name: asked[name].result()


def changes(name: str) -> dict:
    return CHECKPOINTS.get(name, {"expert_format": "mxfp4"} if name.startswith("mxfp4") else {})


def _folder(name: str) -> str:
    """Of a server's checkpoint, shared by those that serve the same."""
    return "-".join(f"{key}-{value}" for key, value in changes(name).items()) or "nvfp4"


def ask(
    name: str, extra: list[str], environment: dict[str, str], folder: Path
) -> tuple[list[float], list[list[int]], str]:
    log = folder / f"{name}.log"
    # With a cache of given size no server measures how much memory the others left.
    arguments = [*SMALL_ARGUMENTS, "--gpu-memory-utilization=0.1", CACHE, *extra]
    logprobs, tokens = [], []
    with serve(folder / _folder(name), log, arguments, environment) as server:
        for prompt in PROMPTS:
            body = server.complete(
                prompt,
                max_tokens=16,
                temperature=0,
                ignore_eos=True,
                prompt_logprobs=0,
                return_token_ids=True,
            )
            logprobs += prompt_logprobs(body)
            tokens.append(body["choices"][0]["token_ids"])
    return logprobs, tokens, log.read_text()


def prompt_logprobs(body: dict) -> list[float]:
    """Of every token of the prompt after the first, in an answer with no others."""
    (choice,) = body["choices"]
    return [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]


def distance(a: list[float], b: list[float]) -> float:
    """Mean absolute difference of log-probabilities, nats."""
    assert len(a) == len(b) > 100
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.parametrize("server", ["ours", "ours_fp8"])
def test_every_expert_layer_is_ours(answers, server):
    logprobs, tokens, log = answers(server)
    assert re.search(rf"plugin runs NVFP4 experts, on sm\d+: layers 0-{MODEL.layers - 1}\b", log)
    assert "vLLM keeps the experts" not in log
    assert "one launch gates and routes" in log and "vLLM applies the gate" not in log
    assert all(math.isfinite(value) and value <= 0 for value in logprobs)
    assert [len(answer) for answer in tokens] == [16] * len(PROMPTS)


# Mean differences, nats, of backends that multiply the same bf16 activations: 0.022 to Marlin and
# 0.020 to the reference (H200). What quantises activations too is 0.155 from Marlin.
SAME_NUMERICS = 0.04


def test_agrees_with_vllms_backends(answers, record_property):
    """Marlin multiplies bf16 activations, as sm90 does; emulation quantises them too."""
    ours, marlin, emulation = (answers(name)[0] for name in ("ours", "marlin", "emulation"))
    between = distance(marlin, emulation)
    record_property("marlin_emulation", between)
    record_property("ours_marlin", distance(ours, marlin))
    record_property("ours_emulation", distance(ours, emulation))
    # Which holds ours as far from emulation as Marlin is, within that bound.
    assert distance(ours, marlin) <= SAME_NUMERICS
    assert between > 2 * SAME_NUMERICS, "the bound would not tell other numerics apart"


def test_agrees_with_the_reference_backend(answers, record_property):
    reference = distance(answers("ours")[0], answers("ours_bf16_reference")[0])
    record_property("ours_reference", reference)
    assert reference <= SAME_NUMERICS


def test_greedy_tokens_start_like_marlins(answers, record_property):
    pairs = list(zip(answers("ours")[1], answers("marlin")[1], strict=True))
    record_property("tokens", json.dumps(pairs))
    assert sum(ours[0] == marlin[0] for ours, marlin in pairs) >= len(pairs) - 1


def test_none_of_our_kernels_is_compiled_while_serving(answers):
    """vLLM's monitor names each Triton kernel that a request had to wait for."""
    log = answers("ours")[2]
    assert "Kernel JIT monitor activated" in log
    compiled = set(re.findall(r"JIT compilation during inference: (\w+)", log))
    kernels = Path(dsv4_kernels.__file__).parent
    ours = {n for f in kernels.rglob("*.py") for n in re.findall(r"def (\w+)\(", f.read_text())}
    assert "_layout_kernel" in ours
    assert not compiled & ours


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("MXFP4 experts are this plugin's on Hopper")


def test_every_mxfp4_layer_is_ours(hopper, answers):
    logprobs, tokens, log = answers("mxfp4")
    assert f"runs MXFP4 experts, on sm90: layers 0-{MODEL.layers - 1} (W4A16" in log
    assert "vLLM keeps the experts" not in log and "are rounded into them" not in log
    assert all(math.isfinite(value) and value <= 0 for value in logprobs)
    assert [len(answer) for answer in tokens] == [16] * len(PROMPTS)


def test_mxfp4_agrees_with_marlin_and_the_reference(hopper, answers, record_property):
    """All three multiply bf16 activations; the yardstick is what quantising them does."""
    ours, marlin, reference = (
        answers(name)[0] for name in ("mxfp4", "mxfp4_marlin", "mxfp4_reference")
    )
    yardstick = distance(answers("marlin")[0], answers("emulation")[0])
    record_property("mxfp4_marlin", distance(ours, marlin))
    record_property("mxfp4_reference", distance(ours, reference))
    assert distance(ours, marlin) <= yardstick
    assert distance(ours, reference) <= yardstick
    pairs = zip(answers("mxfp4")[1], answers("mxfp4_marlin")[1], strict=True)
    assert sum(ours[0] == theirs[0] for ours, theirs in pairs) >= len(PROMPTS) - 1


def test_mxfp4_drafts_beside_nvfp4_experts_are_ours_too(hopper, answers, record_property):
    logprobs, _, log = answers("drafts")
    assert f"runs NVFP4 experts, on sm90: layers 0-{MODEL.layers - 1} (W4A16" in log
    assert f"runs MXFP4 experts, on sm90: layers {MODEL.layers} (W4A8" in log
    assert "vLLM keeps the experts" not in log
    # Drafts choose no token: what the model says is what it says without them.
    difference = distance(logprobs, answers("ours")[0])
    record_property("drafts_ours", difference)
    assert difference <= distance(answers("marlin")[0], answers("emulation")[0])
