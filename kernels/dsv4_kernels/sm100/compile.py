"""Which kernels of sm100 a layer needs compiled, and how one is compiled.

Loading this loads neither torch nor, before a kernel is compiled, CuTe DSL: seconds that the
processes that compile, and who starts them, need not wait for.
"""

from dsv4_kernels.compiled import Kernel
from dsv4_kernels.sm100.heuristic import all_gemms
from dsv4_kernels.sm100.spec import Gemm
from dsv4_kernels.types import MoeShape


def kernels(shape: MoeShape, arch: str) -> list[Kernel]:
    """All that `gemm.compile_layer` needs."""
    return [Kernel(compile_now, gemm, arch) for gemm in all_gemms(shape)]


def compile_now(gemm: Gemm, options: str):
    """The specialisation's launcher; needs no GPU."""
    from cutlass import cute

    from dsv4_kernels.sm100.kernel import Dsv4GroupedGemmSm100, example_arguments

    return cute.compile(Dsv4GroupedGemmSm100(gemm), *example_arguments(gemm), options=options)
