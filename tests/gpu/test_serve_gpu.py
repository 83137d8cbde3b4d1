"""A tiny V4 on a GPU through `vllm serve`: this plugin beside vLLM's own NVFP4 backends.

The linears are bf16; `ours_fp8` has them in FP8 as published checkpoints do.
"""

import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dsv4_kernels
import pytest

from vllm_dsv4_moe.commands.demo import GPU_SIZES
from vllm_dsv4_moe.commands.serving import SMALL_ARGUMENTS, serve
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

# One process starts each server once.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("servers")]

MODEL = GPU_SIZES  # of the demo
PROMPTS = ("Hello world", "The quick brown fox jumps over the lazy dog", "0123456789" * 12, "a")
NOT_OURS = {"VLLM_PLUGINS": ""}
# The expert backend is the difference; the rest is what every GPU host has.
SERVERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "ours": ([], {}),
    "ours_fp8": ([], {}),
    "ours_bf16_reference": (
        ["--enforce-eager"],
        {"VLLM_DSV4_MOE_BACKEND": "reference", "VLLM_DSV4_MOE_ACTIVATIONS": "bf16"},
    ),
    "marlin": (["--kernel-config", '{"moe_backend": "marlin"}'], NOT_OURS),
    "emulation": (["--kernel-config", '{"moe_backend": "emulation"}'], NOT_OURS),
}
LINEAR = {"ours_fp8": "fp8"}
CACHE = f"--kv-cache-memory-bytes={2 << 30}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Server's name -> (log-probability of every prompt token, greedy tokens, log).

    All servers start at once, since starting takes most of their time.
    """
    folder = tmp_path_factory.mktemp("serve_gpu")
    for linear in ("bf16", "fp8"):
        write_tiny_checkpoint(folder / linear, dataclasses.replace(MODEL, linear=linear))
    with ThreadPoolExecutor(len(SERVERS)) as pool:
        asked = {name: pool.submit(ask, name, folder) for name in SERVERS}
        yield lambda name: asked[name].result()


def ask(name: str, folder: Path) -> tuple[list[float], list[list[int]], str]:
    extra, environment = SERVERS[name]
    log = folder / f"{name}.log"
    # With a cache of given size no server measures how much memory the others left.
    arguments = [*SMALL_ARGUMENTS, "--gpu-memory-utilization=0.3", CACHE, *extra]
    logprobs, tokens = [], []
    with serve(folder / LINEAR.get(name, "bf16"), log, arguments, environment) as server:
        for prompt in PROMPTS:
            body = server.complete(
                prompt,
                max_tokens=16,
                temperature=0,
                ignore_eos=True,
                prompt_logprobs=0,
                return_token_ids=True,
            )
            (choice,) = body["choices"]
            for entry in choice["prompt_logprobs"][1:]:
                logprobs.append(next(iter(entry.values()))["logprob"])
            tokens.append(choice["token_ids"])
    return logprobs, tokens, log.read_text()


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
