"""Kernels that compile in no time, for tests of what is done with the compiled ones.

Each compilation adds a line to its log, and lasts until
the file `until`, where one is named, is there.
"""

import time
from pathlib import Path
from typing import NamedTuple

from dsv4_kernels.compiled import Kernel


class FakeGemm(NamedTuple):
    name: str
    log: str
    until: str = ""


class FakeLauncher(NamedTuple):
    content: bytes

    def export_to_c(self, folder: str, name: str, prefix: str) -> None:
        Path(folder, f"{name}.o").write_bytes(self.content)


def compile(gemm: FakeGemm, options: str) -> FakeLauncher:
    with open(gemm.log, "a") as log:
        print(gemm.name, file=log)
    while gemm.until and not Path(gemm.until).exists():
        time.sleep(0.01)
    return FakeLauncher(object_of(gemm))


def object_of(gemm: FakeGemm) -> bytes:
    return gemm.name.encode() * 10_000


def fake_kernels(folder: Path, count: int, until: str = "") -> list[Kernel]:
    log = folder / "log"
    log.touch()
    names = map(str, range(count))
    return [Kernel(compile, FakeGemm(name, str(log), until), "sm_90a") for name in names]


def compilations(kernels: list[Kernel]) -> list[str]:
    """Names in the order in which they were compiled."""
    return Path(kernels[0].gemm.log).read_text().split()
