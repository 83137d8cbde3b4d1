"""A tiny V4 on two GPUs through `vllm serve`: what every topology says beside one GPU."""

import dataclasses
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from tests.gpu import test_serve_w4a8_gpu as w4a8
from tests.gpu.test_serve_gpu import CACHE, PROMPTS, SAME_NUMERICS, distance, prompt_logprobs
from vllm_dsv4_moe.commands.demo import GPU_SIZES
from vllm_dsv4_moe.commands.serving import SMALL_ARGUMENTS, Server, ServerError, serve
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("two_gpus"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

EP = "--enable-expert-parallel"
EPLB_STEPS = 24  # of the engine, between two rearrangements


def eplb(use_async: bool) -> tuple[str, ...]:
    config = {"num_redundant_experts": 16, "window_size": 16, "use_async": use_async}
    return ("--enable-eplb", "--eplb-config", json.dumps(config | {"step_interval": EPLB_STEPS}))


TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "tp2": ("-tp=2",),
    "tp2-ep": ("-tp=2", EP),
    "dp2-ep": ("-dp=2", EP),
    "eplb": ("-dp=2", EP, *eplb(use_async=False)),
    "eplb-async": ("-tp=2", EP, *eplb(use_async=True)),
}


class Answers(NamedTuple):
    before: list[float]  # log-probability of every prompt token
    after: list[float]  # the same, when experts may have moved
    log: str


def logprobs_of(server: Server) -> list[float]:
    options = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    bodies = (server.complete(prompt, **options) for prompt in PROMPTS)
    return [value for body in bodies for value in prompt_logprobs(body)]


def arguments(topology: str) -> list[str]:
    memory = ["--gpu-memory-utilization=0.1", CACHE]
    return [*SMALL_ARGUMENTS, *memory, *TOPOLOGIES.get(topology, ())]


def ask(topology: str, expert_format: str, folder: Path) -> Answers:
    log = folder / f"{topology}-{expert_format}.log"
    settings = {"VLLM_DSV4_MOE_FORMATS": "nvfp4,mxfp4"}
    with serve(folder / expert_format, log, arguments(topology), settings) as server:
        before = logprobs_of(server)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            options = {"max_tokens": 4 * EPLB_STEPS, "ignore_eos": True}
            list(pool.map(lambda prompt: server.complete(prompt, **options), PROMPTS))
        return Answers(before, logprobs_of(server), log.read_text())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder of both formats."""
    folder = tmp_path_factory.mktemp("two_gpus")
    for expert_format in ("nvfp4", "mxfp4"):
        sizes = dataclasses.replace(GPU_SIZES, expert_format=expert_format)
        write_tiny_checkpoint(folder / expert_format, sizes, "cuda")
    return folder


@pytest.fixture(scope="module", params=["nvfp4", "mxfp4"])
def answers(request, checkpoints):
    """Topology -> its answers, of servers that start at once: starting takes most of their time."""
    with ThreadPoolExecutor(len(TOPOLOGIES) + 1) as pool:
        names = ("one", *TOPOLOGIES)
        asked = {name: pool.submit(ask, name, request.param, checkpoints) for name in names}
        yield lambda name: asked[name].result()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_two_gpus_say_what_one_says(answers, topology, record_property):
    one, two = answers("one"), answers(topology)
    assert all(math.isfinite(value) and value <= 0 for value in two.before + two.after)
    assert re.search(
        rf"plugin runs (NV|MX)FP4 experts, on sm\d+: layers 0-{GPU_SIZES.layers - 1}", two.log
    )
    assert "vLLM keeps the experts" not in two.log
    for name in ("before", "after"):
        difference = distance(getattr(one, name), getattr(two, name))
        record_property(f"one_gpu_{name}", difference)
        assert difference <= (w4a8.SAME_NUMERICS if "(W4A8" in two.log else SAME_NUMERICS)
    moved = two.log.count("Rearranging experts")
    record_property("rearrangements", moved)
    assert (moved > 0) == topology.startswith("eplb")


def test_a_rank_that_dies_ends_the_server(checkpoints, tmp_path):
    """In the middle of a request, and within a minute."""
    log = tmp_path / "server.log"
    with serve(checkpoints / "nvfp4", log, arguments("tp2-ep")) as server:
        workers = [
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "Worker" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2, workers
        with ThreadPoolExecutor(1) as pool:
            options = {"max_tokens": 900, "ignore_eos": True}
            request = pool.submit(server.complete, PROMPTS[0], **options)
            time.sleep(1)
            assert not request.done()
            workers[1].kill()
            server.process.wait(timeout=60)
            with pytest.raises(ServerError):
                request.result(timeout=60)
    assert server.process.returncode != 0
