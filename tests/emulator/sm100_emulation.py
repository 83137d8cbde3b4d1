"""The sm100 kernels' host functions, launching in the PTX emulator instead of on a GPU."""

import functools
import math
from dataclasses import dataclass, field

from dsv4_kernels.sm100.kernel import Dsv4GroupedGemmSm100, example_arguments
from dsv4_kernels.sm100.spec import Gemm

from tests.emulator.ptx_emulator.host import EmulatedFunction, Statistics, emulate

PRODUCED = (
    *("tokens", "token_scales", "counts", "offsets", "tile_to_expert", "row_to_slot"),
    "routing_weights",
)


def name(gemm: Gemm) -> str:
    """Of a test's case."""
    output = "nvfp4" if gemm.quantize else "bf16"
    rows = " row scales" if gemm.scale_per_row else ""
    return f"{gemm.op} {gemm.config.num_ctas}cta n{gemm.config.tile} -> {output}{rows}"


@functools.cache
def emulated(gemm: Gemm) -> EmulatedFunction:
    return emulate(Dsv4GroupedGemmSm100(gemm), *example_arguments(gemm), arch="sm_100a")


@dataclass
class Emulation:
    """`launch` stands in for `sm100.launch`."""

    mode: str = "eager"
    seed: int = 0
    clusters: int = 2  # few, so that each has many tiles
    ptx: str | None = None  # instead of what was compiled
    max_instructions: int = 50_000_000
    statistics: list[Statistics] = field(default_factory=list)
    gemm: Gemm | None = None  # of the last launch

    def launch(self, gemm: Gemm, arguments: tuple, limit: float | None) -> None:
        given = (argument for argument in arguments if argument is not None)
        limit = math.inf if limit is None else limit
        self.gemm = gemm
        statistics = emulated(gemm).run(
            *(*given, limit, self.clusters, None),
            mode=self.mode,
            seed=self.seed,
            ptx=self.ptx,
            max_instructions=self.max_instructions,
            produced=PRODUCED,
        )
        self.statistics.append(statistics)
