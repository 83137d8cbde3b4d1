"""Many short requests at once to a running server, some of them hung up on, and what is left after.

Nothing here imports torch or vllm.
"""

import http.client
import json
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_dsv4_moe.commands.serving import MODEL_NAME, Server

REQUEST_SECONDS = 600
IDLE_SECONDS = 300


def soak(
    server: Server,
    requests: int,
    *,
    new: int,
    vocab: int,
    concurrency: int = 64,
    hang_up: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """How many tokens came of each request. That share of them is hung up on after some."""
    chance = random.Random(seed)

    def request(_) -> tuple[list[int], int | None]:
        prompt = [chance.randrange(3, vocab) for _ in range(chance.randrange(1, 9))]
        return prompt, chance.randrange(new) if chance.random() < hang_up else None

    given = list(map(request, range(requests)))
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda each: stream(server, each[0], new, each[1]), given))


def stream(server: Server, prompt: Sequence[int], new: int, hang_up_after: int | None) -> int:
    """Tokens that came; with 0 the line is cut before the answer begins."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_SECONDS)
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": new, "ignore_eos": True}
    body |= {"temperature": 0, "stream": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json"}
    tokens = 0
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if hang_up_after == 0:
            return 0
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
            if hang_up_after is not None and tokens >= hang_up_after:
                break
        return tokens
    finally:
        connection.close()


def wait_until_idle(server: Server) -> None:
    """AssertionError where a request, or memory of its KV cache, is left."""
    deadline = time.monotonic() + IDLE_SECONDS
    while (left := in_use(server)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


def in_use(server: Server) -> dict[str, float]:
    """What is not 0 of requests and KV cache."""
    metrics = server.get("/metrics")
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    values = {n: re.findall(rf"(?m)^vllm:{n}\{{.*\}} (\S+)$", metrics) for n in names}
    assert all(values.values()), "vLLM's metrics have other names"
    return {name: total for name, found in values.items() if (total := sum(map(float, found)))}


def resident_bytes(server: Server) -> int:
    """Memory of the server's processes, pages that they share counted in each."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            if group == server.process.pid:
                total += int((folder / "statm").read_text().split()[1]) * 4096
        except OSError:  # it has ended
            continue
    return total
