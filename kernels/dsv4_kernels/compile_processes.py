"""Kernels compiled by processes of their own into a folder, while this process does something else.

CuTe DSL compiles one kernel at a time in a process, and a vLLM worker may have no multiprocessing
children: these are plain programs. Each goes through all that is missing, and leaves to another
whatever that one has locked, so the ranks of a server share the work without knowing one another.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv4_kernels.compiled import Kernel, KernelCache, key_of, object_of
from dsv4_kernels.trusted_folder import TrustedFolder

# V4-Flash's 24 kernels take 12 s on an H200's 16 cores.
MOST_PROCESSES = 16
LONGEST_LOCK = 120.0  # seconds that a process waits for what others have locked
POLL = 0.005  # seconds; to find 26 kernels locked takes a core 0.08 ms


def num_processes(num_ranks: int = 1) -> int:
    """How many should compile at a time, for each of the ranks that share this machine."""
    return max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // num_ranks))


class CompileProcesses:
    """At most num_processes of them, started now; `wait` says what went wrong.

    kernels that take longest to compile come first, so that no process is left with one at the end.
    environ is the processes' environment, and where they find Python's packages.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        folder: TrustedFolder,
        num_processes: int,
        environ: Mapping[str, str],
    ) -> None:
        self.num_processes = min(num_processes, len(kernels))
        self.processes: list[subprocess.Popen] = []
        self.failures: list[str] = []
        for i in range(self.num_processes):
            # Each begins with one of its own, then takes what nobody has, in order. Where locks
            # do not work, that keeps them apart at first.
            order = [kernels[i], *kernels[self.num_processes :], *kernels]
            try:
                self._start(order, folder, environ)
            except OSError as error:
                self.failures.append(f"no process could be started: {error}")

    def _start(
        self, kernels: Sequence[Kernel], folder: TrustedFolder, environ: Mapping[str, str]
    ) -> None:
        # -P: what lies in the working directory is not imported.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dsv4_kernels.compile_processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(environ, kernels[0].arch),
        )
        self.processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            pickle.dump((folder.path, kernels), process.stdin)
        process.stdin = None  # it is closed, and communicate would flush it

    def wait(self) -> list[str]:
        """Until all have ended; why those failed that did, in a line each."""
        for process in self.processes:
            _, errors = process.communicate()
            if process.returncode != 0:
                lines = errors.decode(errors="replace").splitlines() or ["no message"]
                self.failures.append(f"exit status {process.returncode}: {lines[-1]}")
        self.processes = []
        return self.failures


def _environment(environ: Mapping[str, str], arch: str) -> dict[str, str]:
    """Of a process that finds this very package, compiles for the arch, and sees no GPU; NumPy,
    which CuTe DSL imports, starts no threads there."""
    given = environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(Path(__file__).parents[1]), *filter(os.path.isabs, given)]
    ours = {name: value for name, value in environ.items() if not name.startswith("CUTE_DSL_")}
    ours |= {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    return ours | {"CUTE_DSL_ARCH": arch, "OPENBLAS_NUM_THREADS": "1"}


def fill(folder: TrustedFolder, kernels: Sequence[Kernel]) -> None:
    """Compile what the folder lacks: first what nobody else does, then what others left undone.

    OSError where an object cannot be written.
    """
    deadline = None
    while kernels:
        locked = deadline is None or time.monotonic() < deadline
        kernels = [kernel for kernel in kernels if not _keep(folder, kernel, locked)]
        if deadline is None:
            deadline = time.monotonic() + LONGEST_LOCK
        if kernels:
            time.sleep(POLL)


def _keep(folder: TrustedFolder, kernel: Kernel, locked: bool) -> bool:
    """See that the folder has the kernel. False if another process is compiling it."""
    lock = None
    if locked:
        try:
            lock = folder.lock(key_of(kernel))
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks on this file system: at worst another compiles the same
    try:
        if not KernelCache([folder]).has(kernel):
            folder.store(key_of(kernel), object_of(kernel))
    finally:
        if lock is not None:
            os.close(lock)
    return True


if __name__ == "__main__":
    path, to_compile = pickle.load(sys.stdin.buffer)
    fill(TrustedFolder(path), to_compile)
    os._exit(0)  # not after the second that unloading the compiler takes: somebody waits
