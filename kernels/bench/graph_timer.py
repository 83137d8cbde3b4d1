"""The one timer of benches: a CUDA graph, replayed, events around each."""

from collections.abc import Callable, Sequence
from statistics import median

import torch


def time_us(calls: Sequence[Callable[[], object]], *, replays: int = 40) -> float:
    """Median microseconds per call over replays of one graph that makes every call once."""
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
        stream.synchronize()
    return median(start.elapsed_time(end) for start, end in spans) * 1000 / len(calls)
