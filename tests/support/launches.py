"""Counted on a CPU: what PyTorch and Triton would launch on a GPU, and what PyTorch allocates."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They allocate, or say where a tensor is, and launch nothing.
METADATA = {"aten::empty.memory_format", "aten::empty_strided", "aten::new_empty", "aten::detach"}
METADATA |= {"aten::empty_like", "aten::lift_fresh", "aten::_unsafe_view", "aten::_reshape_alias"}


class _Operators(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() not in METADATA:
            self.counted[func.name()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches(*, interpret: bool = True) -> Iterator[Counter[str]]:
    """By name: operators that are neither views nor allocations (a copy to the host, as of
    `.item()`, is one), and Triton's kernels, which run nothing unless `interpret`."""
    from triton.runtime.interpreter import GridExecutor

    launched: Counter[str] = Counter()
    run = GridExecutor.__call__

    def counting(executor: GridExecutor, *args, **kwargs) -> None:
        launched[executor.fn.__name__] += 1
        if interpret:
            with torch.utils._python_dispatch._disable_current_modes():
                run(executor, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", counting), _Operators(launched):
        yield launched


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that is allocated at a time, by the allocator's own record, all of it released at
    the end."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
        gc.collect()  # Triton's interpreter leaves cycles
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert live == 0, live
    return peak
