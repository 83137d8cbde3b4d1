"""What the hardware has room for: checked at the launch, and when CTAs have ended.

Numbers: CUDA programming guide, "Compute capabilities", the same for 9.0 and 10.0.
"""

from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import SHARED_BASE
from tests.emulator.ptx_emulator.parser import Kernel
from tests.emulator.ptx_emulator.threads import WARP, Cta

if TYPE_CHECKING:
    from tests.emulator.ptx_emulator.scheduler import Launch

_THREADS = 1024
_SHARED_BYTES = 227 * 1024
_CLUSTER = 16  # beyond 8 only where the kernel allows it
_REGISTERS = 65536
_REGISTERS_OF_A_THREAD = 255
WARPGROUP = 4  # warps


def check_launch(kernel: Kernel, launch: "Launch") -> None:
    threads, cluster = int(np.prod(launch.block)), int(np.prod(launch.cluster))
    shared = kernel.static_shared_bytes + launch.shared_bytes
    required = kernel.directives.get("reqntid")
    if threads > _THREADS or (required and threads != np.prod(required)):
        raise Finding("launch", f"{threads} threads; at most {_THREADS}, .reqntid {required}")
    if shared > _SHARED_BYTES:
        raise Finding("launch", f"{shared} bytes of shared memory; at most {_SHARED_BYTES}")
    if cluster > _CLUSTER or any(g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
        raise Finding("launch", f"grid {launch.grid} in clusters of {launch.cluster}")


def check_exit(kernel: Kernel, ctas: list[Cta]) -> None:
    for cta in ctas:
        if cta.tensor.allocations:
            raise Finding("tmem", f"CTA {cta.index} exits owning columns {cta.tensor.allocations}")
        for offset, barrier in cta.mbarriers.items():
            if barrier.pending_bytes:
                raise Finding(
                    "mbarrier",
                    f"CTA {cta.index} exits with {barrier.pending_bytes} bytes outstanding "
                    f"on the mbarrier at shared byte {offset - SHARED_BASE}",
                )
        for first in range(0, cta.num_warps, WARPGROUP):
            counts = cta.wgmma_counts[first : first + WARPGROUP]
            if counts.any() and (len(counts) < WARPGROUP or (counts != counts[0]).any()):
                raise Finding(
                    "divergent", f"warps {first}.. issued {counts.tolist()} wgmma; a warpgroup does"
                )
        _check_registers(kernel, cta)


def _check_registers(kernel: Kernel, cta: Cta) -> None:
    """setmaxnreg (PTX ISA 9.0, 9.7.19): of whole warpgroups, out of the CTA's own registers."""
    asked = cta.registers
    if not asked.any():
        return
    for first in range(0, cta.num_warps, WARPGROUP):
        group = asked[first : first + WARPGROUP]
        if (group != group[0]).any():
            raise Finding("launch", f"warps {first}.. ask for {group.tolist()} registers")
    (ctas_per_sm,) = kernel.directives.get("minnctapersm", (1,))
    room = _REGISTERS // ctas_per_sm // WARP
    given = min(_REGISTERS_OF_A_THREAD, room // cta.num_warps) // 8 * 8
    total = int(np.where(asked > 0, asked, given).sum())
    if total > room:
        raise Finding(
            "launch", f"setmaxnreg leaves {total * WARP} registers in use of {room * WARP}"
        )
