"""The NVIDIA GPUs of this machine as its driver lists them; CUDA is not initialised."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 2**30
MAJORS = (9, 10)  # compute capabilities, by their first number, that there are kernels for
QUERY = "index,uuid,name,compute_cap,memory.total,memory.free"


@dataclass(frozen=True)
class Gpu:
    index: str  # as nvidia-smi counts, by PCI bus
    uuid: str
    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    free: int  # bytes

    @property
    def is_supported(self) -> bool:
        return self.capability[0] in MAJORS

    @classmethod
    def parsed(cls, line: str) -> "Gpu":
        """From one line of nvidia-smi's answer to QUERY; what it does not know is 0."""
        index, uuid, name, capability, *memory = (word.strip() for word in line.split(","))
        major, minor = (int(n) if n.isdigit() else 0 for n in (capability + ".0").split(".")[:2])
        total, free = (int(word) * 2**20 if word.isdigit() else 0 for word in memory)
        return cls(index, uuid, name, (major, minor), total, free)

    def __str__(self) -> str:
        major, minor = self.capability
        return f"GPU {self.index} ({self.name}, compute capability {major}.{minor})"


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in nvidia-smi's order; none without a driver."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if listed.returncode:
        return []
    gpus = [Gpu.parsed(line) for line in listed.stdout.splitlines() if line.count(",") == 5]
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or "MIG-" in chosen:
        return gpus
    names = [name.strip() for name in chosen.split(",")]
    return [gpu for gpu in gpus if gpu.index in names or any(_names(n, gpu.uuid) for n in names)]


def _names(name: str, uuid: str) -> bool:
    """CUDA takes the start of an identifier, too."""
    return name.startswith("GPU-") and uuid.startswith(name)


def supported_gpus(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those that there are kernels for, the one with the most free memory first."""
    return sorted((gpu for gpu in gpus if gpu.is_supported), key=lambda gpu: -gpu.free)


def has_gpu() -> bool:
    """Whether servers that are started here should run on a GPU."""
    return bool(supported_gpus(visible_gpus()))
