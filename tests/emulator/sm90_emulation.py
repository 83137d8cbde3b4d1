"""The sm90 kernels' host functions, launching in the PTX emulator instead of on a GPU."""

import functools
import math
from dataclasses import dataclass, field

import torch
from dsv4_kernels.sm90 import gemm as sm90
from dsv4_kernels.sm90.arguments import example_arguments
from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90, Gemm

from tests.emulator.ptx_emulator.host import EmulatedFunction, Statistics, emulate
from tests.support.layers import aligned

# What the kernel before writes. The layout is done when fc2 begins: fc1 waited for it.
PRODUCED = {
    "fc1": ("x", "counts", "offsets", "row_to_slot", "slot_weights", "row_scales"),
    "fc2": ("x", "partials", "flags", "row_scales"),
}


@functools.cache
def emulated(gemm: Gemm, kernel: type = Dsv4GroupedGemmSm90) -> EmulatedFunction:
    return emulate(kernel(gemm), *example_arguments(gemm), arch="sm_90a")


@dataclass
class Emulation:
    """`launch` stands in for `sm90.launch`."""

    mode: str = "eager"
    seed: int = 0
    num_sms: int = 5  # few, so that each block works on several tiles and on parts of tiles
    blocks: int | None = None  # of a grid, if not num_sms: more run one wave after another
    kernel: type = Dsv4GroupedGemmSm90
    ptx: str | None = None  # instead of what was compiled
    max_instructions: int = 50_000_000
    statistics: list[Statistics] = field(default_factory=list)
    spills: list[int] = field(default_factory=list)  # blocks that left partial sums

    def launch(
        self,
        gemm: Gemm,
        tensors: tuple[torch.Tensor, ...],
        limit: float | None,
        scales: tuple[torch.Tensor, float] | None = None,
    ) -> None:
        grid = sm90.num_blocks(gemm, self.blocks or self.num_sms)
        partial_floats = gemm.config.tile_m * gemm.config.tile_n[-1]
        partials = aligned(torch.full((grid, partial_floats), float("nan")))
        flags = aligned(torch.zeros(grid * sm90.FLAGS, dtype=torch.int32))
        limit = math.inf if limit is None else limit
        of_fp8: tuple = ()
        if scales is not None:
            of_fp8 = (scales[0], scales[0].stride(0), tensors[3].stride(0), scales[1])
        statistics = emulated(gemm, self.kernel).run(
            *(*tensors, partials, flags, limit, len(tensors[3])),
            grid,
            None,
            *of_fp8,
            mode=self.mode,
            seed=self.seed,
            num_sms=self.num_sms,
            ptx=self.ptx,
            max_instructions=self.max_instructions,
            produced=PRODUCED[gemm.op],
        )
        assert not flags.any(), "flags are left set"
        self.statistics.append(statistics)
        self.spills.append(int((~partials.isnan()).any(dim=1).sum()))
