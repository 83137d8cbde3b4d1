"""What the sm90 launcher is given: pointers, and examples of all its arguments to compile for."""

import math

from cuda.bindings import driver
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_ptr

from dsv4_kernels.sm90.spec import Gemm


def example_arguments(gemm: Gemm) -> tuple:
    """What `cute.compile` is given for a specialisation: types and alignments."""
    fp8 = gemm.activations == "fp8"
    return (
        *(pointer(dtype, 1 << 20) for dtype in pointer_types(gemm)),
        Float32(math.inf),
        Int32(1),
        Int32(1),
        driver.CUstream(0),
        *((pointer(Float32, 1 << 20), Int32(1), Int32(gemm.k), Float32(1)) if fp8 else ()),
    )


def pointer_types(gemm: Gemm) -> tuple:
    """Of codes, block_scales, ... flags."""
    fp8 = gemm.activations == "fp8"
    x_type = Float8E4M3FN if fp8 else BFloat16
    h_is_fp8 = fp8 and gemm.op == "fc1" and not gemm.h_row_scales
    out_type = Float8E4M3FN if h_is_fp8 else BFloat16
    layout_and_fix_up = (Int32, Int32, Int32, Float32, Float32, Int32)
    return (Uint8, Uint8, Float32, x_type, out_type, *layout_and_fix_up)


def pointer(dtype, address: int) -> cute.Pointer:
    align = 4 if dtype in (Int32, Float32) else 16
    return make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)
