"""What bench.serve asks inside a server's worker: memory, a step's CUDA graph alone, its kernels.

`vllm serve --worker-extension-cls bench.serve_worker.ServeWorker` adds these methods to the worker,
and `/collective_rpc` calls them between steps. Answers are plain dictionaries.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

REPLAYS = 50
TRACED_REPLAYS = 3
# vLLM's gate of more than 16 tokens is cuBLAS's, which other products are, too: then the router.
GATES = (
    "LLBf16Dotprod",
    "_gate_route",
    *("topkGatingSoftplusSqrt", "_dsv4_topk_kernel", "dsv4HashTopkSoftplusSqrt"),
)
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


class ServeWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any  # the worker's

    def bench_memory(self) -> dict:
        return {
            "weights_bytes": self.model_runner.model_memory_usage,
            "allocated_bytes": torch.cuda.memory_allocated(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def bench_graph(self, sequences: int) -> dict:
        """Milliseconds of the step's graph, replayed back to back."""
        return {"graph_ms": replay_ms(self._bench_graph_of(sequences))}

    def bench_graph_kernels(self, sequences: int) -> dict:
        """Of a step's graph: its kernels, and how long a MoE layer takes in it."""
        graph = self._bench_graph_of(sequences)
        profiler = started_profiler()
        for _ in range(TRACED_REPLAYS):
            graph.replay()
        kernels = stopped(profiler)
        return {"kernels": by_name(kernels, TRACED_REPLAYS), **moe_layers(kernels)}

    def bench_trace(self) -> dict:
        self._bench_profiler = started_profiler()
        return {}

    def bench_traced(self) -> dict:
        """The kernels since bench_trace."""
        return {"kernels": by_name(stopped(self._bench_profiler), 1)}

    def _bench_graph_of(self, sequences: int) -> torch.cuda.CUDAGraph:
        """The smallest that holds a token of each, and those that are drafted of it."""
        manager = self.model_runner.cudagraph_manager
        num_tokens = sequences * manager.decode_query_len
        fitting = [key for key in manager.graphs if key.num_tokens >= num_tokens]
        return manager.graphs[min(fitting, key=lambda key: key.num_tokens)]


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


def started_profiler() -> torch.profiler.profile:
    torch.cuda.synchronize()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.start()
    return profiler


def stopped(profiler: torch.profiler.profile) -> list[Kernel]:
    """What ran since it was started, by start."""
    torch.cuda.synchronize()
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text())["traceEvents"])


def kernels_of(events: Iterable[dict]) -> list[Kernel]:
    return sorted(
        Kernel(e["ts"], e["ts"] + e["dur"], e["args"].get("stream", 0), e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")
    )


def by_name(kernels: Sequence[Kernel], steps: int) -> list[dict]:
    """Microseconds and launches a step of each kernel, the most first."""
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(short_name(kernel.name), []).append(kernel.end - kernel.start)
    rows = [
        {"name": name, "us": round(sum(us) / steps, 1), "launches": round(len(us) / steps, 1)}
        for name, us in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def short_name(name: str) -> str:
    """A kernel's name without its return type, namespaces, template and arguments."""
    name = name.removeprefix("void ")
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = shorter
    return re.split(r"[<(]", name)[0].rpartition("::")[2].strip()[:60]


def moe_layers(kernels: Sequence[Kernel]) -> dict:
    """Microseconds a MoE layer, and the kernels of one: start, end, stream, name."""
    windows = layer_windows(kernels)
    if not windows:
        return {}
    start, _, inside = windows[len(windows) // 2]
    return {
        "moe_us": mean(window.end - window.start for window in windows),
        "timeline": [
            [round(k.start - start, 1), round(k.end - start, 1), k.stream, short_name(k.name)]
            for k in inside
        ],
    }


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
