"""What compute-sanitizer's racecheck reports, by instruction, and what of it has an explanation.

Racecheck counts an arrival on an mbarrier for the one lane that makes it: it does not follow an
order from a lane to another through a barrier of the warp, and on through that one's arrival. A
stage of the sm90 GEMMs is given back by lane 0, for its warp, once `wgmma.wait_group` has returned:
all lanes are behind it (the SASS has WARPSYNC.ALL there), and WGMMA has consumed what they read.
Another `bar.warp.sync` right before the arrival becomes a NOP, since ptxas knows that the lanes are
together, and the report stays the same, to the last hazard (tried on an H200). So racecheck reports
the next bulk copy of weights into the stage against the reads of the other 31 lanes, in units of 16
bytes:

    codes    LDS.128, a unit a lane: of a warp's 32 units 31 are reported, never lane 0's
    scales   LDS.64, four lanes an address: all of a warp's 4 units are reported

so that codes / 31 = scales / 4. A stage that was given back too early would show lane 0's unit as
well, and any other pair of instructions is another matter: both are left unexplained.

Lane 0 also says that its warp is done with a tile's note and factors, which the weights' warp then
writes again: one STS.128, read by LDS.128, and the STS that follow the bulk copies, read by LDS or
LDS.64. All lanes read the same words there, so no count tells lane 0's reads from others': that the
wait is there is shown by the emulator's planted faults.
"""

import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# Beyond it racecheck counts no more, and what follows would go unseen.
MOST_HAZARDS = 10_000_000
_FIRST = re.compile(r"Race reported between (\w+) access at \S+?\+0x([0-9a-f]+)")
_OTHER = re.compile(r"and (\w+) access at \S+?\+0x([0-9a-f]+) \[(\d+) hazards?\]")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


class Hazard(NamedTuple):
    """How often an instruction touched shared memory that another had touched, unordered."""

    first: str  # "Write at 0x13c0"
    second: str
    count: int
    opcodes: tuple[str, str]


def hazards(output: str, opcodes: Mapping[int, str]) -> list[Hazard]:
    """Of one kernel's report; opcodes by their addresses in it."""
    found, first = [], ("", 0)
    for line in output.splitlines():
        if match := _FIRST.search(line):
            first = (match[1], int(match[2], 16))
        elif match := _OTHER.search(line):
            second, count = (match[1], int(match[2], 16)), int(match[3])
            names = (opcodes.get(first[1], "?"), opcodes.get(second[1], "?"))
            words = (f"{kind} at {address:#x}" for kind, address in (first, second))
            found.append(Hazard(*words, count, names))
    return found


def unexplained(found: Iterable[Hazard]) -> list[Hazard]:
    """What the rule above does not account for, to the last hazard."""
    found = list(found)
    units: dict[str, int] = defaultdict(int)
    odd, explained = [], []
    notes = {h.first for h in found if h.opcodes[0] == "STS.128"}
    copies = [_address(h.first) for h in found if h.opcodes[0].startswith("UBLKCP")]
    for hazard in found:
        write, read = hazard.opcodes
        lanes = {"LDS.128": 31, "LDS.64": 4}.get(read)
        is_write = hazard.first.startswith("Write") and hazard.second.startswith("Read")
        is_weights = write.startswith("UBLKCP") and is_write
        is_note = (write, read) == ("STS.128", "LDS.128") and len(notes) == 1
        is_factor = write == "STS" and _address(hazard.first) > min(copies, default=math.inf)
        if is_write and (is_note or (is_factor and read in ("LDS", "LDS.64"))):
            continue
        if not is_weights or lanes is None or hazard.count % lanes:
            odd.append(hazard)
        else:
            explained.append(hazard)
            units[read] += hazard.count // lanes
    if units["LDS.128"] != units["LDS.64"]:
        odd += explained
    if sum(hazard.count for hazard in found) >= MOST_HAZARDS:
        odd.append(Hazard("racecheck stopped counting", "", MOST_HAZARDS, ("?", "?")))
    return odd


def _address(access: str) -> int:
    return int(access.split()[-1], 16)


def opcodes_of(object_file: Path, folder: Path) -> dict[int, str]:
    """Address -> opcode of the kernel in an object, by nvdisasm."""
    content = object_file.read_bytes()
    cubin = folder / f"{object_file.stem}.cubin"
    cubin.write_bytes(content[content.index(b"\x7fELF", 1) :])
    done = subprocess.run([_nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True)
    return {int(m[1], 16): m[2] for m in _INSTRUCTION.finditer(done.stdout)}


def _nvdisasm() -> str:
    found = shutil.which("nvdisasm") or "/usr/local/cuda/bin/nvdisasm"
    if Path(found).is_file():
        return found
    from bench.sass_sm100 import cuda_tool

    return cuda_tool("nvdisasm")
