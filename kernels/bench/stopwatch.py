"""Seconds and device memory of phases that lie within one another, by wrapping functions.

    watch = Stopwatch()
    watch.time("module:Class.method", "prepare", opens_layer=True)

A phase's seconds are its own: those of a phase inside it are that one's. The device is waited for
where a phase begins and ends, so that a phase pays for what it launched.
"""

import functools
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Record:
    """What one layer took, or everything outside layers."""

    before_bytes: int = 0  # allocated on the device when it began
    seconds: dict[str, float] = field(default_factory=dict)
    # phase -> the most bytes that were allocated in it beyond before_bytes
    extra_bytes: dict[str, int] = field(default_factory=dict)


class Stopwatch:
    def __init__(self) -> None:
        self.outside = Record()
        self.layers: list[Record] = []
        self.began: dict[str, float] = {}  # phase -> when it first began, seconds since the epoch
        self._phases: list[str] = []
        self._record = self.outside
        self._mark = 0.0

    def time(
        self,
        place: str,
        phase: str,
        *,
        opens_layer: bool = False,
        before: Callable[..., None] | None = None,
    ) -> None:
        """Count the calls of the function at `module:path` as this phase; `before` sees each
        call's arguments first, inside the phase."""
        owner_name, _, name = place.replace(":", ".").rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.phase(phase, opens_layer):
                if before is not None:
                    before(*args, **kwargs)
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def phase(self, name: str, opens_layer: bool = False) -> Iterator[None]:
        self._count()
        self.began.setdefault(name, time.time())
        outer = self._record
        if opens_layer and outer is self.outside:
            self._record = Record(allocated_bytes())
            self.layers.append(self._record)
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()
            self._record = outer

    @property
    def current(self) -> Record:
        return self._record

    def _count(self) -> None:
        """Charge the time since the last boundary to the innermost phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phases:
            name, record = self._phases[-1], self._record
            record.seconds[name] = record.seconds.get(name, 0.0) + now - self._mark
            extra = peak_bytes() - record.before_bytes
            record.extra_bytes[name] = max(record.extra_bytes.get(name, 0), extra)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._mark = time.perf_counter()


def allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
