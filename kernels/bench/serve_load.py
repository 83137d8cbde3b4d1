"""One load on a running server: `vllm bench serve`'s own code, and what the engine counted.

That code runs in this process, since importing it anew takes longer than most loads.
"""

import asyncio
import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.timing import query_gpu

from vllm_dsv4_moe.commands.serving import MODEL_NAME, Server, ServerError

KEPT = (
    "duration",
    "completed",
    "failed",
    "output_throughput",
    "total_token_throughput",
    "median_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
)
WARM_UP_TOKENS = 8  # new ones of a request
WARM_UP_PROMPTS = 32_768  # tokens of all its prompts
# Flat enough that sampled tokens stay apart, where greedy ones of a random model would repeat.
TEMPERATURE = "1"


@dataclass(frozen=True)
class Load:
    """So many requests at once, each of `prompt` random tokens, for `new` tokens each."""

    requests: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        return f"{self.requests} × {self.prompt} + {self.new}"

    def warm_up(self) -> "Load":
        """What compiles the same kernels in less time."""
        requests = max(1, min(self.requests, WARM_UP_PROMPTS // self.prompt))
        return Load(requests, self.prompt, min(self.new, WARM_UP_TOKENS))


def bench_serve(server: Server, model: Path, load: Load, seed: int, seconds: float) -> dict:
    """`vllm bench serve`'s own numbers; TimeoutError after `seconds`, ServerError where a request
    failed: the others' numbers are of another load."""
    import argparse

    from vllm.benchmarks.serve import add_cli_args, main_async

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(
        [
            "--backend=vllm",
            f"--base-url={server.address}",
            f"--model={MODEL_NAME}",
            f"--served-model-name={MODEL_NAME}",
            f"--tokenizer={model}",
            "--dataset-name=random",
            f"--random-input-len={load.prompt}",
            f"--random-output-len={load.new}",
            f"--num-prompts={load.requests}",
            f"--max-concurrency={load.requests}",
            "--ignore-eos",
            f"--temperature={TEMPERATURE}",
            f"--seed={seed}",
            "--percentile-metrics=ttft,tpot,itl",
            "--disable-tqdm",
        ]
    )
    found = asyncio.run(asyncio.wait_for(main_async(arguments), seconds))
    if found["completed"] != load.requests:
        raise ServerError(f"{found['completed']} of {load.requests} requests were answered")
    return {key: float(found[key]) for key in KEPT if key in found}


def measure(server: Server, model: Path, load: Load, seed: int, seconds: float) -> dict:
    """What the client saw, `step_ms`, the engine's own mean time between tokens, and `compiled`,
    kernels that were compiled meanwhile.
    """
    before, log_bytes = inter_token_seconds(server), server.log.stat().st_size
    deep_gemm = deep_gemm_folders()
    row: dict = bench_serve(server, model, load, seed, seconds)
    row["step_ms"] = step_ms(before, inter_token_seconds(server))
    new = {
        folder.removeprefix("kernel.").partition(".")[0]
        for folder in deep_gemm_folders() - deep_gemm
    }
    names = [*compiled(server.log, log_bytes), *sorted(new)]
    return row | ({"compiled": names} if names else {})


def deep_gemm_folders() -> set[str]:
    """Names in DeepGEMM's cache, kernel.NAME.HASH: vLLM's monitor does not see what DeepGEMM
    compiles, for one number of tokens after another."""
    from vllm import envs

    # As vllm.utils.deep_gemm has it.
    root = os.environ.get("DG_JIT_CACHE_DIR") or os.path.join(envs.VLLM_CACHE_ROOT, "deep_gemm")
    return {path.name for path in Path(root).glob("cache/*")}


def compiled(log: Path, start: int) -> list[str]:
    """Names of kernels that vLLM's monitor saw being compiled, as the log says from a byte on."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    return sorted(set(re.findall(r"compilation during inference: (\S+?)(?: \(|\. )", text)))


def inter_token_seconds(server: Server) -> tuple[float, float]:
    """Sum and count, so far, of the times between tokens, on the engine's clock."""
    return sum_and_count(server.get("/metrics"))


def sum_and_count(metrics: str) -> tuple[float, float]:
    def value(suffix: str) -> float:
        name = f"vllm:inter_token_latency_seconds_{suffix}"
        found = re.findall(rf"(?m)^{name}(?:\{{.*\}})? (\S+)$", metrics)
        return sum(map(float, found))

    return value("sum"), value("count")


def step_ms(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """None where no token followed another."""
    seconds, count = (new - old for old, new in zip(before, after, strict=True))
    return seconds / count * 1e3 if count else None


def kv_tokens(log: Path) -> int | None:
    """How many tokens the KV cache holds, as the server's log says."""
    found = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text(errors="replace"))
    return int(found[1].replace(",", "")) if found else None


def rpc(server: Server, method: str, *arguments: object) -> dict:
    """A method of bench.serve_worker, of the first worker."""
    body = {"method": method, "args": arguments}
    return server.post("/collective_rpc", body)["results"][0]


class Clocks:
    """The GPU's clock and power about once a second, for as long as a `with` lasts."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []  # MHz, watts
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def __enter__(self) -> "Clocks":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()

    def sample(self) -> None:
        while shutil.which("nvidia-smi") and not self.over.wait(0.7):
            with contextlib.suppress(ValueError):  # a GPU without a power meter
                mhz, watts = map(float, query_gpu("clocks.sm", "power.draw"))
                self.samples.append((mhz, watts))

    @contextlib.contextmanager
    def during(self, row: dict) -> Iterator[None]:
        """Adds to the row: `seconds`, and where there was a sample, medians `sm_mhz`, `watts`."""
        first, begun = len(self.samples), time.monotonic()
        yield
        row["seconds"] = round(time.monotonic() - begun, 2)
        if found := self.samples[first:]:
            row["sm_mhz"], row["watts"] = (median(each) for each in zip(*found, strict=True))
