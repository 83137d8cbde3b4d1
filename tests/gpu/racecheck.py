"""The sm90 GEMMs as racecheck can follow them.

Racecheck counts an arrival on an mbarrier for the lane that makes it. A warp gives a stage back by
its first lane, once all lanes have waited for the WGMMA that consumed what they read; racecheck
then reports the next copy into the stage against the reads of the 31 others, to the last one, and a
barrier of the warp before the arrival changes nothing (bar.warp.sync and barrier.sync, tried on an
H200). Here every lane arrives for itself in its own block, which alone writes what lanes read; the
rows, which another block of a cluster may write, only WGMMA reads. All else is the kernel that
serves, and what racecheck reports is a race.
"""

from cutlass import Boolean, Int32, cute
from dsv4_kernels.sm90.arguments import example_arguments
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.sm90.spec import Gemm


class EveryLaneArrives(Dsv4GroupedGemmSm90):
    def _arrivals(self) -> int:
        return 32 + super()._arrivals()

    @cute.jit
    def _give_back(self, empty: cute.Pointer, lane: Int32, is_read: Boolean):
        if is_read:
            cute.arch.mbarrier_arrive(empty)
        Dsv4GroupedGemmSm90._give_back(self, empty, lane, is_read)


def compile_gemm(gemm: Gemm, options: str):
    return cute.compile(EveryLaneArrives(gemm), *example_arguments(gemm), options=options)
