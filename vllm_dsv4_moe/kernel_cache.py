"""Where compiled kernels are kept, and when what is missing is compiled.

Looked up in order: IMAGE_FOLDER, read-only, which a container image brings; then a folder of this
user's own under vLLM's cache root. Compiling begins when a layer is built, so that it goes on while
weights are read and the first are shuffled, and is waited for when the first kernel is loaded.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_kernels.backends import Backend
from dsv4_kernels.compile_processes import CompileProcesses
from dsv4_kernels.compiled import KernelCache, use_cache
from dsv4_kernels.trusted_folder import TrustedFolder
from dsv4_kernels.types import MoeShape

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

logger = logging.getLogger("vllm.dsv4_moe")
IMAGE_FOLDER = Path("/opt/dsv4-moe/kernels")


def user_folder() -> Path:
    """One for each user: a volume may be shared by several, or be writable by a group."""
    return vllm_cache_root() / f"dsv4_moe_kernels-{os.geteuid()}"


def vllm_cache_root() -> Path:
    """vllm.envs.VLLM_CACHE_ROOT, without the seconds that it takes to import vLLM."""
    caches = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    root = os.environ.get("VLLM_CACHE_ROOT", os.path.join(caches, "vllm"))
    return Path(os.path.expanduser(root))


def num_local_ranks(config: "ParallelConfig") -> int:
    return config.local_world_size * max(1, config.data_parallel_size_local)


def open_folders(warn: Callable[[str], None]) -> tuple[list[TrustedFolder], TrustedFolder | None]:
    """(folders to look through, the user's own if it can be written to)."""
    folders, writable = [], None
    try:
        folders.append(TrustedFolder(IMAGE_FOLDER))
    except FileNotFoundError:
        pass
    except OSError as error:
        warn(f"compiled kernels of the image are not used: {error}")
    try:
        folder = TrustedFolder.make(user_folder(), 0o700)
        folders.append(folder)
        if os.access(".", os.W_OK, dir_fd=folder.fd, effective_ids=True):
            writable = folder
        else:
            warn(f"compiled kernels are not kept: {folder.path} cannot be written to")
    except OSError as error:
        warn(f"compiled kernels are not kept: {error}")
    return folders, writable


class Compilation:
    """What this process compiles; once for all layers of a shape."""

    def __init__(self) -> None:
        self.cache: KernelCache | None = None
        self.writable: TrustedFolder | None = None
        self.begun: set[tuple] = set()
        self.running: list[CompileProcesses] = []

    def begin(self, backend: Backend, shape: MoeShape, arch: str, processes: int) -> None:
        """Start to compile those of the layer's kernels that are not on disk; returns at once."""
        if (backend.name, shape, arch) in self.begun or backend.kernels is None:
            return
        self.begun.add((backend.name, shape, arch))
        if self.cache is None:
            folders, self.writable = open_folders(_warn)
            self.cache = KernelCache(folders, _warn, self.wait)
            use_cache(self.cache)
        kernels = backend.kernels(shape, arch)
        missing = [kernel for kernel in kernels if not self.cache.has(kernel)]
        if not missing:
            return
        words = f"dsv4-moe: compiling {len(missing)} kernels for {arch}"
        if self.writable is None:
            logger.info("%s when the first layer has its weights", words)
            return
        job = CompileProcesses(missing, self.writable, processes, os.environ)
        self.running.append(job)
        kept = self.writable.path
        logger.info("%s, %d at a time; kept in %s", words, job.num_processes, kept)

    def wait(self) -> None:
        """Wait for all that was begun. This process compiles what failed when it needs it."""
        if not self.running:
            return
        begin = time.perf_counter()
        failures = [failure for job in self.running for failure in job.wait()]
        self.running = []
        for failure in dict.fromkeys(failures):
            _warn(f"what a compiling process left is compiled now and not kept: {failure}")
        waited = time.perf_counter() - begin
        logger.info("dsv4-moe: kernels are compiled: the load waited %.1f s for them", waited)


def _warn(sentence: str) -> None:
    logger.warning("dsv4-moe: %s", sentence)


COMPILATION = Compilation()
