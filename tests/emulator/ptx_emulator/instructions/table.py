"""First part of an opcode -> the function that compiles it."""

from tests.emulator.ptx_emulator.instructions import (
    arithmetic,
    bits,
    collective,
    conversion,
    copies,
    loads,
    mbarriers,
    tcgen05,
    tensormaps,
    wgmma,
)

COMPILERS = {
    **arithmetic.COMPILERS,
    **bits.COMPILERS,
    **collective.COMPILERS,
    **conversion.COMPILERS,
    **copies.COMPILERS,
    **loads.COMPILERS,
    **mbarriers.COMPILERS,
    **tcgen05.COMPILERS,
    **tensormaps.COMPILERS,
    **wgmma.COMPILERS,
}
