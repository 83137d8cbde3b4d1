"""One timer for every bench: a CUDA graph of calls, replayed, with events around each replay.

A bench verifies its kernel first, then hands `time_us` one call per input set. Where the inputs of
a real layer come from memory, enough sets to fill the L2 cache twice (`cold_sets`) keep them cold;
where a kernel reads what the kernel before it wrote, one call repeated keeps them warm. Times are
medians, per call, of back-to-back launches as a captured layer makes them.
"""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch


def time_us(
    calls: Sequence[Callable[[], object]],
    *,
    replays: int = 40,
    meanwhile: Callable[[], None] = lambda: None,
) -> float:
    """Median microseconds per call over replays of one graph that makes every call once.

    `meanwhile` is called while the GPU is at it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles what it launches
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        spans = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            spans.append((start, end))
        meanwhile()
        stream.synchronize()
    return median(start.elapsed_time(end) for start, end in spans) * 1000 / len(calls)


def time_warm_us(call: Callable[[], object]) -> float:
    """One call, 20 times in a graph: its inputs stay in L2 where they fit."""
    return time_us([call] * 20)


def cold_sets(bytes_per_set: int) -> int:
    """How many input sets exceed the L2 cache twice over; 2 at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-2 * cache // bytes_per_set) + 1)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, those read and those written counted.

    The better of a memory copy, which the copy engine may do, and an elementwise kernel.
    """
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    us = min(time_us([copy], replays=10) for copy in copies)
    return 2 * source.nbytes / (us * 1e-6)


def query_gpu(*what: str) -> list[str]:
    """What nvidia-smi says, without units, of the first GPU that this process sees."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(what)}"]
    command.append("--format=csv,noheader,nounits")
    text = subprocess.run(command, capture_output=True, text=True).stdout
    return [value.strip() for value in text.split(",")]


def write_results(path: Path, rows: list[dict], commit: str, **facts) -> None:
    """JSON of a bench's rows with what they were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    where = {"gpu": gpu, "torch": torch.__version__, "commit": commit}
    path.write_text(json.dumps({**where, **facts, "rows": rows}, indent=1) + "\n")


def print_table(rows: list[dict]) -> None:
    """Rows of the same keys, one a line; floats to two places."""

    def text(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)

    columns = list(rows[0])
    lines = [columns] + [[text(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
