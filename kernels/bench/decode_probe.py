"""Where a decode step of one sequence goes, of an engine that runs in this process.

graph_ms     the step's CUDA graph alone, replayed back to back, at 1 and 8 sequences
step_ms      what the engine takes a token: 10th, 50th and 90th percentile
wait_ms      how long the host waited for the GPU in a step; near 0, the host is the bound
moe_us       a layer, from the end of the kernel before its gate to the end of its sum
timeline     the middle layer's kernels: start and end in us, stream, name
"""

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, quantiles
from typing import NamedTuple

import torch

STEPS = 512
UNSTEADY_STEPS = 8  # the first ones of a request
REPLAYS = 200
GATES = ("LLBf16Dotprod", "_gate_route")
BEFORE_GATE = "mhc_pre"
SUMS = ("CUDAFunctor_add", "CUDAFunctorOnSelf_add")  # of shared and routed experts


class Kernel(NamedTuple):
    start: float  # us
    end: float
    stream: int
    name: str


class Window(NamedTuple):
    """One MoE layer in a step."""

    start: float
    end: float
    kernels: list[Kernel]


def probe(llm) -> dict:
    core = llm.llm_engine.engine_core.engine_core
    graphs = core.model_executor.driver_worker.worker.model_runner.cudagraph_manager.graphs

    def graph(num_tokens: int) -> torch.cuda.CUDAGraph:
        return next(graph for key, graph in graphs.items() if key.num_tokens == num_tokens)

    steps, waits = engine_steps(llm)
    found: dict = {
        "graph_ms": {n: replay_ms(graph(n)) for n in (1, 8)},
        "step_ms": deciles(steps),
        "wait_ms": deciles(waits),
    }
    windows = layer_windows(trace(graph(1)))
    if windows:
        found["moe_us"] = mean(window.end - window.start for window in windows)
        start, _, kernels = windows[len(windows) // 2]
        found["timeline"] = [
            (round(k.start - start, 1), round(k.end - start, 1), k.stream, k.name[:60])
            for k in kernels
        ]
    return found


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    for _ in range(5):
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPLAYS


def engine_steps(llm) -> tuple[list[float], list[float]]:
    """Seconds of every steady step of one request, and of its wait for the GPU."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    get_output, waits, ends = AsyncOutput.get_output, [], []

    def timed(self):
        begun = time.perf_counter()
        self.copy_event.synchronize()
        waits.append(time.perf_counter() - begun)
        output = get_output(self)
        ends.append(time.perf_counter())
        return output

    prompt = [random.Random(0).randrange(10, 100_000) for _ in range(32)]
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    AsyncOutput.get_output = timed
    try:
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    finally:
        AsyncOutput.get_output = get_output
    steady = ends[UNSTEADY_STEPS:]
    steps = [b - a for a, b in zip(steady, steady[1:], strict=False)]
    return steps, waits[UNSTEADY_STEPS:]


def deciles(seconds: Sequence[float]) -> list[float]:
    """The 10th, 50th and 90th percentile, in milliseconds."""
    tenths = quantiles(seconds, n=10)
    return [round(tenths[i] * 1e3, 3) for i in (0, 4, 8)]


def trace(graph: torch.cuda.CUDAGraph) -> list[Kernel]:
    """Three replays, by start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted(
        Kernel(e["ts"], e["ts"] + e["dur"], e["args"].get("stream", 0), e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")
    )


def layer_windows(kernels: Sequence[Kernel]) -> list[Window]:
    """From the end of the last kernel before a gate that hands on the residual streams to the end
    of the first sum after it."""
    found = []
    after = 0
    for i, kernel in enumerate(kernels):
        if i < after or not any(name in kernel.name for name in GATES):
            continue
        sums = (j for j in range(i, len(kernels)) if any(n in kernels[j].name for n in SUMS))
        last = next(sums, None)
        if last is None:
            break
        before = [k.end for k in kernels[:i] if BEFORE_GATE in k.name]
        start = max(before, default=kernel.start)
        inside = [k for k in kernels[: last + 1] if k.end > start]
        found.append(Window(start, kernels[last].end, inside))
        after = last + 1
    return found
