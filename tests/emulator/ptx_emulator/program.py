"""One compiled instruction, and what it can ask of the scheduler."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.emulator.ptx_emulator.barriers import MBarrier
from tests.emulator.ptx_emulator.threads import Gang

# PLAIN acts and goes on. CONTROL may stop the strand. COLLECTIVE wants whole warps, and may stop.
PLAIN, CONTROL, COLLECTIVE, BRANCH, EXIT = range(5)


class Signal(NamedTuple):
    """Why a strand stops."""

    blocked: str | None = None  # until somebody sets Strand.blocked to None
    barrier: MBarrier | None = None  # a try_wait failed: until the barrier completes a phase
    polled: bool = False  # a load that may poll memory: others go first
    retry: bool = False  # the strand was split: the same instruction again


class Step(NamedTuple):
    kind: int
    action: Callable[[Gang, np.ndarray], Signal | None] | None
    guard: Callable[[Gang], np.ndarray] | None
    target: int = -1

    @property
    def collective(self) -> bool:
        return self.kind == COLLECTIVE
