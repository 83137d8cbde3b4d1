"""1,000 requests to a tiny V4 on a GPU, many of them hung up on, leave the server as it was."""

import os
from pathlib import Path

import pytest
from bench.serve_load import rpc

from tests.gpu.test_serve_gpu import distance, prompt_logprobs
from tests.support.soak import soak, wait_until_idle
from vllm_dsv4_moe.commands.demo import GPU_SIZES
from vllm_dsv4_moe.commands.serving import serve
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("servers")]

ROOT = Path(__file__).parents[2]
REQUESTS = 1000
NEW_TOKENS = 16
ARGUMENTS = (
    "--max-model-len=1024",
    "--max-num-seqs=64",
    "--max-num-batched-tokens=1024",
    "--no-enable-prefix-caching",
    "--gpu-memory-utilization=0.2",
    f"--kv-cache-memory-bytes={2 << 30}",
    "--worker-extension-cls=bench.serve_worker.ServeWorker",
)
PROMPT = list(range(5, 200))
MEMORY_BYTES = 16 * 2**20
TOLERANCE = 1e-3  # nats; attention may split its sums elsewhere when its blocks lie elsewhere


def log_probabilities(server) -> list[float]:
    options = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    return prompt_logprobs(server.complete(PROMPT, **options))


def test_streams_that_are_hung_up_on_leave_memory_and_log_probabilities(tmp_path, record_property):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", GPU_SIZES, "cuda")
    paths = [str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    load = {"new": NEW_TOKENS, "vocab": GPU_SIZES.vocab, "hang_up": 0.4}
    with serve(checkpoint, tmp_path / "log", ARGUMENTS, environment) as server:
        assert "this plugin runs NVFP4 experts, on sm" in server.log.read_text()
        soak(server, 128, **load)  # what is allocated once
        wait_until_idle(server)
        values = log_probabilities(server)
        memory = rpc(server, "bench_memory")
        came = soak(server, REQUESTS, seed=1, **load)
        wait_until_idle(server)
        more = rpc(server, "bench_memory")["allocated_bytes"] - memory["allocated_bytes"]
        after = log_probabilities(server)
    difference = distance(values, after)
    record_property("complete", came.count(NEW_TOKENS))
    record_property("more_bytes", more)
    record_property("difference", difference)
    assert 400 < came.count(NEW_TOKENS) < 800
    assert more <= MEMORY_BYTES
    assert difference <= TOLERANCE
