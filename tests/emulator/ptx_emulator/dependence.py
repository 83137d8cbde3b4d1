"""Programmatic dependent launch: what may be touched before `griddepcontrol.wait`.

A grid launched with programmatic stream serialization may run while the one before it still does
(PTX ISA 9.0, 9.7.14, `griddepcontrol`; CUDA programming guide). Until a thread has executed
`griddepcontrol.wait`, or synchronised with one that has, it may not read what the kernel before
produces, and it may write nothing: that kernel may still read there.
"""

from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.ptx_emulator.barriers import MBarrier
from tests.emulator.ptx_emulator.findings import Finding

if TYPE_CHECKING:
    from tests.emulator.ptx_emulator.memory import Region
    from tests.emulator.ptx_emulator.threads import Cta, Gang


class Dependence:
    """Which warps of a CTA know that the kernel before has ended; `produced`: buffers' names."""

    def __init__(self, num_warps: int, produced: frozenset[str]):
        self.knows = np.zeros(num_warps, bool)
        self.produced = produced

    def check(self, gang: "Gang", region: "Region", write: bool, what: str) -> None:
        if not write and region.name not in self.produced:
            return
        for warp in gang.warps_of(gang.active):
            if not self.knows[gang.first_warp + warp]:
                raise Finding(
                    "dependence",
                    f"{what} of {region.name} by warp {gang.first_warp + warp} before "
                    "griddepcontrol.wait",
                )


def check_global(
    gang: "Gang", addresses: np.ndarray, write: bool, what: str, size: int = 1
) -> None:
    """Called for every access to global memory, when it is issued."""
    dependence = gang.cta.dependence
    if dependence is None:
        return
    for address in (int(addresses.min()), int(addresses.max())):
        dependence.check(gang, gang.machine.memory.find(address, size), write, what)


def publish(gang: "Gang", barrier: MBarrier) -> None:
    """An arrival of the gang's active warps, or a copy of theirs that will complete."""
    dependence = gang.cta.dependence
    if dependence is not None:
        warps = [gang.first_warp + w for w in gang.warps_of(gang.active)]
        barrier.knows_dependence |= bool(dependence.knows[warps].any())


def learn(cta: "Cta", warps: list[int], knows: bool = True) -> None:
    """The CTA's warps waited, or synchronised with somebody who `knows`."""
    if cta.dependence is not None and knows:
        cta.dependence.knows[warps] = True
        if cta.dependence.knows.all():
            cta.dependence = None


def share(cta: "Cta", warps: list[int]) -> None:
    """These warps of the CTA have met."""
    if cta.dependence is not None:
        learn(cta, warps, bool(cta.dependence.knows[warps].any()))
