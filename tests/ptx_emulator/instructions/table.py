"""First part of an opcode -> the function that compiles it."""

from tests.ptx_emulator.instructions import (
    arithmetic,
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
    **collective.COMPILERS,
    **conversion.COMPILERS,
    **copies.COMPILERS,
    **loads.COMPILERS,
    **mbarriers.COMPILERS,
    **tcgen05.COMPILERS,
    **tensormaps.COMPILERS,
    **wgmma.COMPILERS,
}
