"""What a report says of who was where."""

from typing import TYPE_CHECKING

from tests.emulator.ptx_emulator.findings import Finding
from tests.emulator.ptx_emulator.memory import SHARED_BASE
from tests.emulator.ptx_emulator.parser import Kernel
from tests.emulator.ptx_emulator.threads import CONVERGENCE, Cta, Gang, Strand

if TYPE_CHECKING:
    from tests.emulator.ptx_emulator.scheduler import Machine


def where(machine: "Machine", gang: Gang, strand: Strand) -> str:
    kernel = machine.kernel
    if strand.pc >= len(kernel.instructions):
        return ""
    instruction = kernel.instructions[strand.pc]
    warps = ", ".join(str(gang.first_warp + w) for w in strand.warps)
    return (
        f"\n  at line {instruction.line}: {str(instruction)[:160]}"
        f"\n  warp {warps} of CTA {gang.cta.index}, mode {machine.mode}, seed {machine.seed}"
    )


def deadlock(kernel: Kernel, live: list[Gang]) -> Finding:
    lines, kind = [], "deadlock"
    for gang in live:
        for strand in gang.strands:
            if strand.blocked == CONVERGENCE:
                kind = "divergent"
            pc = min(strand.pc, len(kernel.instructions) - 1)
            warps = ",".join(str(gang.first_warp + w) for w in strand.warps)
            lines.append(
                f"  CTA {gang.cta.index} warp {warps} at line "
                f"{kernel.instructions[pc].line} waits for {_awaited(gang.cta, strand)}"
            )
    return Finding(kind, "nothing can go on\n" + "\n".join(lines))


def _awaited(cta: Cta, strand: Strand) -> str | None:
    if strand.parked is None:
        return strand.blocked
    barrier = strand.parked[0]
    names = (
        f"{c.rank}:{offset - SHARED_BASE}"
        for c in cta.cluster
        for offset, other in c.mbarriers.items()
        if other is barrier
    )
    return (
        f"mbarrier {next(names, '?')} (pending {barrier.pending} of {barrier.count}, "
        f"{barrier.pending_bytes} bytes, {barrier.completions} phases done)"
    )
