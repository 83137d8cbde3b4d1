"""Many short requests on a CPU leave the server as it was. SOAK_REQUESTS=10000 for the long run."""

import os

import pytest

from tests.support.cpu_build import needs_cpu_build
from tests.support.soak import resident_bytes, soak, wait_until_idle
from vllm_dsv4_moe.commands.serving import serve
from vllm_dsv4_moe.commands.tiny import TinyConfig, write_tiny_checkpoint

REQUESTS = int(os.environ.get("SOAK_REQUESTS", 96))
CONCURRENCY = 64
NEW_TOKENS = 4
CONFIG = TinyConfig(layers=2, hash_layers=1, hidden=256, intermediate=128, experts=16)
# oneDNN and vLLM keep what they compile for each shape of a matrix product, 2 to 3 MB for a batch
# size that is new: here there are few sizes, and oneDNN's own cache is off.
BATCHED_TOKENS = 16
ARGUMENTS = (
    "--enforce-eager",
    f"--max-model-len={BATCHED_TOKENS}",
    f"--max-num-seqs={BATCHED_TOKENS}",
    f"--max-num-batched-tokens={BATCHED_TOKENS}",
    "--no-enable-prefix-caching",
    "--num-gpu-blocks-override=128",
)
MEMORY_BYTES = 32 * 2**20  # that the second half of the requests may add: 6.7 KB each of 5,000
PROMPT = list(range(5, 5 + BATCHED_TOKENS - NEW_TOKENS))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200 + 2 * REQUESTS), needs_cpu_build]


def log_probabilities(server) -> list[float]:
    answer = server.complete(
        PROMPT, max_tokens=NEW_TOKENS, temperature=0, prompt_logprobs=0, logprobs=1, ignore_eos=True
    )["choices"][0]
    entries = zip(PROMPT[1:], answer["prompt_logprobs"][1:], strict=True)
    given = [entry[str(token)]["logprob"] for token, entry in entries]
    return given + answer["logprobs"]["token_logprobs"]


def test_many_requests_leave_memory_and_log_probabilities(tmp_path, record_property):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", CONFIG)
    environment = {"VLLM_DSV4_MOE_BACKEND": "reference", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    load = {"new": NEW_TOKENS, "vocab": CONFIG.vocab, "concurrency": CONCURRENCY}
    with serve(checkpoint, tmp_path / "log", ARGUMENTS, environment) as server:
        started = len(server.log.read_text())
        for length in range(1, BATCHED_TOKENS):
            server.complete([5] * length, max_tokens=1)
        came = soak(server, CONCURRENCY // 2, hang_up=0.5, **load)
        assert 0 < came.count(NEW_TOKENS) < len(came)
        wait_until_idle(server)
        values, memory = log_probabilities(server), []
        for half in (1, 2):
            came = soak(server, REQUESTS // 2, seed=half, **load)
            assert came == [NEW_TOKENS] * len(came)
            wait_until_idle(server)
            memory.append(resident_bytes(server))
        record_property("resident_bytes", memory)
        assert memory[1] - memory[0] <= MEMORY_BYTES, memory
        assert log_probabilities(server) == values
        assert "Traceback" not in server.log.read_text()[started:]
