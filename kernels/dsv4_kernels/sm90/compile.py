"""Which kernels of sm90 a layer needs compiled, and how one is compiled.

Loading this loads neither torch nor, before a kernel is compiled, CuTe DSL: seconds that the
processes that compile, and who starts them, need not wait for.
"""

from dsv4_kernels.compiled import Kernel
from dsv4_kernels.sm90.heuristic import all_gemms
from dsv4_kernels.sm90.spec import Gemm
from dsv4_kernels.types import MoeShape


def kernels(shape: MoeShape, arch: str) -> list[Kernel]:
    """All that `gemm.compile_layer` needs; what takes longest first."""
    slowest_first = sorted(all_gemms(shape), key=lambda gemm: -sum(gemm.config.tile_n))
    return [Kernel(compile_now, gemm, arch) for gemm in slowest_first]


def compile_now(gemm: Gemm, options: str):
    """The specialisation's launcher; needs no GPU."""
    from cutlass import cute

    from dsv4_kernels.sm90.arguments import example_arguments
    from dsv4_kernels.sm90.kernel import Dsv4GroupedGemmSm90

    return cute.compile(Dsv4GroupedGemmSm90(gemm), *example_arguments(gemm), options=options)
